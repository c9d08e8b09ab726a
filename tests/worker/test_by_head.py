"""Decoding by head without an engine; without a GPU, in Triton's interpreter and with a loop for FlashAttention."""

import os
from types import SimpleNamespace

import pytest
import torch
from head_pool import DEVICE, FULL_HEADS, HEADS, LARGE, LENGTHS, SMALL, Pool

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "no GPU here; test_runner_v2_interpreted.py runs these in Triton's interpreter", allow_module_level=True
    )

from vllm.v1.worker.utils import AttentionGroup  # noqa: E402

from vllm_l2kv.kernels import head_pages  # noqa: E402
from vllm_l2kv.kv_cache_spec import full_name  # noqa: E402
from vllm_l2kv.worker import by_head  # noqa: E402
from vllm_l2kv.worker.by_head import ARGUMENTS, Room, decode_by_head, leave_schedules_to_calls, room_shape  # noqa: E402

pytestmark = [pytest.mark.gpu] if ON_GPU else []

GROUP, SIZE, SCALE = 3, 16, 0.3
FULL_SIZE, PAGE_SIZE = (48, 16) if ON_GPU else (LARGE, SMALL)
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(len(FULL_HEADS))]


class Split:
    """A split layer's attention, which records that it was called."""

    scale, logits_soft_cap = SCALE, 0.0

    def __init__(self, full_heads):
        compressed = tuple(head for head in range(HEADS) if head not in full_heads)
        self.classes = SimpleNamespace(kv_heads=compressed), SimpleNamespace(kv_heads=tuple(full_heads))
        self.calls = []

    def do_kv_cache_update(self, *args):
        self.calls.append("update")

    def forward(self, *args):
        self.calls.append("forward")
        return "split"


class Loop:
    """FlashAttention as a loop, for the arguments used here."""

    def __init__(self):
        self.schedules = []

    def fwd(self, **named):
        assert named.keys() == ARGUMENTS.keys()
        self.schedules.append(named["scheduler_metadata"])
        keys, values = named["k"], named["v"]
        for i, (length, start) in enumerate(zip(named["seqused_k"], named["cu_seqlens_q"], strict=False)):
            assert named["seqused_q"][i] == 1
            pages = named["page_table"][i, : -(-length // keys.shape[1])].long()
            k, v = (part[pages].flatten(0, 2)[:length].float() for part in (keys, values))
            weights = (named["q"][start].float() @ k.T * named["softmax_scale"]).softmax(-1)
            named["out"][start] = (weights @ v).to(named["out"].dtype)


class Engine:
    """Layers with caches in one pool, and the inputs that vLLM prepares for a step."""

    def __init__(self, monkeypatch, max_num_requests=4):
        self.pool = Pool(torch.bfloat16, FULL_SIZE, PAGE_SIZE, head_size=SIZE, value_size=SIZE)
        self.layers = {}
        one = torch.ones(1, device=DEVICE)
        for i, (name, full_heads) in enumerate(zip(NAMES, FULL_HEADS, strict=True)):
            scales = {"_q_scale": one, "_k_scale": one, "_v_scale": one}
            self.layers[name] = SimpleNamespace(
                impl=Split(full_heads), kv_cache=self.pool.cache("compressed", i), **scales
            )
            self.layers[full_name(name)] = SimpleNamespace(kv_cache=self.pool.cache("full", i))
        self.splits = [self.layers[name].impl for name in NAMES]
        self.room = Room.of(*room_shape(HEADS, max_num_requests, 100, PAGE_SIZE), torch.device(DEVICE))
        self.names = decode_by_head(self.layers, reversed(NAMES), self.room)
        self.step()
        self.loop = Loop()
        monkeypatch.setattr(by_head, "get_attention_context", lambda name: self.context(name))
        if not ON_GPU:
            monkeypatch.setattr(torch.ops, "_vllm_fa3_C", self.loop, raising=False)
            monkeypatch.setattr(by_head.fa_utils, "get_scheduler_metadata", lambda **_: object(), raising=False)

    def step(self, max_query_len=1):
        held = {name: self.pool.held(name) for name in LENGTHS}
        self.slots = {name: each.slots for name, each in held.items()}
        self.metadata = {
            name: SimpleNamespace(
                block_table=each.blocks,
                seq_lens=each.lengths,
                max_query_len=max_query_len,
                max_seq_len=max(LENGTHS[name]),
                max_num_splits=0,
            )
            for name, each in held.items()
        }

    def context(self, name):
        of_class = "full" if name.endswith("full") else "compressed"
        return self.metadata[of_class], self.layers[name], self.layers[name].kv_cache, self.slots[of_class]

    def run(self, i, states, update=True):
        """Runs one layer as vLLM's operators call it."""
        layer = self.layers[NAMES[i]]
        metadata, _, cache, slots = self.context(NAMES[i])
        query, key, value, output = states
        if update:
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
        return layer.impl.forward(layer, query, key, value, cache, metadata, output)


def states():
    """Returns states of four tokens and one padding token; queries are a strided view."""
    packed = torch.randn(5, (GROUP + 2) * HEADS * SIZE, generator=torch.Generator().manual_seed(3))
    query, key, value = packed.bfloat16().to(DEVICE).split([GROUP * HEADS * SIZE, HEADS * SIZE, HEADS * SIZE], dim=1)
    output = torch.full((5, GROUP * HEADS, SIZE), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    return query.view(5, -1, SIZE), key.view(5, HEADS, SIZE), value.view(5, HEADS, SIZE), output


def test_layers_with_both_classes_of_heads_attend_in_one_call(monkeypatch):
    monkeypatch.setattr(head_pages, "TILE", 16)
    engine = Engine(monkeypatch)
    assert engine.names == engine.layers.keys()
    for _ in range(2):
        query, key, value, output = states()
        for i, full_heads in enumerate(FULL_HEADS):
            assert engine.run(i, (query, key, value, output)) is output
            compressed = [head for head in range(HEADS) if head not in full_heads]
            for request, head in ((r, h) for r in (0, 1, 3) for h in range(HEADS)):
                name = "full" if head in full_heads else "compressed"
                heads = full_heads if name == "full" else compressed
                rows = engine.pool.rows(name, i, heads.index(head), request).float()
                assert torch.equal(rows[-1], torch.cat([key[request, head], value[request, head]]).float())
                own = slice(head * GROUP, (head + 1) * GROUP)
                weights = (query[request, own].float() @ rows[:, :SIZE].T * SCALE).softmax(-1)
                right = weights @ rows[:, SIZE:]
                assert torch.allclose(output[request, own].float(), right, atol=2e-2 if ON_GPU else 1e-2)
    assert not any(split.calls for split in engine.splits)
    if not ON_GPU:
        first, second, third, last = engine.loop.schedules[-len(FULL_HEADS) :]
        assert first is last, "layers with as many full heads share a schedule"
        assert len({first, second, third}) == 3
        assert first is not engine.loop.schedules[0], "each pass makes its own"


def test_other_batches_take_a_call_for_each_class(monkeypatch):
    engine = Engine(monkeypatch)
    engine.step(max_query_len=2)
    assert engine.run(0, states()) == "split"
    assert engine.splits[0].calls == ["update", "forward"]


def test_batches_larger_than_the_buffer_take_a_call_for_each_class(monkeypatch):
    engine = Engine(monkeypatch, max_num_requests=3)
    assert engine.run(0, states()) == "split"
    assert engine.splits[0].calls == ["update", "forward"]


def test_a_table_is_used_only_by_its_own_layer_and_step(monkeypatch):
    """A piecewise graph may contain the cache's update, so its replay makes no table."""
    engine = Engine(monkeypatch)
    assert engine.run(0, states(), update=False) == "split"
    assert engine.run(0, states()) != "split"
    assert engine.run(3, states(), update=False) == "split"
    engine.step()
    assert engine.run(0, states(), update=False) == "split"


def test_blocks_that_are_not_pages_are_not_used(monkeypatch):
    engine = Engine(monkeypatch)
    split = Split(FULL_HEADS[0])
    engine.layers[NAMES[0]].impl = split
    engine.layers[full_name(NAMES[0])].kv_cache = torch.zeros_like(engine.pool.cache("full", 0))
    assert decode_by_head(engine.layers, NAMES[:1], engine.room) == set()
    assert engine.layers[NAMES[0]].impl is split


def test_schedules_are_made_where_a_layer_needs_them():
    builders = [SimpleNamespace(aot_schedule=True) for _ in range(3)]
    groups = [
        AttentionGroup(None, names, None, i, metadata_builders=[builder])
        for i, (names, builder) in enumerate(zip((["a"], ["a", "b"], ["c"]), builders, strict=True))
    ]
    leave_schedules_to_calls([groups[:2], groups[2:]], {"a", "c"})
    assert [builder.aot_schedule for builder in builders] == [False, True, False]


@pytest.mark.parametrize(("max_model_len", "num_requests"), [(1000, 256), (131072, 256), (1 << 20, 128)])
def test_the_buffer_is_bounded(max_model_len, num_requests):
    num_sequences, num_pages = room_shape(8, 256, max_model_len, 16)
    assert num_pages * 16 >= max_model_len
    assert num_sequences == num_requests * 8
    room = Room.of(24, 10, torch.device(DEVICE))
    tensors = [*room.sequences, room.ones, room.ascending]
    assert sum(tensor.numel() * tensor.itemsize for tensor in tensors) == by_head.room_bytes(24, 10)
