"""Which blocks a compaction reads and writes, on paper.

Plain integers: no tensors, no vLLM. The scheduler supplies what it knows of the pool, this module decides.
"""

from collections.abc import Sequence


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` slots."""
    return -(-num_tokens // block_size)


def in_place(private: Sequence[bool], num_destination_blocks: int) -> tuple[int, ...] | None:
    """Picks the destination among a request's own blocks when the pool has too few free ones.

    Only blocks that nobody else holds may be written. The worker reads all rows before it writes any, so the choice
    among them is free; the first ones leave the tail to be freed.

    Args:
        private: For each block of the request's table, whether this request is its only holder.
        num_destination_blocks: Blocks that the kept rows need.

    Returns:
        Indices into the table, ascending, or `None` if there are too few private blocks.
    """
    indices = [index for index, is_private in enumerate(private) if is_private][:num_destination_blocks]
    return tuple(indices) if len(indices) == num_destination_blocks else None
