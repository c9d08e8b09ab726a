import pytest

from vllm_l2kv.plan import in_place, num_blocks_for


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (3000, 94)])
def test_num_blocks_for(tokens, blocks):
    assert num_blocks_for(tokens, 32) == blocks


def test_in_place_takes_the_first_private_blocks():
    assert in_place([False, True, False, True, True], 2) == (1, 3)
    assert in_place([True, True], 2) == (0, 1)


def test_in_place_gives_up_when_too_many_blocks_are_shared():
    assert in_place([False, True, False], 2) is None
    assert in_place([], 1) is None
