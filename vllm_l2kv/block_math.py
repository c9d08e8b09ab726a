"""Block arithmetic of a compaction.

Plain integers: no tensors, no vLLM. The scheduler passes in the state of the pool, and this module decides.
"""

from collections.abc import Sequence


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Number of blocks that hold `num_tokens` slots."""
    return -(-num_tokens // block_size)


def fits_in_place(private: Sequence[bool], num_destination_blocks: int) -> bool:
    """Whether a request's kept rows can go into its own first blocks when the pool has too few free blocks.

    Blocks that another request also holds must not be written. With the first blocks of the table as destination,
    each kept row stays in its slot or moves to an earlier one, so rows can be moved in order without a copy.

    Args:
        private: For each block of the request's table, whether this request is its only holder.
        num_destination_blocks: Number of blocks that the kept rows need.
    """
    return len(private) >= num_destination_blocks and all(private[:num_destination_blocks])
