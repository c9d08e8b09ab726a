"""`vllm-l2kv plan`."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from vllm_l2kv.cli_types import (
    DEFAULT_LAYERS,
    DEFAULT_PROTECTION,
    DefaultsFormatter,
    OneLineParser,
    add_full_heads,
    add_profile,
    layers,
    list_of,
    positive,
    protection,
    ratio,
    real,
)
from vllm_l2kv.params import OFFERED_SCORERS
from vllm_l2kv.profile import setting_of
from vllm_l2kv.settings import Settings
from vllm_l2kv.tools.demo_model import DEMO_NAME, DemoModelError, model_folder
from vllm_l2kv.tools.options import add_budgets

UTILIZATION = 0.92
"""vLLM's default of `--gpu-memory-utilization`."""
OVERHEAD_GIB = 3.0
"""GiB of other memory: activations of a batch, CUDA graphs, CUDA itself. docs/sizing.md says where it was measured."""
RATIOS = (0.5, 0.25)
"""Keep ratios that are compared by default."""
BATCH_TOKENS = 8192
"""vLLM's default of `--max-num-batched-tokens` for a server on a large GPU."""


def plan(argv: Sequence[str]) -> None:
    """Prints how many requests fit.

    Args:
        argv: Arguments after `plan`.

    Raises:
        SystemExit: With 2 and one line on standard error after a bad option, or for a model that cannot be planned.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        take_profile(options)
    except ValueError as error:
        parser.error(f"argument --kv-profile: {error}")
    if options.kv_cache_gib is None and (options.gpu_gib is None or options.device == "cpu"):
        needed = "--kv-cache-gib" if options.device == "cpu" else "--gpu-gib or --kv-cache-gib"
        parser.error(f"{needed} must be given: how much memory there is.")
    with _silent_vllm():
        from vllm_l2kv.tools.plan.report import report
        from vllm_l2kv.tools.plan.table import as_table

        try:
            options.model = model_folder(options.model)
            result = report(options)
        except (DemoModelError, ValueError) as error:
            parser.error(str(error))
    sys.stdout.write(f"{json.dumps(result, indent=2)}\n" if options.json else as_table(result))


def take_profile(options: argparse.Namespace) -> None:
    """Sets full layers, full heads and ratios from the profile, if there is one and they are not given.

    Raises:
        ValueError: Profile or memory is refused.
    """
    has_ratio = options.ratio is not None
    full = options.full_layers, has_ratio, options.full_heads
    wanted = options.kv_classes, options.tensor_parallel_size, options.kv_scorer
    setting = setting_of(options.kv_profile, options.kv_memory, *full, *wanted)
    if options.kv_scorer is not None and setting is None:
        raise ValueError(
            "a scorer (--kv-scorer) chooses among the settings of a profile; leave it out, or give --kv-profile and at "
            "most one of --full-layers and --ratio."
        )
    if options.full_layers is None:
        options.full_layers = setting.full_layers if setting else Settings.full_layers
    if options.full_heads is None:
        options.full_heads = setting.full_heads if setting else {}
    if not has_ratio:
        options.ratio = [setting.keep_ratio] if setting else RATIOS


@contextmanager
def _silent_vllm() -> Iterator[None]:
    """Keeps vLLM's log out of standard output, which is for the plan, and away from the one-line error."""
    # vLLM logs to what standard output is at the time of its import.
    with redirect_stdout(sys.stderr):
        import vllm.logger  # noqa: F401
    log = logging.getLogger("vllm")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="vllm-l2kv plan",
        description="Computes how many requests of one kind fit the KV cache at once, in stock vLLM and in vllm-l2kv "
        "at several keep ratios and budgets. Reads only the model's config. docs/sizing.md explains the columns.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    gib = real("G", "0 < G", lambda value: value > 0)
    add("model", nargs="?", default=DEMO_NAME, metavar="MODEL", help="folder or name of a model")
    add("--context", type=positive, required=True, metavar="N", help="tokens of a prompt")
    add("--output", type=positive, required=True, metavar="N", help="generated tokens of a request")
    add(
        "--ratio",
        type=list_of(ratio),
        metavar="R,R",
        help=f"keep ratios; 1 is always included (default: {','.join(map(str, RATIOS))})",
    )
    add_profile(add, "--full-layers or --full-heads, and --ratio,")
    add("--kv-scorer", choices=OFFERED_SCORERS, help="the server's, if it is not the one that the profile recommends")
    add_budgets(parser)
    add("--document-tokens", type=positive, metavar="N", help="also show how many documents of N tokens stay cached")
    add("--gpu-gib", type=gib, metavar="G", help="memory of one GPU")
    add("--kv-cache-gib", type=gib, metavar="G", help="memory for the KV cache of one GPU, instead of --gpu-gib")
    add("--gpu-memory-utilization", type=ratio, default=UTILIZATION, metavar="R", help="as vLLM's")
    add("--weights-gib", type=gib, metavar="G", help="weights on all GPUs together (default: from files or config)")
    add(
        "--overhead-gib",
        type=real("G", "0 <= G", lambda value: value >= 0),
        default=OVERHEAD_GIB,
        metavar="G",
        help="estimate of other memory on one GPU: activations, CUDA graphs",
    )
    add("--tensor-parallel-size", type=positive, default=1, metavar="N", help="GPUs that share each layer")
    add("--pipeline-parallel-size", type=positive, default=1, metavar="N", help="ranks that share the layers")
    add(
        "--gpus",
        type=positive,
        metavar="N",
        help="also show what a fleet of N GPUs holds, with a copy of the model on the GPUs that share it",
    )
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="as vLLM's")
    add("--kv-cache-dtype", choices=("auto", "fp8", "fp8_e4m3"), default="auto", help="as vLLM's")
    add("--max-num-batched-tokens", type=positive, default=BATCH_TOKENS, metavar="N", help="as vLLM's")
    add("--full-layers", type=layers, metavar="I,J", help=f"layers that never compact (default: {DEFAULT_LAYERS})")
    add_full_heads(add, "--full-heads")
    add("--protect", type=protection, default=DEFAULT_PROTECTION, metavar="FIRST:LAST", help="protected tokens")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device of the server; its block sizes differ")
    add("--json", action="store_true", help="print JSON, not a table")
    return parser
