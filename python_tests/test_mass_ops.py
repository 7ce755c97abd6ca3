"""key_mass and window_mass: against float64 brute force, and what must hold whatever the numbers are."""

import functools
import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import block_sparse_attention, key_mass, use_backend, window_mass

RUNS = ("starts", "lengths")
REAL = ("q_first", "q_last")
REDUCE = {"mean": lambda x: sum(x) / len(x), "sum": sum, "max": max}


def store(lengths: list[list[int]], dim: int, dtype: torch.dtype, seed: int, gap: int = 2) -> dict:
    """Keys in runs of these lengths, last run first, NaN between them."""
    starts, at = torch.zeros(len(lengths), len(lengths[0]), dtype=torch.int64), gap
    for b, h in reversed([(b, h) for b in range(len(lengths)) for h in range(len(lengths[0]))]):
        starts[b, h] = at
        at += lengths[b][h] + gap
    k, found = torch.full((at, dim), math.nan, dtype=dtype), torch.tensor(lengths)
    g = torch.Generator().manual_seed(seed)
    for start, length in zip(starts.flatten().tolist(), found.flatten().tolist(), strict=True):
        k[start : start + length] = torch.randn(length, dim, generator=g).to(dtype)
    return dict(k=k, starts=starts, lengths=found)


@st.composite
def mass_cases(draw, most: int = 150) -> dict:
    """Ragged runs, empty ones among them; queries with padding on either side; every option of both ops."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 8]))
    n_q, dim, dtype = draw(st.integers(1, 70)), draw(st.sampled_from([64, 24, 40, 128])), draw(st.sampled_from(DTYPES))
    seed, heads = draw(st.integers(0, 99)), kv_heads * group
    q_first = q_last = None
    if draw(st.booleans()):
        q_first = torch.tensor([draw(st.integers(0, n_q)) for _ in range(batch)], dtype=torch.int32)
        q_last = torch.tensor([draw(st.integers(int(f), n_q)) for f in q_first], dtype=torch.int32)
    sizes = st.sampled_from([n_q, n_q + draw(st.integers(0, most)), 0, 1])
    lengths = [[draw(sizes) for _ in range(kv_heads)] for _ in range(batch)]
    case = store(lengths, dim, dtype, seed) | dict(
        q=randn(batch, heads, n_q, dim, dtype, draw(st.sampled_from(["plain", "tokens_first", "sliced", "dim_strided"])), seed + 1)
        * draw(st.sampled_from([1.0, 4.0])),
        scale=draw(st.sampled_from([dim**-0.5, 0.3 * dim**-0.5])), softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        rows=draw(st.sampled_from([0, 0, 1, 20])), window=draw(st.sampled_from([1, 4, 33, 100])),
        kernel=draw(st.sampled_from([1, 3, 7, 401])), pool=draw(st.sampled_from(["mean", "max"])),
        reduce=draw(st.sampled_from(list(REDUCE))), q_first=q_first, q_last=q_last,
        sinks=torch.randn(heads, generator=torch.Generator().manual_seed(seed)) if draw(st.booleans()) else None,
    )  # fmt: skip
    return case | {"lse": true_lse(case)}


def looks(case: dict):
    """``(b, kv_head, head, query row, logits of what it sees)``, one query at a time."""
    (batch, heads, n_q, _), kv_heads = case["q"].shape, case["starts"].shape[1]
    for b in range(batch):
        real = range(int(case["q_first"][b]) if case["q_first"] is not None else 0,
                     int(case["q_last"][b]) if case["q_last"] is not None else n_q)
        for head in range(heads):
            h = head // (heads // kv_heads)
            start, length = int(case["starts"][b, h]), int(case["lengths"][b, h])
            for back, row in enumerate(reversed(real)):
                keys = case["k"][start : start + max(0, length - back)].double()
                logits = keys @ case["q"][b, head, row].double() * case["scale"]
                yield b, h, head, row, back, case["softcap"] * torch.tanh(logits / case["softcap"]) if case["softcap"] else logits


def true_lse(case: dict) -> torch.Tensor:
    """float32 ``[B, H, Nq]``, sinks included; -inf where there is nothing."""
    lse = torch.full(case["q"].shape[:3], -math.inf)
    for b, _, head, row, _, logits in looks(case):
        sink = case["sinks"][head : head + 1].double() if case["sinks"] is not None else logits[:0]
        lse[b, head, row] = torch.cat([logits, sink]).logsumexp(0)
    return lse


def truth(case: dict, last: int, pooled: bool) -> torch.Tensor:
    """float64 ``[S]``: probabilities under the case's lse, added up, pooled and reduced one by one."""
    mass, sums = torch.zeros(len(case["k"]), dtype=torch.float64), {}
    (_, _, n_q, _) = case["q"].shape
    for b, h, head, row, back, logits in looks(case):
        per_head = sums.setdefault((b, h), {}).setdefault(head, torch.zeros(int(case["lengths"][b, h]), dtype=torch.float64))
        lse = case["lse"][b, head, row].double()
        if back < last and lse.isfinite():
            per_head[: len(logits)] += (logits - lse).exp()
    for (b, h), heads in sums.items():
        start, length = int(case["starts"][b, h]), int(case["lengths"][b, h])
        n_real = len(range(int(case["q_first"][b]), int(case["q_last"][b]))) if case["q_first"] is not None else n_q
        before, reach = max(0, length - min(last, n_real)), case["kernel"] // 2
        for i in range(length):
            values = []
            for per_head in heads.values():
                near = slice(max(0, i - reach), min(before, i + reach + 1)) if pooled and i < before else slice(i, i + 1)
                near = per_head[near].tolist()
                values.append(max(near) if case["pool"] == "max" else sum(near) / len(near))
            mass[start + i] = REDUCE[case["reduce"]](values)
    return mass


def key_args(case: dict) -> tuple:
    return tuple(case[name] for name in ("q", "k", "lse", *RUNS, "scale", "softcap", "rows", "reduce", *REAL))


def window_args(case: dict) -> tuple:
    return tuple(case[name] for name in ("q", "k", *RUNS, "scale", "window", "softcap", "sinks", "kernel", "pool", "reduce", *REAL))


def inside(case: dict) -> torch.Tensor:
    """bool ``[S]``: rows of some run."""
    row = torch.arange(len(case["k"]))[:, None]
    return ((row >= case["starts"].flatten()) & (row < (case["starts"] + case["lengths"]).flatten())).any(1)


def as_good(got: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, case: dict) -> None:
    assert got.dtype == torch.float32
    # a sum of up to as many probabilities as there are queries
    size = max(1.0, exact.max().item() if len(exact) else 0.0)
    assert_as_good_as_torch(torchs, exact, exact, 1e-4 * size)  # the yardstick is straight
    assert_as_good_as_torch(got, torchs, exact, 4e-6 * size)
    assert (got[~inside(case)] == 0).all() and (got[exact == 0] == 0).all(), "what nobody sees must be exactly 0"


# -- against float64 ----------------------------------------------------------------------------------------------------


@op_backends("key_mass")
@settings(max_examples=20)
@given(case=mass_cases(), data=st.data())
def test_key_mass_is_as_accurate_as_torch(backend, case, data):
    # a query that attention had nothing for, and one that went wrong
    lse = case["lse"].flatten()
    lse[data.draw(st.integers(0, len(lse) - 1))], lse[data.draw(st.integers(0, len(lse) - 1))] = -math.inf, math.nan
    args = key_args(case)
    skip_unless(key_mass, backend, *args)
    with use_backend(backend):
        got = key_mass(*args)
    as_good(got, key_mass.reference(*args), truth(case, case["rows"] or 10**9, pooled=False), case)


@op_backends("window_mass")
@settings(max_examples=20)
@given(case=mass_cases())
def test_window_mass_is_as_accurate_as_torch(backend, case):
    args = window_args(case)
    skip_unless(window_mass, backend, *args)
    with use_backend(backend):
        got = window_mass(*args)
    as_good(got, window_mass.reference(*args), truth(case, case["window"], pooled=True), case)


@functools.cache
def long_cases() -> list[tuple]:
    """An op, its arguments and the truth.

    More keys than a tile and a chunk, more queries than are packed at a time, runs that end inside a panel.
    """
    found = []
    for lengths, group, n_q, dim in (([[4500, 333]], 1, 320, 24), ([[700], [1003]], 6, 90, 64)):
        case = store(lengths, dim, torch.bfloat16, 0) | dict(
            q=randn(len(lengths), len(lengths[0]) * group, n_q, dim, torch.bfloat16, "tokens_first", 1), scale=dim**-0.5, softcap=0.0,
            rows=0, window=310 if group == 1 else 64, kernel=7, pool="mean", reduce="mean", q_first=None, q_last=None, sinks=None)
        case |= {"lse": true_lse(case)}
        found += [(key_mass, key_args(case), truth(case, 10**9, False)),
                  (window_mass, window_args(case), truth(case, case["window"], True))]
    return found


@op_backends("key_mass", "window_mass")
def test_masses_over_many_tiles_are_right(backend):
    for op, args, exact in long_cases():
        skip_unless(op, backend, *args)
        with use_backend(backend):
            torch.testing.assert_close(op(*args).double(), exact, atol=4e-6, rtol=2e-5)


@op_backends("key_mass")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_with_the_lse_of_our_attention_a_sum_is_off_by_a_thousandth_at_most(backend, dtype):
    n = 900
    q, k = randn(1, 4, n, 64, dtype, "tokens_first", 0), randn(1, 1, n, 64, dtype, "plain", 1)
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    skip_unless(block_sparse_attention, backend, q, k, k, lists[0] + 1, lists, n, n, 0.125)
    run = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), n)
    skip_unless(key_mass, backend, q, k[0, 0], torch.zeros(q.shape[:3]), *run, 0.125)
    with use_backend(backend):
        _, lse = block_sparse_attention(q, k, k, lists[0] + 1, lists, n, n, 0.125)
        got = key_mass(q, k[0, 0], lse, *run, 0.125, reduce="sum")
    p = (q.double() @ k.double().mT * 0.125).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    assert ((got - p.sum((0, 1, 2))).abs() / p.sum((0, 1, 2))).max() < 1e-3
    assert got.double().sum() == pytest.approx(4 * n, rel=1e-3), "each row of the matrix sums to 1"


# -- what must hold whatever the numbers are ------------------------------------------------------------------------------


@op_backends("window_mass")
@settings(max_examples=10)
@given(case=mass_cases())
def test_window_mass_is_key_mass_of_the_last_rows(backend, case):
    case |= {"kernel": 1, "rows": case["window"]}
    skip_unless(window_mass, backend, *window_args(case))
    with use_backend(backend):
        torch.testing.assert_close(window_mass(*window_args(case)), key_mass(*key_args(case)), atol=1e-5, rtol=1e-4)


@op_backends("key_mass")
def test_chunks_add_up_to_the_prompt(backend):
    q, whole = randn(1, 4, 300, 64, torch.float32, "plain", 0), store([[300, 300]], 64, torch.float32, 1, gap=0)
    lse = true_lse(whole | dict(q=q, scale=0.125, softcap=0.0, sinks=None, q_first=None, q_last=None))
    skip_unless(key_mass, backend, q, whole["k"], lse, whole["starts"], whole["lengths"], 0.125)
    with use_backend(backend):
        once = key_mass(q, whole["k"], lse, whole["starts"], whole["lengths"], 0.125)
        parts = [key_mass(q[:, :, a:b], whole["k"], lse[:, :, a:b], whole["starts"], torch.full((1, 2), b), 0.125)
                 for a, b in ((0, 100), (100, 101), (101, 300))]
    torch.testing.assert_close(sum(parts), once, atol=1e-5, rtol=1e-5)


@op_backends("key_mass", "window_mass")
@settings(max_examples=10)
@given(case=mass_cases())
def test_a_sequence_in_a_batch_is_the_sequence_alone(backend, case):
    for op, arguments in ((key_mass, key_args), (window_mass, window_args)):
        skip_unless(op, backend, *arguments(case))
        with use_backend(backend):
            together = op(*arguments(case))
            for b in range(case["q"].shape[0]):
                rows = slice(int(case["q_first"][b]), int(case["q_last"][b])) if case["q_first"] is not None else slice(None)
                alone = case | {name: case[name][b : b + 1] for name in RUNS} | dict.fromkeys(REAL)
                alone |= dict(q=case["q"][b : b + 1, :, rows], lse=case["lse"][b : b + 1, :, rows])
                single, own = op(*arguments(alone)), inside(alone)
                if backend == "reference":  # torch's matrix product rounds by shape
                    torch.testing.assert_close(together[own], single[own], atol=1e-5, rtol=1e-4)
                else:
                    assert torch.equal(together[own], single[own])


@op_backends("key_mass", "window_mass")
def test_the_number_of_threads_does_not_change_a_bit(backend):
    case = store([[2500, 40]], 64, torch.bfloat16, 0) | dict(
        q=randn(1, 6, 30, 64, torch.bfloat16, "tokens_first", 1), scale=0.125, softcap=0.0, rows=0, window=20, kernel=5, pool="mean",
        reduce="mean", q_first=None, q_last=None, sinks=None)
    case["lse"] = true_lse(case)
    found = []
    for op, args in ((key_mass, key_args(case)), (window_mass, window_args(case))):
        skip_unless(op, backend, *args)
    if backend == "reference":
        pytest.skip("reference: torch's matrix product rounds by shape and threads")
    for threads in (1, 2, 3):
        with running_on(threads), use_backend(backend):
            found.append((key_mass(*key_args(case)), window_mass(*window_args(case))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@op_backends("window_mass")
def test_a_row_of_nan_or_infinite_logits_adds_nothing(backend):
    case = store([[90]], 64, torch.float32, 0)
    q = randn(1, 2, 12, 64, torch.float32, "plain", 1)
    q[0, 0, 4], q[0, 0, 9] = math.nan, math.inf
    args = q, case["k"], case["starts"], case["lengths"], 0.125, 12, 0.0, None, 1, "mean", "sum"
    skip_unless(window_mass, backend, *args)
    with use_backend(backend):
        assert window_mass(*args).sum().item() == pytest.approx(22, rel=1e-5)


@op_backends("window_mass")
def test_what_the_question_points_at_is_found_with_its_neighbours(backend):
    """A planted key that the last queries want: pooling with 5 lifts the two tokens on either side above all others."""
    case = store([[400]], 64, torch.float32, 0, gap=0)
    case["k"][:, 0], case["k"][150, 0] = 0.0, 40.0
    q = randn(1, 4, 32, 64, torch.float32, "plain", 1)
    q[..., 0] = 4.0
    args = q, case["k"], case["starts"], case["lengths"], 0.125, 32
    skip_unless(window_mass, backend, *args)
    with use_backend(backend):
        plain, pooled, peak = window_mass(*args), window_mass(*args, kernel=5), window_mass(*args, kernel=5, pool="max")
    assert plain.argmax() == 150
    for mass in (pooled, peak):
        assert sorted(mass[: 400 - 32].topk(5).indices.tolist()) == [148, 149, 150, 151, 152]


@op_backends("window_mass")
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_the_published_votes_are_ours_but_for_the_ends_of_the_mean(backend, pool):
    """SnapKV's listing, 32 rows, kernel 5, one set per key head."""
    n, window, kernel = 300, 32, 5
    case = store([[n]], 64, torch.float32, 0, gap=0)
    q = randn(1, 4, n, 64, torch.float32, "plain", 1)
    attention = (q[:, :, -window:] @ case["k"].mT * 0.125).masked_fill(torch.ones(window, n).triu(n - window + 1).bool(), -math.inf)
    votes = attention.softmax(-1)[..., :-window].sum(-2)
    smooth = {"mean": torch.nn.functional.avg_pool1d, "max": torch.nn.functional.max_pool1d}[pool]
    published = smooth(votes, kernel, stride=1, padding=kernel // 2)[0].mean(0)
    args = q, case["k"], case["starts"], case["lengths"], 0.125, window, 0.0, None, kernel, pool
    skip_unless(window_mass, backend, *args)
    with use_backend(backend):
        ours = window_mass(*args)[:-window]
    edge = kernel // 2 if pool == "mean" else 0
    torch.testing.assert_close(ours[edge : len(ours) - edge], published[edge : len(ours) - edge], atol=1e-6, rtol=1e-5)
    assert (ours >= published * (1 - 1e-5)).all()


Q, K, LSE = torch.zeros(2, 4, 8, 32), torch.zeros(64, 32), torch.zeros(2, 4, 8)
STARTS, LENGTHS = torch.tensor([[0, 16], [32, 48]]), torch.full((2, 2), 16)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: key_mass(Q, K[None], LSE, STARTS, LENGTHS, 1.0), "k 2 [S, D], got 4 and 3"),
    (lambda: key_mass(Q, K.half(), LSE, STARTS, LENGTHS, 1.0), "q is torch.float32 but k is torch.float16"),
    (lambda: key_mass(Q, K[:, :16], LSE, STARTS, LENGTHS, 1.0), "q has head_dim 32 but k has 16"),
    (lambda: key_mass(Q, K, LSE.double(), STARTS, LENGTHS, 1.0), "lse must be float32 [2, 4, 8]"),
    (lambda: key_mass(Q, K, LSE[:, :2], STARTS, LENGTHS, 1.0), "lse must be float32 [2, 4, 8]"),
    (lambda: key_mass(Q, K, LSE, STARTS.int(), LENGTHS, 1.0), "starts must be int64 [2, Hkv]"),
    (lambda: key_mass(Q, K, LSE, STARTS[:1], LENGTHS, 1.0), "starts must be int64 [2, Hkv]"),
    (lambda: key_mass(Q, K, LSE, STARTS, LENGTHS[:, :1], 1.0), "starts is [2, 2] but lengths [2, 1]"),
    (lambda: key_mass(Q[:, :3], K, LSE[:, :3], STARTS, LENGTHS, 1.0), "3 query heads are not a multiple of the 2 key heads"),
    (lambda: key_mass(Q, K, LSE, STARTS, LENGTHS, 1.0, -1.0), "softcap=-1.0 is negative"),
    (lambda: key_mass(Q, K, LSE, STARTS, LENGTHS, 1.0, rows=-1), "rows=-1 is negative; use 0 for every query"),
    (lambda: key_mass(Q, K, LSE, STARTS, LENGTHS, 1.0, reduce="vote"), "reduce='vote' is not known; use one of mean, sum, max"),
    (lambda: key_mass(Q, K, LSE, STARTS, LENGTHS, 1.0, q_last=torch.zeros(2)), "q_last must be int32 [2], one entry per sequence"),
    (lambda: window_mass(Q, K, STARTS, LENGTHS, 1.0, 0), "window=0 is no query; use 1 or more"),
    (lambda: window_mass(Q, K, STARTS, LENGTHS, 1.0, 4, kernel=4), "kernel=4 has no middle; use an odd number"),
    (lambda: window_mass(Q, K, STARTS, LENGTHS, 1.0, 4, pool="median"), "pool='median' is not known; use one of mean, max"),
    (lambda: window_mass(Q, K, STARTS, LENGTHS, 1.0, 4, reduce="vote"), "reduce='vote' is not known"),
    (lambda: window_mass(Q, K, STARTS, LENGTHS, 1.0, 4, sinks=torch.zeros(2)), "sinks must be [4], one logit per query head, got [2]"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)


@op_backends("key_mass", "window_mass")
@pytest.mark.parametrize(("start", "length"), [(-1, 4), (60, 5), (0, -1), (65, 0), (2**62, 2**62)])
def test_a_run_outside_the_store_is_refused(backend, start, length):
    starts, lengths = STARTS.clone(), LENGTHS.clone()
    starts[1, 0], lengths[1, 0] = start, length
    for op, args in ((key_mass, (Q, K, LSE, starts, lengths, 1.0)), (window_mass, (Q, K, starts, lengths, 1.0, 4))):
        skip_unless(op, backend, *args)
        with use_backend(backend), pytest.raises(ContractError, match=r"run \[1, 0\] has .* rows from .* but the store has 64"):
            op(*args)
