"""`vllm-l2kv profile`: measures a model and writes its profile and a report."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_l2kv.cli_types import OneLineParser, positive
from vllm_l2kv.tools.demo_model import DEMO_NAME
from vllm_l2kv.tools.engine_log import progress_beside_log
from vllm_l2kv.tools.evaluation.texts import read_text
from vllm_l2kv.tools.options import RefusedError, add_verbose, folder_of

DEFAULTS = {"cpu": (12, 512, 4), "cuda": (112, 1536, 384)}
"""Number of texts, tokens of a text, and number of questions. With these, a small model takes minutes on a CPU."""
DRAWN = "drawn"
"""Value of `--images` for the bundled pictures."""
PARTS = """\
Parts of this run; each shows the time left where it is known:
  1. reading texts and asking about them; fewer --samples, --tokens shorten it
  2. training the scorer learned; no option shortens it
  3. searching for settings and judging them; fewer --questions, --tokens shorten it
A run that is ended starts anew: the profile is written at the end."""
"""What a user needs to know before the wait."""


def profile(argv: Sequence[str]) -> None:
    """Measures a model, and writes its profile and a report.

    Args:
        argv: Arguments after `profile`.

    Raises:
        SystemExit: With 2 and one line on standard error after a bad option, or for a model that cannot be profiled;
            with 130 after an interrupt.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    named = options.model
    try:
        options.model = folder_of(named)
        made = _make(options)
    except RefusedError as refused:
        parser.error(str(refused))
    except KeyboardInterrupt:
        sys.exit(130)

    from vllm_l2kv.tools.profile.report import summary, write_report

    path = write_report(made, options.report)
    sys.stdout.write(f"\n{summary(made, named)}\n\nReport: {path}\n")


def _make(options: Namespace) -> Any:
    """A `Made`."""
    if options.output.is_dir():
        raise RefusedError(f"argument -o: {options.output} is a folder; give a file.")
    options.report = options.report or options.output.with_name(f"{options.output.stem}-report")
    try:
        texts = [read_text(name) for name in options.text]
        pictures = _pictures(options.images)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.report.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RefusedError(str(error)) from error
    with progress_beside_log(options.report / "transformers.log", options.verbose) as progress:
        progress.say(PARTS)
        progress.begin(f"loading {options.model}")
        import torch

        from vllm_l2kv.tools.profile.make import Amounts, make
        from vllm_l2kv.tools.profile.model import uses_gpu

        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        given = options.samples, options.tokens, options.questions
        defaults = DEFAULTS["cuda" if uses_gpu(device) else "cpu"]
        amounts = Amounts(*(number or default for number, default in zip(given, defaults, strict=True)))
        try:
            ranks = options.tensor_parallel_size
            return make(options.model, options.output, texts, pictures, amounts, device, ranks, progress)
        except torch.OutOfMemoryError as error:
            raise RefusedError(
                f"the GPU's memory is too small for {options.model}; use --device auto with several GPUs, or --tokens "
                f"below {amounts.tokens}."
            ) from error
        except (ImportError, OSError, ValueError) as error:
            raise RefusedError(" ".join(str(error).split())) from error


def _pictures(where: str | None) -> list[Any]:
    """The PIL images that `--images` names."""
    if where is None:
        return []
    from vllm_l2kv.tools.profile.pictures import drawn, of_folder

    return drawn() if where == DRAWN else of_folder(Path(where))


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vllm-l2kv profile",
        description="Measures how much a model's answers need each layer and KV head, and writes a profile for "
        "--kv-profile of serve, eval, plan and bench. Runs the model in transformers. No option shortens the "
        "training of the scorer learned. A run that is ended starts anew. See docs/profiles.md.",
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default=DEMO_NAME,
        metavar="MODEL",
        help="folder or name of a model (default: the demo model, %(default)s)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("profile.safetensors"),
        metavar="FILE",
        help="file of the profile (default: %(default)s)",
    )
    add("--report", type=Path, metavar="DIR", help="folder of the report (default: FILE's name with -report)")
    add(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="a text like those that the model will read, from which half of the prose is drawn; may be repeated",
    )
    add(
        "--images",
        metavar="DIR",
        help="folder of pictures, to compare the norms of their keys with those of text in a vision-language model; "
        f"{DRAWN}: four bundled pictures",
    )
    helps = {
        "samples": "number of texts to read; the search reads at most as many others, or two for each question if that "
        "is more; fewer shorten the reading",
        "tokens": "tokens of a text; fewer shorten everything but the training",
        "questions": "number of questions for the search; half as many more judge its results; fewer shorten both, "
        "and the report warns if they are too few",
    }
    for (name, text), few, many in zip(helps.items(), DEFAULTS["cpu"], DEFAULTS["cuda"], strict=True):
        add(f"--{name}", type=positive, metavar="N", help=f"{text} (default: {many}, on a CPU {few})")
    add(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, or auto for a model that needs several GPUs (default: a GPU if there is one)",
    )
    add(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="GPUs that share the model in a server, each with the same number of full heads (default: 1)",
    )
    add_verbose(parser)
    return parser
