"""Options that several commands have."""

from argparse import ArgumentParser

from vllm_l2kv.cli_types import list_of, positive
from vllm_l2kv.policy import Intervals


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
