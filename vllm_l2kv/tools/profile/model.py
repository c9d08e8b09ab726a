"""Loads a model of `transformers`, and finds the layout of its KV cache from its keys."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from vllm_l2kv.profile import FULL_ATTENTION, RECURRENT, SLIDING_ATTENTION, WITHOUT_CACHE, Rope, Shape
from vllm_l2kv.scorers.learned import features
from vllm_l2kv.tools.profile.observe import Seen, read

NUM_TOKENS = 16
"""Number of distinct tokens that are repeated to find how keys are rotated."""
SAME = 0.02
"""Relative difference up to which magnitudes count as equal; those of bf16 keys differ by less than 0.01."""
SLOW_ANGLE = math.pi / 2
"""Pairs that turn by less over a model's longest context are slow."""


def load(folder: str, device: str) -> Any:
    """Loads a model, in bf16 on GPUs and in fp32 on a CPU, with its vision encoder if it has one.

    Args:
        folder: Folder of the model.
        device: `cpu`, `cuda`, `cuda:N`, or `auto` to spread the model over all GPUs (on the CPU if there is none).

    Raises:
        OSError: The model cannot be read.
        ImportError: `auto` needs the package accelerate, which is missing.
        ValueError: The device does not exist, or `transformers` has no causal language model for this folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    _check(device)
    kind = AutoModelForImageTextToText if sees(AutoConfig.from_pretrained(folder)) else AutoModelForCausalLM
    options = {"dtype": torch.bfloat16 if uses_gpu(device) else torch.float32, "attn_implementation": "sdpa"}
    if device == "auto":
        return kind.from_pretrained(folder, device_map=device, **options).eval()
    return kind.from_pretrained(folder, **options).eval().to(device)


def sees(config: Any) -> bool:
    """Whether a model of this configuration takes images."""
    return hasattr(config, "vision_config")


def uses_gpu(device: str) -> bool:
    """Whether `load` puts a model on a GPU."""
    return device != "cpu" and torch.cuda.is_available()


def _check(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda", "auto") or (number and not number.isdecimal()):
        raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {device}.")
    num_gpus = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= num_gpus:
        raise ValueError(f"device must be one of this machine's {num_gpus} GPUs or cpu, got {device}.")


def layout(model: Any) -> tuple[Shape, Rope]:
    """The shape of a model's KV cache and the rotation of its keys, found from its keys.

    Raises:
        ValueError: A profile cannot describe the layout, or no layer of the model would compress.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} has MLA, whose cache holds no keys, so no layer would compress.")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{name} has layers that read another layer's cache, which profile does not support.")
    types = list(getattr(config, "layer_types", None) or [])
    if strange := set(types) - {FULL_ATTENTION, SLIDING_ATTENTION} - RECURRENT - WITHOUT_CACHE:
        raise ValueError(f"{name} has layers of type {min(strange)}, which profile does not support.")
    seen: list[Seen] = []
    # The same tokens at several positions: the keys of the first layer differ only by their rotation.
    with _without_layers_before_keys(model, types):
        read(model, list(range(10, 10 + NUM_TOKENS)) * 4, seen.append)
    windows = {each.layer: FULL_ATTENTION if each.window is None else SLIDING_ATTENTION for each in seen}
    found = tuple(windows.get(i, kind) for i, kind in enumerate(types)) or tuple(windows.values())
    if types and tuple(types) != found:
        raise ValueError(f"{name} has layers whose attention does not tell its window, so it cannot be profiled.")
    _check_states(model, types)
    if FULL_ATTENTION not in found:
        raise ValueError(f"{name} has a sliding window in every layer, so no layer would compress.")
    sizes = {each.keys.shape for each in seen}
    if len(sizes) > 1:
        raise ValueError(f"{name} has layers with caches of several shapes, which cannot be compressed.")
    (num_kv_heads, _, head_size) = sizes.pop()
    return Shape(len(found), num_kv_heads, head_size, found), _rope(model, seen[0].keys.float())


@torch.inference_mode()
def _check_states(model: Any, types: Sequence[str]) -> None:
    """Rejects a model whose recurrent layers lose their state when they continue with several tokens at once.

    Questions after a text are read in this way. Checks the first recurrent layer, which depends only on its own state,
    with two tokens, since states decay.
    """
    from transformers import DynamicCache

    first = next((i for i, kind in enumerate(types) if kind in RECURRENT), None)
    if first is None:
        return
    ids = torch.arange(10, 10 + NUM_TOKENS, device=model.device)[None]
    found = []
    for ends in ((NUM_TOKENS,), (NUM_TOKENS - 2, NUM_TOKENS)):
        cache = DynamicCache(config=model.config)
        for begin, end in zip((0, *ends), ends, strict=False):
            positions = torch.arange(begin, end, device=model.device)[None]
            model.get_decoder()(ids[:, begin:end], past_key_values=cache, use_cache=True, position_ids=positions)
        states = cache.layers[first].recurrent_states.values()
        found.append([state.float() for state in states if state is not None])  # a short convolution has none
    for whole, parts in zip(*found, strict=True):
        if torch.linalg.vector_norm(whole - parts) > SAME * torch.linalg.vector_norm(whole):
            raise ValueError(
                f"{type(model).__name__} loses its state when it continues with several tokens in this version of "
                "transformers, so it cannot be profiled; install another version."
            )


@contextmanager
def _without_layers_before_keys(model: Any, types: Sequence[str]) -> Iterator[None]:
    """In this context, layers before the first attention layer, which would mix tokens, return their inputs."""
    before = list(takewhile(lambda kind: kind in RECURRENT | WITHOUT_CACHE, types))

    def handed_on(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        states = inputs[0] if inputs else named["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers = model.get_decoder().layers[: len(before)] if before else ()
    hooks = [layer.register_forward_hook(handed_on, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rope(model: Any, keys: torch.Tensor) -> Rope:
    """How keys are rotated, from those of the first layer, `[H, T, head_size]`, of tokens that repeat.

    Tokens repeat every `NUM_TOKENS`. In the right layout, magnitudes of pairs are the same at every position.
    """
    embedding = _rotation(model)
    first, later = keys[:, :NUM_TOKENS], keys[:, -NUM_TOKENS:]
    ropes = [Rope(0, False)]
    if embedding is not None:
        angles: list[torch.Tensor] = []
        hook = embedding.register_forward_hook(lambda _module, _inputs, output: angles.append(output[0]))
        try:
            read(model, [10, 11], lambda _seen: None)
        finally:
            hook.remove()
        ropes = [Rope(angles[0].shape[-1], interleaved) for interleaved in (False, True)]
    for rope in ropes:
        num_of_keys = keys.shape[-1] - rope.rotary_dim // 2
        seen, again = (features(each, each, rope)[..., :num_of_keys] for each in (first, later))
        if torch.linalg.vector_norm(seen - again) <= SAME * torch.linalg.vector_norm(seen):
            return replace(rope, slow_pairs=len(slow_frequencies(model, rope.rotary_dim // 2)))
    raise ValueError(f"{type(model).__name__} rotates its keys in an unknown way, so it cannot be profiled.")


def _rotation(model: Any) -> Any:
    """The module that makes the angles of keys; `None` if the model has none. LFM2 with experts has its own name."""
    decoder = model.get_decoder()
    return getattr(decoder, "rotary_emb", getattr(decoder, "pos_emb", None))


def slow_frequencies(model: Any, num_pairs: int) -> torch.Tensor:
    """Frequencies of the slow pairs: the last pairs of a key, which rotate by less than `SLOW_ANGLE` over the context.

    Args:
        model: Model of `transformers`. Its layers of full attention may have separate frequencies.
        num_pairs: Number of rotated pairs of a key.

    Returns:
        `[slow_pairs]` fp32 on the CPU, in radians per position, not increasing. Empty if frequencies of pairs increase,
        or if the model does not tell its frequencies or its context length.
    """
    embedding, context = _rotation(model), longest_context(model)
    of_all = getattr(embedding, "inv_freq", None)
    found = getattr(embedding, f"{FULL_ATTENTION}_inv_freq", of_all)
    if found is None or context is None or len(found) != num_pairs or (found.diff() > 0).any():
        return torch.zeros(0)
    frequencies: torch.Tensor = found.float().cpu()
    return frequencies[frequencies * context < SLOW_ANGLE]


def longest_context(model: Any) -> int | None:
    """The context length of a model; `None` if its config does not tell."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context
