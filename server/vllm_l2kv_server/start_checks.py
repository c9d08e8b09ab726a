"""Checks before the engine starts, so that a bad option is refused early.

`check_words` runs before vLLM is imported, within a second. It checks names of options, and those values that it can
read without vLLM's parser. After vLLM's parser has read all options, `check_parsed` repeats these checks and builds the
engine's configuration as vLLM will, to run `vllm_l2kv.refusals.check_supported`, as the engine does too.
"""

import copy
import errno
import os
import socket
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_l2kv_server.config_file import nearest, read_yaml

DEFAULT_PORT = 8000
VLLM_KV_OPTIONS = (
    "kv-cache-dtype",
    "kv-cache-dtype-skip-layers",
    "kv-cache-memory-bytes",
    "kv-cache-metrics",
    "kv-cache-metrics-sample",
    "kv-events-config",
    "kv-offloading-backend",
    "kv-offloading-size",
    "kv-sharing-fast-prefill",
    "kv-transfer-config",
)
"""vLLM's own options that begin with `kv-`."""
VALUES = ("config", "hf-config-path", "host", "model", "port", "uds")
SWITCHES = ("data-parallel-multi-port-external-lb", "headless")
"""With either of them this process does not listen on the given address."""
MODEL_FILES = ("config.json", "params.json")
"""A model's folder has one of them, in the format of Hugging Face or of Mistral."""


class StartError(ValueError):
    """The server cannot start with these options; one sentence that names the option and says what to do."""


def check_words(words: Sequence[str], own_options: Collection[str]) -> Mapping[str, Any]:
    """Refuses what can be refused without vLLM.

    Args:
        words: Words of the command line, without the options of vllm-l2kv.
        own_options: Names of the options of vllm-l2kv, without leading dashes.

    Returns:
        The options of the config file, and those of `VALUES` and `SWITCHES` in the words, which win; by name.

    Raises:
        StartError: An unknown option that begins with `kv-`, in the words or in the config file, a folder without a
            model, or an address on which the server cannot listen.
        ConfigFileError: The config file cannot be read.
    """
    finder = ArgumentParser(usage=SUPPRESS, add_help=False, allow_abbrev=False)
    for name in VALUES:
        finder.add_argument(f"--{name}")
    for name in SWITCHES:
        finder.add_argument(f"--{name}", action="store_true", default=None)
    found, rest = finder.parse_known_args([_dashed(word) for word in words])
    file = read_yaml(found.config) if found.config else {}
    file = {str(key).replace("_", "-"): value for key, value in file.items()}
    known = (*own_options, *VLLM_KV_OPTIONS)
    for name in (word[2:].partition("=")[0].partition(".")[0] for word in rest if word.startswith("--kv-")):
        if name not in known:
            raise StartError(f"unrecognized option --{name}; did you mean --{nearest(name, known)}?")
    for key in file:
        if key.startswith("kv-") and key not in known:
            hint = f"did you mean {nearest(key, known)!r}?"
            raise StartError(f"argument --config: {found.config}: unknown key {key!r}; {hint}")
    given = file | {name.replace("_", "-"): value for name, value in vars(found).items() if value is not None}
    if rest and not rest[0].startswith("-"):
        # A word before the first option is the model. Whether a later one is, only vLLM's parser knows.
        given["model"] = rest[0]
    _check_all(given)
    return given


def check_parsed(args: Namespace) -> None:
    """Repeats the checks on the parsed options, and checks the engine's configuration.

    Args:
        args: The parsed options, with the engine's arguments; not changed.

    Raises:
        StartError: As for `check_words`, or a configuration that vLLM or vllm-l2kv refuses.
    """
    _check_all({name: getattr(args, name.replace("-", "_")) for name in (*VALUES, *SWITCHES) if name != "config"})
    if not args.data_parallel_multi_port_external_lb:  # there each server builds a configuration of its own
        _check_engine(args)


def check_model(model: str) -> None:
    """Refuses a folder that is missing or holds no model; names on the Hugging Face hub are not checked.

    Raises:
        StartError: The folder is missing or holds no model.
    """
    if Path(model).is_dir():
        if not any((Path(model) / name).is_file() for name in MODEL_FILES):
            raise StartError(f"argument MODEL: the folder {model} holds no {MODEL_FILES[0]}; name a model's folder.")
        return
    is_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if is_path and "://" not in model and not Path(model).is_file():
        raise StartError(
            f"argument MODEL: there is no folder {model}; name a model's folder, or a model of the Hugging Face hub as "
            "OWNER/NAME."
        )


def check_address(host: str | None, port: int, uds: str | None) -> None:
    """Refuses an address on which the server cannot listen.

    Binds to it and releases it; vLLM binds again later.

    Raises:
        StartError: The address is taken, is not of this machine, or may not be used.
    """
    host = host or ""
    family = socket.AF_UNIX if uds else socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        if not uds:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(uds or (host, port))
        except OSError as error:
            raise StartError(_address_error(error, host, port, uds)) from None
        if uds:
            os.unlink(uds)


def _address_error(error: OSError, host: str, port: int, uds: str | None) -> str:
    if uds:
        hint = "remove it if no server uses it" if error.errno == errno.EADDRINUSE else "name another path"
        return f"argument --uds: cannot listen on {uds} ({error.strerror}); {hint}."
    if error.errno == errno.EADDRINUSE:
        where = host or "this machine"
        return f"argument --port: {port} is taken on {where}; name another, or stop the process that listens there."
    if error.errno == errno.EACCES:
        return f"argument --port: {port} needs rights that this user does not have; name one above 1023."
    return f"argument --host: cannot listen on {host} ({error.strerror}); name an address of this machine."


def _check_all(given: Mapping[str, Any]) -> None:
    if given.get("model") and not given.get("hf-config-path"):
        check_model(str(given["model"]))
    port = str(DEFAULT_PORT if given.get("port") is None else given["port"])
    # The parser refuses a value that is not a port.
    if port.isdecimal() and int(port) < 2**16 and not any(given.get(name) for name in SWITCHES):
        check_address(given.get("host"), int(port), given.get("uds"))


def _check_engine(args: Namespace) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_l2kv.refusals import check_supported

    try:
        # From a copy, since building the configuration fills in arguments. vLLM cannot take this configuration and
        # builds it again later, so a few lines of its log appear twice.
        engine_args = AsyncEngineArgs.from_cli_args(copy.deepcopy(args))
        check_supported(engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER, headless=args.headless))
    except (OSError, ValueError, NotImplementedError) as error:
        raise StartError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    """Returns an error's message as one line; pydantic's messages have several lines and show types of values."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        text = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors(include_url=False))
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def _dashed(word: str) -> str:
    """Returns an option as vLLM reads it, with dashes for the underscores of its name."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
