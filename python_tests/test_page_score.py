"""page_score: against float64 brute force, and what must hold whatever the numbers are."""

import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import page_score, use_backend

NAMES = ("q", "low", "high", "starts", "pages", "reduce", "q_first", "q_last")


@st.composite
def score_cases(draw, most: int = 40) -> dict:
    """Arguments of page_score by name; pages of nobody are NaN."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    n_q, seed = draw(st.sampled_from([1, 1, 2, 5, 16])), draw(st.integers(0, 99))
    several = st.lists(st.integers(0, most), min_size=batch * kv_heads, max_size=batch * kv_heads)
    pages = torch.tensor(draw(several)).view(batch, kv_heads)
    gaps = torch.tensor(draw(several)).view(batch, kv_heads) % 4
    starts = (pages + gaps).flatten().cumsum(0).view_as(pages) - pages
    rows = int((pages + gaps).sum()) + 2
    dim, dtype = draw(st.sampled_from([16, 24, 30, 64, 80, 128])), draw(st.sampled_from(DTYPES))
    ends = [randn(1, 1, rows, dim, dtype, draw(st.sampled_from(["plain", "sliced"])), seed + i)[0, 0] for i in (1, 2)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    mine = torch.zeros(rows, dtype=torch.bool)
    for start, count in zip(starts.flatten().tolist(), pages.flatten().tolist()):
        mine[start : start + count] = True
    low[~mine], high[~mine] = math.nan, math.nan
    q_first = q_last = None
    if draw(st.booleans()):
        q_first = torch.tensor([draw(st.integers(0, n_q)) for _ in range(batch)], dtype=torch.int32)
        q_last = torch.tensor([draw(st.integers(int(f), n_q)) for f in q_first], dtype=torch.int32)
    layout = draw(st.sampled_from(["plain", "tokens_first", "sliced", "dim_strided"]))
    return dict(q=randn(batch, kv_heads * group, n_q, dim, dtype, layout, seed), low=low, high=high, starts=starts, pages=pages,
                reduce=draw(st.sampled_from(["max", "mean", "sum"])), q_first=q_first, q_last=q_last)


def run(backend: str, case: dict) -> torch.Tensor:
    args = tuple(case[name] for name in NAMES)
    skip_unless(page_score, backend, *args)
    with use_backend(backend):
        return page_score(*args)


def truth(case: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One page and one query head at a time, by the formula of the paper."""
    q, low, high = (case[name].to(dtype) for name in ("q", "low", "high"))
    score = torch.zeros(len(low), dtype=dtype)
    (batch, heads, n_q, _), kv_heads = q.shape, case["starts"].shape[1]
    group = heads // kv_heads
    for b in range(batch):
        first = int(case["q_first"][b]) if case["q_first"] is not None else 0
        last = int(case["q_last"][b]) if case["q_last"] is not None else n_q
        for h in range(kv_heads):
            start = int(case["starts"][b, h])
            for page in range(start, start + int(case["pages"][b, h]) if last > first else start):
                bounds = [max(torch.maximum(x * low[page], x * high[page]).sum() for x in q[b, head, first:last])
                          for head in range(h * group, (h + 1) * group)]
                score[page] = {"max": max, "sum": sum, "mean": lambda x: sum(x) / len(x)}[case["reduce"]](bounds)
    return score


@op_backends("page_score")
@given(case=score_cases())
def test_bounds_match_float64(backend, case):
    got, scale = run(backend, case), case["q"].shape[3] ** -0.5 / 4
    assert got.dtype == torch.float32
    assert_as_good_as_torch(got * scale, truth(case, torch.float32) * scale, truth(case) * scale)


@op_backends("page_score")
@pytest.mark.parametrize("group, n_q", [(1, 1), (2, 1), (4, 1), (3, 5)])
def test_no_key_of_a_page_exceeds_its_bound_and_threads_change_nothing(backend, group, n_q):
    """Runs of thousands of pages: several tasks each."""
    pages, page, dim = torch.tensor([[2500, 0, 37]]), 4, 64
    q, keys = randn(1, 3 * group, n_q, dim, torch.float32, "plain", 0), randn(1, int(pages.sum()), page, dim, torch.float32, "plain", 1)[0]
    case = dict(q=q, low=keys.amin(1), high=keys.amax(1), starts=pages.cumsum(1) - pages, pages=pages, reduce="max", q_first=None, q_last=None)
    found = []
    for threads in (1, 2, 5):
        with running_on(threads):
            found.append(run(backend, case))
    if backend != "reference":  # torch's products depend on its threads
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for h, (start, count) in enumerate(zip(case["starts"][0].tolist(), pages[0].tolist())):
        best = torch.einsum("hqd,pkd->hqpk", q[0, h * group : (h + 1) * group].double(), keys[start : start + count].double()).amax((0, 1, 3))
        assert (found[0][start : start + count] >= best - 1e-4).all()


Q, ROWS, RUN = torch.zeros(1, 4, 1, 16), torch.zeros(10, 16), (torch.tensor([[2, 6]]), torch.tensor([[3, 4]]))


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: page_score(Q, ROWS, ROWS[:9], *RUN), "low is torch.float32 [10, 16] but high torch.float32 [9, 16]; they must agree"),
    (lambda: page_score(Q.half(), ROWS, ROWS, *RUN), "q is torch.float16 but k is torch.float32; cast one of them"),
    (lambda: page_score(Q, ROWS, ROWS, RUN[0].int(), RUN[1]), "starts must be int64 [1, Hkv]"),
    (lambda: page_score(Q, ROWS, ROWS, *RUN, "median"), "reduce='median' is not known"),
    (lambda: page_score(Q, ROWS, torch.zeros(16, 10).T, *RUN), "high must be contiguous in its last dimension, got stride 10"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)


@op_backends("page_score")
def test_a_run_outside_the_pages_gets_a_sentence_from_every_backend(backend):
    skip_unless(page_score, backend, Q, ROWS, ROWS, *RUN)
    with use_backend(backend), pytest.raises(ContractError, match="run .0, 1. has 5 rows from 6 but the store has 10"):
        page_score(Q, ROWS, ROWS, RUN[0], RUN[1] + 1)
