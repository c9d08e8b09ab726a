"""A model of `transformers`, and what its own keys say of its layout."""

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
"""Read again and again to see how keys are rotated."""
SAME = 0.02
"""Relative difference up to which magnitudes count as equal; those of bf16 keys differ by less than 0.01."""
SLOW_ANGLE = math.pi / 2
"""Pairs that turn by less over a model's longest context are slow."""


def load(folder: str, device: str) -> Any:
    """A model, on GPUs in bf16 and on a CPU in fp32; one that sees images with the part that does.

    Args:
        folder: That of the model.
        device: `cpu`, `cuda`, `cuda:N`, or `auto` to spread it over all GPUs; without a GPU that is the CPU.

    Raises:
        OSError: It cannot be read.
        ImportError: `auto` without the package accelerate.
        ValueError: There is no such device, or it is no causal language model that `transformers` knows.
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
        raise ValueError(f"device must be there, got {device}, and this machine has {num_gpus} GPUs.")


def layout(model: Any) -> tuple[Shape, Rope]:
    """The shape of a model's KV cache and how its keys are rotated, seen from its own keys.

    Raises:
        ValueError: A layout that a profile cannot describe, or a model of which no layer would compress.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} has MLA, whose cache holds no keys, so nothing of it would compress.")
    types = list(getattr(config, "layer_types", None) or [])
    if strange := set(types) - {FULL_ATTENTION, SLIDING_ATTENTION} - RECURRENT - WITHOUT_CACHE:
        raise ValueError(f"{name} has layers of type {min(strange)}, which profile does not know.")
    seen: list[Seen] = []
    # The same tokens at several positions: keys of the first layer differ by their rotation alone.
    with _without_layers_before_keys(model, types):
        read(model, list(range(10, 10 + NUM_TOKENS)) * 4, seen.append)
    windows = {each.layer: FULL_ATTENTION if each.window is None else SLIDING_ATTENTION for each in seen}
    found = tuple(windows.get(i, kind) for i, kind in enumerate(types)) or tuple(windows.values())
    if types and tuple(types) != found:
        raise ValueError(f"{name} has layers whose windows its attention does not name, so it cannot be profiled.")
    _check_states(model, types)
    if FULL_ATTENTION not in found:
        raise ValueError(f"{name} has a sliding window in every layer, so nothing of it would compress.")
    sizes = {each.keys.shape for each in seen}
    if len(sizes) > 1:
        raise ValueError(f"{name} has layers with caches of several shapes, which cannot be compressed.")
    (num_kv_heads, _, head_size) = sizes.pop()
    return Shape(len(found), num_kv_heads, head_size, found), _rope(model, seen[0].keys.float())


@torch.inference_mode()
def _check_states(model: Any, types: Sequence[str]) -> None:
    """Refuses a model whose recurrent layers forget their state when they go on with more than one token at once.

    Questions are asked so after a text. By the first of these layers, which depends on its own state alone, and with
    two tokens, since states fade.
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
                f"{type(model).__name__} forgets what it has read when it goes on with several tokens, in this version "
                "of transformers, so it cannot be profiled."
            )


@contextmanager
def _without_layers_before_keys(model: Any, types: Sequence[str]) -> Iterator[None]:
    """While it is open, layers before the first one with keys, which would mix tokens, hand on what they get."""
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
    """How the keys `[H, T, head_size]` of the first layer, of tokens that repeat every `NUM_TOKENS`, are rotated.

    So that the magnitudes that the scorer learned sees are the same at every position.
    """
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
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
    raise ValueError(f"{type(model).__name__} rotates its keys in an unknown way, which a profile cannot describe.")


def slow_frequencies(model: Any, num_pairs: int) -> torch.Tensor:
    """How fast the slow pairs at the end of keys turn: those that turn by less than `SLOW_ANGLE` over the context.

    Args:
        model: Of `transformers`. Layers of full attention may have frequencies of their own.
        num_pairs: That its keys have.

    Returns:
        `[slow_pairs]` fp32 on the CPU, in radians a position, never rising. None if pairs do not turn ever more slowly,
        or if the model does not say how fast they turn or how long its context is.
    """
    embedding, context = getattr(model.get_decoder(), "rotary_emb", None), longest_context(model)
    of_all = getattr(embedding, "inv_freq", None)
    found = getattr(embedding, f"{FULL_ATTENTION}_inv_freq", of_all)
    if found is None or context is None or len(found) != num_pairs or (found.diff() > 0).any():
        return torch.zeros(0)
    frequencies: torch.Tensor = found.float().cpu()
    return frequencies[frequencies * context < SLOW_ANGLE]


def longest_context(model: Any) -> int | None:
    """Positions that a model was made for; `None` if it does not say."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context
