"""A model of `transformers` watched while it reads: the norms of its keys and what its last queries look at."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from vllm_l2kv.scorers import norms
from vllm_l2kv.tools.evaluation.attention import per_kv_head
from vllm_l2kv.tools.evaluation.progress import Progress
from vllm_l2kv.tools.evaluation.texts import encode

FULL_ATTENTION = "full_attention"
"""What `transformers` calls layers of the kind that compresses."""


class Observation(NamedTuple):
    """Of one layer, fp32.

    Attributes:
        norms: `[num_kv_heads, num_tokens]` of keys as they are cached.
        attention: `[num_kv_heads, num_queries, num_tokens]` of the last tokens, the mean of each group of query heads.
    """

    norms: torch.Tensor
    attention: torch.Tensor


def load(model_path: str) -> Any:
    """A model in fp32, on a GPU if there is one."""
    from transformers import AutoModelForCausalLM

    # Fused attention has no map to look at.
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def layer_types(model: Any) -> tuple[str, ...]:
    """Of each layer, `FULL_ATTENTION` or another one of `transformers`' names."""
    config = model.config.get_text_config()
    if types := getattr(config, "layer_types", None):
        return tuple(types)
    # The first Mistral names a window and no types: it is the same in all layers.
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else FULL_ATTENTION
    return (kind,) * int(config.num_hidden_layers)


def chunks(tokenizer: Any, text: str, num_tokens: int) -> Iterator[torch.Tensor]:
    """Cuts a text into token ids `[1, num_tokens]` int64, leaving out what remains at its end."""
    # With BOS in front of each chunk, as `encode` puts it in front of a text.
    bos = encode(tokenizer, "")
    token_ids = encode(tokenizer, text)[len(bos) :]
    size = num_tokens - len(bos)
    for start in range(0, len(token_ids) - size + 1, size):
        yield torch.tensor([bos + token_ids[start : start + size]])


@torch.inference_mode()
def observe(
    model: Any, layers: Sequence[int], token_ids: torch.Tensor, num_queries: int, progress: Progress
) -> list[Observation]:
    """Reads a chunk `[1, num_tokens]` and returns what was seen in each of `layers`, ascending.

    By hooks, which hold one layer's map `[num_heads, num_tokens, num_tokens]` at a time; `output_attentions` would
    keep those of all layers. Each layer advances the progress by 1.

    Raises:
        ValueError: A model of another layout.
    """
    from transformers import DynamicCache

    cache, decoder = DynamicCache(config=model.config), model.get_decoder()
    seen: list[Observation] = []

    def hook(layer: int) -> Any:
        def look(_module: Any, _inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            keys = cache.layers[layer].keys[0]
            attention = outputs[1][0, :, -num_queries:].float()
            seen.append(Observation(norms(keys), per_kv_head(attention, keys.shape[0])))
            progress.advance(1)

        return look

    attentions: list[Any] = [getattr(decoder.layers[layer], "self_attn", None) for layer in layers]
    if None in attentions:
        raise ValueError(
            f"{type(model).__name__} has no attention where diagnose looks for it (a module self_attn in each layer); "
            "measure with `vllm-l2kv eval` instead."
        )
    hooks = [attention.register_forward_hook(hook(i)) for i, attention in zip(layers, attentions, strict=True)]
    try:
        # The decoder alone: logits are not used.
        decoder(token_ids.to(model.device), past_key_values=cache, use_cache=True)
    finally:
        for handle in hooks:
            handle.remove()
    return seen
