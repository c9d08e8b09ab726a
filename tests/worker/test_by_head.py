"""Attention by head without an engine; without a GPU, in Triton's interpreter and with loops for FlashAttention."""

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
from vllm_l2kv.worker.by_head import ARGUMENTS, Room, attend_by_head, leave_schedules_to_calls, room_shape  # noqa: E402

pytestmark = [pytest.mark.gpu] if ON_GPU else []

GROUP, SIZE, SCALE = 3, 16, 0.3
FULL_SIZE, PAGE_SIZE = (48, 16) if ON_GPU else (LARGE, SMALL)
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(len(FULL_HEADS))]


class Impl:
    """vLLM's implementation as loops over requests of one token; records the KV heads of its calls."""

    def __init__(self, num_kv_heads, calls):
        self.num_heads, self.num_kv_heads, self.calls = num_kv_heads * GROUP, num_kv_heads, calls

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        self.calls.append(("update", self.num_kv_heads))
        assert key.shape[1] == kv_cache.shape[1] == self.num_kv_heads
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                block, row = divmod(slot, kv_cache.shape[2])
                kv_cache[block, :, row] = torch.cat([key[token], value[token]], -1)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        self.calls.append(("forward", self.num_kv_heads))
        assert query.shape[1] == output.shape[1] == self.num_heads
        for request, length in enumerate(attn_metadata.seq_lens.tolist()):
            rows = kv_cache[attn_metadata.block_table[request].long()].transpose(1, 2).flatten(0, 1)[:length]
            keys, values = rows.float().repeat_interleave(GROUP, 1).transpose(0, 1).split(SIZE, -1)
            weights = (query[request].float().unsqueeze(1) @ keys.transpose(1, 2) * SCALE).softmax(-1)
            output[request] = (weights @ values).squeeze(1).to(output.dtype)


class Split:
    """A split layer's attention, which serves only steps without metadata."""

    scale, logits_soft_cap = SCALE, 0.0

    def __init__(self, name, full_heads):
        self.calls = []
        compressed = [head for head in range(HEADS) if head not in full_heads]
        self.classes = [
            SimpleNamespace(name=of_class, kv_heads=tuple(heads), impl=Impl(len(heads), self.calls))
            for of_class, heads in ((name, compressed), (full_name(name), full_heads))
        ]

    def forward(self, *args):
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
                impl=Split(name, full_heads), kv_cache=self.pool.cache("compressed", i), **scales
            )
            self.layers[full_name(name)] = SimpleNamespace(kv_cache=self.pool.cache("full", i))
        self.splits = [self.layers[name].impl for name in NAMES]
        self.room = Room.of(*room_shape(HEADS, max_num_requests, 100, PAGE_SIZE), torch.device(DEVICE))
        self.names = attend_by_head(self.layers, reversed(NAMES), self.room)
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


def check(engine, i):
    """Runs a layer, and compares its cache and outputs with the pool's rows."""
    full_heads = FULL_HEADS[i]
    query, key, value, output = states()
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


def test_layers_with_both_classes_of_heads_attend_in_one_call(monkeypatch):
    monkeypatch.setattr(head_pages, "TILE", 16)
    engine = Engine(monkeypatch)
    assert engine.names == engine.layers.keys()
    for _ in range(2):
        for i in range(len(FULL_HEADS)):
            check(engine, i)
    assert not any(split.calls for split in engine.splits)
    if not ON_GPU:
        first, second, third, last = engine.loop.schedules[-len(FULL_HEADS) :]
        assert first is last, "layers with as many full heads share a schedule"
        assert len({first, second, third}) == 3
        assert first is not engine.loop.schedules[0], "each pass makes its own"


@pytest.mark.parametrize(("max_query_len", "max_num_requests"), [(2, 4), (1, 3)], ids=["prompts", "too many requests"])
def test_other_batches_take_a_call_for_each_run_of_adjacent_heads(max_query_len, max_num_requests, monkeypatch):
    engine = Engine(monkeypatch, max_num_requests)
    engine.step(max_query_len)
    for i in range(len(FULL_HEADS)):
        check(engine, i)
    # Full heads 1, 0 and 3, 0 to 2, and 2 of four; those that compress come first.
    runs = [[1, 2, 1], [2, 1, 1], [1, 3], [2, 1, 1]]
    for split, lengths in zip(engine.splits, runs, strict=True):
        assert split.calls == [("update", n) for n in lengths] + [("forward", n) for n in lengths]
    assert not engine.loop.schedules


def test_steps_without_metadata_are_vllms(monkeypatch):
    engine = Engine(monkeypatch)
    engine.metadata = {"full": None, "compressed": None}
    assert engine.run(0, states(), update=False) == "split"
    assert not engine.splits[0].calls


def test_a_table_is_used_only_by_its_own_layer_and_step(monkeypatch):
    """A piecewise graph may contain the cache's update, so its replay makes no table."""
    engine = Engine(monkeypatch)
    engine.run(0, states(), update=False)
    assert engine.splits[0].calls.pop() == ("forward", 1)
    engine.splits[0].calls.clear()
    engine.run(0, states())
    assert not engine.splits[0].calls
    engine.run(3, states(), update=False)
    assert engine.splits[3].calls
    engine.step()
    engine.run(0, states(), update=False)
    assert engine.splits[0].calls


def test_blocks_that_are_not_pages_are_not_used(monkeypatch):
    engine = Engine(monkeypatch)
    split = Split(NAMES[0], FULL_HEADS[0])
    engine.layers[NAMES[0]].impl = split
    engine.layers[full_name(NAMES[0])].kv_cache = torch.zeros_like(engine.pool.cache("full", 0))
    assert attend_by_head(engine.layers, NAMES[:1], engine.room) == set()
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
