"""Slots and lengths of compacted requests on a GPU, in one launch each, written to buffers that CUDA graphs read."""

import torch
import triton
import triton.language as tl

PAD_SLOT = -1
TILE = 1024


def slot_mappings(
    out: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    num_evicted: torch.Tensor,
    is_compressed: torch.Tensor,
    table_pointers: torch.Tensor,
    table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    has_slots: torch.Tensor,
) -> None:
    """Computes the slot of every token in every group.

    Args:
        out: `[num_groups, max_num_tokens]` int64, written; padding tokens after the batch get -1.
        idx_mapping: `[num_reqs]` int64, batch order to request state; -1 for a request without blocks.
        query_start_loc: `[num_reqs + 1]` int32, index of each request's first token.
        positions: `[num_tokens]` int64, logical.
        num_evicted: `[max_num_reqs]` int32, by request state.
        is_compressed: `[num_groups]` int32, 1 for groups in which `slot = position - num_evicted`, else 0.
        table_pointers: `[num_groups]` uint64, addresses of `[max_num_reqs, max_num_blocks]` int32 tables.
        table_strides: `[num_groups]` int64, elements from one request's row to the next.
        block_sizes: `[num_groups]` int32, tokens per block.
        has_slots: `[num_groups]` bool, false for recurrent states, whose tokens all get -1.
    """
    grid = (out.shape[0], idx_mapping.shape[0] + 1)
    _slot_mappings_kernel[grid](
        out, out.stride(0), out.shape[1], idx_mapping, query_start_loc, positions, num_evicted, is_compressed,
        table_pointers, table_strides, block_sizes, has_slots, PAD=PAD_SLOT, TILE=TILE,
    )  # fmt: skip


def physical_lengths(
    out: torch.Tensor, seq_lens: torch.Tensor, idx_mapping: torch.Tensor, num_evicted: torch.Tensor
) -> None:
    """Computes `seq_lens - num_evicted`.

    Args:
        out: `[num_reqs_padded]` int32, written.
        seq_lens: `[num_reqs_padded]` int32, logical; the lengths of padding requests are copied unchanged.
        idx_mapping: `[num_reqs]` int64, batch order to request state.
        num_evicted: `[max_num_reqs]` int32, by request state.
    """
    num_reqs_padded = out.shape[0]
    _physical_lengths_kernel[(triton.cdiv(num_reqs_padded, TILE),)](
        out, seq_lens, idx_mapping, num_evicted, idx_mapping.shape[0], num_reqs_padded, TILE=TILE
    )


@triton.jit(do_not_specialize=["num_reqs", "num_reqs_padded"])
def _physical_lengths_kernel(
    out,  # [num_reqs_padded] int32
    seq_lens,  # [num_reqs_padded] int32
    idx_mapping,  # [num_reqs] int64
    num_evicted,  # [max_num_reqs] int32
    num_reqs,
    num_reqs_padded,
    TILE: tl.constexpr,
):
    o_req = tl.program_id(0) * TILE + tl.arange(0, TILE)
    b_state = tl.load(idx_mapping + o_req, mask=o_req < num_reqs, other=-1)
    b_evicted = tl.load(num_evicted + b_state, mask=b_state >= 0, other=0)
    m_req = o_req < num_reqs_padded
    tl.store(out + o_req, tl.load(seq_lens + o_req, mask=m_req, other=0) - b_evicted, mask=m_req)


@triton.jit(do_not_specialize=["max_num_tokens"])
def _slot_mappings_kernel(
    out,  # [num_groups, max_num_tokens] int64
    out_stride,
    max_num_tokens,
    idx_mapping,  # [num_reqs] int64
    query_start_loc,  # [num_reqs + 1] int32
    positions,  # [num_tokens] int64
    num_evicted,  # [max_num_reqs] int32
    is_compressed,  # [num_groups] int32
    table_pointers,  # [num_groups] uint64
    table_strides,  # [num_groups] int64
    block_sizes,  # [num_groups] int32
    has_slots,  # [num_groups] bool
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    i_group, i_req = tl.program_id(0), tl.program_id(1)
    out += i_group.to(tl.int64) * out_stride
    begin = tl.load(query_start_loc + i_req)
    if i_req == tl.num_programs(1) - 1:
        # Padding after the batch, which CUDA graphs read too.
        for start in range(begin, max_num_tokens, TILE):
            o_token = start + tl.arange(0, TILE)
            tl.store(out + o_token, PAD, mask=o_token < max_num_tokens)
        return
    end = tl.load(query_start_loc + i_req + 1)
    state = tl.load(idx_mapping + i_req)
    # A dummy request has no blocks, and a recurrent state has no slots.
    is_real = (state >= 0) & (tl.load(has_slots + i_group) != 0)
    state = tl.maximum(state, 0)
    evicted = tl.load(num_evicted + state) * tl.load(is_compressed + i_group) * is_real.to(tl.int32)
    table = tl.load(table_pointers + i_group).to(tl.pointer_type(tl.int32))
    table += state.to(tl.int64) * tl.load(table_strides + i_group)
    block_size = tl.load(block_sizes + i_group)
    for start in range(begin, end, TILE):
        o_token = start + tl.arange(0, TILE)
        m_token = o_token < end
        b_slot = tl.load(positions + o_token, mask=m_token, other=0) - evicted
        m_block = o_token < tl.where(is_real, end, 0)
        b_block = tl.load(table + b_slot // block_size, mask=m_block, other=0).to(tl.int64)
        b_slot = tl.where(is_real, b_block * block_size + b_slot % block_size, PAD)
        tl.store(out + o_token, b_slot, mask=m_token)
