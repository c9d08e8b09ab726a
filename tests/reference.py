"""The rules of the paper and of budgets on Hugging Face `transformers`, without code of vllm_l2kv.

Computes tokens up to a compaction with their true positions, compacts each compressed layer per head, and continues.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from usages import numbers_of


def expected_keep(n: int, ratio: str, first: int = 0, last: int = 0) -> int:
    """Returns the count in exact arithmetic, from the ratio's decimal text."""
    return min(n, max(math.ceil(Fraction(ratio) * n), first + last, 1))


def expected_compactions(
    n: int,
    num_computed: int,
    ratio: str = "1",
    first: int = 0,
    last: int = 0,
    budget: int | None = None,
    intervals: tuple[int, int] = (2048, 256),
    document: int | None = None,
    images: Sequence[tuple[int, int]] = (),
) -> dict[int, int]:
    """Maps numbers of computed tokens at which rows are evicted to the rows left, by a walk over the tokens.

    Everything after a document is kept whole, unless a budget evicts rows.

    Args:
        n: Length of the prompt.
        num_computed: Number of computed tokens, including the prompt's.
        ratio: Share of the prompt, or of the document, that is kept at its end.
        first: Number of protected rows at the beginning.
        last: Number of protected rows at the end.
        budget: Rows left whenever a request holds an interval more; `None` for no budget.
        intervals: Intervals before the end of the prompt, and after it.
        document: Number of tokens at the beginning of the prompt that are compressed by themselves, at most to the
        budget; `None` for no document.
        images: First and last positions of images in the prompt that a budget must not divide: what would be due inside
        one happens before it.
    """
    left, rows = {}, 0
    num_coming = {first: last - first for first, last in images}
    end = n if document is None else document
    for position in range(1, num_computed + 1):
        rows += 1
        keep = rows
        if budget is not None and rows + num_coming.get(position, 0) >= budget + intervals[position >= n]:
            keep = min(rows, budget)
        if position == end:
            keep = min(keep, expected_keep(end, ratio, first, last))
        if position == document and budget is not None:
            keep = min(keep, budget)
        if keep < rows:
            left[position] = rows = keep
    return left


def expected_numbers(n: int, num_tokens: int, *args: Any, found: int = 0, **kwargs: Any) -> dict[str, int]:
    """Returns counts in `usage.kv_cache` of an answer of `num_tokens`; other arguments as for `expected_compactions`.

    The last token is not computed, and a compaction happens when a token after it is computed. Compactions up to the
    position `found`, whose rows were found, count as the request's own.
    """
    num_computed = n + num_tokens - 1
    left = expected_compactions(n, num_computed - 1, *args, **kwargs)
    last = max(left, default=0)
    kept = left.get(last, 0) + num_computed - last
    numbers = {
        "prompt_tokens": n,
        "kept_tokens": kept,
        "evicted_tokens": num_computed - kept,
        "compactions": len(left),
    }
    return {**numbers, "found_tokens": found} if found or kwargs.get("document") else numbers


def check_numbers(output: Any, **rule: Any) -> dict[str, int]:
    """Checks the numbers in vLLM's `output`, wherever the request found compacted rows of an earlier one.

    Args:
    output: Output of one finished request.
        rule: Arguments of `expected_compactions`.

    Returns:
        The numbers.

    Raises:
        AssertionError: The numbers are wrong, or the request continued from a position without a compaction.
    """
    n, num_tokens = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    numbers = {name: value for name, value in numbers_of(output).items() if name != "reason"}
    found = numbers.get("found_tokens", 0)
    assert found in {0, *expected_compactions(n, n - 1, **rule)}, f"{n} tokens, {rule}: {found} found"
    expected = expected_numbers(n, num_tokens, found=found, **rule)
    assert numbers == expected, f"{n} tokens, {rule}: {numbers}, not {expected}"
    return numbers


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    s_aux=None,
    softcap=None,
    first_position=None,
    images=(),
    **others,
):
    """Causal attention for layers with different numbers of rows; `transformers` makes one mask for all layers.

    `s_aux` are learned sinks, a logit for each head; `softcap` bounds logits. `first_position` is the position of the
    first query, for attention within chunks of the text and in `images`, whose tokens all see each other: first and
    last positions.
    """
    shape = query.shape[2], key.shape[2]
    num_before = shape[1] - shape[0]
    mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(num_before)
    if sliding_window is not None:
        mask = mask.triu(num_before - sliding_window + 1)
    if first_position is not None and module.config.layer_types[module.layer_idx] == "chunked_attention":
        positions = torch.arange(first_position - num_before, first_position + shape[0], device=query.device)
        chunks = positions // module.config.attention_chunk_size
        mask &= chunks[num_before:, None] == chunks
    for first, last in images:
        begin, end = max(first - first_position, 0), last + 1 - first_position  # among the queries
        if end > 0:
            mask[begin:end, num_before + begin : num_before + end] = True
    if (held := _held(key)).logical_not().any():
        mask = mask & held.repeat_interleave(query.shape[1] // key.shape[1], dim=1).unsqueeze(2)
        key = key.nan_to_num()
    if s_aux is None and softcap is None:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    else:
        keys, values = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        logits = query @ keys.transpose(2, 3) * scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        logits = logits.masked_fill(~mask, -torch.inf)
        sinks = torch.full_like(logits[..., :1], -torch.inf) if s_aux is None else s_aux.view(1, -1, 1, 1)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1)
        attended = logits.softmax(-1)[..., :-1] @ values
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register("any_rows", attend)


def _held(keys: torch.Tensor) -> torch.Tensor:
    """Returns which rows each head holds, `[1, num_kv_heads, num_rows]`; keys of rows that it lacks are NaN."""
    return keys[..., 0].isnan().logical_not()


class RoundedCache(DynamicCache):
    """A cache whose keys and values are rounded to a smaller type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def update(self, keys, values, *args, **kwargs):
        keys, values = (states.to(self.dtype).to(states.dtype) for states in (keys, values))
        return super().update(keys, values, *args, **kwargs)


class Reference:
    """`cache_dtype` is the type to which cached keys and values are rounded; `full_heads` are those of `Settings`."""

    auto_class = AutoModelForCausalLM
    attention: str | dict[str, str] = "any_rows"

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        cache_dtype: torch.dtype | None = None,
        full_heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        model = self.auto_class.from_pretrained(model, dtype=dtype, attn_implementation=self.attention)
        self.model = model.eval().to(device)
        self.device = device
        self.full_heads = full_heads or {}
        self.new_cache = DynamicCache if cache_dtype is None else partial(RoundedCache, cache_dtype)
        self._begun: dict[tuple[int, ...], tuple[DynamicCache, torch.Tensor]] = {}

    def generate(self, prompt: Sequence[int], num_tokens: int, *args: Any, **kwargs: Any) -> list[int]:
        """Returns greedy tokens; further arguments as for `logits`."""
        return self.logits(prompt, [None] * num_tokens, *args, **kwargs).argmax(-1).tolist()

    def greedy(self, prompt: Sequence[int], answer: Sequence[int], *args: Any, **kwargs: Any) -> list[int]:
        """Returns the most likely token after the prompt and after each beginning of an answer.

        They equal the answer exactly if `generate` would return it. `generate` takes a pass for each token, this a few.
        """
        return self.logits(prompt, answer, *args, **kwargs).argmax(-1).tolist()

    @torch.inference_mode()
    def logits(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int | None],
        ratio: str = "1",
        full_layers: Sequence[int] = (0, 1),
        first: int = 0,
        last: int = 0,
        budget: int | None = None,
        intervals: tuple[int, int] = (2048, 256),
        document: int | None = None,
        images: Sequence[tuple[int, int]] = (),
    ) -> torch.Tensor:
        """Returns logits of each next token, `[len(tokens), vocabulary]` fp32.

        `tokens` are the generated ones; a `None` is replaced by the most likely token. Logits of tokens up to a
        compaction come from the cache before it. The other arguments are those of `expected_compactions`.
        """
        known, rows, n = [*prompt, *tokens], [], len(prompt)
        end_of_answer = n + len(tokens) - 1  # the last token is not computed
        left = expected_compactions(n, end_of_answer, ratio, first, last, budget, intervals, document, images)
        unknown = {place for place, token in enumerate(known) if token is None}
        cache, position = self.new_cache(), 0
        for end in sorted({*left, *unknown, n, end_of_answer}):
            cache, logits = self._computed(cache, known[:end], position, num_logits=end - position if end > n else 1)
            if end in left:
                cache = self._compacted(cache, left[end], full_layers, first, last)
            if end in unknown:
                known[end] = int(logits[-1].argmax())
            if end >= n:
                rows.append(logits)
            position = end
        return torch.cat(rows)

    def _computed(
        self, cache: DynamicCache, tokens: Sequence[int], position: int, num_logits: int
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Returns the cache after the tokens from `position` on, and logits of the tokens after the last ones."""
        if position == 0:  # remembered, since prompts are used several times
            if tuple(tokens) not in self._begun:
                self._begun[tuple(tokens)] = self._forward(self.new_cache(), tokens, 0, num_logits)
            return copy.deepcopy(self._begun[tuple(tokens)])
        return self._forward(cache, tokens, position, num_logits)

    def _forward(
        self, cache: DynamicCache, tokens: Sequence[int], position: int, num_logits: int
    ) -> tuple[DynamicCache, torch.Tensor]:
        logits = self.model(
            torch.tensor([tokens[position:]], device=self.device),
            past_key_values=cache,
            position_ids=torch.arange(position, len(tokens), device=self.device)[None],
            use_cache=True,
            logits_to_keep=num_logits,
            **self._more(position),
        ).logits
        return cache, logits[0].float()

    def _more(self, position: int) -> dict[str, Any]:
        """Returns further arguments that the model passes to attention."""
        return {}

    def _compacted(
        self, cache: DynamicCache, num_keep: int, full_layers: Sequence[int], first: int, last: int
    ) -> DynamicCache:
        compacted = self.new_cache()
        for index, layer in enumerate(cache.layers):
            if not hasattr(layer, "keys") or layer.is_sliding:
                # Unchanged, with its count of seen tokens.
                compacted.layers[index] = layer
                continue
            keys, values = layer.keys, layer.values
            heads = [head for head in range(keys.shape[1]) if head not in self.full_heads.get(index, ())]
            if index not in full_layers and heads:
                num_held = int(_held(keys)[0, heads[0]].sum())
                of_heads = [states[:, heads, -num_held:] for states in (keys, values)]
                kept = self._kept(index, of_heads[0][0], of_heads[1][0], num_keep, first, last)
                kept = kept.to(self.device)[..., None].expand(-1, -1, -1, keys.shape[-1])
                of_heads = [states.gather(2, kept) for states in of_heads]
                if len(heads) == keys.shape[1]:
                    keys, values = of_heads
                else:  # after rows that only full heads hold
                    keys, values = keys.clone(), values.clone()
                    keys[:, heads], values[:, heads] = torch.nan, 0
                    keys[:, heads, -num_keep:], values[:, heads, -num_keep:] = of_heads
            if hasattr(layer, "conv_states"):  # a layer with a state beside its rows
                layer.keys, layer.values = keys, values
                compacted.layers[index] = layer
            else:
                compacted.update(keys, values, index)
        return compacted

    def _kept(
        self, index: int, keys: torch.Tensor, values: torch.Tensor, num_keep: int, first: int, last: int
    ) -> torch.Tensor:
        """Returns the kept rows of layer `index`, `[1, num_kv_heads, num_keep]`, by a loop over heads and rows.

        Keys and values are `[num_kv_heads, num_rows, head_size]`, of the heads that are not full, in the order of
        their tokens.
        """
        num_rows = keys.shape[1]
        protected = set(range(min(first, num_rows))) | set(range(max(num_rows - last, 0), num_rows))
        rows = []
        for head in keys:
            norms = head.float().norm(dim=-1).tolist()
            ranked = sorted(range(num_rows), key=lambda row: (row not in protected, norms[row], row))
            rows.append(sorted(ranked[:num_keep]))
        return torch.tensor(rows)[None]
