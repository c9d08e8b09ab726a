"""The command `vllm-l2kv`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from vllm_l2kv import __version__
from vllm_l2kv.supported_vllm import UnsupportedVLLMError, check_vllm
from vllm_l2kv.tools.demo_model import DEMO_NAME, DemoModelError, model_folder

VLLM = {"vllm": "[cpu], or with [cuda] on a machine with an NVIDIA GPU"}
PLOTS = dict.fromkeys(("jinja2", "matplotlib"), "[eval]")
REPORTS = PLOTS | {"scipy": "[eval]"}
NEEDS: Mapping[str, Mapping[str, str]] = {
    "serve": VLLM,
    "eval": VLLM | REPORTS,
    "eval report": REPORTS,
    "eval ruler": VLLM | REPORTS | dict.fromkeys(("lm_eval", "wonderwords"), "[eval]"),
    "profile": VLLM | PLOTS,
    "bench": dict.fromkeys(("httpx", "jinja2", "matplotlib"), "[bench]"),
    "plan": VLLM,
}
"""Command (its first one or two words) to the packages that it imports and the extra that installs each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand.

    Args:
        argv: Arguments after `vllm-l2kv`; `None` for those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _check_packages(words)
    # Each command with options has its own parser. That of `serve` is vLLM's, which cannot be a subparser of this one.
    match words:
        case ["serve", *rest]:
            from vllm_l2kv_server.serve import serve

            serve(rest)
        case ["eval", *rest]:
            from vllm_l2kv.tools.evaluation.cli import evaluate

            evaluate(rest)
        case ["profile", *rest]:
            from vllm_l2kv.tools.profile.cli import profile

            profile(rest)
        case ["bench", *rest]:
            from vllm_l2kv.tools.bench.cli import bench

            bench(rest)
        case ["plan", *rest]:
            from vllm_l2kv.tools.plan.cli import plan

            plan(rest)
        case _:
            if _parser().parse_args(words).command == "demo-model":
                _show_demo_model()
            else:
                _show_config_schema()


def _check_packages(words: Sequence[str]) -> None:
    """Exits with one line if a required package is missing: some are imported only after hours of work."""
    command = " ".join(words[:2])
    for package, extra in NEEDS.get(command, NEEDS.get(command.partition(" ")[0], {})).items():
        if find_spec(package) is None:
            sys.stderr.write(
                f"vllm-l2kv {words[0]}: error: the package {package} is missing; install vllm-l2kv{extra}.\n"
            )
            sys.exit(2)
        if package == "vllm":
            try:
                check_vllm()
            except UnsupportedVLLMError as error:
                sys.stderr.write(f"vllm-l2kv {words[0]}: error: {error}\n")
                sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-l2kv", description="vLLM with per-request KV-cache compression by the L2 norm of keys."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="start the OpenAI-compatible server; see vllm-l2kv serve --help")
    commands.add_parser("eval", help="measure what a keep ratio or a budget costs; see vllm-l2kv eval --help")
    commands.add_parser("profile", help="measure which layers and heads a model needs; see vllm-l2kv profile --help")
    commands.add_parser("bench", help="load-test a server at several keep ratios; see vllm-l2kv bench --help")
    commands.add_parser("plan", help="compute how many requests fit a GPU; see vllm-l2kv plan --help")
    commands.add_parser("demo-model", help="get the demo model and print its folder")
    commands.add_parser("config-schema", help="print the JSON schema of config files, for editors")
    return parser


def _show_config_schema() -> None:
    from vllm_l2kv_server.serve_options import config_schema

    sys.stdout.write(config_schema())


def _show_demo_model() -> None:
    try:
        folder = model_folder(DEMO_NAME)
    except DemoModelError as error:
        sys.exit(f"vllm-l2kv: {error}")
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
