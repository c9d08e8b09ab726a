"""`vllm-l2kv serve`: vLLM's server with the options of vLLM and of vllm-l2kv."""

import argparse
import gc
import os
import signal
import sys
import textwrap
import traceback
from argparse import Namespace
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NoReturn

from vllm_l2kv import engine_args
from vllm_l2kv.params import FIELDS_WITH_DEFAULTS
from vllm_l2kv.settings import CONFIG_KEY, Settings
from vllm_l2kv.tools.demo_model import DEMO_NAME, DemoModelError, is_demo_model, model_folder
from vllm_l2kv_server.config_file import ConfigFileError, nearest, option_names, read_config_file
from vllm_l2kv_server.last_line import LastLine, Outcome
from vllm_l2kv_server.profile_line import profile_line
from vllm_l2kv_server.screen import Screen, open_screen
from vllm_l2kv_server.serve_options import PROG, own_options
from vllm_l2kv_server.start_checks import DEFAULT_PORT, StartError, check_parsed, check_words
from vllm_l2kv_server.start_signals import Stopped, signals_that_stop

PLUGIN = "l2kv"
OPTIONAL_PLUGIN_GROUPS = ("general", "platform", "io_processor", "stat_logger")
"""Groups whose plugins vLLM loads when `VLLM_PLUGINS` is unset; endpoint plugins must always be named."""

DEMO_CACHE_BYTES = 2 * 2**30

DESCRIPTION = """\
Starts vLLM's OpenAI-compatible server with per-request KV-cache compression.
Without MODEL it serves the demo model, {demo}.

{own}
Every option of `vllm serve` works too; they are listed below by section.
"""
EPILOG = """\
For a section: vllm-l2kv serve --help=ModelConfig
For a flag:    vllm-l2kv serve --help=max-model-len
For full list: vllm-l2kv serve --help=all
"""


def serve(argv: Sequence[str]) -> None:
    """Runs the server until a signal stops it.

    Args:
        argv: The words after `serve`.

    Raises:
        SystemExit: With 2 if the options are refused, before an engine starts; with 1 if the server failed, at its
            start or later; with 128 plus the signal's number if a signal came before the server was ready; otherwise
            with 0. The last line says which.
    """
    screen = _opened_screen(argv)
    last_line, outcome = LastLine(screen), Outcome()
    try:
        with signals_that_stop():
            with without_garbage_collection():
                args = _checked_options(argv, screen)
            if line := profile_line(Settings.from_config(args.additional_config)):
                sys.stdout.write(line)
                sys.stdout.flush()
            args.outcome = outcome
            _run(args)
    except (Stopped, KeyboardInterrupt) as interrupt:
        # vLLM's handler of SIGTERM, which `signals_that_stop` replaces soon, raises KeyboardInterrupt.
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGTERM)
        last_line.end(stopped.code, f"stopped by {stopped.name} before it was ready.")
    except Exception as error:
        traceback.print_exc()
        last_line.end(1, _what_failed(error, screen.log))
    if outcome.engine_lost:
        last_line.end(1, f"the engine ended by itself, and the server with it; {screen.log} says why.")
    last_line.end(0, "stopped.")


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disables garbage collection during imports, where it finds nothing and takes a fifth of vLLM's import time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _opened_screen(argv: Sequence[str]) -> Screen:
    """Checks the options as far as possible without vLLM, and opens the screen that they ask for.

    Raises:
        SystemExit: The options are refused, with one line on standard error.
    """
    own = own_options()
    named, words = own.parse_known_args(argv)
    if any(word == "-h" or word.partition("=")[0] == "--help" for word in words):
        return Screen()
    try:
        given = check_words(words, option_names(own))
    except ConfigFileError as error:
        own.error(f"argument --config: {error}")
    except StartError as error:
        own.error(str(error))
    # A node without an HTTP server is never ready.
    verbose = given.get("verbose") if named.verbose is None else named.verbose
    return open_screen(True if given.get("headless") else verbose, given.get("port") or DEFAULT_PORT)


def _checked_options(argv: Sequence[str], screen: Screen) -> Namespace:
    """Parses and checks the options, as far as possible without an engine.

    Raises:
        SystemExit: The options are refused, with one line on the screen.
    """
    name_plugin(os.environ)
    # vLLM is imported late: it reads VLLM_PLUGINS, and it takes seconds.
    from vllm.logger import configure_logging_from_args

    from vllm_l2kv_server.seams import cli_env_setup, validate_parsed_serve_args

    load_routes()
    cli_env_setup()
    parser = make_parser(screen)
    args = parse(parser, argv)
    configure_logging_from_args(args)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        if args.model is None or is_demo_model(args.model):
            use_demo_model(args)
        check_parsed(args)
    except (DemoModelError, StartError) as error:
        parser.error(str(error))
    return args


def _run(args: Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        ServeSubcommand.cmd(args)
    except Stopped:
        raise
    except SystemExit as ended:
        # With several API servers, vLLM ends this way at a signal.
        if ended.code:
            raise


def _what_failed(error: Exception, log: str) -> str:
    said = " ".join(str(error).split())
    if said.startswith("Engine core initialization failed"):
        return f"the engine ended during its start; the first ERROR in {log} says why."
    return f"the server failed: {textwrap.shorten(f'{type(error).__name__}: {said}', 300, placeholder=' ...')}"


def name_plugin(environ: MutableMapping[str, str]) -> None:
    """Adds this plugin to `VLLM_PLUGINS`, which child processes inherit, and keeps all other plugins enabled.

    vLLM loads an endpoint plugin only if the variable names it. Once the variable is set, vLLM loads no other plugin.
    """
    named = environ.get("VLLM_PLUGINS")
    if named is None:
        groups = (entry_points(group=f"vllm.{group}_plugins") for group in OPTIONAL_PLUGIN_GROUPS)
        names = [entry_point.name for group in groups for entry_point in group]
    else:
        names = [name for name in named.split(",") if name]
    environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN]))


def load_routes() -> None:
    """Imports the routes; if that fails, vLLM would only log it and serve without them.

    Raises:
        ImportError: The routes, or a package that they need, are broken or missing.
    """
    (plugin,) = entry_points(group="vllm.endpoint_plugins", name=PLUGIN)
    plugin.load()
    import_module("vllm_l2kv_server.routes")


def make_parser(screen: Screen | None = None) -> Any:
    """Returns vLLM's parser of `vllm serve`, with the options of vllm-l2kv.

    Args:
        screen: Where errors are printed; by default on standard error.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_l2kv_server.seams import make_arg_parser

    own = own_options()
    parser = FlexibleArgumentParser(
        prog=PROG,
        usage="vllm-l2kv serve [MODEL] [--config FILE] [options]",
        description=DESCRIPTION.format(demo=DEMO_NAME, own=own.format_help()),
        epilog=EPILOG,
        parents=[own],
        allow_abbrev=False,
    )
    make_arg_parser(parser)
    parser.error = partial(_fail, parser, screen or Screen())
    # An option that is still None after parsing was not given.
    parser.set_defaults(model=None, scheduler_cls=None, worker_cls=None, block_size=None, enable_offline_docs=None)
    return parser


def _fail(parser: Any, screen: Screen, message: str) -> NoReturn:
    """Ends the process with one line; for an unknown option it names the nearest one."""
    _, found, words = message.partition("unrecognized arguments: ")
    if found and words.startswith("--"):
        name = words.split()[0].partition("=")[0]
        message = f"unrecognized option {name}; did you mean --{nearest(name[2:], option_names(parser))}?"
    screen.close(f"{parser.prog}: error: {message}\n")
    sys.exit(2)


def parse(parser: Any, argv: Sequence[str]) -> Namespace:
    """Parses the options: from the command line, else the config file, else the defaults of vllm-l2kv, else vLLM's.

    Raises:
        SystemExit: A bad option.
    """
    args: Namespace = parser.parse_args(_with_config_file(parser, argv))
    args.model = args.model_tag or args.model
    args.model_tag = None
    if args.grpc or os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        parser.error("--grpc and VLLM_USE_RUST_FRONTEND bypass the HTTP fields of vllm-l2kv; leave them out.")
    for option in ("scheduler_cls", "worker_cls"):
        if getattr(args, option) is not None:
            parser.error(f"argument --{option.replace('_', '-')}: set by vllm-l2kv itself; leave it out.")
    if args.enable_offline_docs is None:
        # Otherwise /docs loads its scripts from another host. Under a root path, vLLM's own copies are not found.
        args.enable_offline_docs = not args.root_path
    if CONFIG_KEY in (args.additional_config or {}):
        parser.error(f"argument --additional-config: set {CONFIG_KEY!r} by the --kv- options instead.")
    try:
        ours = engine_args(
            full_layers=args.kv_full_layers,
            full_heads=args.kv_full_heads,
            metrics=True,
            prompt_interval=args.kv_prompt_interval,
            answer_interval=args.kv_answer_interval,
            profile=args.kv_profile,
            memory=args.kv_memory,
            classes=args.kv_classes,
            tensor_parallel_size=args.tensor_parallel_size,
            additional_config=args.additional_config,
            **{field.argument: getattr(args, f"kv_{field.argument}") for field in FIELDS_WITH_DEFAULTS},
        )
    except ValueError as error:
        parser.error(str(error))
    for name, value in ours.items():
        if name == "additional_config" or getattr(args, name) is None:
            setattr(args, name, value)
    return args


def use_demo_model(args: Namespace) -> None:
    """Sets the demo model, and on CPUs settings for an ordinary machine where the user has set none."""
    from vllm.platforms import current_platform

    args.model = model_folder(DEMO_NAME)
    args.served_model_name = args.served_model_name or [DEMO_NAME]
    if not current_platform.is_cpu():
        return
    # float32 works with the attention kernel of every CPU; some pack bf16 keys in a way that cannot be compacted.
    args.dtype = "float32" if args.dtype == "auto" else args.dtype
    # Eager mode needs no C++ compiler and starts sooner.
    args.enforce_eager = True
    # By default vLLM takes nearly all of the machine's memory.
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or DEMO_CACHE_BYTES


def _with_config_file(parser: Any, argv: Sequence[str]) -> list[str]:
    """Returns the words of the config file, if one is named, before those of the command line; later words win."""
    finder = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, words = finder.parse_known_args(argv)
    if found.config is None:
        return words
    try:
        from_file = read_config_file(found.config, parser)
    except ConfigFileError as error:
        parser.error(f"argument --config: {error}")
    # MODEL stays first: after the file's words it would become one more item of a list at their end.
    num_leading = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [*words[:num_leading], *from_file, *words[num_leading:]]
