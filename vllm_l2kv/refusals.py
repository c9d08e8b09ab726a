"""Rejects configurations of vLLM that are not tested with compaction, each with a sentence that says what to do."""

from collections.abc import Sequence
from os.path import isdir

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.kv_heads import check_full
from vllm_l2kv.policy import CompactionPoints, Kind, image_around
from vllm_l2kv.profile import Profile, check_model, local_folder
from vllm_l2kv.settings import Settings
from vllm_l2kv.supported_vllm import check_vllm

DRAFTERS = {
    "CPUs": ("ngram", "draft_model", "eagle", "eagle3", "mtp"),
    "GPUs": ("ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "mtp"),
}
"""Methods of speculative decoding that are tested with compaction, by device."""
OFFLOADING, TRANSFERRING = "SimpleCPUOffloadConnector", "NixlConnector"
CONNECTORS = {"CPUs": (TRANSFERRING,), "GPUs": (OFFLOADING, TRANSFERRING)}
"""KV connectors that are tested with compaction, by device."""
TRANSFERS = "vllm_l2kv.worker.transfers"
"""Module of the `NixlConnector` that the worker puts in place of vLLM's, which may lose rows."""


def check_supported(config: VllmConfig) -> None:
    """Rejects configurations that are not tested with compaction.

    Raises:
        ValueError: The configuration is not tested; the message names the setting and says what to do.
    """
    check_vllm()
    check_connector(config)  # first, since some connectors make vLLM change other settings
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    on_cpu = current_platform.is_cpu()
    refusals = {
        "context parallelism (set --decode-context-parallel-size and --prefill-context-parallel-size to 1)": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "experts of several data-parallel engines on CPUs, where vLLM cannot exchange tokens between them "
        "(set --data-parallel-size 1)": on_cpu and parallel.data_parallel_size > 1 and model.is_moe,
        **_refused_drafts(config, _devices()),
        "this KV-cache type (set --kv-cache-dtype to auto or fp8_e4m3)": (
            is_quantized_kv_cache(cache.cache_dtype) and cache.cache_dtype not in ("fp8", "fp8_e4m3")
        ),
        "quantized KV caches on CPUs (set --kv-cache-dtype auto)": (
            on_cpu and is_quantized_kv_cache(cache.cache_dtype)
        ),
        "pooling models (serve them with stock vLLM)": model.runner_type == "pooling",
        "encoder-decoder models (serve them with stock vLLM)": model.is_encoder_decoder,
        "R-SWA models (serve them with stock vLLM)": model.rswa_window is not None,
        "models with MLA, whose cache holds no keys (serve them with stock vLLM; see docs/mla.md)": model.use_mla,
        "models with only recurrent layers (serve them with stock vLLM)": model.has_inner_state and not model.is_hybrid,
        "prefills that leave out layers that read another layer's cache (drop --kv-sharing-fast-prefill)": (
            cache.kv_sharing_fast_prefill
        ),
        "ReplaySSM (drop --use-replayssm)": cache.use_replayssm,
        "prefix-cache hits inside a block of recurrent layers (drop --prefix-match-unit)": (
            model.is_hybrid and cache.prefix_match_unit is not None
        ),
        "a single KV-cache group for all layers (drop --disable-hybrid-kv-cache-manager)": bool(
            config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "vLLM's runner V2 on a CPU (set VLLM_USE_V2_MODEL_RUNNER=0)": on_cpu and config.use_v2_model_runner,
        "vLLM's runner V1 on a GPU (drop the setting that vLLM's log names, or set VLLM_USE_V2_MODEL_RUNNER=1)": (
            not on_cpu and not config.use_v2_model_runner
        ),
    }
    for what, found in refusals.items():
        if found:
            raise ValueError(f"vllm-l2kv does not support {what}.")
    num_heads, degree = model.get_total_num_kv_heads(), parallel.tensor_parallel_size
    check_kv_heads(num_heads, degree)
    # Only the worker knows which layers have no cache of their own.
    layers = range(model.get_total_num_hidden_layers())
    check_full(Settings.from_config(config.additional_config), layers, num_heads, degree)
    if isdir(model.model):  # otherwise the files may not be downloaded yet, and the worker checks after loading
        check_profile(config)


def check_connector(config: VllmConfig) -> None:
    """Rejects KV connectors that may release blocks before they have copied them, and untested settings of the others.

    Raises:
        ValueError: The connector, or one of its settings, is not supported.
    """
    transfer, cache = config.kv_transfer_config, config.cache_config
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config
    devices = _devices()
    taken = CONNECTORS[devices]
    offloads = transfer.kv_connector == OFFLOADING
    instead = [name for name in taken if name == OFFLOADING]  # most users of other connectors want to offload
    refusals = {
        f"the KV connector {transfer.kv_connector} on {devices} (drop --kv-transfer-config and --kv-offloading-size"
        f"{_or_set('kv_connector', instead)})": transfer.kv_connector not in taken,
        f"a KV connector of another module, which was not tested (drop kv_connector_module_path, got "
        f"{transfer.kv_connector_module_path!r})": transfer.kv_connector_module_path not in (None, TRANSFERS),
        "CPU offloading without a prefix cache (drop --no-enable-prefix-caching, or --kv-transfer-config)": (
            offloads and not cache.enable_prefix_caching
        ),
        'eager CPU offloading (add "lazy_offload": true to kv_connector_extra_config)': (
            offloads and not extra.get("lazy_offload", False)
        ),
        'blocks that pass through CPU memory (set "kv_buffer_device": "cuda")': (
            devices == "GPUs" and transfer.kv_connector == TRANSFERRING and transfer.kv_buffer_device == "cpu"
        ),
        'rows that the prefilling engine loads back (drop "bidirectional_kv_xfer")': bool(
            extra.get("bidirectional_kv_xfer")
        ),
        "KV connectors with pipeline parallelism (drop --kv-transfer-config)": (
            config.parallel_config.pipeline_parallel_size > 1
        ),
        'KV offloading to a disk (drop "kv_offload_backend")': extra.get("kv_offload_backend", "cpu") != "cpu",
    }
    for what, found in refusals.items():
        if found:
            raise ValueError(f"vllm-l2kv does not support {what}.")


def _devices() -> str:
    return "CPUs" if current_platform.is_cpu() else "GPUs"


def _or_set(name: str, supported: Sequence[str]) -> str:
    """The end of an advice to drop a setting, which names what it may be instead, if anything."""
    return f", or set {name} to {' or '.join(supported)}" if supported else ""


def _refused_drafts(config: VllmConfig, devices: str) -> dict[str, bool]:
    """Unsupported uses of speculative decoding to whether this configuration has them."""
    speculative = config.speculative_config
    if speculative is None:
        return {}
    taken = DRAFTERS[devices]
    return {
        f"speculative decoding by {speculative.method} on {devices} (drop --speculative-config"
        f"{_or_set('its method', taken)})": speculative.method not in taken,
        "Gemma 4's drafter, which reads the cache of compressed layers (drop --speculative-config)": (
            speculative.use_gemma4_mtp()
        ),
        "mtp with more than one draft layer (set num_speculative_tokens to 1 in --speculative-config)": (
            speculative.use_multi_module_mtp()
        ),
        "adaptive verification of draft tokens (drop enable_adaptive_verification from --speculative-config)": (
            speculative.enable_adaptive_verification
        ),
        "speculative decoding of models with recurrent layers (drop --speculative-config)": (
            config.model_config.is_hybrid
        ),
        "speculative decoding with pipeline parallelism (drop --speculative-config)": (
            config.parallel_config.pipeline_parallel_size > 1
        ),
        "speculative decoding with a KV connector (drop --speculative-config)": config.kv_transfer_config is not None,
    }


def check_profile(config: VllmConfig) -> None:
    """Rejects a profile that was made for another model.

    Args:
        config: The engine's configuration; its model is on this machine, as a folder or as a finished download.

    Raises:
        OSError: The profile or the model cannot be read.
        ValueError: The profile is damaged or of another model, or the model's files are not on this machine.
    """
    path, model = Settings.from_config(config.additional_config).profile, config.model_config
    if path is not None:
        check_model(Profile.read(path), local_folder(model.model, model.revision, config.load_config.download_dir))


def check_seed(seed: int | None, points: CompactionPoints) -> None:
    """Rejects a seed on a CPU if compaction splits the prompt into chunks.

    vLLM's runner for CPUs cannot undo a seeded draw at the end of a chunk: its engine would fail.

    Args:
        seed: The request's seed; `None` if it has none or samples greedily.
        points: The request's compactions.

    Raises:
        ParamError: The prompt is split, by a document or a budget.
    """
    first = points.after(None)
    if seed is None or first is None or first.position >= points.num_prompt_tokens or not current_platform.is_cpu():
        return
    if first.position == points.params.prefix_tokens:
        message = (
            "seed works on CPUs, but not with documents (kv_prefix_tokens, kv_prefix_messages); leave seed or the "
            "document's field out."
        )
    else:
        message = (
            f"seed works on CPUs only with prompts of at most {first.position} tokens (kv_max_tokens plus "
            f"--kv-prompt-interval), got {points.num_prompt_tokens}; leave seed out, or raise kv_max_tokens."
        )
    raise ParamError("seed", message)


def reads_images_as_a_whole(config: VllmConfig) -> bool:
    """Whether tokens of an image attend to each other, so that all must be computed in one step.

    On CPUs vLLM's attention is causal in images too.
    """
    return bool(config.model_config.is_mm_prefix_lm) and not current_platform.is_cpu()


def check_images(points: CompactionPoints) -> None:
    """Rejects a compaction inside an image that must be computed in one step.

    Args:
        points: The request's compactions, with its images.

    Raises:
        ParamError: A compaction is inside an image; the message names the image's tokens.
    """
    for compaction in points.in_prompt() if points.images else ():
        position, image = compaction.position, image_around(points.images, compaction.position)
        if image is None:
            continue
        first, last = image
        inside = f"inside an image (tokens {first} to {last} of the prompt), which this model reads as a whole"
        if compaction.kind is Kind.DOCUMENT:
            raise ParamError(
                "kv_prefix_tokens",
                f"kv_prefix_tokens must not end {inside}, got {position}; set it to {first} or {last + 1}.",
            )
        raise ParamError(
            "kv_max_tokens",
            f"kv_max_tokens={points.params.max_tokens} would compact the prompt after {position} tokens, {inside}; set "
            f"it to at least {last + 1 - points.intervals.prompt}, or --kv-prompt-interval to at least the image's "
            f"{last + 1 - first} tokens.",
        )


def check_kv_heads(num_kv_heads: int, num_ranks: int) -> None:
    """Rejects KV heads that can be neither divided among the ranks nor replicated; vLLM would fail without a message.

    Args:
        num_kv_heads: KV heads of a layer.
        num_ranks: Tensor-parallel size.

    Raises:
        ValueError: Neither number divides the other.
    """
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise ValueError(
            f"vllm-l2kv does not support {num_kv_heads} KV heads on {num_ranks} ranks (set --tensor-parallel-size to a "
            "divisor or multiple of them)."
        )
