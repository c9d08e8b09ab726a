"""Options that several commands share, and the error for unusable ones."""

from argparse import ArgumentParser

from vllm_l2kv.cli_types import list_of, positive
from vllm_l2kv.policy import Intervals
from vllm_l2kv.tools.demo_model import DemoModelError, model_folder


class RefusedError(Exception):
    """The command cannot do what its options ask for; the message says why, in one line."""


def folder_of(name: str) -> str:
    """Resolves MODEL to a folder or a name; the demo model is downloaded if needed.

    Raises:
        RefusedError: The demo model cannot be downloaded.
    """
    try:
        return model_folder(name)
    except DemoModelError as error:
        raise RefusedError(str(error)) from error


def add_verbose(parser: ArgumentParser) -> None:
    """Adds `--verbose`, for commands that write the engine's log to a file."""
    parser.add_argument(
        "--verbose", action="store_true", help="print the engine's log instead of writing it to a file in DIR"
    )


def add_budgets(parser: ArgumentParser) -> None:
    """Adds `--budgets`, and the options of `serve` for the intervals."""
    add = parser.add_argument
    add("--budgets", type=list_of(positive), default=[], metavar="N,N", help="budgets, values of kv_max_tokens")
    for name, interval in Intervals()._asdict().items():
        where = "before" if name == "prompt" else "from"
        add(
            f"--{name}-interval",
            type=positive,
            default=interval,
            metavar="N",
            help=f"most rows beyond a budget that a request holds, {where} the end of the prompt",
        )
