"""The rule of the paper on Hugging Face `transformers`, sharing no code with vllm_l2kv.

Prefill, compact each compressed layer per head, decode greedily with the true positions.
"""

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def expected_keep(n: int, ratio: str, first: int = 0, last: int = 0) -> int:
    """The count in exact arithmetic, from the ratio as it is written."""
    return min(n, max(math.ceil(Fraction(ratio) * n), first + last, 1))


class Reference:
    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._prefilled: dict[tuple[int, ...], tuple[DynamicCache, int]] = {}

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        ratio: str = "1",
        full_layers: Sequence[int] = (0, 1),
        first: int = 0,
        last: int = 0,
        delay: int = 0,
    ) -> list[int]:
        """Greedy tokens; `delay` more tokens than the first are computed on the full cache before it is compacted."""
        cache, token = self._prefill(tuple(prompt))
        n = len(prompt)
        tokens = [token]
        if delay:
            cache = copy.deepcopy(cache)
            self._decode(cache, tokens, n, delay)
        compacted = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values
            if index not in full_layers:
                kept = self._kept(keys[:, :, :n], expected_keep(n, ratio, first, last), first, last)
                generated = torch.arange(n, keys.shape[2]).expand(1, keys.shape[1], -1)
                kept = torch.cat([kept, generated], dim=2)
                kept = kept[..., None].expand(-1, -1, -1, keys.shape[-1])
                keys, values = keys.gather(2, kept), values.gather(2, kept)
            compacted.update(keys, values, index)
        self._decode(compacted, tokens, n, num_tokens - len(tokens))
        return tokens

    def _decode(self, cache: DynamicCache, tokens: list[int], n: int, num_steps: int) -> None:
        for _ in range(num_steps):
            logits = self.model(
                torch.tensor([[tokens[-1]]]),
                past_key_values=cache,
                position_ids=torch.tensor([[n + len(tokens) - 1]]),
                use_cache=True,
            ).logits
            tokens.append(int(logits[0, -1].argmax()))

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[DynamicCache, int]:
        if prompt not in self._prefilled:
            cache = DynamicCache()
            logits = self.model(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            self._prefilled[prompt] = cache, int(logits[0, -1].argmax())
        return self._prefilled[prompt]

    @staticmethod
    def _kept(keys: torch.Tensor, num_keep: int, first: int, last: int) -> torch.Tensor:
        """`[1, num_kv_heads, num_keep]` positions, one head at a time, one token at a time."""
        n = keys.shape[2]
        protected = set(range(min(first, n))) | set(range(max(n - last, 0), n))
        rows = []
        for head in keys[0]:
            norms = [float(norm) for norm in head.norm(dim=-1)]
            ranked = sorted(range(n), key=lambda position: (position not in protected, norms[position], position))
            rows.append(sorted(ranked[:num_keep]))
        return torch.tensor(rows)[None]
