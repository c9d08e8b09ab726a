"""Times of compactions and their report to the scheduler."""

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from vllm_l2kv.messages.orders import seconds_of
from vllm_l2kv.worker.clock import HostClock
from vllm_l2kv.worker.worker import TimedOutput


def test_each_time_is_reported_once():
    clock = HostClock()
    for _ in range(2):
        with clock.measure():
            pass
    assert len(clock.take()) == 2
    assert clock.take() == []


def test_a_later_output_has_them_too():
    class Later(AsyncModelRunnerOutput):
        def get_output(self):
            return EMPTY_MODEL_RUNNER_OUTPUT

        def get_kv_connector_output(self):
            return "of the connector"

    timed = TimedOutput(Later(), [0.25])
    assert timed.get_kv_connector_output() == "of the connector"
    output = timed.get_output()
    assert seconds_of(output) == [0.25]
    assert output.req_ids == []
    assert seconds_of(EMPTY_MODEL_RUNNER_OUTPUT) == []
