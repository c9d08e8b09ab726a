"""Documents as `vllm-l2kv plan` counts them, beside those that the managers hold."""

from typing import Any

import hybrid_shapes
import pytest
from tail_shapes import STATE, Layer, specs
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.request import RequestStatus

from vllm_l2kv.kv_cache_spec import group_layer_specs
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scheduler.cache_manager import TailManager
from vllm_l2kv.tools.plan.capacity import Cache, Document, Group

BATCH_TOKENS = 64
NUM_BLOCKS, NUM_DOCUMENTS = 90, 32
"""Of the pool; asked for, which is more than it can hold."""
MODELS: dict[str, tuple[tuple[Layer, ...], tuple[int, ...]]] = {
    "two groups": ((None, None, None), (0,)),
    "a window": ((40, None, 40, None), ()),
    "a full layer in larger blocks": ((40, None, 40, None, 40, None), (1,)),
    "many windows": ((40, 40, 40, 40, 40, None), ()),
    "a short window and a long one": ((17, None, 200, None), ()),
    "states": ((STATE, None, STATE, None), ()),
    "states, and a full layer in larger blocks": ((STATE, None) * 3, (1,)),
    "many states": ((STATE, STATE, STATE, STATE, STATE, None), ()),
    "states and windows": ((STATE, 40, None, STATE, 40, None), ()),
}
PARAMS = {
    "ratio": CompressionParams(0.5, 0, 0),
    "budget": CompressionParams(1.0, 0, 0, max_tokens=48),
}


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def depth(request):
    return request.param


@pytest.fixture
def harness(make_harness, depth, model):
    layers, full_layers = MODELS[model]
    sizes = {"max_num_batched_tokens": BATCH_TOKENS, "prompt_interval": 50}
    return make_harness(NUM_BLOCKS, full_layers, depth, specs=specs(layers, 16), **sizes)


def cache_of(harness) -> Cache:
    config, batch_tokens = harness.scheduler.kv_cache_config, harness.scheduler.max_num_scheduled_tokens
    groups = tuple(Group(tuple(group_layer_specs(group).values())) for group in config.kv_cache_groups)
    return Cache(groups, 1, config.num_blocks, batch_tokens, harness.depth)


def ask(harness, name: str, document: Document, number: int) -> None:
    """A request of one token about one of many documents."""
    fields = {**document.params.as_fields(), "kv_prefix_tokens": document.num_tokens}
    harness.submit(name, [*range(number * 10_000, number * 10_000 + document.num_tokens), 7], fields, 1)


def found(harness, document: Document, number: int) -> list[Any]:
    """The blocks of a document, if it is findable."""
    ask(harness, f"look {number}", document, number)
    hit = harness.scheduler._shared.find(harness.scheduler._states[f"look {number}"].prefixes)
    harness.scheduler.finish_requests(f"look {number}", RequestStatus.FINISHED_ABORTED)
    return [block for group in hit[1] for block in group if not block.is_null] if hit else []


def findable_in_tails(harness) -> set[int]:
    """Ids of blocks of windows and states that can be found in any way."""
    managers = harness.scheduler.kv_cache_manager.coordinator.single_type_managers
    tails = {manager.kv_cache_group_id for manager in managers if isinstance(manager, TailManager)}
    hashed = [block for block in harness.pool.blocks if block.block_hash is not None]
    return {block.block_id for block in hashed if get_group_id(block.block_hash) in tails}


def check(harness, document: Document, num_documents: int) -> None:
    """Each is asked for once. The last one may need less than is planned, so that one more stays."""
    cache = cache_of(harness)
    ask(harness, "0", document, 0)
    harness.run()
    blocks = {block.block_id for block in found(harness, document, 0)}
    assert len(blocks | findable_in_tails(harness)) == cache.document_blocks(document)
    for number in range(1, num_documents):
        ask(harness, f"{number}", document, number)
        harness.run()
    findable = [bool(found(harness, document, number)) for number in range(num_documents)]
    assert findable == sorted(findable), "the last ones stay"
    planned = cache.num_documents(document)
    assert 1 <= planned <= findable.count(True) <= planned + 1 < num_documents


@pytest.mark.parametrize("num_tokens", [96, 111, 415])
@pytest.mark.parametrize("kept", PARAMS)
@pytest.mark.parametrize("model", MODELS)
def test_documents(harness, kept, num_tokens):
    check(harness, Document(num_tokens, PARAMS[kept], harness.scheduler.settings.intervals), NUM_DOCUMENTS)


@pytest.mark.parametrize("num_tokens", [7000, 14 * 544])
@pytest.mark.parametrize("max_tokens", [None, 1000])
@pytest.mark.parametrize("name", ["Qwen3-Next-80B", "Nemotron-H-8B"])
def test_documents_beside_real_states(make_harness, depth, name, max_tokens, num_tokens):
    """Blocks of several hundred tokens: a document has few of rows."""
    layers = hybrid_shapes.MODELS[name].specs(has_prefix_cache=True)
    (block_size,) = {spec.block_size for spec in layers.values()}
    sizes = {"max_num_batched_tokens": 4096, "max_model_len": 8192, "block_size": block_size}
    harness = make_harness(120, (0, 1), depth, specs=tuple(layers.items()), **sizes)
    params = CompressionParams(0.25, 0, 0, max_tokens=max_tokens)
    check(harness, Document(num_tokens, params, harness.scheduler.settings.intervals), 24)
