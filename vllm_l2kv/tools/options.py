"""Options that several commands have, and what they refuse."""

from argparse import ArgumentParser

from vllm_l2kv.cli_types import list_of, positive
from vllm_l2kv.policy import Intervals
from vllm_l2kv.tools.demo_model import DemoModelError, model_folder


class RefusedError(Exception):
    """What the user asked for cannot be done; the message says why, in one line."""


def folder_of(name: str) -> str:
    """The folder or name that MODEL means; the demo model is fetched, with a line on the terminal.

    Raises:
        RefusedError: It cannot be had.
    """
    try:
        return model_folder(name)
    except DemoModelError as error:
        raise RefusedError(str(error)) from error


def add_verbose(parser: ArgumentParser) -> None:
    """Adds `--verbose`, of commands that send what others print to a log."""
    parser.add_argument(
        "--verbose", action="store_true", help="print the log of the engine; otherwise it goes to a file in DIR"
    )


def add_budgets(parser: ArgumentParser) -> None:
    """Adds `--budgets`, and the intervals beyond them as `serve` has them."""
    add = parser.add_argument
    add("--budgets", type=list_of(positive), default=[], metavar="N,N", help="budgets, values of kv_max_tokens")
    for name, interval in Intervals()._asdict().items():
        where = "before" if name == "prompt" else "from"
        add(
            f"--{name}-interval",
            type=positive,
            default=interval,
            metavar="N",
            help=f"rows beyond a budget that are held at most, {where} the end of the prompt",
        )
