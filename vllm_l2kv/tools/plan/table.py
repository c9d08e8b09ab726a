"""Formats a plan as text for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_l2kv.cli_types import aligned, full_in_words

GIB = 2**30
COLUMNS = (
    "engine", "kept", "rows", "memory", "peak rows", "prompt GiB", "answer GiB", "mean GiB", "at once", "on average",
    "longest",
)  # fmt: skip
REMARKS = """\
rows: rows of a compressed layer after the prompt; memory: of the request then, relative to uncompressed.
peak rows: most rows at any time; prompt GiB: most memory of a request while its prompt is computed.
answer GiB, mean GiB: most and average memory of a request while its answer is generated.
at once: requests that can all finish, even if one prompt is computed while the others hold their most.
on average: requests in a steady state, spread evenly over their answers.
longest: the largest --max-model-len with which an engine with this default starts.
Prompts share nothing, and --max-num-seqs is ignored. docs/sizing.md has the formulas and measurements."""

DOCUMENT_COLUMNS = ("engine", "kept", "rows", "document GiB", "documents")
DOCUMENT_REMARK = """\
documents: how many stay cached if each is computed once and nothing else runs; document GiB: memory of one.
none: not planned for uncompressed documents in models with sliding windows or recurrent layers: what prompts
find of these depends on the text after them."""

FLEET_COLUMNS = ("engine", "kept", "at once", "on average", "documents")
FLEET_REMARK = """\
Totals over all copies, with requests spread evenly. Documents: if a router sends all requests about a document to one
copy; otherwise as many as one copy holds."""


def as_table(plan: Mapping[str, Any]) -> str:
    """The plan as text.

    Args:
        plan: Plan from `report.report`.
    """
    documents = [*_documents(plan), ""] if plan["num_document_tokens"] else []
    fleet = [*_fleet(plan), ""] if plan["num_replicas"] else []
    remarks = [REMARKS, *([DOCUMENT_REMARK] if documents else []), *([FLEET_REMARK] if fleet else [])]
    return "\n".join([*_heading(plan), "", *_table(plan), "", *documents, *fleet, *_layouts(plan), *remarks]) + "\n"


def _heading(plan: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{plan['model']}: prompts of {plan['num_prompt_tokens']:,} tokens, answers of {plan['num_output_tokens']:,}"
        + (f", {plan['num_gpus']} GPUs, each with" if plan["num_gpus"] > 1 else "")
    )
    memory = plan["memory_of_a_gpu"]
    if "gpu_gib" in memory:
        yield f"{memory['gpu_gib']:8.2f} GiB in total"
        yield f"{memory['used_gib']:8.2f} GiB for vLLM, by --gpu-memory-utilization"
        yield f"{memory['weights_gib']:8.2f} GiB of weights, by {memory['weights_source']}"
        yield f"{memory['overhead_gib']:8.2f} GiB for activations, CUDA graphs and others, estimated (--overhead-gib)"
    yield f"{memory['kv_cache_gib']:8.2f} GiB for the KV cache"
    if plan["profile"] or plan["full_heads"]:
        full = full_in_words(plan["full_layers"], plan["full_heads"])
        yield f"{full}, with the profile {plan['profile']}" if plan["profile"] else full
    token = plan["bytes_per_token"]
    sliding = f", {token['sliding_window'] / 1024:,g} more inside windows" if token["sliding_window"] else ""
    yield f"{token['full_attention'] / 1024:8,g} KiB per token{sliding}"
    if plan["state_bytes"]:
        yield f"{plan['state_bytes'] / 1024:8,g} KiB per request for states, each of which takes a whole block"


def _table(plan: Mapping[str, Any]) -> list[str]:
    lines: list[tuple[str, ...]] = [COLUMNS]
    for engine in plan["engines"]:
        for row in engine["rows"]:
            rows = (f"{row['kept_rows']:,}", f"{row['memory_ratio']:.3f}", f"{row['peak_rows']:,}")
            blocks = (row[name] for name in ("prompt_blocks", "answer_blocks", "mean_blocks"))
            memory = (f"{number * engine['block_bytes'] / GIB:.3f}" for number in blocks)
            longest = "any" if row["longest_request"] is None else f"{row['longest_request']:,}"
            counts = (f"{row['at_once']:,}", f"{row['on_average']:,.1f}", longest)
            lines.append((engine["engine"], _kept(row), *rows, *memory, *counts))
    return aligned(lines)


def _documents(plan: Mapping[str, Any]) -> list[str]:
    lines: list[tuple[str, ...]] = [DOCUMENT_COLUMNS]
    for engine in plan["engines"]:
        for row in engine["rows"]:
            memory = f"{row['document_blocks'] * engine['block_bytes'] / GIB:.3f}"
            documents = "none" if row["documents"] is None else f"{row['documents']:,}"
            lines.append((engine["engine"], _kept(row), f"{row['document_rows']:,}", memory, documents))
    return [f"Documents of {plan['num_document_tokens']:,} tokens", *aligned(lines)]


def _fleet(plan: Mapping[str, Any]) -> list[str]:
    replicas = plan["num_replicas"]
    lines: list[tuple[str, ...]] = [FLEET_COLUMNS]
    for engine in plan["engines"]:
        for row in engine["rows"]:
            documents = row.get("documents")
            shown = "" if documents is None else f"{documents * replicas:,}"
            counts = (f"{row['at_once'] * replicas:,}", f"{row['on_average'] * replicas:,.0f}", shown)
            lines.append((engine["engine"], _kept(row), *counts))
    gpus = replicas * plan["num_gpus"]
    return [f"{gpus:,} GPUs, {replicas:,} {'copy' if replicas == 1 else 'copies'} of the model", *aligned(lines)]


def _kept(row: Mapping[str, Any]) -> str:
    return f"{row['keep_ratio']:g}" if row["max_tokens"] is None else f"budget {row['max_tokens']:,}"


def _layouts(plan: Mapping[str, Any]) -> Iterator[str]:
    for engine in plan["engines"]:
        groups = ", ".join(f"{_counted(plan, group)} x {group['block_size']:,} tokens" for group in engine["groups"])
        yield f"{engine['engine']}: {engine['num_blocks']:,} blocks of {engine['block_bytes'] / 1024:,g} KiB ({groups})"


def _counted(plan: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Contents of a group: layers, or heads if a layer may be in two groups."""
    if plan["full_heads"] and group["heads"]:
        return f"{group['heads']} {group['kind']} heads of {group['layers']} layers"
    return f"{group['layers']} {group['kind']} layers"
