"""Loggers of vllm-l2kv, whose lines carry a mark in vLLM's log."""

import logging
from collections.abc import MutableMapping
from typing import Any

MARK = "vllm-l2kv:"
"""First word of each message; vLLM's log format shows only file names, and vLLM has files of the same names."""


class _Marked(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{MARK} {msg}", kwargs


def logger_of(module: str) -> logging.LoggerAdapter[logging.Logger]:
    """Returns a module's logger.

    Args:
        module: The module's `__name__`. vLLM configures only loggers below "vllm", so this one is named "vllm.MODULE".
    """
    return _Marked(logging.getLogger(f"vllm.{module}"), {})
