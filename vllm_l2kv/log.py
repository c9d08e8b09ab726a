"""Loggers of vllm-l2kv, whose lines can be found in vLLM's log."""

import logging
from collections.abc import MutableMapping
from typing import Any

MARK = "vllm-l2kv:"
"""The first word of each of our messages; vLLM's log names files, whose names are those of vLLM's too."""


class _Marked(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{MARK} {msg}", kwargs


def logger_of(module: str) -> logging.LoggerAdapter[logging.Logger]:
    """Returns a module's logger.

    Args:
        module: Its `__name__`. vLLM configures logging below its own name only, so the logger's name begins with it.
    """
    return _Marked(logging.getLogger(f"vllm.{module}"), {})
