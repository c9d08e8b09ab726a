"""The rule of the paper on Hugging Face `transformers`, sharing no code with vllm_l2kv.

Prefill, compact each compressed layer per head, decode with the true positions.
"""

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def expected_keep(n: int, ratio: str, first: int = 0, last: int = 0) -> int:
    """The count in exact arithmetic, from the ratio as it is written."""
    return min(n, max(math.ceil(Fraction(ratio) * n), first + last, 1))


class RoundedCache(DynamicCache):
    """A cache whose keys and values went through a smaller type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def update(self, keys, values, *args, **kwargs):
        keys, values = (states.to(self.dtype).to(states.dtype) for states in (keys, values))
        return super().update(keys, values, *args, **kwargs)


class Reference:
    """`cache_dtype`, if given, is the type that cached keys and values are rounded to."""

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
        self.device = device
        self.new_cache = DynamicCache if cache_dtype is None else partial(RoundedCache, cache_dtype)
        self._prefilled: dict[tuple[int, ...], tuple[DynamicCache, torch.Tensor]] = {}

    def generate(self, prompt: Sequence[int], num_tokens: int, *args, **kwargs) -> list[int]:
        """Greedy tokens; further arguments as those of `logits`."""
        return self.logits(prompt, [None] * num_tokens, *args, **kwargs).argmax(-1).tolist()

    @torch.inference_mode()
    def logits(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int | None],
        ratio: str = "1",
        full_layers: Sequence[int] = (0, 1),
        first: int = 0,
        last: int = 0,
    ) -> torch.Tensor:
        """`[len(tokens), vocabulary]` logits of each next token, fp32.

        `tokens` are what was generated; where one is `None`, the likeliest takes its place. The first comes from the
        full cache.
        """
        cache, logits = self._prefill(tuple(prompt))
        n, rows = len(prompt), [logits]
        cache = copy.deepcopy(cache)
        cache = self._compacted(cache, n, expected_keep(n, ratio, first, last), full_layers, first, last)
        self._decode(cache, tokens[: len(tokens) - 1], rows, n)
        return torch.stack(rows)

    def _decode(
        self, cache: DynamicCache, tokens: Sequence[int | None], rows: list[torch.Tensor], num_prompt_tokens: int
    ) -> None:
        for token in tokens:
            chosen = int(rows[-1].argmax()) if token is None else token
            logits = self.model(
                torch.tensor([[chosen]], device=self.device),
                past_key_values=cache,
                position_ids=torch.tensor([[num_prompt_tokens + len(rows) - 1]], device=self.device),
                use_cache=True,
            ).logits
            rows.append(logits[0, -1].float())

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[DynamicCache, torch.Tensor]:
        if prompt not in self._prefilled:
            cache = self.new_cache()
            ids = torch.tensor([prompt], device=self.device)
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            self._prefilled[prompt] = cache, logits[0, -1].float()
        return self._prefilled[prompt]

    def _compacted(
        self, cache: DynamicCache, n: int, num_keep: int, full_layers: Sequence[int], first: int, last: int
    ) -> DynamicCache:
        compacted = self.new_cache()
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values
            if index not in full_layers:
                kept = self._kept(index, keys[0, :, :n], values[0, :, :n], num_keep, first, last)
                kept = kept.to(self.device)[..., None].expand(-1, -1, -1, keys.shape[-1])
                keys, values = keys.gather(2, kept), values.gather(2, kept)
            compacted.update(keys, values, index)
        return compacted

    def _kept(
        self, index: int, keys: torch.Tensor, values: torch.Tensor, num_keep: int, first: int, last: int
    ) -> torch.Tensor:
        """`[1, num_kv_heads, num_keep]` positions in layer `index`, one head at a time, one token at a time.

        Keys and values are `[num_kv_heads, n, head_size]`.
        """
        n = keys.shape[1]
        protected = set(range(min(first, n))) | set(range(max(n - last, 0), n))
        rows = []
        for head in keys:
            norms = head.float().norm(dim=-1).tolist()
            ranked = sorted(range(n), key=lambda position: (position not in protected, norms[position], position))
            rows.append(sorted(ranked[:num_keep]))
        return torch.tensor(rows)[None]
