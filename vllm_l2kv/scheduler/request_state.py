"""What the scheduler remembers of a request."""

from dataclasses import dataclass

from vllm_l2kv.messages.usage import PromptUsage
from vllm_l2kv.params import CompressionParams


@dataclass
class RequestState:
    """An unfinished request that reports the numbers of its prompt.

    Attributes:
        params: What it asks; `None` if its prompt is kept whole, at a ratio of 1 or as streaming input.
        usage: The numbers, as its outputs carry them from now on.
        is_counted: Whether the statistics have it among compressed requests.
    """

    params: CompressionParams | None
    usage: PromptUsage
    is_counted: bool = False
