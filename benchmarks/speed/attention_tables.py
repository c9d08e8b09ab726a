"""The sections of docs/benchmarks.md about attention kernels: strides of KV blocks, and heads of two classes."""

from typing import Any

from benchmarks.speed.page_parts import Row, plot, table

SECTIONS = """## Attention and the stride of KV blocks

Decode attention on the layouts of `vllm_l2kv.kv_cache_spec.pack` takes {least:.3f} to {most:.3f} x stock vLLM's time.
8 requests x 15,000 tokens, FlashAttention 3, microseconds a layer, in brackets the ratio to stock. `pack` gave these
layouts when the rows were made (padding unit 4 KiB on the H200, 32 KiB today); stock vLLM has 16 tokens a block:

{layouts}

The stride decides: multiples of 5 are slow on an H100, multiples of 47 on an H200, in units of 64 KiB at 16 tokens a
block. So a little padding is enough, here of the 8B shape's 1,920 KiB (ratios to stock):

{padding}

![decode attention by stride](img/attention.svg)

Longer blocks do not help instead: unpadded on an H100 this shape takes {joined} x stock's time with {sizes} tokens a
block. `BLNHC`, the other order of heads and tokens, takes {least_order:.3f} to {most_order:.3f} x the time of `BLHNC`,
over all shapes and lengths of blocks. Rows: `h100_attention.jsonl` and `h200_attention.jsonl`, by

    python -m benchmarks.speed.attention --out h100_attention.jsonl

### Where the last percent of a decode step goes

To adjacent blocks, which stock vLLM reads faster; blocks of vllm-l2kv hold all layers, so those of one layer are never
adjacent. A fresh engine, as above, gives a request adjacent blocks. In a server that has been running blocks are
scattered, and the difference is gone. Microseconds a layer, stock and compressed layers, in brackets their ratio:

{loads}

    python -m benchmarks.speed.attention --out h100_attention_loads.jsonl --shapes 8b --loads 24x6000 100x700 64x256 \\
        4x24000 --only stock compressed full [--fresh]

## Heads of two classes in a layer

Cache write and decode attention of one layer in a CUDA graph, FlashAttention 3, microseconds on one {heads_gpu}.
{full_heads} of 8 KV heads hold every token, the others a share (in brackets), by two calls of attention or by one.
`plain`: vLLM with every token in every head. `equal counts`: the same rows spread evenly. Outputs of one call and of
two differ by {heads_difference:.3f} at most.

{heads}

    python -m benchmarks.speed.heads_attention --out h100_heads_attention.jsonl
"""


WAYS = ("equal counts", "two calls", "one call")


def attention_sections(rows: list[Row], loads: list[Row], heads: list[Row]) -> str:
    """Returns all these sections.

    Args:
        rows: Rows of `attention.py`, from both GPUs.
        loads: Rows of `attention.py --loads`.
        heads: Rows of `heads_attention.py`.
    """
    ratios = [row["ratio"] for row in rows if row["what"] in ("compressed", "full")]
    unpadded = unpadded_ratios(rows)
    orders = [on["BLNHC"] / on["BLHNC"] for on in unpadded.values() if len(on) == 2]
    joined = {size: on["BLHNC"] for (gpu, shape, size), on in unpadded.items() if (gpu, shape) == ("H100", "8b")}
    return SECTIONS.format(
        least=min(ratios),
        most=max(ratios),
        layouts=layouts_table(rows),
        padding=padding_table(rows),
        joined=", ".join(f"{joined[size]:.2f}" for size in sorted(joined)),
        sizes=", ".join(map(str, sorted(joined))),
        least_order=min(orders),
        most_order=max(orders),
        loads=loads_table(loads),
        heads_gpu=heads[0]["gpu"],
        full_heads=heads[0]["full"],
        heads_difference=max(row["one call: difference"] for row in heads),
        heads=heads_table(heads),
    )


def gpu_of(row: Row) -> str:
    """Returns `H100` or `H200`."""
    return row["gpu"].removeprefix("NVIDIA ").split()[0]


def layouts_table(rows: list[Row]) -> str:
    """Returns a table with a line for each GPU and shape: stock vLLM, and both classes of `pack`, with one stride."""
    of_shape: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["what"] != "scan":
            of_shape.setdefault((gpu_of(row), row["shape"]), {})[row["what"]] = row
    lines = []
    for place, of in of_shape.items():
        stock, compressed, full = (of[what] for what in ("stock", "compressed", "full"))
        classes = [f"{row['us_per_layer']} ({row['ratio']})" for row in (compressed, full)]
        blocks = f"{compressed['block_size']}, {full['block_size']}"
        stride = f"{compressed['stride'] // 1024:,} KiB", f"{compressed['padding']:.1%}"
        lines.append([*place, stock["us_per_layer"], *classes, blocks, *stride])
    return table("GPU shape stock compressed full tokens,a,block stride padding", lines)


def padding_table(rows: list[Row]) -> str:
    """Returns a table of the 8B shape at strides a little above its own, with a line for each GPU."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        is_padding = row["num_layers"] == 30 and row["block_size"] == 16 and row["layout"] == "BLHNC"
        if row["shape"] == "8b" and row["what"] == "scan" and is_padding:
            found.setdefault(gpu_of(row), {})[row["stride"] // 1024 - 1920] = row["ratio"]
    paddings = sorted(set().union(*found.values()))
    lines = [[gpu, *(ratios.get(padding, "") for padding in paddings)] for gpu, ratios in found.items()]
    return table(f"GPU {' '.join(f'{padding},KiB' for padding in paddings)}", lines)


def unpadded_ratios(rows: list[Row]) -> dict[tuple[str, str, int], dict[str, float]]:
    """Returns times of unpadded blocks in stock vLLM's, by GPU, shape and tokens a block, and then by layout."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    num_layers = {"8b": 30, "8b-tp4": 30, "1b": 14, "70b-8-layers": 6, "135m": 28}
    for row in rows:
        if row["what"] == "scan" and not row["padding"] and row["num_layers"] == num_layers.get(row["shape"]):
            of_blocks = found.setdefault((gpu_of(row), row["shape"], row["block_size"]), {})
            of_blocks[row["layout"]] = row["ratio"]
    return found


def loads_table(rows: list[Row]) -> str:
    """Returns a table with a line for each load, with blocks in order and with blocks shuffled."""
    lines = []
    for load in dict.fromkeys(row["load"] for row in rows):
        us = {(row["fresh"], row["what"]): row["us_per_layer"] for row in rows if row["load"] == load}
        cells = []
        for fresh in (True, False):
            stock, compressed = us[fresh, "stock"], us[fresh, "compressed"]
            cells.append(f"{stock}, {compressed} ({compressed / stock:.3f})")
        lines.append([load, *cells])
    return table("load adjacent,blocks scattered,blocks", lines)


def heads_table(rows: list[Row]) -> str:
    """Returns a table with a line for each load: all tokens in all heads, then each way by the share of tokens held."""
    shares = list(dict.fromkeys(row["share"] for row in rows))
    found = {(row["load"], row["share"]): row for row in rows}
    columns = [(way, share) for share in shares for way in WAYS]
    lines = [
        [load, *(f"{found[load, share][way]:.1f}" for way, share in [("plain", shares[0]), *columns])]
        for load in dict.fromkeys(row["load"] for row in rows)
    ]
    heads = [f"{way.replace(' ', ',')},({share:g})" for way, share in columns]
    return table(f"load plain {' '.join(heads)}", lines)


def plot_attention(rows_of: dict[str, list[Row]]) -> None:
    """Draws the attention time of the 8B shape by stride."""
    labels: dict[str, Any] = {"xlabel": "stride between blocks, KiB", "ylabel": "time, of stock vLLM's"}
    with plot("attention", **labels, title="decode attention, one layer") as axes:
        for name, rows in rows_of.items():
            scan = {
                row["stride"] // 1024: row["ratio"]
                for row in rows
                if row["shape"] == "8b" and row["what"] == "scan" and row["block_size"] == 16 and not row["padding"]
                if row["layout"] == "BLHNC" and row["stride"] % (64 * 1024) == 0 and row["num_layers"] > 2
            }
            axes.plot(sorted(scan), [scan[stride] for stride in sorted(scan)], ".-", label=name)
