"""paged_attention: against float64 brute force, and what must hold whatever the numbers are."""

import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless, skip_unless_it_looks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import block_sparse_attention, paged_attention, use_backend

NAMES = ("q", "k", "v", "starts", "counts", "scale", "causal", "softcap", "sinks", "q_first", "q_last", "bias")


def scattered(lengths: list[list[int]], sizes: list[int], pages: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pages of the given sizes in turn, each head's own, in random places of a store; what is between them belongs to nobody."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.full((len(lengths), len(lengths[0]), pages), -7)  # of pages without rows
    counts = torch.zeros(starts.shape, dtype=torch.int32)
    todo = []
    for b, heads in enumerate(lengths):
        for h, left in enumerate(heads):
            for p in range(pages):
                counts[b, h, p] = min(left, sizes[p % len(sizes)]) if p < pages - 1 else left
                left -= int(counts[b, h, p])
                todo.append((b, h, p))
    at = 3
    for i in torch.randperm(len(todo), generator=g).tolist():
        if counts[todo[i]]:
            starts[todo[i]] = at
            at += int(counts[todo[i]]) + i % 3
    return starts, counts, at + 2


@st.composite
def paged_cases(draw, most: int = 90) -> dict:
    """Arguments of paged_attention by name; rows that no page names are NaN."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    n_q, heads = draw(st.sampled_from([1, 1, 1, 2, 5, 70])), kv_heads * group
    lengths = [[draw(st.integers(0, most)) for _ in range(kv_heads)] for _ in range(batch)]
    pages = draw(st.sampled_from([1, 3, 9]))
    starts, counts, rows = scattered(lengths, draw(st.sampled_from([[16], [1, 0, 7], [64, 3]])), pages, draw(st.integers(0, 99)))
    dim, seed = draw(st.sampled_from([64, 128, 80, 24, 30])), draw(st.integers(0, 99))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["plain", "tokens_first", "sliced", "dim_strided"]))
    g = torch.Generator().manual_seed(seed)
    k, v = (randn(1, 1, rows, width, dtype, draw(st.sampled_from(["plain", "sliced"])), seed + i)[0, 0]
            for i, width in ((1, dim), (2, draw(st.sampled_from([dim, dim, 40, 17, 192])))))  # fmt: skip
    named = torch.zeros(rows, dtype=torch.bool)
    for start, count in zip(starts.flatten().tolist(), counts.flatten().tolist()):
        named[max(start, 0) : max(start, 0) + count] = True
    k[~named], v[~named] = math.nan, math.nan
    q_first = q_last = None
    if draw(st.booleans()):
        q_first = torch.tensor([draw(st.integers(0, n_q)) for _ in range(batch)], dtype=torch.int32)
        q_last = torch.tensor([draw(st.integers(int(f), n_q)) for f in q_first], dtype=torch.int32)
    bias = torch.randn(rows, generator=g)
    bias[torch.rand(rows, generator=g) < 0.1] = -math.inf
    return dict(
        q=randn(batch, heads, n_q, dim, dtype, layout, seed) * draw(st.sampled_from([1.0, 4.0])), k=k, v=v, starts=starts,
        counts=counts, scale=dim**-0.5, causal=draw(st.sampled_from([True, True, False])), softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        sinks=torch.randn(heads, generator=g) if draw(st.booleans()) else None, q_first=q_first, q_last=q_last,
        bias=bias if draw(st.booleans()) else None,
    )  # fmt: skip


def paged_args(case: dict) -> tuple:
    return tuple(case[name] for name in NAMES)


def real(case: dict, b: int) -> range:
    first = int(case["q_first"][b]) if case["q_first"] is not None else 0
    return range(first, max(first, int(case["q_last"][b]) if case["q_last"] is not None else case["q"].shape[2]))


def truth(case: dict, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """One query of one head at a time, over the list of rows that it sees; products in ``dtype``, sums never below float32."""
    q, k, v = (case[name].to(dtype) for name in "qkv")
    wide = torch.promote_types(dtype, torch.float32)
    batch, heads, n_q, _ = q.shape
    group = heads // case["starts"].shape[1]
    out = torch.zeros(batch, heads, n_q, v.shape[1], dtype=dtype)
    lse = torch.full((batch, heads, n_q), -math.inf, dtype=wide)
    for b in range(batch):
        for h in range(heads):
            pages = zip(case["starts"][b, h // group].tolist(), case["counts"][b, h // group].tolist())
            listed = [row for start, count in pages for row in range(start, start + count)]
            for number, i in enumerate(real(case, b)):
                rows = listed[: max(0, len(listed) - len(real(case, b)) + 1 + number)] if case["causal"] else listed
                logits = (k[rows] @ q[b, h, i]).to(wide) * case["scale"]
                if case["softcap"]:
                    logits = case["softcap"] * torch.tanh(logits / case["softcap"])
                if case["bias"] is not None:
                    logits = logits + case["bias"][rows].to(wide)
                whole = torch.cat([logits, case["sinks"][h : h + 1].to(wide)]) if case["sinks"] is not None else logits
                if len(whole) and whole.max() > -math.inf:
                    lse[b, h, i] = whole.logsumexp(0)
                    out[b, h, i] = (logits - lse[b, h, i]).exp().to(dtype) @ v[rows]
    return out, lse


def run(backend: str, case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    skip_unless(paged_attention, backend, *paged_args(case))
    with use_backend(backend):
        return paged_attention(*paged_args(case))


def flat_case(lengths: list[int], n_q: int = 1, group: int = 4, dim: int = 64, dtype: torch.dtype = torch.float32, pages: int = 1,
              sizes: tuple[int, ...] = (16,), **other) -> dict:
    """One sequence whose heads have so many rows each."""
    starts, counts, rows = scattered([lengths], list(sizes), pages, 0)
    k, v = (randn(1, 1, rows, dim, dtype, "plain", i)[0, 0] for i in (1, 2))
    return dict(dict.fromkeys(NAMES), q=randn(1, group * len(lengths), n_q, dim, dtype, "plain", 0), k=k, v=v, starts=starts,
                counts=counts, scale=dim**-0.5, causal=True, softcap=0.0) | other


# -- against float64 ----------------------------------------------------------------------------------------------------


@op_backends("paged_attention")
@settings(max_examples=40)
@given(case=paged_cases())
def test_pages_are_attended_as_accurately_as_torch_does(backend, case):
    out, lse = run(backend, case)
    exact, lse_exact = truth(case)
    plain, lse_plain = truth(case, case["q"].dtype)
    assert out.dtype == case["q"].dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous(), "out must be laid out as [B, Nq, H, Dv]"
    assert_as_good_as_torch(out, plain, exact)
    assert torch.equal(lse.isneginf(), lse_exact.isneginf()), "lse is -inf exactly where nothing is seen"
    there = ~lse_exact.isneginf()
    assert (out[~there] == 0).all(), "a row that sees nothing must be 0"
    if there.any():
        assert_as_good_as_torch(lse[there], lse_plain[there], lse_exact[there], 1e-5)


@op_backends("paged_attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pages", "sizes", "n_q"), [(1, (16,), 1), (700, (16, 0, 5), 1), (300, (16,), 4), (2, (1,), 70)])
def test_long_ragged_heads_in_parts_and_pages_are_right(backend, pages, sizes, n_q, dtype):
    """Lengths around the end of a part and of a tile, a head without rows, one long page or many, one query or several."""
    for lengths in ([4100, 1024], [1025, 0], [63, 3000]):
        case = flat_case(lengths, n_q, 2, 32, dtype, pages, sizes)
        out, lse = run(backend, case)
        exact, lse_exact = paged_attention.reference(*paged_args(case | {x: case[x].double() for x in "qkv"}))
        torch.testing.assert_close(lse, lse_exact, atol=1e-5, rtol=1e-5)
        step = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
        torch.testing.assert_close(out.double(), exact, atol=step / 2, rtol=step)


@op_backends("paged_attention")
def test_a_late_huge_logit_rescales_what_came_before(backend):
    case = flat_case([3000], dtype=torch.bfloat16, dim=64)
    case["q"], case["k"] = case["q"] * 60, case["k"] * 60
    late = int(case["starts"][0, 0, 0]) + 2500
    case["k"][late] *= 30
    out, lse = run(backend, case)
    _, exact = truth(case)
    assert out.isfinite().all()
    assert (lse - exact).abs().max() <= 1e-5 * exact.abs().max()
    wins = case["q"][0, :, 0].double() @ case["k"][late].double() * case["scale"] > exact[0, :, 0] - 1
    assert wins.any() and not wins.all() and (out[0, wins, 0] - case["v"][late]).abs().max() < 1e-2


# -- what must hold whatever the numbers are ------------------------------------------------------------------------------


@op_backends("paged_attention")
def test_a_planted_key_is_found_in_whatever_page_it_lies(backend):
    for row in (0, 15, 16, 1023, 1024, 2047, 2999):
        case = flat_case([3000, 40], pages=250, sizes=(16,), dtype=torch.bfloat16)
        pages = zip(case["starts"][0, 0].tolist(), case["counts"][0, 0].tolist())
        at = [r for start, count in pages for r in range(start, start + count)][row]
        case["k"][at], case["v"][at] = 20 * case["q"][0, 2, 0].sign(), 7.0
        out, _ = run(backend, case)
        assert (out[0, 2] == 7).all() and out[0, 5].abs().max() < 2


@op_backends("paged_attention")
@given(case=paged_cases())
def test_a_padded_sequence_equals_the_sequence_alone(backend, case):
    together = run(backend, case)
    for b in range(case["q"].shape[0]):
        rows = slice(real(case, b).start, real(case, b).stop)
        alone = case | {"q": case["q"][b : b + 1, :, rows], "q_first": None, "q_last": None, "starts": case["starts"][b : b + 1],
                        "counts": case["counts"][b : b + 1]}
        for whole, single in zip(together, run(backend, alone), strict=True):
            eps = torch.finfo(single.dtype).eps
            torch.testing.assert_close(whole[b : b + 1, :, rows], single, atol=max(1e-5, eps), rtol=max(1e-5, eps))


@op_backends("paged_attention")
@settings(max_examples=15)
@given(case=paged_cases(), data=st.data())
def test_the_newest_row_changes_only_the_query_that_it_belongs_to(backend, case, data):
    # copies before and after: how rows are aligned may decide how they are added up
    case |= {"causal": True, "q_first": None, "q_last": None, "k": case["k"].clone(), "v": case["v"].clone()}
    n_q = case["q"].shape[2]
    before = run(backend, case)
    changed = case | {"k": case["k"].clone(), "v": case["v"].clone()}
    ends = (case["starts"] + case["counts"] - 1).masked_fill(case["counts"] == 0, -1)
    last = (case["counts"] > 0) * torch.arange(1, ends.shape[2] + 1)
    newest = ends.gather(2, last.argmax(2, keepdim=True)).flatten()
    changed["k"][newest[newest >= 0]], changed["v"][newest[newest >= 0]] = 7.0, 1e3
    for old, new in zip(before, run(backend, changed), strict=True):
        assert torch.equal(old[:, :, : n_q - 1], new[:, :, : n_q - 1])


@op_backends("paged_attention")
def test_the_order_of_pages_and_how_rows_are_cut_into_them_do_not_matter_to_one_query(backend):
    case = flat_case([2600, 900], pages=200, sizes=(16,), causal=False)
    out, lse = run(backend, case)
    turned = case | {"starts": case["starts"].flip(2), "counts": case["counts"].flip(2)}
    split = case | {"starts": torch.stack([case["starts"], case["starts"] + case["counts"] // 2], 3).flatten(2),
                    "counts": torch.stack([case["counts"] // 2, case["counts"] - case["counts"] // 2], 3).flatten(2)}
    for other in (turned, split):
        for got, want in zip(run(backend, other), (out, lse), strict=True):
            torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@op_backends("paged_attention")
def test_two_lists_merged_by_lse_equal_one(backend):
    case = flat_case([2600, 900], pages=200, sizes=(16,), causal=False)
    whole, lse = run(backend, case)
    halves = [run(backend, case | {"starts": case["starts"][:, :, at], "counts": case["counts"][:, :, at]})
              for at in (slice(0, 60), slice(60, None))]
    merged = torch.logaddexp(halves[0][1], halves[1][1])
    torch.testing.assert_close(merged, lse, atol=1e-5, rtol=0)
    got = sum(out * (part - merged).exp()[..., None] for out, part in halves)
    torch.testing.assert_close(got, whole, atol=3e-6, rtol=1e-5)


@op_backends("paged_attention")
def test_a_dense_run_equals_block_sparse_attention(backend):
    n_q, n_k = 70, 300
    q, k, v = (randn(1, h, n, 64, torch.float32, "tokens_first", i) for i, (h, n) in enumerate(((6, n_q), (2, n_k), (2, n_k))))
    counts = torch.ones(1, 1, 1, dtype=torch.int32)
    sinks = torch.randn(6)
    dense = block_sparse_attention(q, k, v, counts, counts[None] - 1, n_q, n_k, 0.125, n_k - n_q, True, 0, 5.0, None, None, sinks)
    flat = dict(dict.fromkeys(NAMES), q=q, k=k[0].flatten(0, 1), v=v[0].flatten(0, 1), starts=torch.tensor([[[0], [n_k]]]),
                counts=torch.full((1, 2, 1), n_k, dtype=torch.int32), scale=0.125, causal=True, softcap=5.0, sinks=sinks)
    for got, want in zip(run(backend, flat), dense, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@op_backends("paged_attention")
@pytest.mark.parametrize("n_q", [1, 40])
def test_threads_do_not_change_a_bit(backend, n_q):
    if backend == "reference":
        pytest.skip("reference: torch's matrix product rounds by shape and threads")
    case = flat_case([5000, 700], n_q, dtype=torch.bfloat16, pages=200, sizes=(16,))
    found = []
    for threads in (1, 2, 3):
        with running_on(threads):
            found.append(run(backend, case))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@op_backends("paged_attention")
def test_no_pages_no_queries_and_no_rows_are_answered(backend):
    case = flat_case([0, 0], n_q=2)
    sinks = torch.tensor([0.5, -math.inf] * 4)
    for given_sinks in (None, sinks):
        out, lse = run(backend, case | {"sinks": given_sinks})
        assert (out == 0).all() and lse.shape == (1, 8, 2)
        want = torch.full((8,), -math.inf) if given_sinks is None else sinks
        assert torch.equal(lse[0, :, 1], want)
    empty = case | {"starts": case["starts"][:, :, :0], "counts": case["counts"][:, :, :0]}
    assert (run(backend, empty)[0] == 0).all()
    assert run(backend, case | {"q": case["q"][:, :, :0]})[0].shape == (1, 8, 0, 64)


# -- bad input ------------------------------------------------------------------------------------------------------------


@op_backends("paged_attention")
@pytest.mark.parametrize(("start", "count"), [(-1, 2), (28, 5), (0, -1), (2**40, 1), (0, 2**30)])
def test_a_page_outside_the_store_is_refused_before_it_is_read(backend, start, count):
    skip_unless_it_looks(backend)
    case = flat_case([20, 5])
    case["starts"][0, 1, 0], case["counts"][0, 1, 0] = start, count
    for _ in range(2):  # the second call finds the contract already checked
        with pytest.raises(ContractError) as error:
            run(backend, case)
        assert f"page [0, 1, 0] holds {count} rows from row {start} on, but the store has" in str(error.value)


@op_backends("paged_attention")
def test_a_store_that_is_strided_in_its_channels_is_refused(backend):
    case = flat_case([20, 5])
    run(backend, case)
    with pytest.raises(ContractError, match="contiguous in its last dimension, got stride"):
        if backend == "reference":  # reads it, but its contract is that of all
            paged_attention._settled.clear()
        run(backend, case | {"v": case["v"].t().contiguous().t()})


def test_narrow_rows_go_to_the_reference():
    case = flat_case([20, 5], dim=8)
    assert paged_attention.chosen(*paged_args(case)) == "reference"
    refusals = [why for name, why in paged_attention.explain(*paged_args(case)).items() if name != "reference"]
    assert "needs rows of 16 channels or more, got 8" in refusals


BASE = flat_case([20, 5])


@pytest.mark.parametrize(("change", "sentence"), [
    ({"q": BASE["q"][0]}, "q must be [B, H, Nq, D], got 3 dimensions"),
    ({"k": BASE["k"][None]}, "k must be the rows of a store, [S, D], got [1, "),
    ({"v": BASE["v"].half()}, "q is torch.float32 but v is torch.float16"),
    ({"v": BASE["v"][1:]}, "they must agree"),
    ({"k": BASE["k"][:, :32]}, "q has head_dim 64 but k has 32"),
    ({"starts": BASE["starts"].int()}, "starts must be torch.int64 [1, Hkv, P]"),
    ({"counts": BASE["counts"][:, :, 0]}, "counts must be torch.int32 [1, Hkv, P]"),
    ({"counts": BASE["counts"][:, :1]}, "must agree"),
    ({"q": BASE["q"][:, :7]}, "7 query heads are not a multiple of the 2 key heads"),
    ({"softcap": -1.0}, "softcap=-1.0 is negative"),
    ({"sinks": torch.zeros(3)}, "sinks must be [8], one logit per head"),
    ({"bias": torch.zeros(3)}, "bias must be float32 ["),
    ({"q_first": torch.zeros(1)}, "q_first must be int32 [1]"),
    ({"q_last": torch.zeros(2, dtype=torch.int32)}, "q_last must be int32 [1]"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(change, sentence):
    with pytest.raises(ContractError) as error:
        paged_attention(*paged_args(BASE | change))
    assert sentence in str(error.value)
