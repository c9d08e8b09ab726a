"""Draws the pictures of README and docs that the code itself determines: docs/img/{rows,pool,life}.svg.

python scripts/pictures.py
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vllm-l2kv"  # the same code makes the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

from vllm_l2kv.block_math import num_blocks_for  # noqa: E402
from vllm_l2kv.params import CompressionParams  # noqa: E402
from vllm_l2kv.policy import CompactionPoints, Intervals, num_keep  # noqa: E402

IMAGES = Path(__file__).parents[1] / "docs" / "img"
FULL, COMPRESSED, OTHER, FREE = "#1f4e79", "#6baed6", "#f2b872", "#ffffff"
"""Colours of blocks: of full layers, of compressed layers, of a second request, free."""


def main() -> None:
    """Writes all pictures."""
    for name, draw in {"rows": draw_rows, "pool": draw_pool, "life": draw_life}.items():
        draw().savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


# Rows that a request holds, computed by the policy.

PROMPT, ANSWER, DOCUMENT = 8_000, 3_000, 6_000
REQUESTS = {
    "kv_keep_ratio 0.5": CompressionParams(keep_ratio=0.5),
    "kv_max_tokens 2048": CompressionParams(max_tokens=2_048),
    f"kv_keep_ratio 0.25, kv_prefix_tokens {DOCUMENT}": CompressionParams(keep_ratio=0.25, prefix_tokens=DOCUMENT),
}


def draw_rows() -> Figure:
    """Draws the rows of a compressed layer over the tokens of a request, one panel for each rule."""
    figure, panels = plt.subplots(1, len(REQUESTS), figsize=(11, 3), sharey=True, layout="constrained")
    for axes, (title, params) in zip(panels, REQUESTS.items(), strict=True):
        axes.axvspan(0, PROMPT, color="0.95")
        axes.plot([0, PROMPT + ANSWER], [0, PROMPT + ANSWER], ":", color="0.5", label="uncompressed")
        axes.plot(*zip(*held_rows(params), strict=True), color=FULL, label="rows held")
        if params.prefix_tokens:
            axes.axvline(params.prefix_tokens, color="0.6", linewidth=0.8)
            axes.annotate("found by\nlater requests", (params.prefix_tokens + 150, 300), fontsize="small")
        axes.set(title=title, xlabel="tokens: prompt (grey), answer", xlim=(0, PROMPT + ANSWER), ylim=(0, None))
        axes.title.set_fontsize("medium")
    panels[0].set(ylabel="rows of each KV head")
    panels[0].legend(fontsize="small", loc="upper left")
    return figure


def held_rows(params: CompressionParams) -> Iterator[tuple[int, int]]:
    """Yields the corners of the line: tokens computed, rows held."""
    num_tokens, num_evicted = PROMPT + ANSWER, 0
    yield 0, 0
    for compaction in CompactionPoints(PROMPT, params, Intervals()).until(num_tokens):
        yield compaction.position, compaction.num_rows
        yield compaction.position, compaction.num_keep
        num_evicted = compaction.num_evicted
    yield num_tokens, num_tokens - num_evicted


# Blocks of the pool, in the sizes of the demo model.

COMPRESSED_SIZE, FULL_SIZE, POOL = 32, 448, 64
"""Tokens in a block of 28 compressed layers, and of 2 full ones; blocks in the picture."""
TOKENS = 1_400
COLUMNS = 16


class Held(NamedTuple):
    """Number of blocks that one request holds, of full and of compressed layers."""

    full: int
    compressed: int

    @classmethod
    def by(cls, num_rows: int) -> "Held":
        """Returns the blocks of a prompt of `TOKENS` that holds so many rows in compressed layers."""
        return cls(num_blocks_for(TOKENS, FULL_SIZE), num_blocks_for(num_rows, COMPRESSED_SIZE))


def draw_pool() -> Figure:
    """Draws a pool before a compaction, after it, and with a second request."""
    whole, half = Held.by(TOKENS), Held.by(num_keep(TOKENS, CompressionParams(keep_ratio=0.5)))
    freed = [FREE] * (whole.compressed - half.compressed)
    before = [FULL] * whole.full + [COMPRESSED] * whole.compressed
    after = [FULL] * half.full + [COMPRESSED] * half.compressed + freed
    rest = POOL - len(before)
    second = [OTHER] * (half.full + half.compressed)
    pools = {
        f"{TOKENS:,} tokens, all kept: {sum(whole)} blocks": before + [FREE] * rest,
        f"keep ratio 0.5: {sum(half)} blocks": after + [FREE] * rest,
        "room for a second one": (second_in(after, second) + [FREE] * rest)[:POOL],
    }
    figure, panels = plt.subplots(1, len(pools), figsize=(11, 2), layout="constrained")
    for axes, (title, colors) in zip(panels, pools.items(), strict=True):
        draw_blocks(axes, colors)
        axes.set_title(title, fontsize="medium")
    legend = {
        f"a block of 2 full layers x {FULL_SIZE} tokens": FULL,
        f"of 28 compressed layers x {COMPRESSED_SIZE} tokens": COMPRESSED,
        "of another request": OTHER,
        "free": FREE,
    }
    patches = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="0.4", label=text) for text, color in legend.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def second_in(colors: Sequence[str], second: Sequence[str]) -> list[str]:
    """Returns the pool's blocks with the second request in the free ones; any block can hold either class."""
    waiting = list(second)
    filled = [waiting.pop() if color == FREE and waiting else color for color in colors]
    return filled + waiting


def draw_blocks(axes: Axes, colors: Iterable[str]) -> None:
    """Draws a square for each block, line by line."""
    for index, color in enumerate(colors):
        line, column = divmod(index, COLUMNS)
        axes.add_patch(Rectangle((column, -line), 0.86, 0.86, facecolor=color, edgecolor="0.4", linewidth=0.6))
    axes.set(xlim=(-0.3, COLUMNS + 0.2), ylim=(-POOL / COLUMNS + 0.8, 1.1), aspect="equal")
    axes.axis("off")


# Processes, and what happens to a request in each.

PROCESSES = {
    "Client": "",
    "Front end": "vllm_l2kv_server",
    "Engine core": "vllm_l2kv.scheduler",
    "Device": "vllm_l2kv.worker, .kernels",
}
LIFE = [
    (0, 1, "kv_keep_ratio 0.5"),
    (1, 1, "check the fields, or answer 400"),
    (1, 2, "prompt, fields"),
    (2, 2, "compute compaction points;\nlook for compacted prefixes"),
    (2, 3, "chunks of the prompt, none across a point"),
    (3, 0, "first token, computed on the whole cache"),
    (2, 2, "free blocks beyond 500 rows;\nwaiting requests start"),
    (2, 3, "order: 1,000 rows to 500"),
    (3, 3, "score, select and move rows;\npositions become slots"),
    (3, 0, "further tokens, computed on 500 rows and their own"),
    (1, 0, "usage.kv_cache: kept, evicted, memory"),
]
"""Steps: the process where each begins, the process where it ends, and its text."""
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def draw_life() -> Figure:
    """Draws a request from top to bottom, one column for each process."""
    figure, axes = plt.subplots(figsize=(11, 6.4), layout="constrained")
    bottom = -len(LIFE) - 0.3
    for column, (name, package) in enumerate(PROCESSES.items()):
        axes.plot([column, column], [-0.2, bottom], color="0.75", linewidth=1, zorder=0)
        axes.text(column, 0.25, name, ha="center", weight="bold")
        axes.text(column, 0, package, ha="center", va="center", fontsize="small", family="monospace", color="0.35")
    for step, (start, end, text) in enumerate(LIFE, start=1):
        draw_step(axes, -step + 0.1, start, end, text)
    axes.set(xlim=(-0.5, len(PROCESSES) - 0.4), ylim=(bottom, 0.6))
    axes.axis("off")
    return figure


def draw_step(axes: Axes, height: float, start: int, end: int, text: str) -> None:
    """Draws an arrow from one process to another, or a box for a step within one."""
    if start == end:
        box = FancyBboxPatch((start - 0.42, height - 0.33), 0.84, 0.66, boxstyle="round,pad=0,rounding_size=.05")
        box.set(facecolor="#e8f1fa", edgecolor=FULL, linewidth=0.8)
        axes.add_patch(box)
        axes.text(start, height, text, ha="center", va="center", fontsize="small")
        return
    axes.annotate("", (end, height), (start, height), arrowprops={"arrowstyle": "-|>", "color": FULL})
    axes.text((start + end) / 2, height + 0.1, text, ha="center", va="bottom", fontsize="small", bbox=ON_WHITE)


if __name__ == "__main__":
    main()
