"""keep_top and move_rows: against plain Python, and what must hold whatever the numbers are."""

import functools
import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless, skip_unless_it_looks
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn.errors import ContractError
from sparse_attn.ops import keep_top, move_rows, use_backend

VALUES = [0.0, -0.0, 1.0, 1.0000001, 1.5, -1.5, 3e38, -3e38, 1e-40, -1e-40, math.inf, -math.inf, math.nan]
DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float64, torch.bool]


def layout(batch: int, heads: int, lengths: list[int], gaps: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """starts, lengths and the number of rows; runs stand in any order, with rows of nobody between and behind them."""
    order = torch.randperm(batch * heads, generator=torch.Generator().manual_seed(seed)).tolist()
    starts, at = [0] * len(order), 0
    for run in order:
        at += gaps[run]
        starts[run] = at
        at += lengths[run]
    return torch.tensor(starts).view(batch, heads), torch.tensor(lengths).view(batch, heads), at + gaps[0]


@st.composite
def keep_cases(draw) -> tuple:
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    several = st.lists(st.integers(0, 40), min_size=batch * heads, max_size=batch * heads)
    starts, lengths, n = layout(batch, heads, draw(several), [g % 4 for g in draw(several)], draw(st.integers(0, 99)))
    counts = torch.tensor(draw(several), dtype=torch.int32).view(batch, heads)
    numbers = st.one_of(st.sampled_from(VALUES), st.floats(width=32))
    score = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float32)
    return score, starts, lengths, counts, int(counts.minimum(lengths.int()).max()) + draw(st.integers(0, 2))


def kept_offsets(score: list[float], count: int) -> list[int]:
    """The rule on one run, one row at a time."""
    value = [-math.inf if math.isnan(x) else x for x in score]
    return sorted(sorted(range(len(score)), key=lambda j: (-value[j], j))[:count])


def assert_keeps_the_best(backend: str, args: tuple) -> None:
    score, starts, lengths, counts, slots = args
    skip_unless(keep_top, backend, *args)
    with use_backend(backend):
        got = keep_top(*args)
    assert got.dtype == torch.int32 and got.shape == (*starts.shape, slots)
    for b, h in torch.cartesian_prod(*map(torch.arange, starts.shape)).view(-1, 2).tolist():
        run = score[starts[b, h] : starts[b, h] + lengths[b, h]].tolist()
        want = kept_offsets(run, int(counts[b, h]))
        assert got[b, h].tolist() == want + [-1] * (slots - len(want))


@op_backends("keep_top")
@given(args=keep_cases())
def test_the_best_rows_stay_in_order(backend, args):
    assert_keeps_the_best(backend, args)


@functools.cache
def long_scores() -> list[tuple]:
    """Spread over all floats, over one bucket, few values, rising, and protected ends; counts from one to all but one."""
    g = torch.Generator().manual_seed(0)
    kinds = [torch.randint(-(2**31), 2**31 - 1, (3001,), generator=g, dtype=torch.int32).view(torch.float32),
             1 + torch.rand(3001, generator=g) / 8, torch.randint(0, 5, (3001,), generator=g).float(), torch.arange(3001).float(),
             torch.cat([torch.full((70,), math.inf), torch.randn(2861, generator=g), torch.full((70,), math.inf)])]
    score = torch.cat(kinds)
    starts, lengths = torch.arange(5)[None] * 3001, torch.full((1, 5), 3001)
    return [(score, starts, lengths, torch.full((1, 5), count, dtype=torch.int32), count) for count in (1, 64, 200, 1500, 3000)]


@op_backends("keep_top")
def test_the_best_of_long_runs_stay(backend):
    for args in long_scores():
        assert_keeps_the_best(backend, args)


@op_backends("keep_top")
def test_strided_scores_are_read_right(backend):
    score = torch.rand(80)
    args = (torch.tensor([[0, 20]]), torch.tensor([[20, 20]]), torch.tensor([[5, 6]], dtype=torch.int32), 6)
    skip_unless(keep_top, backend, score[::2], *args)
    with use_backend(backend):
        assert torch.equal(keep_top(score[::2], *args), keep_top(score[::2].clone(), *args))


# -- move_rows ----------------------------------------------------------------------------------------------------------


@st.composite
def move_cases(draw) -> tuple:
    """Rows of some shape and dtype; entries that rise or fall, alone or in stretches."""
    n = draw(st.integers(1, 60))
    rise = draw(st.booleans())
    sources = [i for i in range(n) if draw(st.sampled_from([True, True, False]))]
    at, targets = 0, []
    for i in sources:  # each at or before its source, behind the one before
        at = max(at, i - draw(st.sampled_from([0, 1, 1, 3, 60])))
        targets.append(at)
        at += 1
    if not rise:
        sources, targets = [n - 1 - i for i in sources], [n - 1 - i for i in targets]
    shape, dtype = draw(st.sampled_from([(), (3,), (2, 5), (40,), (0,)])), draw(st.sampled_from(DTYPES))
    rows = torch.randint(0, 100, (n, *shape), generator=torch.Generator().manual_seed(n)).to(dtype)
    return rows, torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)


def assert_moves(backend: str, rows: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    skip_unless(move_rows, backend, rows, sources, targets)
    want, got = rows.clone(), rows.clone()
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        want[target] = rows[source]
    with use_backend(backend):
        assert move_rows(got, sources, targets) is None
    assert torch.equal(got, want)


@op_backends("move_rows")
@given(args=move_cases())
def test_rows_move_as_if_all_were_read_first(backend, args):
    assert_moves(backend, *args)


def runs_of_rows(lengths: list[int]) -> torch.Tensor:
    """First row of each run of ``lengths``, back to back."""
    return torch.tensor([0, *lengths]).cumsum(0)[:-1]


@op_backends("move_rows")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_cache_is_compacted_packed_opened_and_patched(backend, threads):
    """Rows of 256 bytes, runs of thousands: many tasks, and some that must not be cut."""
    g = torch.Generator().manual_seed(0)
    lengths = [3000, 1, 2500, 4000, 0, 700]
    rows = torch.randn(sum(lengths), 64, generator=g)
    starts = runs_of_rows(lengths)
    kept = [torch.randperm(n, generator=g)[: n * 2 // 3].sort().values for n in lengths]
    compact = torch.cat([s + k for s, k in zip(starts, kept)])
    own_starts = torch.cat([s + torch.arange(len(k)) for s, k in zip(starts, kept)])
    packed = torch.arange(len(compact))
    with running_on(threads):
        assert_moves(backend, rows, compact, own_starts)
        assert_moves(backend, rows, compact, packed)
        assert_moves(backend, rows, packed.flip(0), compact.flip(0))  # opening the gaps again
        assert_moves(backend, rows, own_starts.flip(0), compact.flip(0))
        victims = torch.tensor([s + 5 for s, n in zip(starts, lengths) if n > 5])
        last = torch.tensor([s + n - 1 for s, n in zip(starts, lengths) if n > 5])
        assert_moves(backend, rows, last, victims)
        assert_moves(backend, rows, torch.arange(len(rows)), torch.arange(len(rows)))


@op_backends("move_rows")
def test_no_thread_overwrites_what_another_still_reads(backend):
    """Rows that all move by one place: each entry writes what the one before it reads. Again and again, for it is a race."""
    few = 4 if backend == "cuda_emulated" else 20  # its buffer still has to be filled several times
    rows = torch.arange(20000.0)[:, None].repeat(1, 64)
    up, down = torch.arange(1, len(rows)), torch.arange(len(rows) - 1)
    skip_unless(move_rows, backend, rows, up, down)
    with use_backend(backend), running_on(4):
        for _ in range(few):
            closed, opened = rows.clone(), rows.clone()
            move_rows(closed, up, down)
            move_rows(opened, down.flip(0), up.flip(0))
            assert torch.equal(closed[:-1], rows[1:]) and torch.equal(opened[1:], rows[:-1])


SCORE, RUN = torch.zeros(10), (torch.tensor([[2, 6]]), torch.tensor([[3, 4]]))
COUNT, ROWS = torch.tensor([[1, 2]], dtype=torch.int32), torch.zeros(10, 4)


def entries(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: keep_top(SCORE.double(), *RUN, COUNT, 2), "score must be float32 [S]"),
    (lambda: keep_top(SCORE, RUN[0].int(), RUN[1], COUNT, 2), "starts must be int64 [1, 2]"),
    (lambda: keep_top(SCORE, RUN[0], RUN[1][:, :1], COUNT, 2), "lengths must be int64 [1, 2], one entry per run, got torch.int64 [1, 1]"),
    (lambda: keep_top(SCORE, *RUN, COUNT.long(), 2), "counts must be int32 [1, 2]"),
    (lambda: keep_top(SCORE, *RUN, COUNT, -1), "slots=-1 is negative"),
    (lambda: move_rows(ROWS, entries(1), torch.tensor([0], dtype=torch.int32)), "targets must be int64 [N]"),
    (lambda: move_rows(ROWS, entries(1, 2), entries(0)), "there are 2 sources but 1 targets"),
    (lambda: move_rows(ROWS[0, 0], entries(), entries()), "rows needs 1 dimension"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)


@op_backends("keep_top", "move_rows")
@pytest.mark.parametrize(("op", "args", "sentence"), [
    (keep_top, (SCORE, RUN[0], RUN[1] + 1, COUNT, 2), "run [0, 1] has 5 rows from 6 but the store has 10"),
    (keep_top, (SCORE, RUN[0] - 3, RUN[1], COUNT, 2), "run [0, 0] has 3 rows from -1"),
    (keep_top, (SCORE, RUN[0], -RUN[1], COUNT, 2), "has -3 rows from 2"),
    (keep_top, (SCORE, *RUN, COUNT - 2, 2), "counts has -1 for run [0, 0]"),
    (keep_top, (SCORE, *RUN, COUNT, 1), "run [0, 1] keeps 2 rows but there are 1 slots"),
    (move_rows, (ROWS, entries(3, 10), entries(1, 2)), "an entry names a row that does not exist; there are 10"),
    (move_rows, (ROWS, entries(3, 4), entries(-1, 2)), "an entry names a row that does not exist; there are 10"),
    (move_rows, (ROWS, entries(3, 4), entries(2, 5)), "must rise with no target past its source, or fall"),
    (move_rows, (ROWS, entries(4, 3), entries(3, 2)), "must rise with no target past its source, or fall"),
    (move_rows, (ROWS, entries(3, 4), entries(2, 2)), "must rise with no target past its source, or fall"),
    (move_rows, (torch.zeros(4, 10).T, entries(3, 4), entries(1, 2)), "rows must be contiguous"),
])  # fmt: skip
def test_bad_values_get_a_sentence_from_every_backend_and_nothing_is_written(backend, op, args, sentence):
    skip_unless(op, backend, *args)
    skip_unless_it_looks(backend)
    if op is move_rows:
        args[0].copy_(torch.arange(40.0).view_as(args[0]))
    before = args[0].clone()
    for _ in range(2):  # the second call finds the contract already checked
        with use_backend(backend), pytest.raises(ContractError) as error:
            op(*args)
        assert sentence in str(error.value)
    assert torch.equal(args[0], before)


@op_backends("keep_top", "move_rows")
def test_nothing_at_all_is_legal(backend):
    none = torch.zeros(0, 2, dtype=torch.int64)
    for op, args in ((keep_top, (torch.zeros(0), none, none, none.int(), 0)),
                     (keep_top, (torch.zeros(0), none[None, :, 0], none[None, :, 0], none[None, :, 0].int(), 3)),
                     (move_rows, (torch.zeros(0, 4), entries(), entries())),
                     (move_rows, (torch.zeros(3, 0), entries(2), entries(1)))):
        skip_unless(op, backend, *args)
        with use_backend(backend):
            op(*args)
