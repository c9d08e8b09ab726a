"""Configurations refused at start-up, with one sentence that says what to do."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from classified import classify_layers
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import SpeculativeConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.rswa_attention import RSWAAttention
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)
from weights import made_up_weights, write_profile

from vllm_l2kv import engine_args, refusals
from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.kv_cache_spec import (
    FLASH_ATTENTION,
    ChunkedLayerSpec,
    CompressedLayerSpec,
    FullLayerSpec,
    RecurrentLayerSpec,
    SlidingLayerSpec,
    key_dtype,
    pack,
)
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.policy import CompactionPoints, Intervals
from vllm_l2kv.profile import Target, fingerprint
from vllm_l2kv.refusals import check_images, check_profile, check_seed, check_supported
from vllm_l2kv.settings import Settings
from vllm_l2kv.worker.worker import check_attention, check_block_size

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}


def transfer(connector="SimpleCPUOffloadConnector", module=None, buffer="cpu", **extra):
    extra = {"lazy_offload": True, **extra}
    return SimpleNamespace(
        kv_connector=connector,
        kv_connector_module_path=module,
        kv_connector_extra_config=extra,
        kv_buffer_device=buffer,
    )


def config(**changes):
    parts = {
        "kv_transfer_config": None,
        "speculative_config": None,
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            data_parallel_size=1,
        ),
        "model_config": SimpleNamespace(
            model="some/model",
            hf_text_config=SimpleNamespace(model_type="llama"),
            revision=None,
            runner_type="generate",
            is_encoder_decoder=False,
            rswa_window=None,
            use_mla=False,
            is_moe=False,
            is_mm_prefix_lm=False,
            has_inner_state=False,
            is_hybrid=False,
            get_total_num_kv_heads=lambda: 6,
            get_total_num_hidden_layers=lambda: 4,
        ),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "cache_config": SimpleNamespace(
            cache_dtype="auto",
            use_replayssm=False,
            prefix_match_unit=None,
            enable_prefix_caching=True,
            kv_sharing_fast_prefill=False,
        ),
        "load_config": SimpleNamespace(download_dir=None),
        "use_v2_model_runner": not refusals.current_platform.is_cpu(),
        "additional_config": None,
    }
    for path, value in changes.items():
        owner, _, name = path.partition("__")
        if name:
            setattr(parts[owner], name, value)
        else:
            parts[owner] = value
    return SimpleNamespace(**parts)


def drafting(method, enable_adaptive_verification=False, **draft_config):
    """vLLM's, without its look at a model on the disk."""
    speculative = object.__new__(SpeculativeConfig)
    draft = SimpleNamespace(hf_config=SimpleNamespace(**{"model_type": "", **draft_config})) if draft_config else None
    speculative.__dict__ |= {
        "method": method,
        "enable_adaptive_verification": enable_adaptive_verification,
        "num_speculative_tokens": 2,
        "draft_model_config": draft,
    }
    return speculative


def test_a_profile_is_compared_with_the_files_of_a_name(llama, tmp_path):
    """They may arrive after the first check, so the worker checks again once the model is loaded."""
    path, memory = tmp_path / "p.safetensors", (Target(0.5, (0,), 0.333333, "l2"),)
    write_profile(path, made_up_weights(4, 2, 32), fingerprint(llama), memory)
    about = config(additional_config=engine_args(profile=path)["additional_config"], load_config__download_dir=tmp_path)
    check_supported(about)
    with pytest.raises(ValueError, match="The files of some/model are not on this machine"):
        check_profile(about)
    repository = tmp_path / "models--some--model"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots/c0ffee").symlink_to(llama)
    check_profile(about)
    write_profile(path, made_up_weights(4, 2, 32), memory=memory)
    with pytest.raises(ValueError, match="was made for another model, made up: shape and RoPE and weights of"):
        check_profile(about)


def test_an_ordinary_configuration_passes():
    check_supported(config())


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (
            {"kv_transfer_config": transfer("LMCacheConnectorV1")},
            "LMCacheConnectorV1 on CPUs .drop --kv-transfer-config",
        ),
        (
            {"kv_transfer_config": transfer("OffloadingConnector")},
            r"OffloadingConnector on CPUs \(drop .*--kv-offloading-size\)",
        ),
        ({"speculative_config": drafting("dflash")}, "by dflash on CPUs .*set its method to ngram or draft_model or"),
        ({"speculative_config": drafting("mtp", model_type="gemma4_mtp")}, "Gemma 4's drafter, which reads the cache"),
        ({"speculative_config": drafting("mtp", num_nextn_predict_layers=2)}, "set num_speculative_tokens to 1"),
        ({"speculative_config": drafting("ngram_gpu")}, "by ngram_gpu on CPUs"),
        ({"speculative_config": drafting("ngram", enable_adaptive_verification=True)}, "enable_adaptive_verification"),
        (
            {"parallel_config__pipeline_parallel_size": 2, "speculative_config": drafting("ngram")},
            "speculative decoding with pipeline parallelism",
        ),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_config__rswa_window": 128}, "R-SWA"),
        ({"model_config__use_mla": True}, r"models with MLA, .*stock vLLM; see docs/mla\.md"),
        ({"model_config__has_inner_state": True}, "only recurrent layers"),
        (
            {"model_config__is_hybrid": True, "speculative_config": drafting("ngram")},
            "speculative decoding of models with recurrent layers",
        ),
        ({"cache_config__kv_sharing_fast_prefill": True}, "drop --kv-sharing-fast-prefill"),
        ({"cache_config__use_replayssm": True}, "--use-replayssm"),
        ({"model_config__is_hybrid": True, "cache_config__prefix_match_unit": 16}, "--prefix-match-unit"),
        ({"model_config__get_total_num_hidden_layers": lambda: 1}, "full_layers names layer 1"),
        ({"additional_config": {"l2kv": {"full_layers": [7, 4]}}}, "names layer 4, but .* 0 to 3; change --kv-full-la"),
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype to auto or fp8_e4m3"),
        ({"cache_config__cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype to auto or fp8_e4m3"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_unsupported_settings_are_named(changes, setting):
    with pytest.raises(ValueError, match=setting):
        check_supported(config(**changes))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({}, None),
        ({"kv_transfer_config": transfer(lazy_offload=False)}, '"lazy_offload": true'),
        ({"kv_transfer_config": transfer(kv_offload_backend="disk")}, '"kv_offload_backend"'),
        ({"cache_config__enable_prefix_caching": False}, "--no-enable-prefix-caching"),
        (
            {"kv_transfer_config": transfer("MultiConnector")},
            "the KV connector MultiConnector on GPUs .*, or set kv_connector to SimpleCPUOffloadConnector",
        ),
        ({"parallel_config__pipeline_parallel_size": 2}, "KV connectors with pipeline parallelism"),
        ({"kv_transfer_config": transfer(module="mine")}, "drop kv_connector_module_path, got 'mine'"),
    ],
)
def test_offloading_to_cpu_memory(monkeypatch, changes, setting):
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    parts = {"kv_transfer_config": transfer(), "use_v2_model_runner": True}
    about = config(**{**parts, **changes})
    with pytest.raises(ValueError, match=setting) if setting else nullcontext():
        check_supported(about)


@pytest.mark.parametrize(
    ("on_cpu", "extra", "setting"),
    [
        (True, {}, None),
        (False, {}, 'through CPU memory .set "kv_buffer_device": "cuda"'),
        (False, {"buffer": "cuda"}, None),
        (True, {"bidirectional_kv_xfer": True}, '"bidirectional_kv_xfer"'),
        # The worker sets the first one, and the scheduler may check the same configuration later.
        (True, {"module": "vllm_l2kv.worker.transfers"}, None),
        (True, {"module": "mine"}, "drop kv_connector_module_path, got 'mine'"),
    ],
)
def test_prefill_decode_pairs(monkeypatch, on_cpu, extra, setting):
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: on_cpu)
    about = config(kv_transfer_config=transfer("NixlConnector", **extra), use_v2_model_runner=not on_cpu)
    with pytest.raises(ValueError, match=setting) if setting else nullcontext():
        check_supported(about)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 12])
def test_heads_are_dealt_out_or_replicated(num_ranks):
    check_supported(config(parallel_config__tensor_parallel_size=num_ranks))


def test_experts_of_several_engines_are_taken_on_gpus_alone(monkeypatch):
    """vLLM's `CpuCommunicator` has no `all_gatherv`, so engines would end at their first request."""
    experts = config(parallel_config__data_parallel_size=2, model_config__is_moe=True)
    with pytest.raises(ValueError, match="experts of several data-parallel engines on CPUs"):
        check_supported(experts)
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    experts.use_v2_model_runner = True
    check_supported(experts)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_pipeline_parallelism_is_taken(monkeypatch, on_cpu):
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: on_cpu)
    parallel = {"parallel_config__pipeline_parallel_size": 2, "parallel_config__tensor_parallel_size": 2}
    check_supported(config(use_v2_model_runner=not on_cpu, **parallel))


@pytest.mark.parametrize("num_ranks", [4, 5, 9])
def test_heads_that_do_not_divide_evenly_are_refused(num_ranks):
    with pytest.raises(ValueError, match=f"6 KV heads on {num_ranks} ranks .*--tensor-parallel-size to a divisor"):
        check_supported(config(parallel_config__tensor_parallel_size=num_ranks))


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "mtp", "medusa"])
@pytest.mark.parametrize("devices", ["CPUs", "GPUs"])
def test_drafts_are_taken_where_their_method_was_run(monkeypatch, devices, method):
    on_gpu = devices == "GPUs"
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: not on_gpu)
    about = config(speculative_config=drafting(method), use_v2_model_runner=on_gpu)
    is_taken = method not in ({"medusa"} if on_gpu else {"ngram_gpu", "medusa"})
    others = f"{'ngram_gpu or ' if on_gpu else ''}draft_model or eagle or eagle3 or mtp"
    sentence = rf"by {method} on {devices} \(drop --speculative-config, or set its method to ngram or {others}\)"
    with nullcontext() if is_taken else pytest.raises(ValueError, match=sentence):
        check_supported(about)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_each_device_has_its_runner(monkeypatch, on_cpu):
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: on_cpu)
    check_supported(config(use_v2_model_runner=not on_cpu))
    with pytest.raises(ValueError, match=f"VLLM_USE_V2_MODEL_RUNNER={int(not on_cpu)}"):
        check_supported(config(use_v2_model_runner=on_cpu))


def layers(*specs):
    return {f"model.layers.{i}.self_attn.attn": spec for i, spec in enumerate(specs)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MLAAttentionSpec(**SHAPE), "MLAAttentionSpec"),
        (SinkFullAttentionSpec(**SHAPE, sink_len=4), "SinkFullAttentionSpec"),
        (CrossAttentionSpec(**SHAPE), "CrossAttentionSpec"),
        (EncoderOnlyAttentionSpec(**SHAPE), "EncoderOnlyAttentionSpec"),
        (FullAttentionSpec(**SHAPE, sliding_window=128), "hybrid KV-cache manager"),
        (FullAttentionSpec(**SHAPE, attention_chunk_size=128), "hybrid KV-cache manager"),
        (FullAttentionSpec(**SHAPE, non_causal=True), "non-causally"),
        (FullAttentionSpec(**{**SHAPE, "dtype": torch.uint8}), "--kv-cache-dtype"),
        (
            FullAttentionSpec(**{**SHAPE, "dtype": torch.uint8}, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD),
            "FP8_PER_TOKEN_HEAD",
        ),
    ],
)
def test_caches_that_cannot_be_compacted_are_named(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        classify_layers(layers(FullAttentionSpec(**SHAPE), spec), Settings(()))
    assert "model.layers.1.self_attn.attn" in str(error.value)


def test_a_full_layer_that_does_not_exist():
    with pytest.raises(ValueError, match=r"full_layers names layer 2, but .* 0 to 1"):
        classify_layers(layers(*[FullAttentionSpec(**SHAPE)] * 2), Settings((0, 2)))


def test_nothing_left_to_compress():
    with pytest.raises(ValueError, match="name fewer layers"):
        classify_layers(layers(*[FullAttentionSpec(**SHAPE)] * 2), Settings((0, 1)))


@pytest.mark.parametrize("kinds", ["SSSS", "MSMS"])
def test_nothing_to_compress_at_all(kinds):
    with pytest.raises(ValueError, match=r"No layer of this model attends to all tokens .*stock vLLM"):
        classify_layers(hybrid(kinds), Settings((0, 1)))


def test_classes_of_an_ordinary_model():
    classified = classify_layers(layers(*[FullAttentionSpec(**SHAPE)] * 6), Settings((0, 1)))
    assert [type(spec) for spec in classified.values()] == [FullLayerSpec] * 2 + [CompressedLayerSpec] * 4
    assert [spec.block_size for spec in classified.values()] == [32] * 2 + [16] * 4


def test_more_full_layers_than_compressed_ones():
    classified = classify_layers(layers(*[FullAttentionSpec(**SHAPE)] * 5), Settings((0, 1, 2)))
    assert [spec.block_size for spec in classified.values()] == [16] * 3 + [16] * 2
    classified = classify_layers(layers(*[FullAttentionSpec(**SHAPE)] * 5), Settings((0, 1, 2, 3)))
    assert [spec.block_size for spec in classified.values()] == [16] * 4 + [64]


@pytest.mark.parametrize(
    ("window", "of_ours"),
    [
        (SlidingWindowSpec(**SHAPE, sliding_window=512), SlidingLayerSpec),
        (ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64), ChunkedLayerSpec),
    ],
)
def test_layers_that_attend_to_a_part_are_left_alone(window, of_ours):
    classified = classify_layers(layers(window, window, FullAttentionSpec(**SHAPE)), Settings(()))
    assert list(classified.values())[:2] == [replace_as(window, of_ours)] * 2
    assert type(list(classified.values())[2]) is CompressedLayerSpec


STATE = MambaSpec(block_size=16, shapes=((4, 8),), dtypes=(torch.float32,))


def hybrid(kinds):
    """Returns specs from a letter for each layer: M recurrent, * attention, S sliding window, - without a cache."""
    spec_of = {"M": STATE, "*": FullAttentionSpec(**SHAPE), "S": SlidingWindowSpec(**SHAPE, sliding_window=512)}
    return {f"model.layers.{i}.x": spec_of[kind] for i, kind in enumerate(kinds) if kind != "-"}


@pytest.mark.parametrize(
    ("kinds", "named", "full"),
    [
        ("MMM*MMM*MMM*", (0, 1), {3}),  # Qwen3-Next, Qwen3.5
        ("MM*MM*M*", (0, 1), {2}),  # LFM2
        ("M-M-M*-M-M*-", (0, 1), {5}),  # Nemotron-H: feed-forward layers have no cache
        ("M*M*M*", (0, 1), {1}),
        ("M*M*M*", (), set()),
        ("M*M*M*", (1, 3), {1, 3}),  # an explicit list of attention layers is used as it is
        ("M*M*M*", (2, 3), {3}),
        ("*M*M*", (0, 1), {0, 2}),
        ("MS*M*", (0, 1), set()),  # the next one has a window
    ],
)
def test_full_layers_of_a_hybrid(kinds, named, full):
    specs = hybrid(kinds)
    classified = classify_layers(specs, Settings(named))
    assert {i for i in range(len(kinds)) if type(classified.get(f"model.layers.{i}.x")) is FullLayerSpec} == full
    for name, spec in specs.items():
        if spec is STATE:
            assert type(classified[name]) is RecurrentLayerSpec
            assert classified[name] == replace_as(STATE, RecurrentLayerSpec)


@pytest.mark.parametrize(("kinds", "named", "last"), [("M*M*M", (4,), 3), ("M*M", (1, 7), 1)])
def test_full_layers_after_the_last_attention_layer(kinds, named, last):
    with pytest.raises(
        ValueError, match=f"names layer {named[-1]}, but the last attention layer of this model is {last}"
    ):
        classify_layers(hybrid(kinds), Settings(named))


def test_nothing_left_to_compress_in_a_hybrid():
    with pytest.raises(ValueError, match="name fewer layers"):
        classify_layers(hybrid("MM*M"), Settings((0, 1)))


def test_an_fp8_cache_holds_e4m3_keys():
    spec = FullAttentionSpec(**{**SHAPE, "dtype": torch.uint8}, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    assert key_dtype(spec) == torch.float8_e4m3fn
    classified = classify_layers(layers(*[spec] * 6), Settings((0, 1)))
    assert [key_dtype(spec) for spec in classified.values()] == [torch.float8_e4m3fn] * 6


def test_quantized_caches_on_a_cpu(monkeypatch):
    quantized = config(cache_config__cache_dtype="fp8", use_v2_model_runner=True)
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    check_supported(quantized)
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: True)
    with pytest.raises(ValueError, match="quantized KV caches on CPUs"):
        check_supported(quantized)


def attention(backend, layer_class=Attention, alibi=None):
    layer = layer_class.__new__(layer_class)
    layer.__dict__.update(attn_backend=backend, impl=SimpleNamespace(alibi_slopes=alibi))
    return layer


class NamedAlike(FlashAttentionBackend):
    """As in Step 5: another implementation with the name of vLLM's."""


class LayerOfAModel:
    """As in Inkling, with vLLM's backend."""

    def get_attn_backend(self):
        return FlashAttentionBackend


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (attention(FlexAttentionBackend), "FLEX_ATTENTION.* --attention-backend FLASH_ATTN or TRITON_ATTN"),
        (attention(FlashAttentionBackend, alibi=[0.5]), "ALiBi"),
        (attention(NamedAlike), "attention of its own .*Attention with NamedAlike.*stock vLLM"),
        (attention(FlashAttentionBackend, RSWAAttention), "attention of its own .*RSWAAttention.*stock vLLM"),
        (LayerOfAModel(), "attention of its own .*LayerOfAModel with FlashAttentionBackend.*stock vLLM"),
    ],
)
def test_attention_that_does_not_work_on_compacted_rows(layer, message):
    backends = ("FLASH_ATTN", "TRITON_ATTN")
    check_attention("model.layers.3.self_attn.attn", attention(FlashAttentionBackend), backends)
    with pytest.raises(ValueError, match=f"Layer model.layers.3.self_attn.attn .*{message}"):
        check_attention("model.layers.3.self_attn.attn", layer, backends)


@pytest.mark.parametrize(
    ("asked", "images", "message"),
    [
        ({"prefix_tokens": 120}, [(10, 20), (100, 140)], r"got 120; set it to 100 or 141"),
        ({"prefix_tokens": 140}, [(100, 140)], r"\(tokens 100 to 140 .* got 140"),
        ({"prefix_tokens": 100}, [(100, 140)], None),
        ({"prefix_tokens": 141}, [(100, 140)], None),
        # After 200, 300, 399, 499, 500, ... tokens: none of these images is longer than the interval of 100.
        ({"max_tokens": 100}, [(301, 398), (399, 498), (500, 599)], None),
        # After 200, 300, 400 and 450 tokens, and then inside an image.
        (
            {"max_tokens": 100},
            [(450, 550)],
            r"kv_max_tokens=100 would .* after 550 tokens, .*\(tokens 450 to 550 .* set it to at least 451, or "
            r"--kv-prompt-interval to at least the image's 101 tokens",
        ),
        ({"max_tokens": 451}, [(450, 550)], None),
        # The end of the prompt is not inside its last image, and answers have no images.
        ({"max_tokens": 100}, [(900, 999)], None),
        ({"keep_ratio": 0.5}, [(900, 999)], None),
    ],
)
def test_compactions_inside_an_image_that_is_read_as_a_whole(asked, images, message):
    params = CompressionParams(**{"keep_ratio": 0.5, **asked})
    points = CompactionPoints(1000, params, Intervals(100, 10), tuple(images))
    if message is None:
        check_images(points)
        return
    with pytest.raises(ParamError, match=message) as error:
        check_images(points)
    assert error.value.param == f"kv_{next(iter(asked))}"


@pytest.mark.parametrize("interval", [100, 101])
def test_the_advice_to_raise_the_prompts_interval_helps(interval):
    points = CompactionPoints(1000, CompressionParams(max_tokens=100), Intervals(interval, 10), ((450, 550),))
    if interval == 101:
        check_images(points)
        return
    with pytest.raises(ParamError, match="at least the image's 101 tokens"):
        check_images(points)


@pytest.mark.parametrize(
    ("sizes", "block_size", "is_refused"),
    [([16, 32, 64], 64, False), ([16, 32, 64], 240, True), ([64], 16, True), ([MultipleOf(16)], 240, False)],
)
def test_blocks_that_vllm_would_cut_for_its_kernels(sizes, block_size, is_refused):
    backend = SimpleNamespace(get_name=lambda: "FLASHINFER", get_supported_kernel_block_sizes=lambda _: sizes)
    spec = FullLayerSpec(**{**SHAPE, "block_size": block_size})
    with pytest.raises(ValueError, match=f"blocks of {block_size} .*--block-size 64") if is_refused else nullcontext():
        check_block_size("model.layers.3.self_attn.attn.full", backend, spec)


def test_classes_never_merge():
    full, compressed = FullLayerSpec(**SHAPE), CompressedLayerSpec(**SHAPE)
    for specs in ([full, compressed], [compressed, full]):
        with pytest.raises(AssertionError):
            type(specs[0]).merge(specs)
        assert not specs[0].is_uniform_with_collection(dict(enumerate(specs)))
    assert CompressedLayerSpec.merge([compressed] * 3) == compressed


@pytest.mark.parametrize(
    ("num_smaller", "num_larger", "size"),
    [(2, 30, 240), (2, 28, 224), (1, 15, 240), (3, 28, 144), (4, 4, 16)],
)
def test_packing_without_a_wish_for_strides(num_smaller, num_larger, size):
    spec = FullAttentionSpec(**SHAPE)
    assert pack([[spec] * num_smaller], [[spec] * num_larger], None) == (size, 16, None)


@pytest.mark.parametrize(
    ("heads", "head_size", "num_smaller", "num_larger", "smaller", "larger", "stride_kib"),
    [
        (8, 128, 2, 30, 240, 16, 1952),  # Llama-3-8B: 1,920 KiB is a multiple of 5
        (2, 128, 2, 30, 480, 32, 992),  # a quarter of it: pages of 16 KiB are joined
        (8, 64, 2, 14, 112, 16, 448),  # 1B shape: no padding
        (8, 128, 2, 78, 624, 16, 4992),  # 70B: no padding
        (3, 64, 2, 28, 896, 64, 1344),  # SmolLM2-135M: pages of 12 KiB, four joined
        (8, 128, 2, 47, 368, 16, 3072),  # a multiple of 47
    ],
)
def test_packing_for_flash_attention(heads, head_size, num_smaller, num_larger, smaller, larger, stride_kib):
    spec = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=head_size, dtype=torch.bfloat16)
    sizes = pack([[spec] * num_smaller], [[spec] * num_larger], FLASH_ATTENTION)
    assert sizes == (smaller, larger, stride_kib * 1024)


@given(heads=st.integers(1, 16), head_size=st.sampled_from([64, 80, 128]), num_larger=st.integers(1, 100))
def test_strides_spread_blocks_over_the_memory(heads, head_size, num_larger):
    spec = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=head_size, dtype=torch.bfloat16)
    sizes = pack([[spec]], [[spec] * num_larger], FLASH_ATTENTION)
    used = sizes.larger * num_larger * spec.page_size_bytes // 16
    assert sizes.larger * spec.page_size_bytes // 16 >= 32 * 1024
    assert sizes.stride % 2**15 == 0
    assert math.gcd(sizes.stride // 2**15, 5 * 47) == 1
    assert used <= sizes.stride < used + 3 * 2**15
    assert sizes.smaller * spec.page_size_bytes // 16 <= sizes.stride


@pytest.mark.parametrize(
    ("seed", "on_cpu", "num_prompt_tokens", "refused"),
    [
        (1, True, 301, True),
        (1, True, 300, False),
        (1, False, 301, False),
        (None, True, 301, False),
    ],
)
def test_a_seed_on_a_cpu_for_a_prompt_in_chunks(monkeypatch, seed, on_cpu, num_prompt_tokens, refused):
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    points = CompactionPoints(num_prompt_tokens, CompressionParams(max_tokens=100), Intervals(200, 10))
    if not refused:
        check_seed(seed, points)
        return
    with pytest.raises(ParamError, match=r"at most 300 tokens .* got 301; leave seed out") as error:
        check_seed(seed, points)
    assert error.value.param == "seed"
    document = CompactionPoints(num_prompt_tokens, CompressionParams(0.5, prefix_tokens=200), Intervals(200, 10))
    with pytest.raises(ParamError, match=r"^seed works on CPUs, but not with documents .* the document's field"):
        check_seed(seed, document)
