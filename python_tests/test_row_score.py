"""row_score: against float64 brute force, and what must hold whatever the numbers are."""

import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import row_score, use_backend

NAMES = ("q", "rows", "starts", "lengths", "scale", "soft", "reduce", "q_first", "q_last")


@st.composite
def score_cases(draw, most: int = 90) -> dict:
    """Arguments of row_score by name; rows of nobody are NaN."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    n_q, seed = draw(st.sampled_from([1, 1, 2, 5, 16])), draw(st.integers(0, 99))
    several = st.lists(st.integers(0, most), min_size=batch * kv_heads, max_size=batch * kv_heads)
    lengths = torch.tensor(draw(several)).view(batch, kv_heads)
    gaps = torch.tensor(draw(several)).view(batch, kv_heads) % 4
    starts = (lengths + gaps).flatten().cumsum(0).view_as(lengths) - lengths
    total = int((lengths + gaps).sum()) + 2
    dim, dtype = draw(st.sampled_from([1, 3, 8, 12, 16, 20, 32, 64, 80, 128])), draw(st.sampled_from(DTYPES))
    rows = randn(1, 1, total, dim, dtype, draw(st.sampled_from(["plain", "sliced"])), seed + 1)[0, 0]
    mine = torch.zeros(total, dtype=torch.bool)
    for start, count in zip(starts.flatten().tolist(), lengths.flatten().tolist()):
        mine[start : start + count] = True
    rows[~mine] = math.nan
    q_first = q_last = None
    if draw(st.booleans()):
        q_first = torch.tensor([draw(st.integers(0, n_q)) for _ in range(batch)], dtype=torch.int32)
        q_last = torch.tensor([draw(st.integers(int(f), n_q)) for f in q_first], dtype=torch.int32)
    layout = draw(st.sampled_from(["plain", "tokens_first", "sliced", "dim_strided"]))
    return dict(q=randn(batch, kv_heads * group, n_q, dim, dtype, layout, seed), rows=rows, starts=starts, lengths=lengths,
                scale=draw(st.sampled_from([1.0, dim**-0.5, 0.02])), soft=draw(st.booleans()),
                reduce=draw(st.sampled_from(["max", "mean", "sum"])), q_first=q_first, q_last=q_last)


def run(backend: str, case: dict) -> torch.Tensor:
    args = tuple(case[name] for name in NAMES)
    skip_unless(row_score, backend, *args)
    with use_backend(backend):
        return row_score(*args)


def truth(case: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One run, one query head and one query at a time."""
    q, rows = (case[name].to(dtype) for name in ("q", "rows"))
    score = torch.zeros(len(rows), dtype=dtype)
    (batch, heads, n_q, _), kv_heads = q.shape, case["starts"].shape[1]
    group = heads // kv_heads
    for b in range(batch):
        first = int(case["q_first"][b]) if case["q_first"] is not None else 0
        last = int(case["q_last"][b]) if case["q_last"] is not None else n_q
        for h in range(kv_heads):
            start, length = int(case["starts"][b, h]), int(case["lengths"][b, h])
            if last == first or not length:
                continue
            of_heads = []
            for head in range(h * group, (h + 1) * group):
                of_queries = []
                for x in q[b, head, first:last]:
                    products = (x * rows[start : start + length]).sum(1) * case["scale"]
                    weights = (products - products.max()).exp()
                    of_queries.append(weights / weights.sum() if case["soft"] else products)
                of_heads.append(torch.stack(of_queries).amax(0))
            every = torch.stack(of_heads)
            score[start : start + length] = {"max": every.amax(0), "sum": every.sum(0), "mean": every.mean(0)}[case["reduce"]]
    return score


@op_backends("row_score")
@given(case=score_cases())
def test_scores_match_float64(backend, case):
    got = run(backend, case)
    assert got.dtype == torch.float32
    size = max(1.0, case["scale"] * case["q"].shape[3] ** 0.5 * 4)
    assert_as_good_as_torch(got / size, truth(case, torch.float32) / size, truth(case) / size)


@op_backends("row_score")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("group, n_q, dim", [(1, 1, 16), (2, 1, 64), (4, 1, 32), (3, 5, 8)])
def test_runs_of_many_tasks_match_float64_and_threads_change_nothing(backend, group, n_q, dim, soft):
    lengths = torch.tensor([[40000, 0, 37]])
    q = randn(1, 3 * group, n_q, dim, torch.float32, "plain", 0)
    rows = randn(1, 1, int(lengths.sum()), dim, torch.float32, "plain", 1)[0, 0]
    case = dict(q=q, rows=rows, starts=lengths.cumsum(1) - lengths, lengths=lengths, scale=3 * dim**-0.5, soft=soft, reduce="sum",
                q_first=None, q_last=None)
    found = []
    for threads in (1, 2, 5):
        with running_on(threads):
            found.append(run(backend, case))
    if backend != "reference":  # torch's products depend on its threads
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    shown = [x.log() if soft else x for x in (found[0], truth(case, torch.float32), truth(case))]  # the small shares too
    assert_as_good_as_torch(*shown, floor=2e-5)


@op_backends("row_score")
def test_soft_scores_of_a_query_sum_to_one_and_survive_huge_products(backend):
    q, rows = 100 * randn(2, 4, 1, 32, torch.float32, "plain", 0), 100 * randn(1, 1, 600, 32, torch.float32, "plain", 1)[0, 0]
    case = dict(q=q, rows=rows, starts=torch.tensor([[0, 200], [300, 500]]), lengths=torch.tensor([[200, 100], [200, 99]]),
                scale=1.0, soft=True, reduce="sum", q_first=None, q_last=None)
    got = run(backend, case)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        start, length = int(case["starts"][b, h]), int(case["lengths"][b, h])
        torch.testing.assert_close(got[start : start + length].sum(), torch.tensor(2.0))
        best = (q[b, 2 * h : 2 * h + 2, 0] @ rows[start : start + length].T).argmax(1) + start
        assert (got[best] > 0.99).all()
    assert got[599] == 0


Q, ROWS, RUN = torch.zeros(1, 4, 1, 16), torch.zeros(10, 16), (torch.tensor([[2, 6]]), torch.tensor([[3, 4]]))


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: row_score(Q.half(), ROWS, *RUN), "q is torch.float16 but k is torch.float32; cast one of them"),
    (lambda: row_score(Q, ROWS[:, :8], *RUN), "q has head_dim 16 but k has 8; they must agree"),
    (lambda: row_score(Q, ROWS, RUN[0].int(), RUN[1]), "starts must be int64 [1, Hkv]"),
    (lambda: row_score(Q, ROWS, *RUN, 1.0, False, "median"), "reduce='median' is not known"),
    (lambda: row_score(Q, torch.zeros(16, 10).T, *RUN), "rows must be contiguous in its last dimension, got stride 10"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)


@op_backends("row_score")
def test_a_run_outside_the_rows_gets_a_sentence_from_every_backend(backend):
    skip_unless(row_score, backend, Q, ROWS, *RUN)
    with use_backend(backend), pytest.raises(ContractError, match="run .0, 1. has 5 rows from 6 but the store has 10"):
        row_score(Q, ROWS, RUN[0], RUN[1] + 1)
