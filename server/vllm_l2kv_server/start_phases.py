"""The phases of a start, recognized by lines of vLLM's log."""

import re
from dataclasses import dataclass

AT_ONCE = re.compile("(?!)")
"""Matches no line; the first phase begins at once."""
KV_CACHE = re.compile(
    r"KV cache size: (?P<tokens>\S+) tokens, .* for (?P<longest>\S+) tokens per request: (?P<times>[\d.]+)x"
)


@dataclass(frozen=True)
class Phase:
    """A part of a start.

    Attributes:
        doing: Text while it runs.
        done: Text once it is over.
        begins: Matches the line of vLLM's log, from any process, that begins it.
    """

    doing: str
    done: str
    begins: re.Pattern[str]


PHASES = (
    Phase("importing vLLM and checking the options", "vLLM imported, options checked", AT_ONCE),
    Phase("starting the engine's processes", "engine's processes started", re.compile("non-default args:")),
    Phase("loading the weights", "weights loaded", re.compile("Starting to load model|Loading model from scratch")),
    Phase("measuring memory", "memory measured", re.compile("Loading weights took|Model loading took")),
    Phase("warming up", "warmed up", KV_CACHE),
    Phase("starting the HTTP server", "HTTP server started", re.compile(r"init engine \(")),
)
"""In order. If a line is missing, as with a higher log level, its phase counts as part of the one before."""


def cache_size(line: str) -> str | None:
    """Returns the size of the KV cache as text if this line of vLLM's log has it."""
    if not (found := KV_CACHE.search(line)):
        return None
    return f"KV cache of {found['tokens']} tokens, {found['times']} times the longest request ({found['longest']})"
