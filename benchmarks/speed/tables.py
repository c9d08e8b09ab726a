"""Writes docs/benchmarks.md, its plots and the README's headline table from the rows in benchmarks/speed/results.

python -m benchmarks.speed.tables
"""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.speed.attention_tables import attention_sections, plot_attention
from benchmarks.speed.document_tables import documents_section, plot_conversation
from benchmarks.speed.draft_tables import drafts_section
from benchmarks.speed.heads_tables import heads_section, heads_verdict
from benchmarks.speed.page_parts import GIB, PLOTS, ROOT, Row, filled, plot, read, table, values_of
from benchmarks.speed.serving import DOCUMENTS, ON_DEMAND, SCENARIOS
from vllm_l2kv.params import GRANULARITIES

PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
HEADLINE_BEGIN, HEADLINE_END = "<!-- headline: benchmarks/speed/tables.py -->", "<!-- end of headline -->"
TWO_GPU_FILES = ("decode_step", "memory_bound", "ample_memory", "70b_decode_step", "checks")
ENGINES = ("stock", "l2kv")
RATIOS = (0.5, 0.25, 0.1)
FIRST_TOKEN = "median_first_token_ms"

TEMPLATE = """# Benchmarks

Unless a section says otherwise: the shape of Llama-3.1-8B with made-up weights, bf16, full layers {{0, 1}}, one {gpu},
vLLM {vllm}, with async scheduling, prefix caching and full CUDA graphs.

{verdict}

`python -m benchmarks.speed.tables` makes this page from the rows in `benchmarks/speed/results`, which name their GPU
and commit. Where a section names a scenario, its rows are in `h100_SCENARIO.jsonl`, by this command, first with stock
vLLM and then with vllm-l2kv:

    python -m benchmarks.speed.serving --model FOLDER_WITH_CONFIG_JSON --out FOLDER --scenarios SCENARIO

## Decode step

Median of {num_steps} steps in milliseconds (scenario `decode_step`). Cases are requests x prompt tokens, and @ the keep
ratio; `ratio` is to uncompressed stock vLLM. The floor is the step if nothing but kept rows cost time: stock's step of
8 x 128, plus the share 2/32 + 30/32 x keep ratio of what its long prompts add.

{steps}

With an fp8 KV cache (`--engine-args '{{"kv_cache_dtype": "fp8_e4m3"}}'`) steps of vllm-l2kv take {fp8_steps}.

![decode step by keep ratio](img/decode_step.svg)

## Time to first token

One request on an idle engine, milliseconds, in brackets the ratio to stock (scenario `first_token`). `at 0.5` compacts
after the first token. With a budget the prompt is compacted on the way:

{first_token}

![time to first token by prompt length](img/first_token.svg)

## Ample memory

{ample_requests} requests at once, 256 + 256 tokens, the whole GPU for the cache, the engine core in its own process
(scenario `ample_memory`). Three runs; the ratio is of medians.

{ample}

Short steps are bound by the host, where `scheduler.decode_fast_path` saves time. A step of 256 decoding requests takes
{scheduler}. This is the scheduler's processor time without an engine, on another machine; rows: `scheduler.jsonl`, by

    PYTHONPATH=tests VLLM_CPU_KVCACHE_SPACE=1 python -m benchmarks.speed.scheduler --model FOLDER --out FILE

## A cache too small for its requests

Prompts of 8,000 tokens, answers of 1,000, a cache of {memory_gib:.0f} GiB, always eight requests in the queue, 40
seconds of steady state, 20 with an fp8 cache (scenario `memory_bound`). First token: from joining the queue. The bound
is how many requests of average length fit without padding.

{memory}

## Long answers

Prompts of 512 tokens, answers of 8,000, a cache of {answers_gib:.0f} GiB, always eight requests in the queue, 60
seconds of steady state (scenario `long_answers`). Gap: time between two tokens of a request. Compactions: their share
of the time, on the device.

{long_answers}

## Bursts

The worst case: 64 requests of 128 tokens begin together, so with a budget of 1,024 and an answer interval of 256 all
are compacted in the same step (scenario `bursts`). Milliseconds; compactions are part of the burst step.

{bursts}
{documents}{drafts}
## Compaction alone

All 30 compressed layers of one or eight prompts, on the device, in microseconds; in brackets the multiple of a
device-to-device copy of the bytes that must be touched (keys read once, kept rows read and written), and the share of
the prefill. Targets: at most twice the copy, and 0.5 % of the prefill.

{compaction}

Of one prompt at 0.25 {compaction_kernels} of the kernels' time (PyTorch's profiler).

    python -m benchmarks.speed.compaction --out h100_compaction.jsonl
{scorers}
{attention}{heads}{two_gpus}"""

VERDICT = """- **A cache too small**: {memory} x stock's output tokens a second at keep 1, {ratios}.
- **Long answers**: {answers} x with budgets of {budgets}.
- **Ample memory**: {ample} x at keep 1, {ratios}.
- **Decode step**: {idle} x stock's time with nothing compressed; {compressed} x at {ratios} (8 x 15,000 tokens).
- **First token**: {whole} x with a ratio; {first:.2f} x with a budget of {budget:,} at {length:,} tokens.
- **Full heads**: {heads}.
- **Compaction**: {shares} % of the prompt's prefill.
- **Documents**: see [choosing](choosing.md#one-document-many-questions)."""

SCORERS = """
## Scorers and blocks of tokens

No scorer takes more than {most:.1f} x as long as `l2`, by token, neighbors or block. One prompt of the 8B shape, keep
ratio {keep_ratio}: milliseconds on the device, in brackets the multiple of `l2` by tokens. Host: the longest of
{repeats} times that it waited while the device had {busy_ms} ms of other work. Targets: at most 3 x `l2`, less than 2
ms. All kernels compile in {warm_up_s:.0f} s, once on a machine.

{table}

    python -m benchmarks.speed.scorers --out h100_scorers.jsonl
"""

TWO_GPUS = """
## Two GPUs

{verdict}Tensor parallelism of 2 on two {gpu}, vLLM {vllm}, commit {commit}, NVLink multicast off. Rows:
`tp2_*.jsonl`, by `serving.py` with `--engine-args '{{"tensor_parallel_size": 2, "max_model_len": 32768}}'`, both
engines in one run.

{sections}
"""

TWO_GPU_SECTIONS = {
    "decode_step": "Decode step, milliseconds, as [on one GPU](#decode-step):",
    "memory_bound": "A cache too small for its requests, 8 GiB on each GPU:",
    "ample_memory": "Ample memory:",
    "70b_decode_step": (
        "Decode step of Llama-3.1-70B's shape, {num_layers} layers, as many as fit (`benchmarks/speed/shapes.py`). The "
        "cache that is left holds {stock_requests} requests of 4,000 prompt tokens and 250 generated ones in stock "
        "vLLM, and {requests} in vllm-l2kv at 1, 0.5 and 0.25:"
    ),
    "agreement": (
        "Greedy answers of 16 tokens on two GPUs and on one. Split sums of bf16 round differently, so the table has "
        "root mean squares of differences between logits of likely tokens: two GPUs to one, two GPUs to the Hugging "
        "Face reference in fp32, and this reference in bf16 to fp32 (`tests/gpu/test_two_gpus.py --rows FOLDER`):"
    ),
    "findings": "What else was run:",
}


def main() -> None:
    """Writes the page and the plots."""
    steps, attention, attention_h200 = read("h100_decode_step"), read("h100_attention"), read("h200_attention")
    PLOTS.mkdir(exist_ok=True)
    plot_steps([row for row in steps if row["kv_cache_dtype"] == "auto"])
    plot_attention({"H100": attention, "H200": attention_h200})
    plot_first_token(read("h100_first_token"))
    if conversation := read("h100_conversation", must_exist=False):
        plot_conversation(conversation)
    PAGE.write_text(page())
    before, begin, rest = README.read_text().partition(HEADLINE_BEGIN)
    end = rest[rest.index(HEADLINE_END) :]
    README.write_text(f"{before}{begin}\n{headline_of_rows()}\n{end}")


def page() -> str:
    """Returns the page, from the rows."""
    may_lack = (*DOCUMENTS, *ON_DEMAND)
    rows = {name: read(f"h100_{name}", name not in may_lack) for name in (*SCENARIOS, *ON_DEMAND)}
    steps, first, ample, memory = (rows[n] for n in ("decode_step", "first_token", "ample_memory", "memory_bound"))
    compaction, attention, attention_h200 = read("h100_compaction"), read("h100_attention"), read("h200_attention")
    by_class = read("h100_heads_attention")
    decoding, waiting = split_scheduler(read("scheduler"))
    bf16 = [row for row in steps if row["kv_cache_dtype"] == "auto"]
    text = TEMPLATE.format(
        gpu=steps[0]["gpu"],
        vllm=steps[0]["vllm"],
        num_steps=steps[0]["num_steps"],
        verdict=verdict(rows, compaction),
        steps=step_table(bf16),
        fp8_steps=" and ".join(f"{r['median_step_ms']:.2f} ms ({r['case']})" for r in steps if r not in bf16),
        first_token=first_token_table(first),
        ample_requests=ample[0]["num_requests"],
        ample=ample_table(ample),
        scheduler=scheduler_times(decoding),
        memory_gib=memory[0]["cache_bytes"] / GIB,
        memory=memory_table(memory),
        answers_gib=rows["long_answers"][0]["cache_bytes"] / GIB,
        long_answers=long_answers_table(rows["long_answers"]),
        bursts=bursts_table(rows["bursts"]),
        documents=documents_section({name: rows[name] for name in may_lack}, waiting),
        drafts=drafts_section(read("h100_drafts", must_exist=False)),
        compaction=compaction_table(compaction, first),
        compaction_kernels=kernel_shares(compaction),
        scorers=scorers_section(read("h100_scorers", must_exist=False)),
        attention=attention_sections([*attention, *attention_h200], read("h100_attention_loads"), by_class),
        heads=heads_section(read("h100_heads")),
        two_gpus=two_gpus_section({name: read(f"tp2_{name}", must_exist=False) for name in TWO_GPU_FILES}),
    )
    return filled(text)


def verdict(rows: dict[str, list[Row]], compaction: list[Row]) -> str:
    """Returns gains and losses relative to stock vLLM, one line for each section."""
    first, long_answers = rows["first_token"], rows["long_answers"]
    steps, memory = ([r for r in rows[n] if r["kv_cache_dtype"] == "auto"] for n in ("decode_step", "memory_bound"))
    stock, ours = (by_engine(steps, engine, "case", "median_step_ms") for engine in ENGINES)
    idle, shares = idle_steps(steps), prefill_shares(compaction, first)
    (of_stock,) = (row["output_tokens_per_s"] for row in memory if row["engine"] == "stock")
    speeds = [row["output_tokens_per_s"] / of_stock for row in memory if row["engine"] == "l2kv"]
    (of_stock,) = (row["output_tokens_per_s"] for row in long_answers if row["engine"] == "stock")
    of_budget = {row["budget"]: row["output_tokens_per_s"] / of_stock for row in long_answers if row["budget"]}
    longest = max((row for row in first if row.get("budget")), key=lambda row: row["num_prompt_tokens"])
    whole = by_engine([row for row in first if not row.get("budget")], "stock", "num_prompt_tokens", FIRST_TOKEN)
    of_whole = [row[FIRST_TOKEN] / whole[row["num_prompt_tokens"]] for row in first if row["keep_ratio"] < 1]
    _, *of_ample = ample_shares(rows["ample_memory"])
    return VERDICT.format(
        ratios=values(RATIOS, "g"),
        memory=values(speeds, ".2f"),
        answers=values(of_budget.values(), ".2f"),
        budgets=values(of_budget, ",d"),
        ample=values(of_ample, ".2f"),
        idle=f"{min(idle):.3f} to {max(idle):.3f}",
        compressed=values((ours[f"8x15000@{ratio}"] / stock["8x15000"] for ratio in RATIOS), ".2f"),
        whole=f"{min(of_whole):.3f} to {max(of_whole):.3f}",
        first=longest[FIRST_TOKEN] / whole[longest["num_prompt_tokens"]],
        budget=longest["budget"],
        length=longest["num_prompt_tokens"],
        heads=heads_verdict(read("h100_heads")),
        shares=f"{min(shares):.2f} to {max(shares):.2f}",
    )


def headline_of_rows() -> str:
    """Returns the headline, from the rows."""
    rows = {name: read(f"h100_{name}") for name in SCENARIOS if name not in DOCUMENTS}
    return headline(
        rows["decode_step"],
        rows["ample_memory"],
        rows["memory_bound"],
        read("h100_compaction"),
        rows["first_token"],
    )


def headline(
    steps: list[Row], ample: list[Row], memory: list[Row], compaction: list[Row], first_token: list[Row]
) -> str:
    """Returns a user's gains and losses, one line for each measurement."""
    bf16 = [row for row in steps if row["kv_cache_dtype"] == "auto"]
    stock = by_engine(bf16, "stock", "case", "median_step_ms")
    ours = by_engine(bf16, "l2kv", "case", "median_step_ms")
    idle = idle_steps(bf16)
    long = [stock["8x15000"], *(ours["8x15000" + ratio] for ratio in ("", "@0.5", "@0.25", "@0.1"))]
    shares = prefill_shares(compaction, first_token)
    multiples = [row["multiple"] for row in compaction]
    running, speed = (
        {(row["engine"], row["kv_cache_dtype"], row["keep_ratio"]): row[name] for row in memory}
        for name in ("mean_running", "output_tokens_per_s")
    )
    of_memory = [("stock", "auto", 1.0), *(("l2kv", "auto", ratio) for ratio in (1.0, *RATIOS))]
    of_fp8 = [("l2kv", dtype, ratio) for dtype in ("auto", "fp8_e4m3") for ratio in (1.0, 0.5)]
    _, *shares_of_stock = ample_shares(ample)
    fast, slow = min(idle), max(idle)
    ratios = "stock; keep 1, 0.5, 0.25, 0.1"
    lines = [
        ["decode step, nothing compressed, 1 x 128 to 12 x 15,000 tokens", f"{fast:.3f} to {slow:.3f} of stock", "1"],
        [f"decode step (ms), 8 x 15,000 tokens: {ratios}", values(long, ".1f"), "1"],
        [f"requests running at once, 16 GiB of cache, 8,000 tokens: {ratios}", pick(running, of_memory, ".1f"), "2"],
        [f"output tok/s of these: {ratios}", pick(speed, of_memory, ",.0f"), "2"],
        ["requests running at once: keep 1, 0.5; with an fp8 cache keep 1, 0.5", pick(running, of_fp8, ".1f"), "3"],
        ["time to compact a prompt, of copying its bytes", f"{min(multiples)} to {max(multiples)} x", "4"],
        ["time to compact a prompt, of its prefill", f"{min(shares):.2f} to {max(shares):.2f} %", "4"],
        [
            "output tok/s of stock, ample memory, 256 + 256 tokens: keep 1, 0.5, 0.25, 0.1",
            values(shares_of_stock, ".2f"),
            "5",
        ],
    ]
    return table("what one,H100 command", lines)


def idle_steps(rows: list[Row]) -> list[float]:
    """Returns the times of decode steps with nothing compressed, divided by those of stock vLLM."""
    stock, ours = (by_engine(rows, engine, "case", "median_step_ms") for engine in ENGINES)
    return [ours[case] / stock[case] for case in stock]


def prefill_shares(compaction: list[Row], first_token: list[Row]) -> list[float]:
    """Returns the time of each compaction in percent of the prefill of its prompts."""
    prefill = by_engine(first_token, "stock", "num_prompt_tokens", FIRST_TOKEN)
    return [row["us"] / 10 / prefill[row["num_prompt_tokens"]] / row["num_prompts"] for row in compaction]


def values(numbers: Iterable[float], form: str) -> str:
    """Returns numbers as one cell of a table."""
    return ", ".join(format(number, form) for number in numbers)


def pick(numbers: dict[Any, float], keys: Iterable[Any], form: str) -> str:
    """Returns some of the numbers as one cell of a table."""
    return values((numbers[key] for key in keys), form)


def by_engine(rows: list[Row], engine: str, key: str, value: str) -> dict[Any, Any]:
    """Returns one engine's values by another field."""
    return {row[key]: row[value] for row in rows if row["engine"] == engine}


def floor_of(stock: dict[str, float], name: str, ratio: float, num_layers: int) -> float:
    """Returns the milliseconds that a compressed case of 8 requests should take; see the page."""
    return stock["8x128"] + (stock[name] - stock["8x128"]) * (2 + (num_layers - 2) * ratio) / num_layers


def step_table(rows: list[Row]) -> str:
    """Returns a table with a line for each case that stock vLLM ran too."""
    stock = by_engine(rows, "stock", "case", "median_step_ms")
    num_layers = sum(size for size, _ in rows[0]["groups"])
    lines = []
    for case, ours in by_engine(rows, "l2kv", "case", "median_step_ms").items():
        name, _, ratio = case.partition("@")
        if name not in stock:
            continue
        line = [case, f"{stock[name]:.2f}", f"{ours:.2f}", f"{ours / stock[name]:.3f}"]
        floor = floor_of(stock, name, float(ratio), num_layers) if ratio and "8x128" in stock else None
        lines.append([*line, *([f"{floor:.2f}", f"{ours / floor:.3f}"] if floor else ["", ""])])
    return table("case stock vllm-l2kv ratio floor of,floor", lines)


def first_token_table(rows: list[Row]) -> str:
    """Returns a table with a line for each length: stock vLLM, then vllm-l2kv whole, at a ratio and with a budget."""
    times: dict[tuple[str, int, float, int | None], float] = {
        (row["engine"], row["num_prompt_tokens"], row["keep_ratio"], row.get("budget")): row[FIRST_TOKEN]
        for row in rows
    }
    budget = max(row.get("budget") or 0 for row in rows)
    cases = ((1.0, None), (0.5, None), (1.0, budget))
    lines = []
    for length in sorted({row["num_prompt_tokens"] for row in rows}):
        stock = times["stock", length, 1.0, None]
        ours = [times.get(("l2kv", length, *case)) for case in cases]
        if any(ours[1:]):
            lines.append([f"{length:,}", stock, *(f"{ms} ({ms / stock:.3f})" if ms else "" for ms in ours)])
    return table(f"prompt,tokens stock vllm-l2kv vllm-l2kv,at,0.5 budget,of,{budget}", lines)


def long_answers_table(rows: list[Row]) -> str:
    """Returns a table with a line for each run."""
    (stock,) = (row["output_tokens_per_s"] for row in rows if row["engine"] == "stock")
    lines = []
    for row in rows:
        speed, share = row["output_tokens_per_s"], row["compaction_share"]
        gaps = row["median_gap_ms"], row["p99_gap_ms"]
        what = row["engine"], row["budget"] or "none", row["mean_running"]
        lines.append([*what, f"{speed:,.0f}", f"{speed / stock:.2f}", *gaps, row["preemptions"], f"{share:.2%}"])
    return table("engine budget running output,tok/s of,stock gap,(ms) gap,p99 preemptions compactions", lines)


def bursts_table(rows: list[Row]) -> str:
    """Returns a table with a line for each engine."""
    lines = []
    for row in rows:
        slowest, median = sorted(row["burst_steps_ms"]), row["median_step_ms"]
        numbers = [median, row["p99_step_ms"]]
        if slowest:
            on_device = statistics.median(row["compaction_ms"])
            numbers += [statistics.median(slowest), slowest[-1], slowest[-1] / median, on_device]
        cells = [f"{number:.2f}" for number in numbers]
        lines.append([row["engine"], len(slowest), *cells, *[""] * (6 - len(cells))])
    steps = "median,step p99,of,other,steps burst,step,median burst,step,slowest slowest,of,median"
    return table(f"engine bursts {steps} compactions", lines)


def ample_table(rows: list[Row]) -> str:
    """Returns a table with a line for each ratio."""
    lines = []
    for row, share in zip(rows, ample_shares(rows), strict=True):
        runs = " ".join(f"{speed:,.0f}" for speed in row["output_tokens_per_s"])
        lines.append([row["engine"], row["keep_ratio"], runs, f"{share:.3f}"])
    return table("engine keep,ratio output,tok/s of,stock", lines)


def ample_shares(rows: list[Row]) -> list[float]:
    """Returns the median throughput of each row, divided by that of stock vLLM."""
    medians = [statistics.median(row["output_tokens_per_s"]) for row in rows]
    (stock,) = (speed for row, speed in zip(rows, medians, strict=True) if row["engine"] == "stock")
    return [speed / stock for speed in medians]


def split_scheduler(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Returns rows of requests that all decode, and rows of a request that waits."""
    return [row for row in rows if "waiting" not in row], [row for row in rows if "waiting" in row]


def scheduler_times(rows: list[Row]) -> str:
    """Returns the time of a step as text."""
    (stock,) = (row["ms_per_step"] for row in rows if row["engine"] == "stock")
    ours = [
        f"{row['ms_per_step'] / stock:.2f} x that at keep {row['keep_ratio']:g}"
        for row in rows
        if row["engine"] == "l2kv"
    ]
    return f"{stock} ms in stock vLLM, and {' and '.join(ours)} in vllm-l2kv"


def memory_table(rows: list[Row]) -> str:
    """Returns a table with a line for each run."""
    lines = []
    for row in rows:
        ratio = row["keep_ratio"]
        token_bytes = 128 * 1024 // (1 if row["kv_cache_dtype"] == "auto" else 2)
        bound = row["cache_bytes"] / token_bytes / (8500 * 2 / 32 + (8000 * ratio + 500) * 30 / 32)
        what = row["engine"], row["kv_cache_dtype"].replace("auto", "bf16"), ratio
        running = row["mean_running"], f"{bound:.1f}", f"{row['output_tokens_per_s']:,.0f}"
        lines.append([*what, *running, row["median_first_token_s"], row["preemptions"]])
    return table("engine cache,type keep,ratio running bound output,tok/s first,token,(s) preemptions", lines)


def two_gpus_section(rows: dict[str, list[Row]]) -> str:
    """Returns the section about two GPUs; empty without rows."""
    of_70b, agreement, findings = rows["70b_decode_step"], *split_checks(rows["checks"])
    sections = {
        "decode_step": rows["decode_step"] and step_table(rows["decode_step"]),
        "memory_bound": rows["memory_bound"] and memory_table(rows["memory_bound"]),
        "ample_memory": rows["ample_memory"] and ample_table(rows["ample_memory"]),
        "70b_decode_step": of_70b and step_table(of_70b),
        "agreement": agreement and agreement_table(agreement),
        "findings": "\n".join(findings_lines(findings)),
    }
    measured = [row for of_file in rows.values() for row in of_file]
    if not measured:
        return ""
    numbers = numbers_of_70b(of_70b) if of_70b else {}
    texts = [
        f"{text.format(**numbers) if name == '70b_decode_step' else text}\n\n{sections[name]}"
        for name, text in TWO_GPU_SECTIONS.items()
        if sections[name]
    ]
    about = {name: values_of(measured, name) for name in ("gpu", "vllm", "commit")}
    about["verdict"] = two_gpus_verdict(rows["decode_step"], rows["memory_bound"])
    return TWO_GPUS.format(**about, sections="\n\n".join(texts))


def two_gpus_verdict(steps: list[Row], memory: list[Row]) -> str:
    """Returns gains and losses; empty before both engines were measured."""
    stock = [row["output_tokens_per_s"] for row in memory if row["engine"] == "stock"]
    if not (stock and by_engine(steps, "l2kv", "case", "median_step_ms")):
        return ""
    idle = idle_steps(steps)
    speeds = {row["keep_ratio"]: row["output_tokens_per_s"] / stock[0] for row in memory if row["engine"] == "l2kv"}
    return (
        f"A decode step takes {min(idle):.3f} to {max(idle):.3f} x stock vLLM's time with nothing compressed; a cache "
        f"too small gives {values(speeds.values(), '.2f')} x its output tokens a second at keep {values(speeds, 'g')}. "
    )


def findings_lines(rows: list[Row]) -> list[str]:
    """Returns one line for checks with the same findings."""
    checks: dict[str, list[str]] = {}
    for row in rows:
        checks.setdefault(row["found"], []).append(row["check"])
    return [f"- {'; '.join(of_finding)}: {found}" for found, of_finding in checks.items()]


def split_checks(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Returns rows that compare answers, and rows with findings in words."""
    return [row for row in rows if "found" not in row], [row for row in rows if "found" in row]


def numbers_of_70b(rows: list[Row]) -> dict[str, Any]:
    """Returns the numbers for the sentence about the cache that a large shape's weights leave."""
    of_engine = {row["engine"]: row for row in rows}
    fits = {engine: [requests_that_fit(row, ratio) for ratio in (1, 0.5, 0.25)] for engine, row in of_engine.items()}
    return {
        "num_layers": sum(size for size, _ in rows[0]["groups"]),
        "stock_requests": fits["stock"][0] if "stock" in fits else "?",
        "requests": values(fits["l2kv"], "d") if "l2kv" in fits else "?",
    }


def requests_that_fit(row: Row, ratio: float, num_prompt_tokens: int = 4000, num_output_tokens: int = 250) -> int:
    """Returns the number of requests that a cache holds at once; full layers have the largest blocks of the pool."""
    *full, (_, block_size) = sorted(row["groups"], key=lambda group: -group[1])
    lengths = [(num_prompt_tokens, size) for _, size in full]
    lengths.append((math.ceil(num_prompt_tokens * (ratio if full else 1)), block_size))
    blocks = sum(math.ceil((num_tokens + num_output_tokens) / size) for num_tokens, size in lengths)
    return (row["num_blocks"] - 1) // blocks


def agreement_table(rows: list[Row]) -> str:
    """Returns a table with a line for each model and ratio."""
    lines = [
        [row["model"], row["keep_ratio"], f"{row['num_equal']} of {row['num_answers']}"]
        + [f"{row[name]:.3f}" for name in ("of_one_gpu", "of_fp32", "bf16_of_fp32")]
        for row in rows
    ]
    return table("model keep,ratio equal,answers two,GPUs,-,one two,GPUs,-,fp32 bf16,-,fp32", lines)


def compaction_table(rows: list[Row], first_token: list[Row]) -> str:
    """Returns a table with a line for each number and length of prompts, and a column for each keep ratio."""
    cells: dict[str, dict[float, str]] = {}
    for row, share in zip(rows, prefill_shares(rows, first_token), strict=True):
        of_size = cells.setdefault(f"{row['num_prompts']} x {row['num_prompt_tokens']:,}", {})
        of_size[row["keep_ratio"]] = f"{row['us']:,.0f} ({row['multiple']}, {share:.2f} %)"
    lines = [[size, *(of_size.get(ratio, "") for ratio in RATIOS)] for size, of_size in cells.items()]
    return table(f"prompts,x,tokens {' '.join(f'keep,{ratio:g}' for ratio in RATIOS)}", lines)


def kernel_shares(rows: list[Row]) -> str:
    """Returns the share of each kernel in the time of a compaction, over lengths of prompts."""
    kernels = {"_score_kernel": "scores take", "_select_kernel": "the choice", "_move_kernel": "moving rows"}
    times = [row["kernel_us"] for row in rows if row["num_prompts"] == 1 and row["keep_ratio"] == 0.25]
    texts = []
    for name, what in kernels.items():
        shares = [of_kernel[name] / sum(of_kernel[each] for each in kernels) for of_kernel in times]
        texts.append(f"{what} {100 * min(shares):.0f} to {100 * max(shares):.0f} %")
    return ", ".join(texts)


def scorers_section(rows: list[Row]) -> str:
    """Returns the section about the time of each scorer; empty without rows."""
    if not rows:
        return ""
    lengths = sorted({row["num_prompt_tokens"] for row in rows})
    us = {(row["scorer"], row["granularity"], row["num_prompt_tokens"]): row["us"] for row in rows}
    multiples = {case: time / us["l2", "token", case[2]] for case, time in us.items()}
    pooled = [name for name in GRANULARITIES if name != "token" and any(row["granularity"] == name for row in rows)]
    columns = [("token", length) for length in lengths] + [(name, lengths[-1]) for name in pooled]
    lines = []
    for scorer in dict.fromkeys(row["scorer"] for row in rows):
        cases = [(scorer, *column) for column in columns]
        cells = [f"{us[case] / 1000:.2f} ({multiples[case]:.1f})" if case in us else "" for case in cases]
        waited = max(max(row["host_ms"]) for row in rows if row["scorer"] == scorer)
        lines.append([f"`{scorer}`", *cells, f"{waited:.1f}"])
    names = [f"{length},tokens{f',by,{name}' if name in pooled else ''}" for name, length in columns]
    return SCORERS.format(
        most=max(multiples.values()),
        keep_ratio=rows[0]["keep_ratio"],
        repeats=len(rows[0]["host_ms"]),
        busy_ms=rows[0]["busy_ms"],
        warm_up_s=rows[0]["warm_up_s"],
        table=table(f"scorer {' '.join(names)} host,(ms)", lines),
    )


def plot_steps(rows: list[Row]) -> None:
    """Draws the step by keep ratio, with stock vLLM and the floor."""
    stock = by_engine(rows, "stock", "case", "median_step_ms")
    ours = by_engine(rows, "l2kv", "case", "median_step_ms")
    ratios = [1.0, *RATIOS]
    with plot(
        "decode_step", xlabel="keep ratio", ylabel="decode step, ms", ylim=(0, None), title="8 requests x 15,000 tokens"
    ) as axes:
        axes.axhline(stock["8x15000"], color="0.5", linestyle=":", label="stock vLLM")
        axes.plot(ratios, [floor_of(stock, "8x15000", ratio, 32) for ratio in ratios], color="0.5", label="floor")
        axes.plot(ratios, [ours["8x15000" + ("" if r == 1 else f"@{r}")] for r in ratios], "o-", label="vllm-l2kv")


def plot_first_token(rows: list[Row]) -> None:
    """Draws the time to first token by length, for stock vLLM and with a budget."""
    with plot(
        "first_token", xlabel="prompt tokens", ylabel="time to first token, s", ylim=(0, None), title="long prompts"
    ) as axes:
        budget = max(row.get("budget") or 0 for row in rows)
        lengths = {row["num_prompt_tokens"] for row in rows if row.get("budget")}
        for name, engine, asked in (("stock vLLM", "stock", None), (f"budget of {budget:,}", "l2kv", budget)):
            of_case = [r for r in rows if r["engine"] == engine and r.get("budget") == asked and r["keep_ratio"] == 1]
            seconds = {row["num_prompt_tokens"]: row[FIRST_TOKEN] / 1000 for row in of_case}
            axes.plot(sorted(lengths), [seconds[length] for length in sorted(lengths)], ".-", label=name)


if __name__ == "__main__":
    main()
