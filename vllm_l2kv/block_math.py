"""Block arithmetic of a compaction.

Plain integers: no tensors, no vLLM. The scheduler supplies what it knows of the pool, this module decides.
"""

from collections.abc import Sequence


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` slots."""
    return -(-num_tokens // block_size)


def fits_in_place(private: Sequence[bool], num_destination_blocks: int) -> bool:
    """Whether a request's own first blocks can take its kept rows when the pool has too few free ones.

    Only blocks of no other request may be written. With the first blocks of the table as destination, a kept row
    moves to its own slot or to an earlier one, so the rows can be moved in order without a copy of them.

    Args:
        private: For each block of the request's table, whether this request is its only holder.
        num_destination_blocks: Blocks that the kept rows need.
    """
    return len(private) >= num_destination_blocks and all(private[:num_destination_blocks])
