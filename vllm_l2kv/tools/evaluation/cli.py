"""`vllm-l2kv eval`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_l2kv.cli_types import (
    DEFAULT_LAYERS,
    DEFAULT_PROTECTION,
    DefaultsFormatter,
    OneLineParser,
    add_full_heads,
    add_profile,
    count,
    layers,
    list_of,
    listed,
    one_of,
    positive,
    protection,
    ratio,
    real,
)
from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import GRANULARITIES, OWN_SCORER, PROFILE_SCORERS, SCORERS, CompressionParams
from vllm_l2kv.policy import Intervals
from vllm_l2kv.profile import setting_of
from vllm_l2kv.settings import Settings
from vllm_l2kv.tools.demo_model import DEMO_NAME
from vllm_l2kv.tools.engine_log import progress_beside_log
from vllm_l2kv.tools.evaluation.cases import Case
from vllm_l2kv.tools.evaluation.texts import SAMPLES, read_text
from vllm_l2kv.tools.evaluation.variants import QUESTIONS, SEEN
from vllm_l2kv.tools.options import RefusedError, add_budgets, add_verbose, folder_of
from vllm_l2kv.tools.progress import Progress

ROWS = "rows.jsonl"
NUM_ANSWER_TOKENS = 256
"""Most tokens of an answer, unless the task needs more."""
TASKS = ("perplexity", "passkey", "needle", "ruler", "copy", "chat")
ESSAYS = "state_of_the_union"
RATIOS = (0.75, 0.5, 0.25, 0.1)
"""Keep ratios that are measured by default."""


def evaluate(argv: Sequence[str]) -> None:
    """Runs one task, or makes a report from existing rows.

    Args:
        argv: Arguments after `eval`.

    Raises:
        SystemExit: With 2 and one line on standard error after a bad option; with 130 after an interrupt, after which
            the finished rows are reported.
    """
    parser = _eval_parser()
    options = parser.parse_args(argv)
    if options.task == "report":
        try:
            report(options.rows, options.out)
        except (OSError, ValueError) as error:
            parser.error(f"argument ROWS: {error}")
        return
    status = 0
    try:
        take_profile(options)
        options.model = folder_of(options.model)
        _measure(options)
    except RefusedError as refused:
        parser.error(str(refused))
    except KeyboardInterrupt:
        status = 130
        rows = options.out / ROWS
        if not rows.exists() or not rows.stat().st_size:
            sys.exit(status)
        sys.stderr.write("Interrupted; the report covers the rows that were finished.\n")
    report([options.out / ROWS], options.out)
    if status:
        sys.exit(status)


def report(paths: Sequence[Path], out: Path) -> None:
    """Writes plots and an HTML report of rows to a folder, and prints their tables.

    Raises:
        OSError: A file cannot be read.
        ValueError: There are no rows, or a line is not a row.
    """
    from vllm_l2kv.tools.evaluation.report import summary, write_report
    from vllm_l2kv.tools.evaluation.rows import read_rows

    rows = [row for path in paths for row in read_rows(path)]
    if not rows:
        raise ValueError(f"there are no rows in {listed(map(str, paths))}.")
    out.mkdir(parents=True, exist_ok=True)
    path = write_report(rows, out)
    sys.stdout.write(f"{summary(rows)}\n{path}\n")


def write_rows(
    engine: Any,
    options: argparse.Namespace,
    cases: Sequence[Case],
    compared: Sequence[CompressionParams],
    path: Path,
    progress: Progress | None = None,
) -> None:
    """Measures cases, and appends a row for each answer to a file.

    Args:
        engine: An `evaluation.run.Engine`.
        options: Options of `vllm-l2kv eval`; those that define the prompts go into the rows.
        cases: Cases from `cases_of`.
        compared: Variants from `variants`.
        path: The file of rows.
        progress: Shows progress.
    """
    from vllm_l2kv.tools.evaluation.rows import append_rows

    questions = options.questions
    run = {name: value for name, value in vars(options).items() if name in ("text", "seed", "continued")}
    append_rows(path, (row | run for row in engine.rows(options.task, cases, compared, progress, questions)))


def _measure(options: argparse.Namespace) -> None:
    """Starts an engine and adds the rows of a task to its file."""
    from vllm_l2kv.tools.evaluation.aggregates import with_excess_loss
    from vllm_l2kv.tools.evaluation.rows import prepare_for_more
    from vllm_l2kv.tools.evaluation.variants import variants

    ratios = _ratios(options)
    try:
        compared = variants(options.scorers, ratios, options.protect, options.granularities, options.budgets)
    except ParamError as error:
        raise RefusedError(f"argument --budgets: {error}") from error
    intervals = Intervals(options.prompt_interval, options.answer_interval)
    longest = max(options.lengths) + NUM_ANSWER_TOKENS + vars(options).get("continued", 0)
    path = options.out / ROWS
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # Otherwise, bad rows in the file would be noticed only after the run.
            with_excess_loss(prepare_for_more(path))
    except (OSError, ValueError) as error:
        raise RefusedError(f"argument --out: {error}") from error
    with progress_beside_log(options.out / "vllm.log", options.verbose) as progress:
        progress.begin(f"starting the engine with {options.model}")
        from vllm_l2kv.tools.evaluation.run import Engine

        try:
            engine = Engine(
                options.model,
                options.full_layers,
                intervals,
                options.kv_profile,
                options.full_heads,
                scorers=options.scorers,
                max_model_len=options.max_model_len or longest,
            )
            progress.begin(f"making prompts for {options.task}")
            cases = list(cases_of(options, engine.tokenizer))
        except (OSError, ValueError) as error:
            raise RefusedError(str(error)) from error
        longer = [len(case.prompt) for case in cases if len(case.prompt) + case.num_tokens > engine.max_tokens]
        if longer:
            raise RefusedError(
                f"argument --max-model-len: must exceed {max(longer)}, the tokens of the longest prompt, got "
                f"{engine.max_tokens}."
            )
        write_rows(engine, options, cases, compared, path, progress)


def take_profile(options: argparse.Namespace) -> None:
    """Sets what is not given from the profile: full layers, full heads, ratios, scorers and granularities.

    What stays full is the best for the scorer if one is given, since all scorers of a run share it.

    Raises:
        RefusedError: Profile or memory is refused, or a scorer needs a profile and there is none.
    """
    has_ratio = options.ratios is not None or options.memory is not None
    has_several = options.scorers is not None and len(options.scorers) > 1
    scorer = options.scorers[0] if options.scorers and not has_several else None
    try:
        full = options.full_layers, has_ratio, options.full_heads
        setting = setting_of(options.kv_profile, options.kv_memory, *full, options.kv_classes, scorer=scorer)
    except ValueError as error:
        raise RefusedError(f"argument --kv-profile: {error}") from error
    if options.full_layers is None:
        options.full_layers = setting.full_layers if setting else Settings.full_layers
    if options.full_heads is None:
        options.full_heads = setting.full_heads if setting else {}
    if not has_ratio:
        options.ratios = [setting.keep_ratio] if setting else RATIOS
    ranking = setting.ranking(scorer) if setting and not has_several else {}
    if options.granularities is None:
        options.granularities = [ranking.get("granularity", CompressionParams.granularity)]
    if options.scorers is None:
        options.scorers = [ranking.get("scorer", CompressionParams.scorer)]
    if options.kv_profile is None and (without := [name for name in options.scorers if name in PROFILE_SCORERS]):
        raise RefusedError(f"argument --scorers: {without[0]} needs the weights of a profile; give --kv-profile FILE.")


def _ratios(options: argparse.Namespace) -> list[float]:
    """The keep ratios to measure: those of `--ratios`, or those at which the whole cache costs `--memory`."""
    if options.memory is None:
        ratios: list[float] = options.ratios
        return ratios
    from vllm_l2kv.tools.evaluation.variants import ratio_of_memory
    from vllm_l2kv.tools.plan.model import model_of, read_config

    try:
        shape = model_of(read_config(options.model), "auto").shape
        num_full = shape.num_full(options.full_layers, options.full_heads)
        return [ratio_of_memory(memory, shape.num_heads, num_full) for memory in options.memory]
    except ValueError as error:
        raise RefusedError(f"argument --memory: {error}") from error


def cases_of(options: argparse.Namespace, tokenizer: Any) -> Iterator[Case]:
    """The prompts that the options of a task ask for."""
    from vllm_l2kv.tools.evaluation.tasks import chat, copying, needle, passkey, perplexity, ruler

    num_samples, seed = options.samples, options.seed
    if options.task == "perplexity":
        return perplexity.cases(tokenizer, read_text(options.text), options.lengths, num_samples, options.continued)
    if options.task == "passkey":
        return passkey.cases(tokenizer, options.lengths, options.depths, num_samples, seed)
    if options.task == "copy":
        return copying.cases(tokenizer, options.lengths, num_samples, seed)
    if options.task == "chat":
        return chat.cases(tokenizer, read_text(options.text), options.lengths, num_samples, seed)
    if options.task == "needle":
        return needle.cases(tokenizer, read_text(options.text), options.lengths, options.depths, num_samples, seed)
    return ruler.cases(tokenizer, read_text(options.text), options.lengths, options.subtasks, num_samples, seed)


def _eval_parser() -> argparse.ArgumentParser:
    from vllm_l2kv.tools.evaluation.tasks.ruler import TASKS as SUBTASKS

    parser = OneLineParser(
        prog="vllm-l2kv eval",
        description="Measures what a keep ratio or a budget costs in quality, on a real engine, and writes rows, plots "
        "and a report to a folder. For other tasks see docs/lm_eval.md.",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    helps = {
        "perplexity": "loss and accuracy on the continuation of a text",
        "passkey": "a number hidden in noise",
        "needle": "a sentence hidden in essays",
        "ruler": "RULER's task families that need no download",
        "copy": "a list to repeat item by item: long answers",
        "chat": "facts stated early in a conversation and asked for at its end",
    }
    for task in TASKS:
        options = tasks.add_parser(task, help=helps[task], formatter_class=DefaultsFormatter)
        options.add_argument("model", nargs="?", default=DEMO_NAME, metavar="MODEL", help="folder or name of a model")
        add = options.add_argument
        add("--out", type=Path, default=Path("eval") / task, metavar="DIR", help="folder of results; rows are added")
        add(
            "--full-layers",
            type=layers,
            metavar="I,J",
            help=f"layers that never compact (default: {DEFAULT_LAYERS})",
        )
        add_full_heads(add, "--full-heads")
        add_profile(add, "--full-layers or --full-heads, --ratios, --scorers and --granularities")
        amounts = options.add_mutually_exclusive_group()
        amounts.add_argument(
            "--ratios",
            type=list_of(ratio),
            metavar="R,R",
            help=f"keep ratios (default: {','.join(map(str, RATIOS))})",
        )
        amounts.add_argument(
            "--memory",
            type=list_of(_share),
            metavar="M,M",
            help="shares of the whole cache, full layers included, instead of keep ratios",
        )
        add_budgets(options)
        add(
            "--scorers",
            type=list_of(_scorer),
            metavar="S,S",
            help=f"any of {listed(SCORERS)}, or your own as MODULE:CLASS; controls are always included (default: "
            f"{CompressionParams.scorer})",
        )
        add(
            "--granularities",
            type=list_of(one_of(GRANULARITIES)),
            metavar="G,G",
            help=f"any of {listed(GRANULARITIES)} (default: {CompressionParams.granularity})",
        )
        add(
            "--protect",
            type=list_of(protection),
            default=DEFAULT_PROTECTION,
            metavar="FIRST:LAST",
            help="numbers of first and last tokens to protect; several pairs are separated by commas",
        )
        add(
            "--questions",
            type=list_of(one_of(QUESTIONS)),
            default=SEEN,
            metavar="Q,Q",
            help=f"any of {listed(QUESTIONS)}: compress the question with the document, or the document without it",
        )
        add(
            "--lengths",
            type=list_of(positive),
            default="1024",
            metavar="N,N",
            help="prompt lengths in tokens; for ruler and copy they include the answer",
        )
        add("--samples", type=positive, default=10, metavar="N", help="samples for each length and depth or subtask")
        add("--seed", type=count, default=0, metavar="N", help="seed of the prompts")
        add_verbose(options)
        add(
            "--max-model-len",
            type=positive,
            metavar="N",
            help="context length of the engine (default: as long as needed)",
        )
        if task not in ("passkey", "copy"):
            add(
                "--text",
                default="moby_dick" if task in ("perplexity", "chat") else ESSAYS,
                metavar="FILE",
                help=f"file, or {listed(SAMPLES)}",
            )
        if task == "perplexity":
            add("--continued", type=positive, default=128, metavar="N", help="length of the continuation in tokens")
        if task in ("passkey", "needle"):
            add(
                "--depths",
                type=list_of(_depth),
                default="0,0.25,0.5,0.75,1",
                metavar="D,D",
                help="positions of the hidden text in the prompt: 0 is the start, 1 the end",
            )
        if task == "ruler":
            add(
                "--subtasks",
                type=list_of(one_of(SUBTASKS)),
                default=",".join(SUBTASKS),
                metavar="T,T",
                help="subtasks, by RULER's names",
            )
    drawing = tasks.add_parser("report", help="make plots and a report from the rows of one or more runs")
    drawing.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help=f"files of rows ({ROWS}) or aggregates")
    drawing.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    return parser


def _scorer(word: str) -> str:
    """A name of `SCORERS`, or `MODULE:CLASS`."""
    return word if OWN_SCORER.fullmatch(word) else one_of(SCORERS)(word)


_depth = real("D", "0 <= D <= 1", lambda depth: 0 <= depth <= 1)
_share = real("M", "0 < M <= 1", lambda memory: 0 < memory <= 1)
