import copy
import pickle

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_l2kv.messages.orders import CompactionOrder, GroupMove, attach_orders, orders_of
from vllm_l2kv.params import CompressionParams

ORDER = CompactionOrder(
    req_id="r",
    num_rows=100,
    num_keep=40,
    num_evicted=60,
    params=CompressionParams(0.4, 4, 8),
    moves=(GroupMove(1, (5, 6, 7, 8), (9, 10)),),
)


def test_orders_survive_the_ways_an_executor_passes_a_step_on():
    output = SchedulerOutput.make_empty()
    assert orders_of(output) == ()
    attach_orders(output, (ORDER,))
    for passed_on in (output, pickle.loads(pickle.dumps(output)), copy.copy(output)):
        assert orders_of(passed_on) == (ORDER,)
