"""Pages of one head compared with the two caches that hold them; without a GPU in Triton's interpreter."""

import os

import pytest
import torch
from head_pool import DEVICE, FULL_HEADS, HEAD, HEADS, LARGE, LENGTHS, SMALL, VALUE, Pool, pages_of

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here; test_interpreted.py runs these in Triton's interpreter", allow_module_level=True)

from vllm_l2kv.kernels import head_pages  # noqa: E402
from vllm_l2kv.kernels.head_pages import HeadPages, Sequences  # noqa: E402

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def write(pool: Pool, pages: HeadPages, out: Sequences, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a token of each request, and returns keys and values, which are strided views."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if pool.dtype.itemsize == 1 else pool.dtype
    packed = torch.randn(4, HEADS * (HEAD + VALUE) + 5, generator=generator).to(dtype).to(DEVICE)
    keys = packed[:, : HEADS * HEAD].view(4, HEADS, HEAD)
    values = packed[:, HEADS * HEAD : HEADS * (HEAD + VALUE)].view(4, HEADS, VALUE)
    scales = torch.tensor([scale], device=DEVICE), torch.tensor([2 * scale], device=DEVICE)
    pages.write(out, keys, values, pool.held("full"), pool.held("compressed"), *scales)
    return keys, values


@pytest.fixture(params=[1, 512])
def tile(request, monkeypatch):
    """Tile sizes for which a table takes several tiles and programs, or one."""
    monkeypatch.setattr(head_pages, "TILE", request.param)
    monkeypatch.setattr(head_pages, "PROGRAMS", 32 if request.param == 1 else 1)


@pytest.mark.parametrize("sizes", [(LARGE, SMALL), (SMALL, LARGE), (SMALL, SMALL)], ids=str)
@pytest.mark.parametrize("layer", range(len(FULL_HEADS)))
def test_each_sequence_reads_its_head_of_its_request(layer, sizes, tile):
    """All layers use the same buffer; rows left by another layer have no effect."""
    pool = Pool(full_size=sizes[0], compressed_size=sizes[1], padding=SMALL * (HEAD + VALUE))
    out = Sequences.of(4 * HEADS + 3, 30, torch.device(DEVICE))
    for previous in range(layer + 1):
        pages = pages_of(pool, previous)
        keys, values = write(pool, pages, out.first(4 * HEADS))
    full_heads = FULL_HEADS[layer]
    order = [*full_heads, *(head for head in range(HEADS) if head not in full_heads)]
    for place, head in enumerate(order):
        name = "full" if head in full_heads else "compressed"
        for request, length in enumerate(LENGTHS[name]):
            sequence = place * 4 + request
            assert out.lengths[sequence] == length
            assert out.starts[sequence] == request * HEADS + head
            num_pages = -(-length // pages.page_size)
            ids = out.pages[sequence, :num_pages].long()
            found = pages.pool[ids].flatten(0, 2)[:length]
            place_of_class = place if name == "full" else place - len(full_heads)
            assert torch.equal(found, pool.rows(name, layer, place_of_class, request))
            if length:
                assert torch.equal(found[-1], torch.cat([keys[request, head], values[request, head]]))
    assert not out.pages[4 * HEADS :].any()
    assert not out.lengths[4 * HEADS :].any()


def test_a_token_is_written_exactly_once_to_each_head():
    pool = Pool()
    before = pool.memory.clone()
    write(pool, pages_of(pool, 1), Sequences.of(4 * HEADS, 30, torch.device(DEVICE)))
    num_written = 3 * HEADS * (HEAD + VALUE)
    assert num_written - 10 < (before != pool.memory).sum() <= num_written


def test_an_fp8_cache_stores_quotients_by_the_scales():
    pool = Pool(torch.float8_e4m3fn)
    pages = pages_of(pool, 0)
    keys, values = write(pool, pages, Sequences.of(4 * HEADS, 30, torch.device(DEVICE)), scale=0.25)
    held = pool.held("full")
    for request in (0, 1, 3):
        row = pool.cache("full", 0)[held.slots[request] // LARGE, 0, held.slots[request] % LARGE]
        (head,) = FULL_HEADS[0]
        right = torch.cat([keys[request, head].float() / 0.25, values[request, head].float() / 0.5])
        found = row.view(torch.float8_e4m3fn).float()
        assert (found - right).abs().max() <= 2**-4 * right.abs().max(), "three bits, cut off or rounded"


def test_blocks_that_are_not_whole_pages_are_refused():
    assert pages_of(Pool(padding=8), 0) is None
    assert pages_of(Pool(full_size=10), 0) is None
    full, other = Pool(), Pool()
    assert HeadPages.of(full.cache("full", 0), other.cache("compressed", 0), [1], [0, 2, 3]) is None
    assert HeadPages.of(full.cache("full", 0)[:, :, 1:], full.cache("compressed", 0), [1], [0, 2, 3]) is None
