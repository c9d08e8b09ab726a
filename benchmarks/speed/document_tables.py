"""The section of docs/benchmarks.md about documents and conversations, which later requests find compressed."""

import statistics
from typing import Any

from benchmarks.speed.page_parts import GIB, Row, plot, table, values_of

TURNS = (1, 2, 5, 10, 15, 20, 25, 30)
HEAD = """
## Documents and conversations

Stock vLLM uses its prefix cache. {about}

    python -m benchmarks.speed.serving --model FOLDER --out FOLDER --engine-args '{{"max_model_len": 32768}}' \\
        --scenarios document findable popular conversation

"""
TEXTS = {
    "first_token": """### The first and the second question

A document of {num_document_tokens:,} tokens and questions of {num_question_tokens}, idle engine: median time to first
token, milliseconds (scenario `document`).""",
    "memory": """Memory in GiB of requests about one document that decode together, in brackets the ratio to one copy of
the document and the requests' own tokens, without padding (scenario `document`):""",
    "offload": """### A document in CPU memory

The second question to a document of {num_document_tokens:,} tokens, idle engine: median time to first token,
milliseconds, in brackets the ratio to computing it anew (scenario `offload`, with the engine arguments that
`benchmarks/speed/offload.py` names). The question on the GPU is asked right after the first one, while the compressed
document is copied to CPU memory; the table above has its time without copies.""",
    "findable": """### Documents that stay findable

Documents of {num_document_tokens:,} tokens in {cache_gib:.0f} GiB: how many are found if all are asked about in turn,
and then again, the latest first (scenario `findable`). They must fit beside the one that is being computed, which is
whole with a ratio alone. With 2 full layers of 32 a ratio of 0.2 is a quarter of the cache.""",
    "popular": """### Popular documents

{num_documents} such documents, popularity by Zipf's law, {num_clients} clients that wait for their answers,
{cache_gib:.0f} GiB, {seconds:.0f} seconds after a warm-up (scenario `popular`). Hit rate: share of prompt tokens that
were found. A budget of just the compressed rows compacts each answer into a copy of its own: leave room for question
and answer.""",
    "conversation": """### Conversations

{num_conversations} conversations in a cache of {cache_gib:.1f} GiB, or 60,000 tokens. A turn adds {turn_tokens:,}
tokens to all earlier ones: median time to first token, milliseconds, of the turns that an engine came to in 120 seconds
(scenario `conversation`, `--prompt-interval 512`). Choose budget and interval so that all conversations fit together:
at 2,048 and 2,048 they do not, and lose their rows while they wait.""",
    "waiting": """### Requests that wait

The scheduler's processor time, milliseconds a step, while one request decodes and another waits for blocks. Both have
prompts of that length; under `found` they share all but {num_question_tokens:,} tokens. Rows: `scheduler.jsonl`, by
[this command](#ample-memory).""",
}


def documents_section(rows: dict[str, list[Row]], waiting: list[Row]) -> str:
    """Returns the whole section; empty without rows.

    Args:
        rows: Rows by scenario.
        waiting: Rows of `scheduler.py` about a request that waits.
    """
    of_document = rows["document"]
    parts = {
        "first_token": ([row for row in of_document if "num_askers" not in row], first_token_table),
        "memory": ([row for row in of_document if "num_askers" in row], memory_table),
        "offload": (rows["offload"], offload_table),
        "findable": (rows["findable"], findable_table),
        "popular": (rows["popular"], popular_table),
        "conversation": (rows["conversation"], conversation_table),
        "waiting": (waiting, waiting_table),
    }
    texts = [
        f"{TEXTS[name].format(**numbers_of(of_part))}\n\n{make(of_part)}"
        + ("\n\n![time to first token by turn](img/conversation.svg)" if name == "conversation" else "")
        for name, (of_part, make) in parts.items()
        if of_part
    ]
    measured = [row for of_scenario in rows.values() for row in of_scenario]
    if not measured:
        return ""
    about = f"{values_of(measured, 'gpu')}, commit {values_of(measured, 'commit')}."
    return HEAD.format(about=about) + "\n\n".join(texts) + "\n"


def numbers_of(rows: list[Row]) -> dict[str, Any]:
    """Returns the fields that are the same in all rows, for the text above a table."""
    row = rows[0]
    return {**row, "cache_gib": row.get("cache_bytes", 0) / GIB}


def first_token_table(rows: list[Row]) -> str:
    """Returns a table with a line for each ratio."""
    (stock,) = (row["median_second_question_ms"] for row in rows if row["engine"] == "stock")
    lines = []
    for row in rows:
        first, second = statistics.median(row["first_question_ms"]), row["median_second_question_ms"]
        found = f"{row['cached_tokens']:,}"
        lines.append(
            [row["engine"], row["keep_ratio"], f"{first:,.1f}", f"{second:.1f}", f"{second / stock:.2f}", found]
        )
    return table("engine keep,ratio first,question second,question of,stock found,tokens", lines)


def memory_table(rows: list[Row]) -> str:
    """Returns a table with a line for each engine and ratio, and a column for each number of requests."""
    numbers = sorted({row["num_askers"] for row in rows})
    cells: dict[tuple[str, float], dict[int, str]] = {}
    for row in rows:
        held, needed = row["held_bytes"] / GIB, row["needed_bytes"] / GIB
        of_case = cells.setdefault((row["engine"], row["keep_ratio"]), {})
        of_case[row["num_askers"]] = f"{held:.3f} ({held / needed:.3f})"
    lines = [[*case, *(of_case.get(number, "") for number in numbers)] for case, of_case in cells.items()]
    heads = (f"{number},request{'s' if number > 1 else ''}" for number in numbers)
    return table(f"engine keep,ratio {' '.join(heads)}", lines)


def offload_table(rows: list[Row]) -> str:
    """Returns a table with a line for each engine and ratio: the question found on the GPU, in CPU memory, computed."""
    lines = []
    for row in rows:
        anew = row["median_computed_ms"]
        found = [
            f"{row[f'median_{where}_ms']:,.1f} ({row[f'median_{where}_ms'] / anew:.3f})"
            for where in ("found_in_cpu_memory", "found_on_gpu")
        ]
        lines.append(
            [row["engine"], row["keep_ratio"], f"{anew:,.1f}", *found, f"{row['found_in_cpu_memory_tokens']:,}"]
        )
    return table("engine keep,ratio computed,anew from,CPU,memory on,the,GPU tokens,found,in,CPU,memory", lines)


def findable_table(rows: list[Row]) -> str:
    """Returns a table with a line for each case."""
    lines = [
        [
            row["engine"],
            full_layers(row),
            row["keep_ratio"],
            row["budget"] or "none",
            row["num_documents"],
            row["num_found"],
        ]
        for row in rows
    ]
    return table("engine full,layers keep,ratio budget documents found", lines)


def full_layers(row: Row) -> str:
    """Returns the number of full layers of an engine; nothing for stock vLLM."""
    if row["engine"] == "stock":
        return ""
    *full, _ = sorted(row["groups"], key=lambda group: -group[1])
    return str(sum(num_layers for num_layers, _ in full) or "none")


def popular_table(rows: list[Row]) -> str:
    """Returns a table with a line for each case."""
    (stock,) = (row["median_first_token_ms"] for row in rows if row["engine"] == "stock")
    lines = []
    for row in rows:
        median, p99 = row["median_first_token_ms"], row["p99_first_token_ms"]
        what = row["engine"], row["keep_ratio"], row["budget"] or "none"
        speed = f"{row['output_tokens_per_s']:,.0f}"
        lines.append([*what, f"{median:,.0f}", f"{p99:,.0f}", f"{median / stock:.3f}", speed, f"{row['hit_rate']:.1%}"])
    return table("engine keep,ratio budget first,token,p50,(ms) p99 p50,of,stock output,tok/s hit,rate", lines)


def conversation_table(rows: list[Row]) -> str:
    """Returns a table with a line for some of the turns."""
    by_turn = [row["median_first_token_ms"] for row in rows]
    lines = [
        [turn, *(f"{times[turn - 1]:,.0f}" if turn <= len(times) else "" for times in by_turn)]
        for turn in TURNS
        if turn <= max(len(times) for times in by_turn)
    ]
    return table(f"turn {' '.join(name_of(row).replace(' ', ',') for row in rows)}", lines)


def name_of(row: Row) -> str:
    """Returns an engine with its budget and prompt interval as text."""
    if not row["budget"]:
        return "stock vLLM"
    return f"budget {row['budget']} and prompt interval {row['prompt_interval']}"


def waiting_table(rows: list[Row]) -> str:
    """Returns a table with a line for each request kind, and a column for each length, found or not."""
    columns = list(dict.fromkeys((row["num_prompt_tokens"], row["is_found"]) for row in rows))
    found: dict[tuple[str, str], dict[Any, float]] = {}
    for row in rows:
        of_case = found.setdefault((row["engine"], row["waiting"]), {})
        of_case[row["num_prompt_tokens"], row["is_found"]] = row["ms_per_step"]
    heads = [f"{num_tokens},tokens{',found' if is_found else ''}" for num_tokens, is_found in columns]
    lines = [[*case, *(f"{times[column]:.3f}" for column in columns)] for case, times in found.items()]
    return table(f"engine asks,for {' '.join(heads)}", lines)


def plot_conversation(rows: list[Row]) -> None:
    """Draws the time to first token by turn."""
    labels = {"xlabel": "turn", "ylabel": "time to first token, s", "title": "16 conversations, 1,000 tokens a turn"}
    with plot("conversation", yscale="log", **labels) as axes:
        for row in rows:
            seconds = [milliseconds / 1000 for milliseconds in row["median_first_token_ms"]]
            axes.plot(range(1, len(seconds) + 1), seconds, ".-", label=name_of(row))
