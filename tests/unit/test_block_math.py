import pytest

from vllm_l2kv.block_math import fits_in_place, num_blocks_for


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (3000, 94)])
def test_num_blocks_for(tokens, blocks):
    assert num_blocks_for(tokens, 32) == blocks


@pytest.mark.parametrize(
    ("private", "num_blocks", "fits"),
    [
        ([True, True, False], 2, True),
        ([True, True], 2, True),
        ([False, True, True], 2, False),  # the shared prefix must not be written
        ([True, False, True], 2, False),
        ([True], 2, False),
    ],
)
def test_fits_in_place_if_the_first_blocks_are_private(private, num_blocks, fits):
    assert fits_in_place(private, num_blocks) is fits
