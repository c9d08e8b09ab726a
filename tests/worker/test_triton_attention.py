"""vLLM's `TRITON_ATTN` on compacted requests, against plain loops: its own kernels, in Triton's interpreter.

All classes are vLLM's: block tables, metadata builder, the layer's implementation. Between two steps a request is
compacted.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "test_runner_v2_interpreted.py runs these in Triton's interpreter, tests/gpu/test_backends.py on a GPU",
        allow_module_level=True,
    )

from fake_gpu import CPU, HostRunner, patch_vllm
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.composite import requires_mm_prefix
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.kernels.reference import LayerRows, ReferenceCompactor, select
from vllm_l2kv.kv_cache_spec import CompressedLayerSpec, FullLayerSpec, full_name
from vllm_l2kv.messages.orders import CompactionOrder, GroupMove
from vllm_l2kv.params import CompressionParams
from vllm_l2kv.scorers import Heads, bind
from vllm_l2kv.worker.heads import split_attention
from vllm_l2kv.worker.runner import Step
from vllm_l2kv.worker.runner_v2 import RunnerV2

# Queries that pad a tile divide zero by zero.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

NAME = "model.layers.0.attn"
HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 32, 0.3
BLOCK_SIZES = 16, 32
KEEP = 13
PARAMS = CompressionParams(protect_first=2, protect_last=4)
STATES = {"whole": 5, "compacted": 2}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    patch_vllm(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))  # the cache's update reads it


class Engine:
    """One layer, whose KV head 1 may be full, and two requests; group 1 is empty if it is not.

    Attributes:
        held: For each request, keys and values of all its tokens, `[2, num_tokens, KV_HEADS, SIZE]`.
        kept: Positions that KV head 0 (and 1, unless full) holds of a compacted request, and where new rows begin.
    """

    def __init__(self, is_split: bool) -> None:
        one = torch.ones(())
        scales = {"_q_scale": one, "_k_scale": one, "_v_scale": one}
        layer = SimpleNamespace(impl=TritonAttentionImpl(HEADS, SIZE, SCALE, KV_HEADS, None, None, "auto"), **scales)
        self.layers, self.full = {NAME: layer}, (1,) if is_split else ()
        compressed = [head for head in range(KV_HEADS) if head not in self.full]
        if is_split:
            split_attention(self.layers, NAME, compressed, self.full, CPU)
        self.runner = HostRunner(BLOCK_SIZES, max_model_len=128, max_num_tokens=128)
        self.runner.req_states.req_id_to_index.update(STATES)
        self.names = NAME, full_name(NAME)
        for group, spec in enumerate((CompressedLayerSpec, FullLayerSpec)):
            num_heads = len((compressed, self.full)[group]) or 1
            spec = spec(block_size=BLOCK_SIZES[group], num_kv_heads=num_heads, head_size=SIZE, dtype=torch.float32)
            self.runner.attn_groups[group] = [group_of(self.names[group], spec, group)]
            if self.names[group] in self.layers:
                cache = torch.full((24, num_heads, BLOCK_SIZES[group], 2 * SIZE), torch.nan)
                self.layers[self.names[group]].kv_cache = cache
        self.v2 = RunnerV2(self.runner, [0])
        heads = Heads((0,), (tuple(compressed),), KV_HEADS, CPU)
        cache = layer.kv_cache
        self.compactor = ReferenceCompactor(0, [LayerRows(cache[..., :SIZE], cache[..., SIZE:])], bind(heads))
        for i, state in enumerate(STATES.values()):
            blocks = [1 + 6 * i, 4 + 6 * i, 2 + 6 * i, 3 + 6 * i], [13 + 5 * i, 15 + 5 * i, 14 + 5 * i]
            self.runner.block_tables.append_block_ids(state, blocks, overwrite=True)
        self.runner.block_tables.apply_staged_writes()
        self.held = {name: torch.zeros(2, 0, KV_HEADS, SIZE) for name in STATES}
        self.kept = {}
        self.random = torch.Generator().manual_seed(0)

    def step(self, images=None, **num_tokens: int):
        """Computes tokens of requests, and returns the error of attention.

        Args:
        images: For a batch index, inclusive ranges of positions that attend to each other.
        num_tokens: Number of tokens by request.
        """
        query, key, value = (
            torch.randn(sum(num_tokens.values()), heads, SIZE, generator=self.random)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        begins = {name: self.held[name].shape[1] for name in num_tokens}
        for name, keys, values in zip(
            num_tokens, key.split([*num_tokens.values()]), value.split([*num_tokens.values()]), strict=True
        ):
            self.held[name] = torch.cat([self.held[name], torch.stack([keys, values])], dim=1)
        metadata, slots = self._metadata(begins, num_tokens, images)
        output = torch.full_like(query, torch.nan)
        layer = self.layers[NAME]
        attn_metadata, slot_mapping = (
            dict(zip(self.names, metadata, strict=True)),
            dict(zip(self.names, slots, strict=True)),
        )
        with override_forward_context(
            ForwardContext(no_compile_layers=self.layers, attn_metadata=attn_metadata, slot_mapping=slot_mapping)
        ):
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots[0])
            layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata[0], output)
        expected = [
            self._expected(name, queries, (images or {}).get(i, ()))
            for i, (name, queries) in enumerate(zip(num_tokens, query.split([*num_tokens.values()]), strict=True))
        ]
        torch.testing.assert_close(output, torch.cat(expected), rtol=1e-4, atol=1e-5)
        return metadata

    def compact(self) -> None:
        """Compacts the request `compacted` to `KEEP` rows, in a new block."""
        num_rows = self.held["compacted"].shape[1]
        move = GroupMove(0, (7, 10, 8, 9), (21,))
        counts = {"num_rows": num_rows, "num_keep": KEEP, "num_evicted": num_rows - KEEP}
        order = CompactionOrder(req_id="compacted", params=PARAMS, moves=(move,), **counts)
        self.compactor.compact([order])
        self.v2.begin_step(Step(orders=[order]))
        self.runner.block_tables.apply_staged_writes()
        scores = -self.held["compacted"][0].norm(dim=-1).T
        self.kept["compacted"] = select(scores, KEEP, PARAMS.protect_first, PARAMS.protect_last).tolist(), num_rows

    def more_blocks(self, *blocks: int) -> None:
        self.runner.block_tables.append_block_ids(STATES["compacted"], ([*blocks], []), overwrite=False)
        self.runner.block_tables.apply_staged_writes()

    def _metadata(self, begins, num_tokens, images):
        tables, names = self.runner.block_tables, [*num_tokens]
        states = [STATES[name] for name in names]
        idx_mapping = torch.tensor(states)
        starts = torch.tensor([0, *np.cumsum([*num_tokens.values()])], dtype=torch.int32)
        positions = torch.cat([torch.arange(begins[name], begins[name] + n) for name, n in num_tokens.items()])
        blocks = tables.gather_block_tables(idx_mapping, len(names))
        slots = tables.compute_slot_mappings(idx_mapping, starts, positions, len(positions))
        seq_lens = torch.tensor([self.held[name].shape[1] for name in names], dtype=torch.int32)
        shared = {
            "query_start_loc": starts,
            "query_start_loc_cpu": starts,
            "seq_lens": seq_lens,
            "num_reqs": len(names),
            "num_actual_tokens": len(positions),
            "max_query_len": max(num_tokens.values()),
            "max_seq_len": int(seq_lens.max()),
            "seq_lens_cpu_upper_bound": seq_lens.clone(),
            "req_idx": np.array(states, dtype=np.int32),
            "mm_req_doc_ranges": images,
        }
        built = [
            group.build_metadata(CommonAttentionMetadata(**shared, block_table_tensor=blocks[i], slot_mapping=slots[i]))
            for i, (group,) in enumerate(self.runner.attn_groups)
        ]
        return built, slots

    def _expected(self, name, queries, ranges):
        num_tokens, first = self.held[name].shape[1], self.held[name].shape[1] - len(queries)
        output = torch.zeros_like(queries)
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            held = list(range(num_tokens))
            if name in self.kept and kv_head not in self.full:
                kept, since = self.kept[name]
                held = [*kept[kv_head], *range(since, num_tokens)]
            keys, values = self.held[name][:, held, kv_head]
            for i, query in enumerate(queries[:, head]):
                position = first + i
                sees = [k <= position or any(a <= position <= b and a <= k <= b for a, b in ranges) for k in held]
                weights = (keys[sees] @ query * SCALE).softmax(0)
                output[i, head] = weights @ values[sees]
        return output


def group_of(name, spec, group):
    """Returns an attention group of `TRITON_ATTN` with vLLM's builder and a minimal configuration."""
    model = SimpleNamespace(
        get_num_attention_heads=lambda _: HEADS, get_num_kv_heads=lambda _: KV_HEADS, get_head_size=lambda: SIZE,
        rswa_window=None,
    )  # fmt: skip
    compilation = SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE, static_forward_context={})
    scheduler = SimpleNamespace(max_num_seqs=8)
    config = SimpleNamespace(
        model_config=model, parallel_config=None, compilation_config=compilation, scheduler_config=scheduler,
        speculative_config=None,
    )  # fmt: skip
    builder = TritonAttentionBackend.get_builder_cls()(spec, [name], config, CPU)
    return AttentionGroup(TritonAttentionBackend, [name], spec, group, metadata_builders=[builder])


@pytest.mark.parametrize("is_split", [False, True], ids=["all heads compress", "a full head"])
def test_a_compacted_request_attends_to_its_rows(is_split):
    """Its prompt comes in two chunks; then it decodes alone and with another request, one token and several."""
    engine = Engine(is_split)
    engine.step(whole=20, compacted=25)
    engine.step(compacted=15)
    engine.compact()
    compressed, full = engine.step(whole=1, compacted=1)
    assert compressed.seq_lens.tolist() == [21, KEEP + 1]
    assert full.seq_lens.tolist() == [21, 41]
    assert (compressed.max_seq_len, full.max_seq_len) == (21, 41)
    engine.more_blocks(22, 23)
    for _ in range(4):  # into the second block
        engine.step(compacted=1)
    engine.step(whole=1, compacted=7)


def test_an_image_after_a_compaction_attends_to_all_of_itself():
    """Gemma's rule: queries of an image attend to its later keys, whose slots differ from positions."""
    engine = Engine(is_split=True)
    engine.step(whole=20, compacted=40)
    engine.compact()
    engine.more_blocks(22, 23)
    images = {0: [(3, 9)], 1: [(2, 8), (42, 47)]}
    compressed, full = engine.step(images, whole=1, compacted=10)
    assert compressed.mm_prefix_range[1][1] == (42 - 27, 47 - 27)
    assert full.mm_prefix_range == images
    engine.step({0: [(2, 8), (42, 47)]}, compacted=1)


def test_images_of_several_requests_and_compactions():
    """One in each request of a batch, two in one step, and one after a second compaction."""
    engine = Engine(is_split=False)
    engine.step({0: [(3, 9)], 1: [(30, 37)]}, whole=15, compacted=40)
    engine.compact()
    engine.more_blocks(22, 23, 7, 10)
    images = {0: [(3, 9), (16, 19)], 1: [(30, 37), (40, 44), (46, 54)]}
    compressed, _ = engine.step(images, whole=5, compacted=16)
    assert compressed.mm_prefix_range == {0: images[0], 1: [(3, 10), (13, 17), (19, 27)]}
    engine.step(images, whole=1, compacted=3)


def test_a_step_that_ends_inside_an_image_is_wrong():
    """Queries give weight to later keys of the image, which do not exist: why `refusals.check_images` refuses it."""
    engine = Engine(is_split=False)
    engine.step({0: [(20, 27)]}, whole=28)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        engine.step({0: [(20, 27), (30, 37)]}, whole=5)


def test_a_step_after_an_image_takes_causal_attention(monkeypatch):
    """The composite of Triton and FlashAttention chooses by physical ranges and lengths."""
    engine = Engine(is_split=True)
    engine.step(compacted=40)
    engine.compact()
    engine.more_blocks(22, 23)
    chosen = []
    for group in engine.runner.attn_groups:
        (builder,) = group[0].metadata_builders
        build = builder.build
        monkeypatch.setattr(
            builder, "build", lambda *args, build=build: (chosen.append(requires_mm_prefix(args[1])), build(*args))[1]
        )
    images = {0: [(2, 8), (42, 47)]}
    engine.step(images, compacted=10)
    engine.step(images, compacted=2)
    engine.step(images, compacted=1)
    assert chosen == [True, True, False, False, False, False]
