"""The phases of a start, which vLLM's log tells from each other."""

import re
from dataclasses import dataclass

AT_ONCE = re.compile("(?!)")
"""Of the first phase, which begins with no line."""
KV_CACHE = re.compile(
    r"KV cache size: (?P<tokens>\S+) tokens, .* for (?P<longest>\S+) tokens per request: (?P<times>[\d.]+)x"
)


@dataclass(frozen=True)
class Phase:
    """A part of a start.

    Attributes:
        doing: What is being done.
        done: The same once it is done.
        begins: Matches lines of vLLM's log, of any process, with which it begins.
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
"""In their order. A line that is missing, as with a higher log level, leaves its phase to the one before."""


def cache_size(line: str) -> str | None:
    """What vLLM says of the size of the KV cache in this line of its log."""
    if not (found := KV_CACHE.search(line)):
        return None
    return f"KV cache of {found['tokens']} tokens, {found['times']} times the longest request ({found['longest']})"
