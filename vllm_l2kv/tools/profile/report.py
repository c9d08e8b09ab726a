"""What a profile says, for people: on the terminal, and in one HTML file with heat maps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_l2kv.cli_types import aligned, heads_in_words
from vllm_l2kv.profile import Profile, Target
from vllm_l2kv.settings import CLASSES, HEADS, LAYERS
from vllm_l2kv.tools.html_report import embedded, write_html
from vllm_l2kv.tools.profile.make import Made
from vllm_l2kv.tools.profile.norms import JUDGED, KEEP_RATIOS, NUM_PEAKS
from vllm_l2kv.tools.profile.ranks import POOLED
from vllm_l2kv.tools.profile.recommend import NAMES, Outcome
from vllm_l2kv.tools.progress import duration

USED_MEMORY = 0.5
"""Of the command that a summary ends with."""
NUM_NAMED = 8
"""Layers that a summary names."""
PEAKED = 0.5
"""Share of a key's energy in `NUM_PEAKS` elements from which a head counts as peaked."""


class _Map(NamedTuple):
    """A heat map of layers by KV heads.

    Attributes:
        name: Of its file.
        title: Above it.
        values: `[L, H]`.
        colours: Of matplotlib.
        low: Value of the first colour; `None` for the lowest.
        high: Of the last one.
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
    """What the terminal shows.

    Args:
        made: The profile.
        model: As the user named it.
    """
    profile, measured, _ = made
    about, num_compressible = profile.about, len(profile.shape.compressible)
    memories = [target.memory for target in profile.memory]
    took = duration(sum(about["seconds"].values()))
    lines = [
        f"{profile.model}: {num_compressible} of {profile.shape.num_layers} layers may compress, "
        f"{profile.shape.num_kv_heads} KV heads each.",
        f"{measured.num_questions} questions about facts: from its whole cache the model answers "
        f"{measured.num_answered} exactly.",
        *_needed(profile, measured.loss),
        "",
        *_beside_layers(settings(made)),
        "",
        *_how_to_read(made),
        "",
        f"Profile: {profile.path} ({took}"
        + (f", {about['peak_gib']} GiB of GPU memory)" if about["peak_gib"] else ")"),
        "Use it with:",
        f"  vllm-l2kv serve {model} --kv-profile {profile.path} "
        f"--kv-memory {USED_MEMORY if USED_MEMORY in memories else memories[-1]:g}",
    ]
    return "\n".join(lines)


def _beside_layers(lines: list[list[str]]) -> Iterator[str]:
    """Lines with the last column, which is long in some, to the left."""
    for line, text in zip(lines, aligned([line[:-1] for line in lines]), strict=True):
        yield f"{text}  {line[-1]}"


def settings(made: Made) -> list[list[str]]:
    """Lines of words, the first one a heading: each memory, what it is spent on, and what answers are left."""
    outcomes = {(each.name, each.memory): each for each in made.found.outcomes}
    lines = [["memory", "keep ratio", "scorer", "seen", "hidden", "no profile: seen", "hidden", "full"]]
    for target in sorted(made.profile.memory, key=lambda target: -target.memory):
        exact = []
        for name in (NAMES[target.classes][0], "no profile"):
            outcome = outcomes.get((name, target.memory))
            exact += [f"{share:.2f}" for share in reversed(outcome.exact)] if outcome else ["", ""]
        lines.append([f"{target.memory:g}", f"{target.keep_ratio:.3f}", target.scorer, *exact, _full(target)])
    return lines


def _full(each: Target | Outcome) -> str:
    """What stays full."""
    if each.full_heads:
        return f"heads {heads_in_words(each.full_heads)}"
    return f"layers {', '.join(map(str, each.full_layers)) or 'none'}"


def _outcomes(made: Made) -> list[list[str]]:
    lines = [["setting", "memory", "scorer", "keep ratio", "loss seen", "hidden", "exact seen", "hidden", "full"]]
    for each in made.found.outcomes:
        numbers = [f"{number:.2f}" for pair in (each.loss, each.exact) for number in reversed(pair)]
        lines.append([each.name, f"{each.memory:g}", each.scorer, f"{each.keep_ratio:.3f}", *numbers, _full(each)])
    return lines


def _by_kind(made: Made) -> list[list[str]]:
    """The whole cache and the settings, by kinds of texts."""
    asked = made.found.judged
    lines = [["memory", "full", "scorer", *(f"{kind} ({asked[kind]})" for kind in asked)]]
    for each in made.found.outcomes:
        if each.name in ("whole cache", *(NAMES[classes][0] for classes in CLASSES)):
            shares = ("{1:.2f} / {0:.2f}".format(*each.exact_by_kind[kind]) for kind in asked)
            lines.append([f"{each.memory:g}", HEADS if each.full_heads else LAYERS, each.scorer, *shares])
    return lines


def _how_to_read(made: Made) -> Iterator[str]:
    yield (
        "memory: share of the whole cache. Full layers or heads keep every row, the others the keep ratio, chosen by "
        "the scorer. Settings of heads are served with --kv-classes heads."
    )
    yield (
        f"seen, hidden: share of {sum(made.found.judged.values())} questions, which the search did not use, that are "
        "answered exactly; compressed after the question, and before it is known."
    )
    yield "no profile: the same memory with the first layers full and l2 in the others."


def write_report(made: Made, folder: Path) -> Path:
    """Draws heat maps and writes the HTML file into a folder that exists."""
    profile, measured, _ = made
    sections: list[dict[str, Any]] = [
        {
            "title": "Settings",
            "note": " ".join(_how_to_read(made)),
            "table": settings(made),
        },
        {
            "title": "What was compared",
            "note": f"{made.found.num_tried} settings were tried on a few questions, and the best "
            f"{made.found.num_finalists} of them on {sum(made.found.searched.values())}; these are judged by "
            f"{sum(made.found.judged.values())} others. Loss in nats a token of the answer; exact: share of the "
            "answers. The loss differs less by chance than the share.",
            "table": _outcomes(made),
        },
        {
            "title": "What fails",
            "note": "Share of the answers that are exact, by the kind of text that they are about, seen and hidden. "
            "Where the whole cache does not answer either, nothing is lost.",
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
            "note": "Whether low norms say what the model looks at, which is what the scorer l2 relies on.",
            "plots": _drawn(_norm_maps(made), folder),
            "table": _norm_table(made),
        },
        {
            "title": "Where keys of low norm lie",
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
        f"With only the protected rows of layer {worst}, answers lose {losses[worst]:.2f} nats a token; with those of "
        f"layer {best}, {round(losses[best], 2) + 0.0:.2f}."
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
        "How much attention an answer pays, while it is said, to the words of the text that tell it. Bright heads "
        "fetch facts: they need every row.",
    )
    yield _Map(
        "repetition",
        f"share of rows kept of a pooled budget of {POOLED:g}",
        measured.repetition,
        "viridis",
        0.0,
        1.0,
        "If all heads shared a tenth of the cache, and rows were kept by the attention that a repetition of the text "
        "pays them: the share of its rows that each head would keep. Bright heads use much of the text.",
    )
    worst = measured.head_loss.nan_to_num().abs().max().item()
    yield _Map(
        "head_loss",
        "nats that answers lose without a head's rows",
        measured.head_loss,
        "RdBu_r",
        -worst,
        worst,
        "What answers lose when this head alone keeps only the protected rows. Red heads are needed; where others can "
        "take over, a head is white although it retrieves.",
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
        "How far the key norms of a head differ. Near 0 they are all alike, and their order says nothing.",
    )
    yield _Map(
        "correlation",
        "rank correlation of -norm and attention",
        norms["correlation"],
        "RdBu",
        -1.0,
        1.0,
        "Blue: tokens of low norm draw attention, which is what evicting by norm relies on. White or red: they do not.",
    )
    yield _Map(
        "alr",
        "attention loss reference / tokens",
        norms["alr"],
        "viridis_r",
        0.0,
        None,
        "How much more attention evicting by norm loses than the best possible choice, over all ratios. 0 is the best "
        "choice; the darker, the worse.",
    )
    yield _Map(
        "loss",
        f"attention lost, keep ratio {ratio:g}",
        norms["loss"][JUDGED],
        "RdBu_r",
        0.0,
        1.0,
        "Share of the attention to the prompt that goes to evicted tokens when half are kept by norm. White is what "
        "evicting at random loses; blue loses less, red more.",
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
        "Red: queries point away from keys, so dot products are negative, and the shorter a key the less so: short "
        "keys draw attention. Blue: long keys do, unless directions differ much.",
    )
    yield _Map(
        "low_first",
        "cosine of low-norm keys and the first tokens' keys",
        norms["low_first"],
        "RdBu",
        -1.0,
        1.0,
        "Blue: keys of low norm point where the first tokens' keys point, the direction of the attention sink.",
    )
    yield _Map(
        "peaks_moved",
        f"attention moved by zeroing {NUM_PEAKS} peaks",
        norms["peaks_moved"] - norms["others_moved"],
        "RdBu_r",
        -1.0,
        1.0,
        f"Share of the attention that goes elsewhere when the {NUM_PEAKS} largest elements of low-norm keys are zeroed "
        "in all keys, less the share when as many random elements are. Red: these few elements decide.",
    )


def _images(made: Made, folder: Path) -> Iterator[dict[str, Any]]:
    """The section on images, if there were some."""
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
        "of text. Means over heads in the table. If l2 kept half of such a prompt, it would keep this share of the "
        "image's rows; 0.5 if norms did not tell them from text.",
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
        "White: keys of images are as long as those of text. Orange: longer, so l2 evicts them first. Purple: shorter.",
    )
    yield _Map(
        "images_kept",
        "share of image rows kept at 0.5",
        images["kept"],
        "RdBu",
        0.0,
        1.0,
        "White is what a choice keeps that does not tell images from text. Red heads lose the image, blue ones text.",
    )


def _directions(made: Made) -> str:
    """The open question of the paper, in numbers of this model."""
    norms = made.measured.norms
    mean = {name: norms[name].nanmean().item() for name in norms if norms[name].dim() == 2}
    shares = _peak_shares(norms["energy"])
    peaked = (shares >= PEAKED).sum().item()
    loss = norms["loss"][JUDGED]
    away, towards = norms["all_query"] < 0, norms["all_query"] >= 0
    lost = [f"{loss[heads].mean().item():.2f}" if heads.any() else "nothing" for heads in (away, towards)]
    return (
        f"Queries point away from keys in {away.sum().item()} heads, where evicting half by norm loses {lost[0]} of "
        f"the attention, and towards them in {towards.sum().item()}, where it loses {lost[1]}. Means over heads. Keys "
        f"against queries: cosine {mean['all_query']:.2f}; keys of low norm: {mean['low_query']:.2f}. Those against "
        f"the first tokens' keys: {mean['low_first']:.2f}. "
        f"{NUM_PEAKS} elements hold {shares.nanmean().item():.0%} of the energy of low-norm keys, half or more of it "
        f"in {peaked} heads. Zeroing them moves {mean['peaks_moved']:.0%} of the attention, zeroing others "
        f"{mean['others_moved']:.0%}. Norms without them lose {mean['loss_without_peaks']:.2f} of the attention at "
        f"keep ratio {KEEP_RATIOS[JUDGED]:g}, norms as they are {loss.nanmean().item():.2f}."
    )


def _layer_table(made: Made) -> list[list[str]]:
    """Each layer that may compress, those that answers need most first."""
    profile, measured, _ = made
    lines = [
        ["layer", "retrieval, best head", "repetition, best head", "loss without it", "full at memory", "full heads"]
    ]
    for layer in profile.layer_order:
        memories = [f"{target.memory:g}" for target in profile.memory if layer in target.full_layers]
        numbers = (measured.retrieval[layer].max(), measured.repetition[layer].max(), measured.loss[layer])
        heads = (
            f"{target.memory:g}: {','.join(map(str, target.full_heads[layer]))}"
            for target in profile.memory
            if layer in target.full_heads
        )
        words = ", ".join(memories), "; ".join(heads)
        lines.append([str(layer), *(f"{number.item():.3f}" for number in numbers), *words])
    return lines


def _norm_table(made: Made) -> list[list[str]]:
    """What each layer that may compress loses at each keep ratio, of attention."""
    norms = made.measured.norms
    lines = [["layer", *(f"keep {ratio:g}" for ratio in KEEP_RATIOS), "correlation", "first token's share"]]
    lines.append(["random eviction", *(f"{1 - ratio:.2f}" for ratio in KEEP_RATIOS), "", ""])
    for layer in made.profile.shape.compressible:
        losses = [f"{loss:.2f}" for loss in norms["loss"][:, layer].mean(-1).tolist()]
        others = (f"{norms[name][layer].mean().item():.2f}" for name in ("correlation", "sink"))
        lines.append([str(layer), *losses, *others])
    return lines


def _peak_table(made: Made) -> list[list[str]]:
    """Of each head, which elements peak, and what they decide."""
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
    """Share of the energy `[head_size, L, H]` that lies in the largest elements: `[L, H]`."""
    return energy.topk(NUM_PEAKS, 0).values.sum(0) / energy.sum(0)


def _drawn(maps: Iterator[_Map], folder: Path) -> list[dict[str, str]]:
    """Draws PNGs of layers by KV heads; layers that never compress are grey."""
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
        drawn.append(embedded(path, f"{each.caption} Grey layers never compress."))
    return drawn
