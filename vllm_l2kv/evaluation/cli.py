"""`vllm-l2kv eval` and `vllm-l2kv diagnose`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_l2kv.evaluation.cases import Case
from vllm_l2kv.evaluation.texts import SAMPLES, read_text
from vllm_l2kv.options import (
    DEFAULT_LAYERS,
    DEFAULT_PROTECTION,
    OneLineParser,
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
from vllm_l2kv.params import GRANULARITIES, SCORERS, CompressionParams

ROWS = "rows.jsonl"
NUM_ANSWER_TOKENS = 256
"""Room behind prompts; a task that needs more says so."""
TASKS = ("perplexity", "passkey", "needle", "ruler")
ESSAYS = "state_of_the_union"


def evaluate(argv: Sequence[str]) -> None:
    """Runs one task, or draws a report again.

    Args:
        argv: The words after `eval`.

    Raises:
        SystemExit: With 2 after a bad option; one line on standard error.
    """
    parser = _eval_parser()
    options = parser.parse_args(argv)
    if options.task == "report":
        try:
            report(options.rows, options.out)
        except (OSError, ValueError) as error:
            parser.error(f"argument ROWS: {error}")
        return
    from vllm_l2kv.evaluation.run import Engine
    from vllm_l2kv.evaluation.variants import variants

    longest = max(options.lengths) + NUM_ANSWER_TOKENS + vars(options).get("continued", 0)
    compared = variants(options.scorers, options.ratios, options.protect, options.granularities)
    try:
        engine = Engine(options.model, options.full_layers, max_model_len=options.max_model_len or longest)
        cases = list(cases_of(options, engine.tokenizer))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if longer := [len(case.prompt) for case in cases if len(case.prompt) + case.num_tokens > engine.max_tokens]:
        parser.error(f"argument --max-model-len: {engine.max_tokens} is too short for prompts of {max(longer)} tokens.")
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(engine, options, cases, compared, options.out / ROWS)
    report([options.out / ROWS], options.out)


def report(paths: Sequence[Path], out: Path) -> None:
    """Draws plots and the HTML report of rows into a folder."""
    from vllm_l2kv.evaluation.report import read_rows, write_report

    out.mkdir(parents=True, exist_ok=True)
    rows = [row for path in paths for row in read_rows(path)]
    sys.stdout.write(f"{write_report(rows, out)}\n")


def diagnose(argv: Sequence[str]) -> None:
    """Measures a model's norms and attention, and recommends settings.

    Args:
        argv: The words after `diagnose`.

    Raises:
        SystemExit: With 2 after a bad option; one line on standard error.
    """
    parser = OneLineParser(
        prog="vllm-l2kv diagnose",
        description="Measures whether key norms foretell attention, layer by layer, and recommends full layers and a "
        "keep ratio. Runs the model in transformers, in fp32.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name of a model")
    parser.add_argument(
        "--text", action="append", metavar="FILE", help=f"text to read, or {listed(SAMPLES)}; repeatable"
    )
    parser.add_argument("--tokens", type=positive, default=1024, metavar="N", help="tokens of a chunk (default: 1024)")
    parser.add_argument(
        "--chunks", type=positive, default=4, metavar="N", help="chunks to read of each text (default: 4)"
    )
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), metavar="DIR", help="folder of results")
    options = parser.parse_args(argv)

    from vllm_l2kv.evaluation.diagnose import config_text, heat_maps, measure, recommend
    from vllm_l2kv.evaluation.report import write_diagnosis

    try:
        texts = [read_text(name) for name in options.text or SAMPLES]
        diagnosis = measure(options.model, texts, options.tokens, options.chunks)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    recommendation = recommend(diagnosis)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row) for row in diagnosis.rows()]
    (options.out / ROWS).write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = config_text(recommendation, Path(options.model).name)
    (options.out / "config.yaml").write_text(config, encoding="utf-8")
    write_diagnosis(config, heat_maps(diagnosis, options.out), options.out)
    sys.stdout.write(config)


def write_rows(
    engine: Any, options: argparse.Namespace, cases: Sequence[Case], compared: Sequence[CompressionParams], path: Path
) -> None:
    """Measures cases, and appends a row for each answer to a file.

    Args:
        engine: An `evaluation.run.Engine`.
        options: Of `vllm-l2kv eval`; `task` is measured, and what else made its prompts goes into the rows.
        cases: Of `cases_of`.
        compared: Of `variants`.
        path: The file.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    rows = engine.rows(options.task, cases, compared)
    run = {name: value for name, value in vars(options).items() if name in ("text", "seed", "continued")}
    # By the line: a run that is killed leaves whole rows.
    with path.open("a", buffering=1, encoding="utf-8") as file:
        for row in tqdm(rows, total=len(cases) * len(compared), desc=options.task, unit="answer"):
            file.write(json.dumps(row | run, ensure_ascii=False) + "\n")


def cases_of(options: argparse.Namespace, tokenizer: Any) -> Iterator[Case]:
    """The prompts that the options of a task ask for."""
    from vllm_l2kv.evaluation.tasks import needle, passkey, perplexity, ruler

    num_samples, seed = options.samples, options.seed
    if options.task == "perplexity":
        return perplexity.cases(tokenizer, read_text(options.text), options.lengths, num_samples, options.continued)
    if options.task == "passkey":
        return passkey.cases(tokenizer, options.lengths, options.depths, num_samples, seed)
    if options.task == "needle":
        return needle.cases(tokenizer, read_text(options.text), options.lengths, options.depths, num_samples, seed)
    return ruler.cases(tokenizer, read_text(options.text), options.lengths, options.subtasks, num_samples, seed)


def _eval_parser() -> argparse.ArgumentParser:
    from vllm_l2kv.evaluation.tasks.ruler import TASKS as SUBTASKS

    parser = OneLineParser(
        prog="vllm-l2kv eval",
        description="Measures what a keep ratio costs, on a real engine: rows, plots and a report go into a folder. "
        "Any other task: see docs/lm_eval.md.",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    helps = {
        "perplexity": "loss and accuracy on a text's continuation",
        "passkey": "a number hidden in noise",
        "needle": "a sentence hidden in essays",
        "ruler": "RULER's task families that need no download",
    }
    for task in TASKS:
        options = tasks.add_parser(task, help=helps[task], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        options.add_argument("model", metavar="MODEL", help="folder or name of a model")
        add = options.add_argument
        add("--out", type=Path, default=Path("eval") / task, metavar="DIR", help="folder of results; rows are added")
        add(
            "--full-layers",
            type=layers,
            default=DEFAULT_LAYERS,
            metavar="I,J",
            help="layers that never compact",
        )
        add("--ratios", type=list_of(ratio), default="0.75,0.5,0.25,0.1", metavar="R,R", help="keep ratios")
        add(
            "--scorers",
            type=list_of(one_of(SCORERS)),
            default=CompressionParams.scorer,
            metavar="S,S",
            help=f"of {listed(SCORERS)}; the controls come by themselves",
        )
        add(
            "--granularities",
            type=list_of(one_of(GRANULARITIES)),
            default=CompressionParams.granularity,
            metavar="G,G",
            help=f"of {listed(GRANULARITIES)}",
        )
        add(
            "--protect",
            type=list_of(protection),
            default=DEFAULT_PROTECTION,
            metavar="FIRST:LAST",
            help="protected tokens, pairs with commas between them",
        )
        add("--lengths", type=list_of(positive), default="1024", metavar="N,N", help="prompt lengths in tokens")
        add("--samples", type=positive, default=10, metavar="N", help="samples of each length, and depth or task")
        add("--seed", type=count, default=0, metavar="N", help="another one makes other prompts")
        add("--max-model-len", type=positive, metavar="N", help="of the engine; by default as much as is needed")
        if task != "passkey":
            add(
                "--text",
                default=ESSAYS if task != "perplexity" else "moby_dick",
                metavar="FILE",
                help=f"file, or {listed(SAMPLES)}",
            )
        if task == "perplexity":
            add("--continued", type=positive, default=128, metavar="N", help="tokens of the continuation")
        if task in ("passkey", "needle"):
            add(
                "--depths",
                type=list_of(_depth),
                default="0,0.25,0.5,0.75,1",
                metavar="D,D",
                help="where it is hidden; 0 is the beginning",
            )
        if task == "ruler":
            add(
                "--subtasks",
                type=list_of(one_of(SUBTASKS)),
                default=",".join(SUBTASKS),
                metavar="T,T",
                help="RULER's names",
            )
    drawing = tasks.add_parser("report", help="draw plots and report of rows again, of several runs together")
    drawing.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help=f"files named {ROWS}")
    drawing.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    return parser


_depth = real("D", "0 <= D <= 1", lambda depth: 0 <= depth <= 1)
