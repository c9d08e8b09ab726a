"""Pipeline parallelism without an engine: layers of ranks, and a scheduler with steps in flight."""

import inspect
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from bare_scheduler import plan
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_l2kv.kv_cache_spec import (
    FLASH_ATTENTION,
    CompressedLayerSpec,
    FullLayerSpec,
    capacity_of,
    classify_ranks,
    group_layer_specs,
    group_spec,
    is_packed,
    with_borrowed_specs,
    with_own_layers,
)
from vllm_l2kv.messages.orders import orders_of
from vllm_l2kv.scheduler import integrity
from vllm_l2kv.seams import get_kv_cache_groups
from vllm_l2kv.settings import Settings
from vllm_l2kv.tools.plan.capacity import cache_of
from vllm_l2kv.worker import worker as worker_module
from vllm_l2kv.worker.worker import CompactionWorker

SHAPE = {"block_size": 16, "head_size": 8, "dtype": torch.float32}
NUM_HEADS = 2
HEAD_BYTES = 2 * SHAPE["head_size"] * 4

planning = inspect.getmodule(get_kv_cache_groups)  # it moved in 0.33


def ranks_of(*num_layers: int, num_heads: int = NUM_HEADS) -> list[dict[str, FullAttentionSpec]]:
    """Returns specs of so many layers on each rank."""
    spec, ranks, first = FullAttentionSpec(**SHAPE, num_kv_heads=num_heads), [], 0
    for number in num_layers:
        ranks.append({f"model.layers.{i}.attn": spec for i in range(first, first + number)})
        first += number
    return ranks


def configs_of(config, ranks, memory: list[int]) -> list[KVCacheConfig]:
    """Returns vLLM's plan for each rank; since 0.33 it is asked for the groups first."""
    if hasattr(planning, "get_global_kv_cache_groups"):
        groups = planning.get_global_kv_cache_groups(config, ranks)
        return planning.get_kv_cache_configs(config, ranks, memory, groups)
    return planning.get_kv_cache_configs(config, ranks, memory)


def classes(rank) -> list[tuple[type, int]]:
    return [(type(spec), spec.block_size) for spec in rank.values()]


def test_any_rank_may_have_the_full_layers():
    first, second = classify_ranks(ranks_of(3, 3), Settings((0, 1)))
    assert classes(first) == [(FullLayerSpec, 16)] * 2 + [(CompressedLayerSpec, 16)]
    assert classes(second) == [(CompressedLayerSpec, 16)] * 3
    first, second = classify_ranks(ranks_of(3, 3), Settings((4,)))
    assert classes(first) == [(CompressedLayerSpec, 16)] * 3
    assert classes(second) == [(CompressedLayerSpec, 16), (FullLayerSpec, 48), (CompressedLayerSpec, 16)]
    with pytest.raises(ValueError, match=r"full_layers names layer 6, but .* 0 to 5"):
        classify_ranks(ranks_of(3, 3), Settings((6,)))


def test_a_rank_without_compressed_heads():
    first, second = classify_ranks(ranks_of(2, 2), Settings((0, 1)))
    assert classes(first) == [(FullLayerSpec, 16)] * 2
    assert classes(second) == [(CompressedLayerSpec, 16)] * 2
    with pytest.raises(ValueError, match="name fewer layers"):
        classify_ranks(ranks_of(1, 1), Settings((0, 1)))


def test_the_first_attention_layer_may_be_on_a_later_rank():
    """In a model with recurrent layers, a full layer without keys means the next one with keys."""
    state = MambaSpec(block_size=16, shapes=((4, 8),), dtypes=(torch.float32,))
    first, second = (dict.fromkeys(rank, state) for rank in ranks_of(2, 2))
    second["model.layers.3.attn"] = FullAttentionSpec(**SHAPE, num_kv_heads=NUM_HEADS)
    third = ranks_of(4, 1)[1]
    _, *others = classify_ranks([first, second, third], Settings((0, 1)))
    assert [
        type(rank[name]) for rank, name in zip(others, ("model.layers.3.attn", "model.layers.4.attn"), strict=True)
    ] == [
        FullLayerSpec,
        CompressedLayerSpec,
    ]


def test_a_class_counts_by_the_rank_that_has_most_of_it():
    """32 layers on two ranks: counted over all layers, a full block would have 15 times as many tokens."""
    ranks = classify_ranks(ranks_of(16, 16, num_heads=8), Settings((0, 1)), FLASH_ATTENTION)
    sizes = {type(spec): spec.block_size for rank in ranks for spec in rank.values()}
    assert sizes[FullLayerSpec] == 8 * sizes[CompressedLayerSpec]
    strides = {spec.block_stride_alignment for rank in ranks for spec in rank.values()}
    heaviest = sum(spec.page_size_bytes for spec in ranks[1].values())
    assert strides == {FLASH_ATTENTION.padded(heaviest)}


def test_every_rank_knows_what_a_token_weighs_in_the_model():
    """The scheduler, which computes a request's numbers, gets only the first rank's layers from vLLM."""
    ranks = classify_ranks(ranks_of(1, 3), Settings((0,), {2: (1,)}))
    compressed = [spec for rank in ranks for spec in rank.values() if isinstance(spec, CompressedLayerSpec)]
    assert {(spec.compressed_bytes, spec.full_bytes) for spec in compressed} == {(5 * HEAD_BYTES, 3 * HEAD_BYTES)}
    merged = CompressedLayerSpec.merge([spec for spec in compressed if spec.num_kv_heads == NUM_HEADS])
    assert (merged.compressed_bytes, merged.full_bytes) == (5 * HEAD_BYTES, 3 * HEAD_BYTES)


@pytest.fixture(scope="module")
def config(demo_model):
    """Returns an engine's configuration, as vLLM's planner reads it."""
    return plan(demo_model, 10, max_model_len=512).config


@st.composite
def models(draw):
    """Draws layers on two to four ranks, the number of full heads in each layer, and layers with windows."""
    num_layers = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    total = sum(num_layers)
    counts = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=total, max_size=total))
    window = draw(st.sets(st.integers(0, total - 1), max_size=2))
    return num_layers, counts, window


def test_vllm_plans_one_pool_for_all_ranks(config):
    @settings(max_examples=60, deadline=None)
    @given(models())
    def check(model):
        check_plan(config, *model)

    check()


def check_plan(config, num_layers, counts, window) -> None:
    """Checks vLLM's plan of the ranks' reports: equal blocks and groups, and a place for each layer of a rank."""
    ranks = ranks_of(*num_layers, num_heads=3)
    for rank in ranks:
        slides = {f"model.layers.{i}.attn" for i in window} & rank.keys()
        rank.update(dict.fromkeys(slides, SlidingWindowSpec(**SHAPE, num_kv_heads=3, sliding_window=32)))
    attending = [count for i, count in enumerate(counts) if i not in window]
    if min(attending, default=3) == 3:
        return  # no layer is left to compress
    full_heads = {i: tuple(range(count)) for i, count in enumerate(counts) if count}
    classified = classify_ranks(ranks, Settings((), full_heads))
    packed = is_packed(spec for rank in classified for spec in rank.values())
    config.cache_config.kv_cache_layout = "BLHNC" if packed else "LBHNC"
    memory = [(1 << 22) + 10_000 * i for i in range(len(ranks))]
    configs = configs_of(config, [dict(rank) for rank in classified], memory)
    assert len({each.num_blocks for each in configs}) == 1
    planned = cache_of(classified, min(memory), batch_tokens=512, num_steps=1)
    equal = configs_of(config, [dict(rank) for rank in classified], [min(memory)] * len(ranks))
    assert planned.num_blocks == equal[0].num_blocks
    assert len({capacity_of(each, config) for each in configs}) == 1
    for each in configs:
        groups = [(type(group_spec(group)), group_spec(group).block_size) for group in each.kv_cache_groups]
        assert groups == [
            (type(group_spec(group)), group_spec(group).block_size) for group in configs[0].kv_cache_groups
        ]
    num_heads, num_full = 3 * len(attending), sum(attending)
    held = capacity_of(configs[0], config).memory_ratio(100, 25)
    assert held == pytest.approx((num_full + (num_heads - num_full) / 4) / num_heads)
    for each, rank in zip(configs, classified, strict=True):
        assert {name for group in each.kv_cache_groups for name in group_layer_specs(group)} == rank.keys()
        caches = caches_of(with_own_layers(each), KVCacheLayout[config.cache_config.kv_cache_layout])
        assert {name: cache.shape[1] for name, cache in caches.items()} == {
            name: spec.num_kv_heads for name, spec in rank.items()
        }


def caches_of(kv_cache_config: KVCacheConfig, layout: KVCacheLayout) -> dict[str, torch.Tensor]:
    return allocate_kv_cache(kv_cache_config, torch.device("cpu"), layout)


def test_stock_vllm_plans_places_for_layers_of_another_rank(config):
    """Once vLLM no longer does this, `with_own_layers` can be removed."""
    classified = classify_ranks(ranks_of(2, 2), Settings((0,)))
    config.cache_config.kv_cache_layout = "BLHNC"
    _, second = configs_of(config, [dict(rank) for rank in classified], [1 << 20] * 2)
    with pytest.raises(StopIteration):
        caches_of(second, KVCacheLayout.BLHNC)
    assert caches_of(with_own_layers(second), KVCacheLayout.BLHNC).keys() == classified[1].keys()


class Loaded(CompactionWorker):
    """A worker after it has loaded a model."""

    attention_backends = ()
    model_runner = None

    def __init__(self, settings: Settings, specs: dict) -> None:
        self.settings, self._specs = settings, specs
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: NUM_HEADS),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            compilation_config=SimpleNamespace(
                static_forward_context=dict.fromkeys(specs, SimpleNamespace(get_attn_backend=lambda: None))
            ),
        )

    def _packed_layouts(self):
        return [KVCacheLayout.BLHNC]


def test_a_rank_reports_its_layers_as_all_ranks_classify_them(monkeypatch):
    """Also if its own layers are equal: one layout must fit the groups of every rank."""
    ranks = ranks_of(2, 2)
    monkeypatch.setattr(worker_module.WorkerBase, "get_kv_cache_spec", lambda self: self._specs)
    monkeypatch.setattr(worker_module.WorkerBase, "get_supported_kv_cache_layouts", lambda _: ["LBHNC"])
    for name in ("check_profile", "check_attention", "check_block_size", "choose_mamba_kernel"):
        monkeypatch.setattr(worker_module, name, lambda *_: None)
    for number, specs in enumerate(ranks):
        monkeypatch.setattr(worker_module, "of_pipeline_ranks", lambda found, number=number: (number, ranks))
        rank = Loaded(Settings((0,)), specs)
        assert rank.get_kv_cache_spec() == classify_ranks(ranks, Settings((0,)))[number]
        assert rank.get_supported_kv_cache_layouts() == ["BLHNC"]


STEPS = {
    "one by one": {"depth": 1},
    "async": {"depth": 2},
    "two ranks": {"depth": 2, "is_async": False, "pipeline_parallel_size": 2},
    "two ranks, async": {"depth": 3, "pipeline_parallel_size": 2},
}
LOAD = [(50, 6, {}), (200, 9, {}), (3, 1, {}), (120, 7, {}), (64, 3, {})]
COMPRESSED = [
    (50, 6, {"kv_keep_ratio": 0.5}),
    (50, 1, {"kv_keep_ratio": 0.5}),  # no token follows its compaction
    (50, 2, {"kv_keep_ratio": 0.5}),
    *((30, max_tokens, {"kv_max_tokens": 20}) for max_tokens in range(1, 9)),
    (150, 4, {"kv_keep_ratio": 0.5, "kv_prefix_tokens": 70}),
]


def run(harness, load) -> None:
    for number, (num_prompt_tokens, max_tokens, fields) in enumerate(load):
        harness.add(f"r{number}", num_prompt_tokens, max_tokens, **fields)
    harness.run()


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_requests_get_their_steps_when_vllm_gives_them(make_harness, steps, monkeypatch):
    """Without async scheduling a request waits for its last token, also if other steps are in flight."""
    monkeypatch.setattr(integrity, "check_requests", lambda _: None)  # vLLM's own scheduler does not have them
    ours, stock = (make_harness(100, full_layers, **steps) for full_layers in ((), None))
    for harness in (ours, stock):
        run(harness, LOAD)
    assert [step.num_scheduled_tokens for step in ours.steps] == [step.num_scheduled_tokens for step in stock.steps]
    assert ours.outputs == stock.outputs


def test_numbers_do_not_depend_on_steps_in_flight(make_harness):
    """A compaction happens only if a token is computed after it, whether that token is known or in flight."""
    usage = {}
    for name, steps in STEPS.items():
        harness = make_harness(100, prompt_interval=8, answer_interval=3, **steps)
        run(harness, COMPRESSED)
        orders = Counter(order.req_id for step in harness.steps for order in orders_of(step))
        assert {
            req_id: reported["compactions"] for req_id, reported in harness.usage.items() if reported["compactions"]
        } == orders
        usage[name] = harness.usage
    assert len(usage["one by one"]) == len(COMPRESSED)
    assert all(reported == usage["one by one"] for reported in usage.values())


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_a_compaction_among_tokens_that_are_not_known_yet(make_harness, steps):
    """It comes at the end of a block, whose last token is in flight: the block has no hash yet."""
    harness = make_harness(100, prompt_interval=8, answer_interval=3, **steps)
    harness.add("r", 10, 12, kv_max_tokens=13)
    harness.run()
    (first, *_) = (order for step in harness.steps for order in orders_of(step))
    assert first.num_keep + first.num_evicted == 16
    assert len(harness.outputs["r"]) == 12


def test_layers_without_a_cache_borrow_the_spec_of_the_one_they_read(config):
    """vLLM's runners look for it; only their copy of the plan has it."""
    (classified,) = classify_ranks(ranks_of(4), Settings((0,)))
    (plan,) = configs_of(config, [dict(classified)], [1 << 20])
    reader, lender = "model.layers.4.attn", "model.layers.3.attn"
    for before, after in zip(
        plan.kv_cache_groups, with_borrowed_specs(plan, {reader: lender}).kv_cache_groups, strict=True
    ):
        specs = dict(before.kv_cache_spec.kv_cache_specs)
        assert reader not in specs
        more = {reader: specs[lender]} if lender in specs else {}
        assert after.kv_cache_spec.kv_cache_specs == specs | more
        assert group_layer_specs(after) == group_layer_specs(before)
