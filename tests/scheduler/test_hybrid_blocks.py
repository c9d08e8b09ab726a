"""Models with recurrent layers: groups, blocks and prefix cache, in shapes of real models without their kernels."""

import pytest
from classified import classify_layers
from hybrid_shapes import MODELS
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from vllm_l2kv.kv_cache_spec import FLASH_ATTENTION, CompressedLayerSpec, FullLayerSpec
from vllm_l2kv.scheduler.cache_manager import CompressedLayerManager, FullLayerManager, RecurrentLayerManager
from vllm_l2kv.scheduler.integrity import check_nothing_left
from vllm_l2kv.settings import Settings


@pytest.mark.parametrize("geometry", [None, FLASH_ATTENTION], ids=["any stride", "FlashAttention"])
@pytest.mark.parametrize("name", MODELS)
def test_one_attention_layer_is_full_and_states_are_as_they_were(name, geometry):
    specs = MODELS[name].specs(has_prefix_cache=True)
    classified = classify_layers(specs, Settings(), geometry)
    assert [*classified] == [*specs]
    attention = [layer for layer, spec in specs.items() if isinstance(spec, FullAttentionSpec)]
    assert [type(classified[layer]) for layer in attention] == [
        FullLayerSpec,
        *[CompressedLayerSpec] * (len(attention) - 1),
    ]
    assert classified[attention[0]].block_size == (len(attention) - 1) * classified[attention[1]].block_size
    for layer in specs.keys() - set(attention):
        assert classified[layer].page_size_bytes == specs[layer].page_size_bytes
        assert isinstance(classified[layer], MambaSpec)


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def depth(request):
    return request.param


@pytest.mark.parametrize(
    ("full_layers", "num_full_heads"), [((0, 1), 0), ((), 0), ((), 1)], ids=["default", "nothing full", "a full head"]
)
@pytest.mark.parametrize("has_prefix_cache", [True, False], ids=["align", "none"])
@pytest.mark.parametrize("name", ["Qwen3-Next-80B", "Nemotron-H-8B", "LFM2-1.2B"])
def test_requests_of_mixed_rules_leave_nothing(
    make_harness, name, has_prefix_cache, full_layers, num_full_heads, depth
):
    """Blocks are counted after every step, in a pool slightly larger than the longest request."""
    specs = MODELS[name].specs(has_prefix_cache)
    (block_size,) = {spec.block_size for spec in specs.values() if isinstance(spec, FullAttentionSpec)}
    with_keys = [extract_layer_index(layer) for layer, spec in specs.items() if isinstance(spec, FullAttentionSpec)]
    full_heads = ((with_keys[1], (0,)),) * num_full_heads
    harness = make_harness(
        40,
        full_layers,
        depth,
        specs=tuple(specs.items()),
        block_size=block_size,
        enable_prefix_caching=has_prefix_cache,
        max_model_len=4096,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
        prompt_interval=block_size // 2 + 3,
        answer_interval=7,
        full_heads=full_heads,
    )
    kinds = {type(manager) for manager in harness.scheduler.kv_cache_manager.coordinator.single_type_managers}
    assert kinds == {
        CompressedLayerManager,
        RecurrentLayerManager,
        *([FullLayerManager] if full_layers or full_heads else []),
    }
    for i in range(12):
        length, rule = block_size * i // 4 + 3, [{}, {"kv_keep_ratio": 0.3}, {"kv_max_tokens": 40}][i % 3]
        prompt = [i % 2] * (length // 2) + [i] * (length - length // 2)
        harness.submit(f"{i}", prompt, rule or None, max_tokens=20 + 5 * i)
    harness.run(max_steps=3000)
    assert {req_id: len(tokens) for req_id, tokens in harness.outputs.items()} == {
        f"{i}": 20 + 5 * i for i in range(12)
    }
    check_nothing_left(harness.scheduler)


def test_rows_become_free_and_states_stay(make_harness):
    """With a prefix cache a request also holds the state of the step before."""
    specs = MODELS["Qwen3-Next-80B"].specs(has_prefix_cache=True)
    (block_size,) = {spec.block_size for spec in specs.values()}
    assert block_size == 544
    arguments = {"block_size": block_size, "max_num_batched_tokens": 4096, "specs": tuple(specs.items())}
    harness = make_harness(60, (), max_model_len=4096, **arguments)
    harness.add("r", 6 * block_size, max_tokens=4, ratio=0.25)
    managers = harness.scheduler.kv_cache_manager.coordinator.single_type_managers
    held = []
    for _ in range(5):
        harness.step()
        held.append([sum(not b.is_null for b in manager.req_to_blocks.get("r", ())) for manager in managers])
    rows = [type(manager) is CompressedLayerManager for manager in managers].index(True)
    assert [counts[rows] for counts in held] == [5, 6, 2, 2, 0]  # vLLM ends a chunk at each cached state
    assert {counts[group] for counts in held[:-1] for group in range(4) if group != rows} == {1, 2}


@pytest.mark.parametrize("rule", [{"kv_max_tokens": 64}, {"kv_keep_ratio": 0.5, "kv_prefix_tokens": 100}])
def test_a_state_of_a_compressed_context_is_not_found(make_harness, rule):
    """vLLM caches the state at the last boundary of a prompt. A state computed on fewer rows differs."""
    specs = MODELS["LFM2-1.2B"].specs(has_prefix_cache=True)
    (block_size,) = {spec.block_size for spec in specs.values()}
    arguments = {"block_size": block_size, "max_num_batched_tokens": 2048, "specs": tuple(specs.items())}
    harness = make_harness(400, (), prompt_interval=50, **arguments)

    def found(request) -> list[int]:
        return [
            type(manager).find_longest_cache_hit(
                block_hashes=request.block_hashes,
                max_length=request.num_tokens - 1,
                kv_cache_group_ids=[manager.kv_cache_group_id],
                block_pool=harness.pool,
                kv_cache_spec=manager.kv_cache_spec,
                drop_eagle_block=False,
                alignment_tokens=manager.block_size,
            )[1]
            for manager in harness.scheduler.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, RecurrentLayerManager)
        ]

    compressed = harness.submit("compressed", list(range(1000)), rule, max_tokens=3)
    harness.run()
    assert set(found(compressed)) == {0}
    whole = harness.submit("whole", list(range(1000, 2000)), None, max_tokens=3)
    harness.run()
    assert set(found(whole)) == {999 // block_size * block_size}
