"""place_pages and gather_pages: against plain Python, and against the host's slots, whose rule the first one shares."""

import pytest
import torch
from conftest import op_backends, skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.tiers import Slots
from sparse_attn.errors import ContractError
from sparse_attn.ops import gather_pages, place_pages, use_backend

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]
FAST = settings(max_examples=12)  # a thread of an emulated block is a fiber


def slots_of(runs: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((runs, n), -1, dtype=torch.int32), torch.arange(n, dtype=torch.int32).repeat(runs, 1)


@op_backends("place_pages")
@FAST
@given(data=st.data())
def test_the_device_places_pages_where_the_host_would(backend, data):
    runs, n = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5, 33, 70]))
    held, order = slots_of(runs, n)
    skip_unless(place_pages, backend, held, order, held[:, :1])
    host = Slots(runs, n)
    for step in range(data.draw(st.integers(1, 6))):
        m, g = data.draw(st.integers(0, n)), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
        ids = torch.randint(-1, data.draw(st.sampled_from([3, n, 2 * n + 3, 2**31 - 2])), (runs, m), generator=g).int()
        with use_backend(backend):
            slots, misses = place_pages(held, order, ids)
        want, missed = host.want(ids.long())
        assert slots.dtype == torch.int32 and torch.equal(slots.long(), want) and torch.equal(misses, missed)
        assert all(sorted(row) == list(range(n)) for row in order.tolist())
        there = [(r, int(s), int(page)) for r, (row, at) in enumerate(zip(ids, slots)) for page, s in zip(row, at) if page >= 0]
        assert all(held[r, s] == page for r, s, page in there)


@op_backends("place_pages")
def test_many_slots_are_placed_alike(backend):
    """More pages than a block has threads, and steps that share most of them."""
    held, order = slots_of(2, 1100)
    skip_unless(place_pages, backend, held, order, held)
    host, g = Slots(2, 1100), torch.Generator().manual_seed(0)
    for step in range(3):
        ids = torch.stack([torch.randperm(1500, generator=g)[: 700 + 200 * step] for _ in range(2)]).int()
        with use_backend(backend):
            slots, misses = place_pages(held, order, ids)
        want, missed = host.want(ids.long())
        assert torch.equal(slots.long(), want) and torch.equal(misses, missed)


@st.composite
def gather_cases(draw) -> tuple:
    """Rows of some width, aligned or not; entries in any order and shape, some without a source."""
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    width, dtype = draw(st.sampled_from([1, 3, 16, 64, 100, 1280])), draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shift = draw(st.sampled_from([0, 1]))
    made = [torch.randint(0, 100, (shift + rows * width,), generator=g).to(dtype)[shift:].view(rows, width) for rows in (m, n)]
    targets = torch.randperm(m, generator=g)
    sources = torch.randint(-1, n, (m,), generator=g)
    half = m // 2 * 2
    return *made, *((t[:half].view(2, -1) for t in (sources, targets)) if draw(st.booleans()) else (sources, targets))


@op_backends("gather_pages")
@FAST
@given(case=gather_cases())
def test_every_page_comes_to_its_row_and_no_other_row_changes(backend, case):
    rows, pages, sources, targets = case
    skip_unless(gather_pages, backend, *case)
    want, got = rows.clone(), rows.clone() if rows.storage_offset() == 0 else rows
    for source, target in zip(sources.flatten().tolist(), targets.flatten().tolist()):
        if source >= 0:
            want[target] = pages[source]
    with use_backend(backend):
        assert gather_pages(got, pages, sources, targets) is None
    assert torch.equal(got, want)


@op_backends("gather_pages")
@pytest.mark.parametrize("n", [0, 700])
def test_no_page_and_more_pages_than_warps(backend, n):
    rows, pages = torch.zeros(800, 24), torch.randn(50, 24)
    sources, targets = torch.arange(n) % 51 - 1, torch.arange(n)
    skip_unless(gather_pages, backend, rows, pages, sources, targets)
    with use_backend(backend):
        gather_pages(rows, pages, sources, targets)
    assert torch.equal(rows[:n], torch.cat([torch.zeros(1, 24), pages])[sources + 1]) and not rows[n:].any()


def test_bad_input_gets_a_sentence():
    rows, pages, at, (held, order) = torch.zeros(4, 8), torch.ones(3, 8), torch.arange(2), slots_of(2, 3)
    for call, sentence in [
        (lambda: gather_pages(rows, pages[:, :4].contiguous(), at, at), "dtype and width must be the same"),
        (lambda: gather_pages(rows, pages.double(), at, at), "pages are torch.float64"),
        (lambda: gather_pages(rows.t(), pages, at, at), "rows must be contiguous"),
        (lambda: gather_pages(rows, pages, at.int(), at), "sources must be int64"),
        (lambda: gather_pages(rows, pages, at, at[:1]), r"targets must be int64 \[2\]"),
        (lambda: gather_pages(rows, pages, at + 2, at), "outside the 3 pages"),
        (lambda: gather_pages(rows, pages, at, at - 1), "outside the 4 rows"),
        (lambda: gather_pages(rows, pages, at, at * 0), "two pages would go to one row"),
        (lambda: place_pages(held, order, held.repeat(1, 2)), "want 6 pages at once and has 3 slots"),
        (lambda: place_pages(held, order.long(), held), "order must be int32"),
        (lambda: place_pages(held, order[:, :2].contiguous(), held), "order must be .*like held"),
        (lambda: place_pages(held, order, held[:1]), r"ids must be int32 \[2, n\]"),
        (lambda: place_pages(held[:, :0], order[:, :0], held[:, :0]), "with a slot at least"),
    ]:
        with pytest.raises(ContractError, match=sentence), use_backend("reference"):
            call()
    assert not rows.any() and bool((held == -1).all())
