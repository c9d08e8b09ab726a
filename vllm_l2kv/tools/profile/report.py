"""The report of a profile: text for the terminal, and one HTML file with heat maps."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_l2kv.cli_types import aligned, as_typed, counted, heads_in_words
from vllm_l2kv.profile import WORTH_HEADS, Profile, Target
from vllm_l2kv.settings import CLASSES, DEFAULT_MEMORY, HEADS, LAYERS
from vllm_l2kv.tools.html_report import embedded, write_html
from vllm_l2kv.tools.profile.doubts import warning, weak_memories
from vllm_l2kv.tools.profile.make import Made
from vllm_l2kv.tools.profile.norms import JUDGED, KEEP_RATIOS, NUM_PEAKS
from vllm_l2kv.tools.profile.ranks import POOLED
from vllm_l2kv.tools.profile.recommend import NAMES, NO_PROFILE, WHOLE, Outcome, Recommendation
from vllm_l2kv.tools.progress import duration

NUM_NAMED = 8
"""Number of layers that a summary names."""
PEAKED = 0.5
"""Share of a key's energy in `NUM_PEAKS` elements from which a head counts as peaked."""


class _Map(NamedTuple):
    """A heat map of layers by KV heads.

    Attributes:
        name: Name of its file.
        title: Title of the plot.
        values: `[L, H]`.
        colours: Name of a colormap of matplotlib.
        low: Value of the first color; `None` for the lowest value.
        high: Value of the last color; `None` for the highest value.
        caption: How to read it.
    """

    name: str
    title: str
    values: torch.Tensor
    colours: str
    low: float | None
    high: float | None
    caption: str


def summary(made: Made, model: str) -> str:
    """Text for the terminal.

    Args:
        made: The profile.
        model: The model as given by the user.
    """
    profile, measured, found = made
    about, num_compressible = profile.about, len(profile.shape.compressible)
    took = duration(sum(about["seconds"].values()))
    doubts = warning(found)
    lines = [
        f"{profile.model}: {num_compressible} of {profile.shape.num_layers} layers may compress, "
        f"{profile.shape.num_kv_heads} KV heads each.",
        f"Layers and heads were measured with {counted(measured.num_questions, 'question')} about facts; the model "
        f"answers {measured.num_answered} exactly with its whole cache.",
        f"Settings were searched with {counted(found.num_searched, 'other question')}, and judged with "
        f"{found.num_judged} more.",
        *_needed(profile, measured.loss),
        "",
        *_beside_layers(settings(made)),
        "",
        *_how_to_read(made),
        "",
        f"Profile: {profile.path} ({took}"
        + (f", {about['peak_gib']} GiB of GPU memory)" if about["peak_gib"] else ")"),
        *([doubts] if doubts else []),
        *how_to_use(made, model),
    ]
    return "\n".join(lines)


def how_to_use(made: Made, model: str) -> Iterator[str]:
    """A command that serves with the default memory, or with the next higher one of use, see `weak_memories`."""
    profile, num_ranks = made.profile, made.profile.about["tensor_parallel_size"]
    good = {
        target.memory
        for target in profile.recommended
        if target.memory >= DEFAULT_MEMORY
        and target.memory not in weak_memories(made.found, profile.default_classes(target.memory, num_ranks))
    }
    if not good:
        yield f"No memory from {DEFAULT_MEMORY:g} up is good enough to serve with."
        return
    command = ["serve", model, "--kv-profile", str(profile.path), "--kv-memory", f"{min(good):g}"]
    yield "Use it with:"
    yield f"  {shlex.join([as_typed(), *command])}"


def _beside_layers(lines: list[list[str]]) -> Iterator[str]:
    """Aligns all columns except the last one, which is left-aligned, since it may be long."""
    for line, text in zip(lines, aligned([line[:-1] for line in lines]), strict=True):
        yield f"{text}  {line[-1]}"


def settings(made: Made) -> list[list[str]]:
    """A table as lines of cells, the first one a heading: memories, their settings, and shares of exact answers."""
    outcomes = {(each.name, each.memory): each for each in made.found.outcomes}
    lines = [["memory", "keep ratio", "scorer", "seen", "hidden", "no profile: seen", "hidden", "full"]]
    for target in sorted(made.profile.recommended, key=lambda target: -target.memory):
        exact = []
        for name in (NAMES[target.classes][0], NO_PROFILE):
            outcome = outcomes.get((name, target.memory))
            exact += [f"{share:.2f}" for share in reversed(outcome.exact)] if outcome else ["", ""]
        lines.append([f"{target.memory:g}", f"{target.keep_ratio:.3f}", str(target.ranking), *exact, _full(target)])
    return lines


def _full(each: Target | Outcome) -> str:
    """Full layers or heads, as text."""
    if each.full_heads:
        return f"heads {heads_in_words(each.full_heads)}"
    return f"layers {', '.join(map(str, each.full_layers)) or 'none'}"


def _outcomes(made: Made) -> list[list[str]]:
    lines = [["setting", "memory", "scorer", "keep ratio", "loss seen", "hidden", "exact seen", "hidden", "full"]]
    for each in made.found.outcomes:
        numbers = [f"{number:.2f}" for pair in (each.loss, each.exact) for number in reversed(pair)]
        setting = f"{each.memory:g}", str(each.ranking), f"{each.keep_ratio:.3f}"
        lines.append([each.name, *setting, *numbers, _full(each)])
    return lines


def _by_kind(made: Made) -> list[list[str]]:
    """Results of the whole cache and the settings, by kind of text."""
    asked = made.found.judged
    lines = [["memory", "full", "scorer", *(f"{kind} ({asked[kind]})" for kind in asked)]]
    for each in made.found.outcomes:
        if each.name in (WHOLE, *(NAMES[classes][0] for classes in CLASSES)):
            shares = ("{1:.2f} / {0:.2f}".format(*each.exact_by_kind[kind]) for kind in asked)
            lines.append([f"{each.memory:g}", HEADS if each.full_heads else LAYERS, str(each.ranking), *shares])
    return lines


def _how_to_read(made: Made) -> Iterator[str]:
    yield (
        "memory: share of the whole cache. Full layers or heads keep every row; the others keep the share of the keep "
        "ratio, chosen by the scorer. At each memory a server takes full heads if the mean of their shares seen and "
        f"hidden is higher by more than {WORTH_HEADS:g}, else full layers; --kv-classes says otherwise."
    )
    yield (
        f"seen, hidden: share of exact answers to {counted(made.found.num_judged, 'question')} that the search did not "
        "use, with compression after the question (seen) and before it (hidden)."
    )
    yield "no profile: the same memory with the first layers full and l2 in the others."


def _rounds(found: Recommendation) -> str:
    """The rounds of the search, as a sentence."""
    rounds = (f"{each.settings} on {counted(each.questions, 'question')}" for each in found.rounds)
    return f"Settings were tried in rounds, the best ones again: {', '.join(rounds)}."


def write_report(made: Made, folder: Path) -> Path:
    """Draws heat maps and writes the HTML file to an existing folder; returns its path."""
    profile, measured, found = made
    sections: list[dict[str, Any]] = [
        {
            "title": "Settings",
            "note": " ".join(filter(None, (warning(found), *_how_to_read(made)))),
            "table": settings(made),
        },
        {
            "title": "What was compared",
            "note": f"{_rounds(found)} {counted(found.num_judged, 'other question')} served to judge the results. "
            "Loss: nats per token of the answer; exact: share of exact answers. The loss varies less by chance than "
            "the share.",
            "table": _outcomes(made),
        },
        {
            "title": "What fails",
            "note": "Share of exact answers by kind of text: seen / hidden. Questions that the whole cache does not "
            "answer either are no loss.",
            "table": _by_kind(made),
        },
        {
            "title": "What answers need",
            "note": " ".join(_needed(profile, measured.loss)),
            "plots": _drawn(_rank_maps(made), folder),
            "table": _layer_table(made),
        },
        {
            "title": "Norms and attention",
            "note": "Whether keys of low norm get attention, as the scorer l2 assumes.",
            "plots": _drawn(_norm_maps(made), folder),
            "table": _norm_table(made),
        },
        {
            "title": "Directions of keys of low norm",
            "note": _directions(made),
            "plots": _drawn(_direction_maps(made), folder),
            "table": _peak_table(made),
        },
        *_images(made, folder),
        {
            "title": "How it was made",
            "text": "\n".join(f"{name}: {value}" for name, value in profile.about.items() if name != "search"),
        },
    ]
    return write_html(f"Profile of {profile.model}", sections, folder)


def _needed(profile: Profile, loss: torch.Tensor) -> Iterator[str]:
    order = ", ".join(map(str, profile.layer_order[:NUM_NAMED]))
    yield f"Layers that answers need most: {order}."
    losses = {layer: loss[layer].item() for layer in profile.shape.compressible}
    worst, best = max(losses, key=losses.__getitem__), min(losses, key=losses.__getitem__)
    yield (
        f"With only the protected rows in layer {worst}, answers lose {losses[worst]:.2f} nats per token; with only "
        f"those in layer {best}, {round(losses[best], 2) + 0.0:.2f}."
    )


def _rank_maps(made: Made) -> Iterator[_Map]:
    measured = made.measured
    yield _Map(
        "retrieval",
        "attention from answers to facts",
        measured.retrieval,
        "viridis",
        0.0,
        None,
        "Attention from the answer's tokens to the words of the text that state it. Bright heads retrieve facts, so "
        "they need every row.",
    )
    yield _Map(
        "repetition",
        f"share of rows kept, shared budget of {POOLED:g}",
        measured.repetition,
        "viridis",
        0.0,
        1.0,
        "Share of its rows that each head would keep if all heads shared a tenth of the cache, and the rows with the "
        "most attention from a repetition of the text were kept. Bright heads use much of the text.",
    )
    worst = measured.head_loss.nan_to_num().abs().max().item()
    yield _Map(
        "head_loss",
        "nats that answers lose without a head's rows",
        measured.head_loss,
        "RdBu_r",
        -worst,
        worst,
        "Loss of answers if only this head keeps just the protected rows. Red heads are needed. A head that retrieves "
        "facts is white if other heads can replace it.",
    )


def _norm_maps(made: Made) -> Iterator[_Map]:
    norms = made.measured.norms
    ratio = KEEP_RATIOS[JUDGED]
    yield _Map(
        "variation",
        "std / mean of key norms",
        norms["variation"],
        "viridis",
        0.0,
        None,
        "How much the key norms of a head vary. Near 0 they are almost equal, and their order means nothing.",
    )
    yield _Map(
        "correlation",
        "rank correlation of -norm and attention",
        norms["correlation"],
        "RdBu",
        -1.0,
        1.0,
        "Blue: tokens of low norm get more attention, as eviction by norm assumes. White or red: they do not.",
    )
    yield _Map(
        "alr",
        "attention loss reference / tokens",
        norms["alr"],
        "viridis_r",
        0.0,
        None,
        "How much more attention eviction by norm loses than the best possible choice, over all ratios. 0 is the best "
        "choice; darker is worse.",
    )
    yield _Map(
        "loss",
        f"attention lost, keep ratio {ratio:g}",
        norms["loss"][JUDGED],
        "RdBu_r",
        0.0,
        1.0,
        "Share of the attention to the prompt that goes to evicted tokens if half of them are kept by norm. White is "
        "the loss of random eviction; blue is less, red is more.",
    )


def _direction_maps(made: Made) -> Iterator[_Map]:
    norms = made.measured.norms
    yield _Map(
        "all_query",
        "cosine of keys and queries",
        norms["all_query"],
        "RdBu",
        -1.0,
        1.0,
        "Red: queries point away from keys, so dot products are negative, and closest to 0 for short keys, which get "
        "the most attention. Blue: long keys get the most, unless directions differ much.",
    )
    yield _Map(
        "low_first",
        "cosine of low-norm keys and the first tokens' keys",
        norms["low_first"],
        "RdBu",
        -1.0,
        1.0,
        "Blue: keys of low norm have the direction of the first tokens' keys, the attention sink.",
    )
    yield _Map(
        "peaks_moved",
        f"attention moved by zeroing {NUM_PEAKS} peaks",
        norms["peaks_moved"] - norms["others_moved"],
        "RdBu_r",
        -1.0,
        1.0,
        f"Share of the attention that moves to other tokens if the {NUM_PEAKS} largest elements of low-norm keys are "
        "set to zero in all keys, minus the share for as many random elements. Red: these few elements decide.",
    )


def _images(made: Made, folder: Path) -> Iterator[dict[str, Any]]:
    """The section on images; empty without pictures."""
    images, about = made.measured.images, made.profile.about
    if not images:
        return
    lines = [["layer", "norm of text", "of images", "variation of text", "of images", "images kept"]]
    names = ("text_norm", "image_norm", "text_variation", "image_variation", "kept")
    for layer in made.profile.shape.compressible:
        lines.append([str(layer), *(f"{images[name][layer].mean().item():.2f}" for name in names)])
    yield {
        "title": "Norms of images",
        "note": f"{about['pictures']} pictures, {about['image_tokens']} tokens, each in the middle of as many tokens "
        "of text. The table has means over heads. Images kept: share of the image's rows that l2 keeps if it keeps "
        "half of the prompt; 0.5 if norms of images and text do not differ.",
        "plots": _drawn(_image_maps(images), folder),
        "table": lines,
    }


def _image_maps(images: dict[str, torch.Tensor]) -> Iterator[_Map]:
    yield _Map(
        "image_norms",
        "norm of image keys / norm of text keys",
        images["image_norm"] / images["text_norm"],
        "PuOr_r",
        0.0,
        2.0,
        "White: keys of images and text have equal norms. Orange: those of images are longer, so l2 evicts them first. "
        "Purple: those of images are shorter.",
    )
    yield _Map(
        "images_kept",
        "share of image rows kept at 0.5",
        images["kept"],
        "RdBu",
        0.0,
        1.0,
        "White: equal shares of images and text are kept. Red heads lose more of the image, blue ones more of text.",
    )


def _directions(made: Made) -> str:
    """Measurements on the paper's open question: why keys of low norm get attention."""
    norms = made.measured.norms
    mean = {name: norms[name].nanmean().item() for name in norms if norms[name].dim() == 2}
    shares = _peak_shares(norms["energy"])
    peaked = (shares >= PEAKED).sum().item()
    loss = norms["loss"][JUDGED]
    away, towards = norms["all_query"] < 0, norms["all_query"] >= 0
    lost = [f"{loss[heads].mean().item():.2f}" if heads.any() else "nothing" for heads in (away, towards)]
    return (
        f"Queries point away from keys in {away.sum().item()} heads, where evicting half by norm loses {lost[0]} of "
        f"the attention, and towards them in {towards.sum().item()}, where it loses {lost[1]}. Means over heads: the "
        f"cosine of keys and queries is {mean['all_query']:.2f}, that of keys of low norm and queries "
        f"{mean['low_query']:.2f}, and that of keys of low norm and the first tokens' keys {mean['low_first']:.2f}. "
        f"{NUM_PEAKS} elements have {shares.nanmean().item():.0%} of the energy of low-norm keys, and at least half of "
        f"it in {peaked} heads. Setting them to zero moves {mean['peaks_moved']:.0%} of the attention, setting others "
        f"to zero {mean['others_moved']:.0%}. Eviction by norms without them loses {mean['loss_without_peaks']:.2f} of "
        f"the attention at keep ratio {KEEP_RATIOS[JUDGED]:g}, by full norms {loss.nanmean().item():.2f}."
    )


def _layer_table(made: Made) -> list[list[str]]:
    """A table of the layers that may compress, the most important ones first."""
    profile, measured, _ = made
    lines = [
        ["layer", "retrieval, best head", "repetition, best head", "loss without it", "full at memory", "full heads"]
    ]
    for layer in profile.layer_order:
        memories = [f"{target.memory:g}" for target in profile.recommended if layer in target.full_layers]
        numbers = (measured.retrieval[layer].max(), measured.repetition[layer].max(), measured.loss[layer])
        heads = (
            f"{target.memory:g}: {','.join(map(str, target.full_heads[layer]))}"
            for target in profile.recommended
            if layer in target.full_heads
        )
        words = ", ".join(memories), "; ".join(heads)
        lines.append([str(layer), *(f"{number.item():.3f}" for number in numbers), *words])
    return lines


def _norm_table(made: Made) -> list[list[str]]:
    """A table of the attention that each compressible layer loses at each keep ratio."""
    norms = made.measured.norms
    lines = [["layer", *(f"keep {ratio:g}" for ratio in KEEP_RATIOS), "correlation", "first token's share"]]
    lines.append(["random eviction", *(f"{1 - ratio:.2f}" for ratio in KEEP_RATIOS), "", ""])
    for layer in made.profile.shape.compressible:
        losses = [f"{loss:.2f}" for loss in norms["loss"][:, layer].mean(-1).tolist()]
        others = (f"{norms[name][layer].mean().item():.2f}" for name in ("correlation", "sink"))
        lines.append([str(layer), *losses, *others])
    return lines


def _peak_table(made: Made) -> list[list[str]]:
    """A table of the elements with the most energy in each head, and how much attention depends on them."""
    norms = made.measured.norms
    shares, peaks = _peak_shares(norms["energy"]), norms["energy"].nan_to_num().topk(NUM_PEAKS, 0).indices
    lines = [["layer", "head", "elements that peak", "their energy", "attention moved without them", "without others"]]
    for layer in made.profile.shape.compressible:
        for head in range(made.profile.shape.num_kv_heads):
            elements = ", ".join(map(str, sorted(peaks[:, layer, head].tolist())))
            moved = (f"{norms[name][layer, head].item():.2f}" for name in ("peaks_moved", "others_moved"))
            lines.append([str(layer), str(head), elements, f"{shares[layer, head].item():.0%}", *moved])
    return lines


def _peak_shares(energy: torch.Tensor) -> torch.Tensor:
    """Share of the energy, `[head_size, L, H]`, in the `NUM_PEAKS` largest elements: `[L, H]`."""
    return energy.topk(NUM_PEAKS, 0).values.sum(0) / energy.sum(0)


def _drawn(maps: Iterator[_Map], folder: Path) -> list[dict[str, str]]:
    """Draws PNG files of layers by KV heads; layers that never compress are gray."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []
    for each in maps:
        num_layers, num_heads = each.values.shape
        figure = Figure(figsize=(2.5 + 0.25 * num_layers, 1.5 + 0.25 * num_heads), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps[each.colours].with_extremes(bad="lightgrey")
        image = axes.imshow(each.values.T.numpy(), cmap=colours, vmin=each.low, vmax=each.high)
        axes.set(title=each.title, xlabel="layer", ylabel="KV head", yticks=range(num_heads))
        figure.colorbar(image)
        path = folder / f"{each.name}.png"
        figure.savefig(path)
        drawn.append(embedded(path, f"{each.caption} Gray layers never compress."))
    return drawn
