"""Signals before the server is ready."""

import signal
import time

import pytest
from vllm.entrypoints.launchers.api_server import entry
from vllm_l2kv_server.start_signals import VLLM_HANDLER, Stopped, signals_that_stop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def wait_for_handler(is_wanted) -> None:
    deadline = time.monotonic() + 10
    while not is_wanted(signal.getsignal(signal.SIGTERM)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as caught, signals_that_stop():
        signal.raise_signal(number)
    assert (caught.value.code, caught.value.name) == (128 + number, number.name)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_vllms_handler_is_replaced_once():
    """Once vLLM has set it; handlers that vLLM sets later, for a server that is ready, stay."""

    def _interrupt_init(*_):
        raise KeyboardInterrupt("terminated")

    with signals_that_stop():
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _interrupt_init)
        wait_for_handler(lambda handler: handler is ours)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1.2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_other_handlers_stay():
    """The handlers of several API servers raise SystemExit, which vLLM needs."""

    def signal_handler(*_):
        raise SystemExit

    with signals_that_stop():
        signal.signal(signal.SIGTERM, signal_handler)
        time.sleep(1.2)
        assert signal.getsignal(signal.SIGTERM) is signal_handler


def test_vllms_handler_has_this_name():
    assert VLLM_HANDLER in entry.run_server.__code__.co_varnames + entry.run_server.__code__.co_cellvars
