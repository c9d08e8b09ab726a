import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_l2kv.worker.attention_lengths import PhysicalAttentionGroup, make_groups_physical
from vllm_l2kv.worker.runner_v1 import CompressedBlockTable, EvictedCountsV1, subtract_evicted


class FakeTable:
    num_blocks_per_row = "of the table itself"

    def compute_slot_mapping(self, num_reqs, query_start_loc, positions):
        self.seen = num_reqs, query_start_loc, positions


def counts_of(**num_evicted: int) -> EvictedCountsV1:
    counts = EvictedCountsV1()
    for req_id, evicted in num_evicted.items():
        counts.set(req_id, evicted)
    return counts


def test_counts_in_batch_order():
    counts = counts_of(a=5, b=7)
    assert counts.of_batch(["b", "x", "a"]).tolist() == [7, 0, 5]
    assert counts.of_batch(["x", "y"]) is None
    counts.forget(["a", "b", "never seen"])
    assert counts.of_batch(["a", "b"]) is None


def test_slots_are_positions_minus_evicted_rows():
    table = FakeTable()
    counts = counts_of(b=10)
    compressed = CompressedBlockTable(table, lambda: counts.of_batch(["a", "b"]))
    query_start_loc = torch.tensor([0, 2, 5], dtype=torch.int32)
    positions = torch.tensor([100, 101, 50, 51, 52])
    compressed.compute_slot_mapping(2, query_start_loc, positions)
    assert table.seen[2].tolist() == [100, 101, 40, 41, 42]
    assert positions.tolist() == [100, 101, 50, 51, 52]  # positions, which RoPE still needs
    assert compressed.num_blocks_per_row == "of the table itself"


def test_nothing_compacted_passes_positions_through():
    table = FakeTable()
    positions = torch.arange(5)
    CompressedBlockTable(table, lambda: None).compute_slot_mapping(1, torch.tensor([0, 5]), positions)
    assert table.seen[2] is positions


def metadata(seq_lens: list[int]) -> CommonAttentionMetadata:
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=torch.arange(len(seq_lens) + 1, dtype=torch.int32),
        query_start_loc_cpu=torch.arange(len(seq_lens) + 1, dtype=torch.int32),
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens.clone(),
        num_reqs=len(seq_lens),
        num_actual_tokens=len(seq_lens),
        max_query_len=1,
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.zeros(len(seq_lens), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(len(seq_lens), dtype=torch.int64),
    )


def test_attention_sees_physical_lengths_and_vllm_keeps_its_own():
    logical = metadata([100, 50, 0])  # the last row is padding
    physical = subtract_evicted(logical, torch.tensor([90, 0], dtype=torch.int32))
    assert physical.seq_lens.tolist() == [10, 50, 0]
    assert physical.seq_lens_cpu_upper_bound.tolist() == [10, 50, 0]
    assert physical.max_seq_len == 50
    assert logical.seq_lens.tolist() == [100, 50, 0]
    assert logical.max_seq_len == 100


def test_ranges_of_images_move_with_their_rows():
    """Ranges of a request without evicted rows stay the same."""
    logical = metadata([100, 50, 30]).replace(mm_req_doc_ranges={0: [(3, 9), (92, 99)], 1: [(10, 20)]})
    physical = subtract_evicted(logical, torch.tensor([90, 0, 5], dtype=torch.int32))
    assert physical.mm_req_doc_ranges == {0: [(-87, -81), (2, 9)], 1: [(10, 20)]}
    assert logical.mm_req_doc_ranges[0] == [(3, 9), (92, 99)]


class FakeBuilder:
    def build(self, common_prefix_len, common_attn_metadata):
        return "built", common_attn_metadata

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return "captured", common_attn_metadata


def test_only_compressed_groups_become_physical():
    groups = [[AttentionGroup(None, [], None, i, metadata_builders=[FakeBuilder()])] for i in range(2)]
    held_elsewhere = groups[1]
    make_groups_physical(groups, [1], lambda seen: ("physical", seen))
    assert type(groups[0][0]) is AttentionGroup
    (group,) = held_elsewhere
    assert type(group) is PhysicalAttentionGroup
    assert group.build_metadata("logical") == ("built", ("physical", "logical"))
    assert group.build_metadata_for_cudagraph_capture("logical") == ("captured", ("physical", "logical"))
    assert groups[0][0].build_metadata("logical") == ("built", "logical")
