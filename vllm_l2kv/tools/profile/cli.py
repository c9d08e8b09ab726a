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

DEFAULTS = {"cpu": (12, 512, 4), "cuda": (112, 1536, 128)}
"""Texts, their tokens, and questions to search with. A CPU needs minutes for a small model with so many."""
DRAWN = "drawn"
"""What `--images` calls the pictures that come along."""


def profile(argv: Sequence[str]) -> None:
    """Measures a model, and writes its profile and a report.

    Args:
        argv: The words after `profile`.

    Raises:
        SystemExit: With 2 after a bad option or a model that cannot be profiled, one line on standard error; with 130
            after an interrupt.
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
        raise RefusedError(f"argument -o: {options.output} is a folder; name a file.")
    options.report = options.report or options.output.with_name(f"{options.output.stem}-report")
    try:
        texts = [read_text(name) for name in options.text]
        pictures = _pictures(options.images)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.report.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RefusedError(str(error)) from error
    with progress_beside_log(options.report / "transformers.log", options.verbose) as progress:
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
                f"the GPU's memory is too small for {options.model}: give --device auto with several GPUs, or --tokens "
                f"less than {amounts.tokens}."
            ) from error
        except (ImportError, OSError, ValueError) as error:
            raise RefusedError(" ".join(str(error).split())) from error


def _pictures(where: str | None) -> list[Any]:
    """Of PIL."""
    if where is None:
        return []
    from vllm_l2kv.tools.profile.pictures import drawn, of_folder

    return drawn() if where == DRAWN else of_folder(Path(where))


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vllm-l2kv profile",
        description="Measures what each layer and KV head of a model does for its answers, and writes a profile for "
        "--kv-profile of serve, eval, plan and bench. Runs the model in transformers. See docs/profiles.md.",
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
        help="the profile (default: %(default)s)",
    )
    add("--report", type=Path, metavar="DIR", help="folder of the report (default: FILE's name with -report)")
    add(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="a text like those that the model will read; may be given several times, and half of the prose is then "
        "drawn from them",
    )
    add(
        "--images",
        metavar="DIR",
        help="folder of pictures, to compare norms of their keys with those of text in a vision-language model; "
        f"{DRAWN}: four pictures that come with the package",
    )
    helps = {
        "samples": "texts to read",
        "tokens": "tokens of a text",
        "questions": "questions to search settings with; half as many judge them",
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
        help="GPUs that a server will share the model among: each gets equally many full heads (default: 1)",
    )
    add_verbose(parser)
    return parser
