"""Whether the norms of a model's keys say what it will look at: measured per layer and KV head, on its own attention.

A recommendation drawn from it is about attention mass, and no promise about answers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_l2kv.evaluation.attention import (
    attention_loss,
    attention_loss_reference,
    rank_correlation,
    variation,
)
from vllm_l2kv.evaluation.observe import FULL_ATTENTION, Observation, chunks, layer_types, load, observe

NUM_QUERIES = 32
"""Queries behind the prompt. One, as in the paper, says more of that token than of the head."""
KEEP_RATIOS = (0.75, 0.5, 0.25, 0.1)
JUDGED = KEEP_RATIOS.index(0.5)
"""Where layers and heads are judged: half is what the paper claims to be harmless."""
FLAT_VARIATION = 0.02
"""Below, a norm is a constant with noise; heads of SmolLM2 and Gemma 3 have 0.05 to 0.2."""
SINK = 0.1
"""Share of attention from which the first token counts as a sink."""
BAD_LOSS = 0.5
"""A layer that loses more than this share of what random eviction loses is better left full."""
MAX_FULL_LAYERS = 1 / 3
"""Share of the candidates that may be left full while any ratio is safe: each saves less."""
LOSS_BOUND = 0.1
"""Mean share of attention that a safe ratio may lose: chosen, not derived. An attention's output is a mean of values,
and this exchanges a tenth of its weights."""
ADVICE = {
    "flat norms": "the order of norms is mostly chance, try another kv-scorer",
    "no correlation": "low norms do not draw attention, try another kv-scorer",
    "no better than random": "evicting by norm loses as much as evicting at random",
    "only the first token": "apart from the first token, evicting by norm is no better than at random",
    "first token at risk": "it draws much attention and low ratios evict it, kv-protect-first: 1 keeps it",
}
"""Flags of heads; the first three mean that there is no signal."""


@dataclass(frozen=True)
class Diagnosis:
    """Means over chunks, fp32 `[num_layers, num_kv_heads]`; those over keep ratios have `len(KEEP_RATIOS)` in front.

    Layers that do not have full attention never compress and are NaN.

    Attributes:
        model: Its path.
        layer_types: Of each layer, as `transformers` names them.
        num_prompt_tokens: Tokens n of a chunk in front of its queries, the candidates.
        num_chunks: Chunks that were measured.
        variation: Standard deviation over mean of the norms.
        correlation: Spearman's, between minus the norm and the attention received.
        alr: The paper's attention loss reference, in [0, n].
        loss: Share of attention lost by evicting the highest norms.
        ideal_loss: The lowest that any eviction could lose; a random one loses `1 - keep_ratio`.
        sink: Share of attention that the first token receives.
        sink_rank: Share of tokens of lower norm than the first; it is evicted where this exceeds the keep ratio.
        loss_beyond_first: As `loss`, on the other tokens alone: keeping a sink makes any loss look small.
    """

    model: str
    layer_types: tuple[str, ...]
    num_prompt_tokens: int
    num_chunks: int
    variation: torch.Tensor
    correlation: torch.Tensor
    alr: torch.Tensor
    loss: torch.Tensor
    ideal_loss: torch.Tensor
    sink: torch.Tensor
    sink_rank: torch.Tensor
    loss_beyond_first: torch.Tensor

    @property
    def alr_per_token(self) -> torch.Tensor:
        """ALR over n: the mean loss in excess of the ideal, over all numbers of dropped tokens; in [0, 1]."""
        return self.alr / self.num_prompt_tokens

    @property
    def candidates(self) -> list[int]:
        """Layers that may compress."""
        return [layer for layer, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION]

    def flags(self) -> dict[str, torch.Tensor]:
        """Keys of `ADVICE` to bool `[num_layers, num_kv_heads]`, false where nothing was measured."""
        random_loss = 1 - KEEP_RATIOS[JUDGED]
        no_better = self.loss[JUDGED] >= random_loss
        return {
            "flat norms": self.variation < FLAT_VARIATION,
            "no correlation": self.correlation <= 0,
            "no better than random": no_better,
            "only the first token": (self.loss_beyond_first[JUDGED] >= random_loss) & ~no_better,
            "first token at risk": (self.sink >= SINK) & (self.sink_rank >= min(KEEP_RATIOS)),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One JSON object for each layer and head; numbers are null where nothing was measured."""
        flags = self.flags()
        singles = ("variation", "correlation", "alr", "alr_per_token", "sink", "sink_rank")
        for layer, kind in enumerate(self.layer_types):
            for head in range(self.variation.shape[1]):
                row: dict[str, Any] = {"layer": layer, "layer_type": kind, "head": head}
                row |= {name: _number(getattr(self, name)[layer, head]) for name in singles}
                for name in ("loss", "ideal_loss", "loss_beyond_first"):
                    losses = getattr(self, name)[:, layer, head]
                    row[name] = {str(ratio): _number(loss) for ratio, loss in zip(KEEP_RATIOS, losses, strict=True)}
                row["random_loss"] = {str(ratio): round(1 - ratio, 6) for ratio in KEEP_RATIOS}
                row["flags"] = [flag for flag, raised in flags.items() if raised[layer, head]]
                yield row


@dataclass(frozen=True)
class Recommendation:
    """Settings to begin with.

    Attributes:
        full_layers: Layers to leave full.
        keep_ratio: The smallest of `KEEP_RATIOS` that keeps to `LOSS_BOUND`, 1 if none does.
        warnings: Sentences for the user.
    """

    full_layers: tuple[int, ...]
    keep_ratio: float
    warnings: tuple[str, ...]


def measure(
    model_path: str, texts: Sequence[str], num_tokens: int = 1024, num_chunks: int = 8, progress: bool = True
) -> Diagnosis:
    """Runs the model over chunks of text and looks at its keys and attention.

    The last `NUM_QUERIES` tokens of a chunk are the queries, the others the prompt.

    Args:
        model_path: Folder or name of a model that `transformers` can load; runs in fp32, on a GPU if there is one.
        texts: Cut into chunks, each by itself; what is left at an end is not used.
        num_tokens: Length of a chunk, with the tokenizer's BOS token, if it has one, in front.
        num_chunks: Chunks to measure of each text, fewer if it has fewer.
        progress: Whether to show a bar on standard error.

    Raises:
        ValueError: Chunks too short for the queries, texts too short for a chunk, or a model without full attention.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers import AutoTokenizer

    if num_tokens < 2 * NUM_QUERIES:
        raise ValueError(f"num_tokens must be at least {2 * NUM_QUERIES}, got {num_tokens}.")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    read = [chunk for text in texts for chunk in islice(chunks(tokenizer, text, num_tokens), num_chunks)]
    if not read:
        raise ValueError(f"No text is {num_tokens} tokens long; give longer ones or a smaller num_tokens.")
    model = load(model_path)
    types = layer_types(model)
    candidates = [layer for layer, kind in enumerate(types) if kind == FULL_ATTENTION]
    if not candidates:
        raise ValueError(f"No layer of {model_path} has full attention, so none would compress.")

    bar = tqdm(read, desc="Measuring", unit="chunk", disable=not progress)
    # A dictionary for each chunk and candidate.
    measured = [[_measure_layer(seen) for seen in observe(model, candidates, chunk, NUM_QUERIES)] for chunk in bar]
    means = {}
    for name in measured[0][0]:
        values = torch.stack([torch.stack([layer[name] for layer in chunk], dim=-2) for chunk in measured]).mean(0)
        means[name] = values.new_full((*values.shape[:-2], len(types), values.shape[-1]), torch.nan)
        means[name][..., candidates, :] = values
    return Diagnosis(model_path, types, num_tokens - NUM_QUERIES, len(read), **means)


def recommend(diagnosis: Diagnosis) -> Recommendation:
    """Layers to leave full and a keep ratio, by attention mass.

    Layers whose heads lose, on average, more than `BAD_LOSS` of what random eviction loses at half the tokens stay
    full, the worst first, `MAX_FULL_LAYERS` of the layers at most, or as many more as make a ratio safe. The ratio is
    the smallest at which the other layers lose `LOSS_BOUND` or less on average.
    """
    candidates = diagnosis.candidates
    judged, bound = diagnosis.loss[JUDGED].mean(-1).tolist(), BAD_LOSS * (1 - KEEP_RATIOS[JUDGED])
    bad = sorted((layer for layer in candidates if judged[layer] > bound), key=lambda layer: -judged[layer])
    few = min(len(bad), math.floor(MAX_FULL_LAYERS * len(candidates)))
    # Something must be left to compress.
    counts = range(few, min(len(bad) + 1, len(candidates)))
    full = tuple(sorted(bad[: next((n for n in counts if _safe_ratios(diagnosis, bad[:n])), few)]))
    compressed = [layer for layer in candidates if layer not in full]
    safe = _safe_ratios(diagnosis, full)

    warnings = []
    for flag, raised in diagnosis.flags().items():
        if raised.any():
            heads = f"{int(raised.sum())} of {len(candidates) * raised.shape[1]} heads"
            warnings.append(f"{flag}: {heads}, layers {_listed(raised.any(-1).nonzero().flatten())}; {ADVICE[flag]}.")
    if len(full) > few:
        warnings.append(f"With fewer full layers no ratio is safe, so {len(compressed)} of {len(candidates)} compress.")
    if left := sorted(set(bad) - set(full)):
        warnings.append(f"Layers {_listed(left)} are bad too, but more full layers than {len(full)} would save little.")
    if not safe:
        lost = diagnosis.loss[0, compressed].mean()
        warnings.append(f"Keeping {KEEP_RATIOS[0]:g} would lose {lost:.0%} of the attention; nothing is evicted.")
    elif (sink := diagnosis.sink[compressed].mean()) >= SINK:
        rest = diagnosis.loss_beyond_first[KEEP_RATIOS.index(min(safe)), compressed].mean()
        warnings.append(f"The first token receives {sink:.0%} of the attention; of the rest, {rest:.0%} is lost.")
    return Recommendation(full, min(safe, default=1.0), tuple(warnings))


def heat_maps(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Draws PNGs of layers by KV heads into a folder that exists; layers that never compress are grey.

    Returns:
        Paths of the variation, the correlation, ALR and the loss at half the tokens.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ratio = KEEP_RATIOS[JUDGED]
    drawings = {
        "variation": ("std / mean of key norms", diagnosis.variation, "viridis", 0.0, None),
        "correlation": ("rank correlation of -norm and attention", diagnosis.correlation, "RdBu", -1.0, 1.0),
        "alr": ("attention loss reference / tokens", diagnosis.alr_per_token, "viridis_r", 0.0, None),
        # White is what random eviction loses.
        f"loss_{ratio:g}": (f"attention lost, keep ratio {ratio:g}", diagnosis.loss[JUDGED], "RdBu_r", 0.0, 1.0),
    }
    num_layers, num_heads = diagnosis.variation.shape
    paths = []
    for name, (title, values, colours, low, high) in drawings.items():
        figure = Figure(figsize=(2.5 + 0.25 * num_layers, 1.5 + 0.25 * num_heads), layout="constrained")
        axes = figure.subplots()
        colour_map = matplotlib.colormaps[colours].with_extremes(bad="lightgrey")
        image = axes.imshow(values.T.numpy(), cmap=colour_map, vmin=low, vmax=high)
        axes.set(title=title, xlabel="layer", ylabel="KV head", yticks=range(num_heads))
        figure.colorbar(image)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def config_text(recommendation: Recommendation, model: str) -> str:
    """A file for `vllm-l2kv serve --config`."""
    lines = [
        f"# Recommended by `vllm-l2kv diagnose` for {model}, from attention mass: no promise about answers.",
        *(f"# {warning}" for warning in recommendation.warnings),
        f'kv-full-layers: "{",".join(map(str, recommendation.full_layers))}"',
        f"kv-default-keep-ratio: {recommendation.keep_ratio}",
        "kv-scorer: l2",
    ]
    return "\n".join(lines) + "\n"


def _safe_ratios(diagnosis: Diagnosis, full_layers: Sequence[int]) -> list[float]:
    compressed = [layer for layer in diagnosis.candidates if layer not in full_layers]
    means = diagnosis.loss[:, compressed].mean((-2, -1)).tolist()
    return [ratio for ratio, mean in zip(KEEP_RATIOS, means, strict=True) if mean <= LOSS_BOUND]


def _measure_layer(seen: Observation) -> dict[str, torch.Tensor]:
    """Fields of `Diagnosis` for one layer: `[num_kv_heads]` or `[len(KEEP_RATIOS), num_kv_heads]`, fp32, on the CPU."""
    norms, attention = seen.norms[:, :-NUM_QUERIES], seen.attention[..., :-NUM_QUERIES]
    received = attention.sum(1)
    loss, ideal_loss = attention_loss(norms, attention, KEEP_RATIOS)
    loss_beyond_first, _ = attention_loss(norms[:, 1:], attention[..., 1:], KEEP_RATIOS)
    found = {
        "variation": variation(norms),
        "correlation": rank_correlation(-norms, received),
        "alr": attention_loss_reference(norms, attention),
        "loss": loss,
        "ideal_loss": ideal_loss,
        "sink": (received[:, 0] / received.sum(-1)).nan_to_num(),
        "sink_rank": (norms < norms[:, :1]).float().mean(-1),
        "loss_beyond_first": loss_beyond_first,
    }
    return {name: value.float().cpu() for name, value in found.items()}


def _number(value: torch.Tensor) -> float | None:
    number = value.item()
    return None if math.isnan(number) else round(number, 6)


def _listed(layers: Iterable[Any]) -> str:
    return ", ".join(str(int(layer)) for layer in layers)
