"""Whether the norms of a model's keys say what it will look at: measured per layer and KV head, on its own attention.

`recommend` draws settings from it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_l2kv.tools.evaluation.attention import (
    attention_loss,
    attention_loss_reference,
    rank_correlation,
    variation,
)
from vllm_l2kv.tools.evaluation.hf_observer import FULL_ATTENTION, Observation, chunks, layer_types, load, observe
from vllm_l2kv.tools.evaluation.progress import Progress

NUM_QUERIES = 32
"""Queries after the prompt. One, as in the paper, says more of that token than of the head."""
KEEP_RATIOS = (0.75, 0.5, 0.25, 0.1)
JUDGED = KEEP_RATIOS.index(0.5)
"""Where layers and heads are judged: half is what the paper claims to be harmless."""
FLAT_VARIATION = 0.02
"""Below, a norm is a constant with noise; heads of SmolLM2 and Gemma 3 have 0.05 to 0.2."""
SINK = 0.1
"""Share of attention from which the first token counts as a sink."""
BAD_LOSS = 0.5
"""A layer that loses more than this share of what random eviction loses is better left full."""
CAPTIONS = {
    "variation": "How far the key norms of a head differ. Near 0 they are all alike, and their order says nothing; "
    f"below {FLAT_VARIATION:g} a head counts as flat.",
    "correlation": "Blue: tokens of low norm draw attention, which is what evicting by norm relies on. White or red: "
    "they do not, and another scorer or a full layer is called for.",
    "alr": "How much more attention evicting by norm loses than the best possible choice, over all ratios. 0 is the "
    "best choice; the darker, the worse.",
    "loss": "Share of the attention to the prompt that goes to evicted tokens when half are kept. White is what "
    "evicting at random loses; blue loses less, red more.",
}
"""Under each heat map: how to read it."""


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
        """Keys of `recommend.MEANINGS` to bool `[num_layers, num_kv_heads]`, false where nothing was measured."""
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


def measure(
    model_path: str, texts: Sequence[str], num_tokens: int = 1024, num_chunks: int = 8, progress: Progress | None = None
) -> Diagnosis:
    """Runs the model over chunks of text and looks at its keys and attention.

    The last `NUM_QUERIES` tokens of a chunk are the queries, the others the prompt.

    Args:
        model_path: Folder or name of a model that `transformers` can load; runs in fp32, on a GPU if there is one.
        texts: Cut into chunks, each by itself; what is left at an end is not used.
        num_tokens: Length of a chunk, with the tokenizer's BOS token, if it has one, in front.
        num_chunks: Chunks to measure of each text, fewer if it has fewer.
        progress: Counts every layer of every chunk.

    Raises:
        ValueError: Chunks too short for the queries, texts too short for a chunk, or a model without full attention.
    """
    from transformers import AutoTokenizer

    if num_tokens < 2 * NUM_QUERIES:
        raise ValueError(f"num_tokens must be at least {2 * NUM_QUERIES}, got {num_tokens}.")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    read = [chunk for text in texts for chunk in islice(chunks(tokenizer, text, num_tokens), num_chunks)]
    if not read:
        raise ValueError(f"No text is {num_tokens} tokens long; give longer ones or a smaller num_tokens.")
    progress = progress or Progress()
    progress.begin(f"loading {model_path}")
    model = load(model_path)
    types = layer_types(model)
    candidates = [layer for layer, kind in enumerate(types) if kind == FULL_ATTENTION]
    if not candidates:
        raise ValueError(f"No layer of {model_path} has full attention, so none would compress.")

    progress.begin(f"reading {len(read)} chunks of {num_tokens} tokens")
    # A dictionary for each chunk and candidate.
    measured = []
    for number, chunk in enumerate(read, start=1):
        progress.part(f"reading chunk {number} of {len(read)}, {num_tokens} tokens each", len(candidates), "layers")
        seen = observe(model, candidates, chunk, NUM_QUERIES, progress)
        measured.append([_measure_layer(layer) for layer in seen])
        progress.reached(number / len(read))
    means = {}
    for name in measured[0][0]:
        values = torch.stack([torch.stack([layer[name] for layer in chunk], dim=-2) for chunk in measured]).mean(0)
        means[name] = values.new_full((*values.shape[:-2], len(types), values.shape[-1]), torch.nan)
        means[name][..., candidates, :] = values
    return Diagnosis(model_path, types, num_tokens - NUM_QUERIES, len(read), **means)


def heat_maps(diagnosis: Diagnosis, folder: Path) -> dict[Path, str]:
    """Draws PNGs of layers by KV heads into a folder that exists; layers that never compress are grey.

    Returns:
        Paths of the variation, the correlation, ALR and the loss at half the tokens, each with how to read it.
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
    captions = {}
    for name, (title, values, colours, low, high) in drawings.items():
        figure = Figure(figsize=(2.5 + 0.25 * num_layers, 1.5 + 0.25 * num_heads), layout="constrained")
        axes = figure.subplots()
        colour_map = matplotlib.colormaps[colours].with_extremes(bad="lightgrey")
        image = axes.imshow(values.T.numpy(), cmap=colour_map, vmin=low, vmax=high)
        axes.set(title=title, xlabel="layer", ylabel="KV head", yticks=range(num_heads))
        figure.colorbar(image)
        path = folder / f"{name}.png"
        figure.savefig(path)
        captions[path] = f"{CAPTIONS[name.partition('_')[0]]} Grey layers never compress."
    return captions


def table(diagnosis: Diagnosis, full_layers: Sequence[int]) -> list[list[str]]:
    """Lines of words, the first one a heading: what each layer that may compress loses at each keep ratio.

    Args:
        diagnosis: Of a model.
        full_layers: Layers that are recommended to stay full; they are marked.
    """
    random = [f"{1 - ratio:.2f}" for ratio in KEEP_RATIOS]
    lines = [["layer", *(f"keep {ratio:g}" for ratio in KEEP_RATIOS), "correlation", "heads flagged", "stays full"]]
    lines.append(["random eviction", *random, "", "", ""])
    flagged = torch.stack(list(diagnosis.flags().values())).any(0).sum(-1)
    for layer in diagnosis.candidates:
        losses = [f"{loss:.2f}" for loss in diagnosis.loss[:, layer].mean(-1).tolist()]
        correlation = f"{diagnosis.correlation[layer].mean().item():.2f}"
        full = "full" if layer in full_layers else ""
        lines.append([str(layer), *losses, correlation, str(int(flagged[layer]) or ""), full])
    return lines


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
