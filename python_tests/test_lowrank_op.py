"""lowrank_keys: against float64 brute force, and what must hold whatever the numbers are."""

import pytest
import torch
from conftest import op_backends, running_on, skip_unless, skip_unless_it_looks
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import lowrank_keys, use_backend

NAMES = ("rows", "factors", "basis", "starts", "counts", "targets", "positions", "far", "near", "interleaved")


def tables(rows: int, step: int, pairs: int) -> torch.Tensor:
    """float64 ``[rows, 2, pairs]`` of an ordinary model: pair i turns ``10000 ** (-i / pairs)`` per position."""
    angle = torch.arange(rows).double()[:, None] * step * 10000 ** -(torch.arange(pairs).double() / max(pairs, 1))
    return torch.stack([angle.cos(), angle.sin()], 1)


@st.composite
def rebuild_cases(draw) -> dict:
    """Arguments of lowrank_keys by name; tables in float64."""
    batch, kv_heads, pages = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 5))
    dim, rank = draw(st.sampled_from([16, 24, 64, 80, 128])), draw(st.sampled_from([1, 7, 24, 40]))
    pairs, tokens = draw(st.sampled_from([dim // 2, dim // 2, dim // 4, 0])), draw(st.integers(1, 60))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    each = st.integers(0, draw(st.sampled_from([1, 8, 60])))
    counts = torch.tensor([min(draw(each), tokens) for _ in range(batch * kv_heads * pages)], dtype=torch.int32)
    starts = torch.tensor([draw(st.integers(0, tokens - n)) for n in counts.tolist()], dtype=torch.int64)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    targets = torch.zeros_like(starts)
    targets[order] = (counts[order] + 1).long().cumsum(0) - counts[order]  # one row between two pages that nobody writes
    layout = draw(st.sampled_from(["plain", "tokens_first", "sliced", "dim_strided"]))
    shape, n_near = (batch, kv_heads, pages), draw(st.sampled_from([1, 16, 64]))
    return dict(
        rows=torch.full((int(counts.sum()) + len(counts) + 2, dim), 7.0, dtype=dtype),
        factors=randn(1, 1, tokens, rank, dtype, draw(st.sampled_from(["plain", "sliced"])), seed)[0, 0],
        basis=randn(batch, kv_heads, rank, dim, dtype, layout, seed + 1),
        starts=starts.view(shape), counts=counts.view(shape), targets=targets.view(shape),
        positions=torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:tokens].int(),
        far=tables(-(-1000 // n_near), n_near, pairs), near=tables(n_near, 1, pairs), interleaved=draw(st.booleans()),
    )  # fmt: skip


def run(backend: str, case: dict) -> torch.Tensor:
    args = {**case, "rows": case["rows"].clone(), "far": case["far"].float(), "near": case["near"].float()}
    args = tuple(args[name] for name in NAMES)
    skip_unless(lowrank_keys, backend, *args)
    with use_backend(backend):
        assert lowrank_keys(*args) is None
    return args[0]


def truth(case: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One token at a time."""
    rows, pairs = case["rows"].to(dtype), case["near"].shape[2]
    one, other = (slice(i, 2 * pairs, 2) if case["interleaved"] else slice(i * pairs, (i + 1) * pairs) for i in (0, 1))
    turn = 10000 ** -(torch.arange(pairs).double() / max(pairs, 1))
    every = (case[name].flatten().tolist() for name in ("starts", "counts", "targets"))
    for i, (start, count, target) in enumerate(zip(*every)):
        b, h = divmod(i // case["starts"].shape[2], case["starts"].shape[1])
        for token in range(count):
            key = (case["factors"][start + token].to(dtype)[:, None] * case["basis"][b, h].to(dtype)).sum(0)
            angle = int(case["positions"][start + token]) * turn
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            key[one], key[other] = key[one] * cos - key[other] * sin, key[other] * cos + key[one] * sin
            rows[target + token] = key
    return rows


@op_backends("lowrank_keys")
@given(case=rebuild_cases())
def test_keys_match_float64_and_no_other_row_changes(backend, case):
    got, want, dtype = run(backend, case), truth(case), case["rows"].dtype
    # what a perfect kernel would be off by: two rounded tables, one rounded key
    assert_as_good_as_torch(got, truth(case, torch.float32).to(dtype), want, 4e-6 * max(1.0, float(want.abs().max())))


@op_backends("lowrank_keys")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_are_as_good_as_torch_and_threads_change_nothing(backend, dtype):
    """Heads of several tasks each, one without a token, at a usual rank."""
    counts = torch.tensor([[[300, 130, 0]], [[0, 0, 0]], [[1, 128, 129]]]).view(1, 3, 3).int()
    starts = torch.tensor([5, 400, 0, 0, 0, 0, 600, 7, 200]).view(1, 3, 3)
    case = dict(rows=torch.zeros(int(counts.sum()), 128, dtype=dtype), factors=randn(1, 1, 700, 160, dtype, "plain", 0)[0, 0],
                basis=randn(1, 3, 160, 128, dtype, "plain", 1) / 13, starts=starts, counts=counts,
                targets=(counts.flatten().cumsum(0) - counts.flatten()).view(1, 3, 3), positions=torch.arange(1000, 1700).int(),
                far=tables(20, 128, 64), near=tables(128, 1, 64), interleaved=False)
    found = []
    for threads in (1, 2, 5):
        with running_on(threads):
            found.append(run(backend, case))
    if backend != "reference":  # torch's products depend on its threads
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with use_backend("reference"):
        wide = {name: case[name].double() for name in ("rows", "factors", "basis")}
        want = wide["rows"]
        lowrank_keys(*({**case, **wide, "far": case["far"].float(), "near": case["near"].float()}[name] for name in NAMES))
        torch_same = run("reference", case)
    assert_as_good_as_torch(found[0], torch_same, want)


def plain(**changes) -> tuple:
    """Two heads, two pages of 3 tokens, rank 4, 8 channels, 2 pairs that turn."""
    case = dict(rows=torch.zeros(20, 8), factors=torch.ones(10, 4), basis=torch.ones(1, 2, 4, 8), positions=torch.arange(10).int(),
                starts=torch.tensor([[[0, 3], [6, 7]]]), counts=torch.tensor([[[3, 3], [1, 3]]]).int(),
                targets=torch.tensor([[[0, 3], [6, 17]]]), far=torch.ones(5, 2, 2), near=torch.ones(2, 2, 2), interleaved=False)
    return tuple((case | changes)[name] for name in NAMES)


@pytest.mark.parametrize(("changes", "sentence"), [
    (dict(rows=torch.zeros(8, 20).T), "rows must be contiguous"),
    (dict(rows=torch.zeros(20, 8).half()), "factors is torch.float32 and rows torch.float16"),
    (dict(factors=torch.ones(4, 10).T), "factors must be contiguous in its last dimension, got stride 10"),
    (dict(factors=torch.ones(10, 5)), "basis must be [B, Hkv, 5, 8], as wide as factors and rows, got [1, 2, 4, 8]"),
    (dict(basis=torch.ones(2, 4, 8)), "basis needs 4 dimensions [B, Hkv, r, D], got 3"),
    (dict(counts=torch.ones(1, 2, 2).long()), "counts must be int32 [1, 2, P], like the others, got torch.int64"),
    (dict(targets=torch.ones(1, 2, 3).long()), "targets must be int64 [1, 2, P], like the others"),
    (dict(positions=torch.arange(9).int()), "positions must be int32 [10], one per row of factors"),
    (dict(far=torch.ones(5, 2, 3)), "far must be float32 [rows, 2, R]"),
    (dict(far=torch.ones(5, 2, 5), near=torch.ones(2, 2, 5)), "5 pairs of channels do not fit into keys of 8 channels"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(changes, sentence):
    with pytest.raises(ContractError) as error:
        lowrank_keys(*plain(**changes))
    assert sentence in str(error.value)


@op_backends("lowrank_keys")
@pytest.mark.parametrize(("changes", "sentence"), [
    (dict(starts=torch.tensor([[[0, 3], [6, 8]]])), "a page lies outside the 10 factors"),
    (dict(starts=torch.tensor([[[-1, 3], [6, 7]]])), "a page lies outside the 10 factors"),
    (dict(counts=torch.tensor([[[3, 3], [1, -3]]]).int()), "a page lies outside the 10 factors"),
    (dict(targets=torch.tensor([[[0, 3], [6, 18]]])), "a page lies outside the 20 rows"),
    (dict(positions=torch.arange(1, 11).int()), "a position lies outside the 10 that far and near tell of"),
    (dict(positions=torch.arange(-1, 9).int()), "a position lies outside the 10 that far and near tell of"),
])  # fmt: skip
def test_bad_values_get_a_sentence_from_every_backend_and_nothing_is_written(backend, changes, sentence):
    skip_unless_it_looks(backend)
    args = plain(**changes)
    skip_unless(lowrank_keys, backend, *args)
    with use_backend(backend), pytest.raises(ContractError, match=sentence):
        lowrank_keys(*args)
    assert not args[0].any()


@op_backends("lowrank_keys")
def test_keys_that_do_not_rotate_need_no_position(backend):
    args = plain(positions=torch.full((10,), -1).int(), far=torch.zeros(1, 2, 0), near=torch.zeros(1, 2, 0))
    skip_unless(lowrank_keys, backend, *args)
    with use_backend(backend):
        lowrank_keys(*args)
    assert (args[0][:7] == 4).all() and not args[0][7:17].any() and (args[0][17:] == 4).all()
