"""Times of compactions, measured on the device."""

import pytest
import torch

from vllm_l2kv.worker.clock import CUDAClock


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device():
    clock = CUDAClock()
    with clock.measure():
        torch.cuda._sleep(100_000_000)  # clock cycles: about a twentieth of a second
    assert clock.take() == []
    with clock.measure():
        torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    long, short = clock.take()
    assert 0.01 < long < 1
    assert 0 <= short < long / 10
    assert clock.take() == []
