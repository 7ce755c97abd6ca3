"""Every kind of reading that a plan can name, on every backend, against token-by-token definitions in float64."""

import math

import pytest
import torch
from conftest import op_backends, skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch, attention, attention_mask, real_queries
from rows import DTYPES, attention_args, listed_cases, randn

from sparse_attn.errors import ContractError
from sparse_attn.ops import block_sparse_attention, use_backend
from sparse_attn.types import BlockIndex, ReadPlan

NOTHING = dict(columns=None, near=None, dense_rows=0, order=None, pv_threshold=0.0)


def bounds(case: dict, b: int) -> tuple[int, int]:
    """First real key of a batch row and one past the last."""
    n_k = case["k"].shape[2]
    return (int(case["first"][b]), int(case["last"][b])) if case["first"] is not None else (0, n_k)


def read_mask(case: dict, counts: torch.Tensor, indices: torch.Tensor, columns=None, near=None, dense_rows=0, order=None,
              pv_threshold=0.0) -> torch.Tensor:
    """bool ``[B, H, Nq, Nk]``: the union of what is named, cut to what each query may see, by absolute positions."""
    (batch, heads, n_q, _), (kv_heads, n_k) = case["q"].shape, case["k"].shape[1:3]
    bq, bk, none = case["block_q"], case["block_k"], torch.zeros(batch, heads, -(-n_q // case["block_q"]), 0, dtype=torch.int32)
    if order is None:
        seen = attention_mask(case, counts, indices)
    else:  # blocks are found below, through the order
        seen = attention_mask(case, none.sum(-1), none)
    key, real = torch.arange(n_k), real_queries(case) | (not case["causal"])
    for b in range(batch):
        low, high = bounds(case, b)
        rows = real[b].nonzero()[:, 0]
        at, number = case["q_start"] + rows[:, None], torch.arange(len(rows))[:, None]
        see = ((key >= low) & (key < high)).expand(len(rows), -1)
        if case["causal"]:
            see = see & (key <= at) & ((key > at - case["window"]) | (case["window"] == 0))
        for h in range(heads):
            read = (number >= len(rows) - dense_rows).expand(-1, n_k)
            if columns is not None:
                read = read | torch.isin(key - low, columns[b, h // (heads // columns.shape[1])])
            if near is not None:
                read = read | (key - low < near[h, 0]) | (at - key < near[h, 1])
            if order is not None:
                p, slots = h // (heads // counts.shape[1]), order[b, h // (heads // kv_heads), : high - low]
                for i in range(-(-len(rows) // bq)):
                    listed = torch.isin(torch.arange(high - low) // bk, indices[b, p, i, : counts[b, p, i]])
                    read = read | (number // bq == i) & torch.isin(key - low, slots[listed])
            seen[b, h, rows] |= read & see
    return seen


@st.composite
def planned_cases(draw) -> tuple[dict, torch.Tensor, torch.Tensor, dict]:
    """An attention case with lists, and the other arguments of a plan, each of them there or not."""
    case, counts, indices = draw(listed_cases(110))
    (batch, heads), (kv_heads, n_k) = case["q"].shape[:2], case["k"].shape[1:3]
    if draw(st.booleans()):  # no list at all, not even a slot
        counts, indices = torch.zeros_like(counts), indices[..., :0]
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    plan = dict(NOTHING, dense_rows=draw(st.sampled_from([0, 0, 1, 5, 33, 64, 1000])))
    kind = draw(st.sampled_from(["columns", "near", "both", "both", "order", "order"]))
    if kind in ("columns", "both"):
        lists, slots = draw(st.sampled_from([heads, kv_heads, 1])), draw(st.sampled_from([0, 1, 7, 60]))
        plan["columns"] = torch.full((batch, lists, slots), -1, dtype=torch.int32)
        for b in range(batch):
            real = bounds(case, b)[1] - bounds(case, b)[0]
            for line in plan["columns"][b]:
                some = torch.randperm(real, generator=g)[: torch.randint(slots + 1, (), generator=g)].sort().values
                line[: len(some)] = some
    if kind in ("near", "both") and case["causal"]:
        far = draw(st.sampled_from([2**31 - 1, n_k]))
        choice = torch.tensor([[0, 0], [4, 1], [0, 17], [3, 0], [40, 40], [64, 64], [1, 33], [0, far], [far, 0], [-1, -5]])
        plan["near"] = choice[torch.randint(len(choice), (heads,), generator=g)].int()
    if kind == "order":
        segment = draw(st.sampled_from([1, 16, 50, n_k]))
        plan["order"] = torch.full((batch, kv_heads, n_k), -7, dtype=torch.int32)
        for b in range(batch):
            real = bounds(case, b)[1] - bounds(case, b)[0]
            for slots in plan["order"][b]:
                for at in range(0, real, segment):
                    n = min(segment, real - at)
                    slots[at : at + n] = at + torch.randperm(n, generator=g)
    return case, counts, indices, plan


@op_backends("block_sparse_attention")
@settings(max_examples=15)
@given(planned=planned_cases())
def test_attention_reads_the_union_that_the_plan_names(backend, planned):
    case, counts, indices, plan = planned
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args, **plan)
    seen = read_mask(case, counts, indices, **plan)
    truth, lse_truth = attention(case, seen)
    plain, lse_plain = attention(case, seen, case["q"].dtype)
    with use_backend(backend):
        out, lse = block_sparse_attention(*args, **plan)
    assert_as_good_as_torch(out, plain, truth)
    assert torch.equal(lse.isneginf(), lse_truth.isneginf()), "lse is -inf exactly where nothing is seen"
    there = ~lse_truth.isneginf()
    if there.any():
        floor = max(1e-5, torch.finfo(case["q"].dtype).eps / 4)
        assert_as_good_as_torch(lse[there], lse_plain[there], lse_truth[there], floor)
    assert (out[~there] == 0).all(), "a row that sees nothing must be 0"


def long_case(dtype: torch.dtype = torch.float32, heads: int = 2, n: int = 700, **more) -> tuple:
    """Arguments of a causal call that makes full tiles, long runs and several query panels, with a tenth of the blocks listed."""
    q, k, v = (randn(1, h, n, 32, dtype, "plain", i) for i, h in enumerate((heads, 1, 1)))
    qb, kb = -(-n // 128), -(-n // 64)
    keep = torch.rand(1, heads, qb, kb, generator=torch.Generator().manual_seed(9)) < 0.1
    column = torch.where(keep, torch.arange(kb), kb).sort(-1).values
    case = dict(q=q, k=k, v=v, block_q=128, block_k=64, scale=32**-0.5, q_start=0, causal=True, window=0, softcap=0.0, first=None,
                last=None, sinks=None) | more
    return case, keep.sum(-1, dtype=torch.int32), column.masked_fill(column == kb, -1).int()


@op_backends("block_sparse_attention")
@pytest.mark.parametrize("plan", [
    dict(columns=torch.arange(3, 690, 7).int()[None, None], near=torch.tensor([[5, 70], [128, 300]], dtype=torch.int32)),
    dict(columns=torch.arange(100, 400).int()[None, None], near=torch.tensor([[0, 256], [300, 1]], dtype=torch.int32),
         dense_rows=100),
    dict(near=torch.tensor([[0, 700], [4, 128]], dtype=torch.int32), dense_rows=300),
    dict(order=torch.randperm(700, generator=torch.Generator().manual_seed(3)).int()[None, None], dense_rows=10),
    dict(order=torch.cat([s * 256 + torch.randperm(min(256, 700 - s * 256)) for s in range(3)]).int()[None, None]),
], ids=["stripes", "stripe", "dense head", "shuffled", "segments"])  # fmt: skip
@pytest.mark.parametrize("window", [0, 150])
def test_long_plans_are_read_whole(backend, plan, window):
    if backend == "cpu_amx_emulated" and window:
        pytest.skip("cpu_amx_emulated: too slow to do both")
    case, counts, indices = long_case(torch.bfloat16 if "amx" in backend else torch.float32, window=window)
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args, **plan)
    seen = read_mask(case, counts, indices, **plan)
    truth, _ = attention(case, seen)
    plain, _ = attention(case, seen, case["q"].dtype)
    with use_backend(backend):
        out, _ = block_sparse_attention(*args, **plan)
    assert_as_good_as_torch(out, plain, truth)


@op_backends("block_sparse_attention")
@settings(max_examples=6)
@given(planned=planned_cases(), data=st.data())
def test_a_plan_reads_nothing_it_does_not_name(backend, planned, data):
    """Keys and values that a query may not read are replaced: its row does not change by a bit."""
    case, counts, indices, plan = planned
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args, **plan)
    p = data.draw(st.integers(0, case["k"].shape[2] - 1))
    changed = {**case, "k": case["k"].clone(), "v": case["v"].clone()}
    changed["k"][:, :, p], changed["v"][:, :, p] = 7.0, 1e4
    blind = ~read_mask(case, counts, indices, **plan)[..., p]
    with use_backend(backend):
        before, _ = block_sparse_attention(*args, **plan)
        after, _ = block_sparse_attention(*attention_args(changed, counts, indices), **plan)
    assert torch.equal(before[blind], after[blind])


# -- the threshold on tiles -----------------------------------------------------------------------------------------------


def peaked_case(dtype: torch.dtype) -> tuple:
    """Key 0 has a logit of 30 with every query and all others almost none."""
    case, counts, indices = long_case(dtype, heads=1)
    case["q"][..., 0] += 12
    case["k"][:, :, :, 0] = 0
    case["k"][:, :, 0, 0] = 30 / 12 / case["scale"]
    counts, indices = torch.full_like(counts, 11), torch.arange(11, dtype=torch.int32).expand(*counts.shape, 11).contiguous()
    return case, counts, indices


@op_backends("block_sparse_attention")
@pytest.mark.parametrize("threshold", [5.0, 10.0, 15.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_threshold_leaves_out_is_within_its_bound(backend, threshold, dtype):
    if backend == "cpu_amx_emulated" and dtype == torch.float32:
        pytest.skip("cpu_amx_emulated: too slow, and leaves nothing out")
    case, counts, indices = peaked_case(dtype)
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args)
    with use_backend(backend):
        whole, lse_whole = block_sparse_attention(*args)
        out, lse = block_sparse_attention(*args, pv_threshold=threshold)
    share = case["k"].shape[2] * math.exp(-threshold)
    rounding = 2 * torch.finfo(dtype).eps * case["v"].abs().max().item()
    span = (case["v"].max() - case["v"].min()).item()
    assert (out.double() - whole.double()).abs().max() <= share * span + rounding
    assert (lse - lse_whole).abs().max() <= share + 1e-5


@pytest.mark.parametrize("backend", ["cpu_avx512", "cpu_avx2", "cpu_generic"])
@pytest.mark.parametrize("rows", [700, 690])
def test_a_threshold_leaves_far_tiles_out(backend, rows):
    """A value so large that the rest of its logit still shows: gone with the threshold, also where a panel has idle lanes."""
    case, counts, indices = peaked_case(torch.float32)
    case["q"] = case["q"][:, :, :rows]
    case["v"][:, :, 300] = 1e12
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args)
    with use_backend(backend):
        whole, _ = block_sparse_attention(*args)
        out, _ = block_sparse_attention(*args, pv_threshold=15.0)
        kept, _ = block_sparse_attention(*args, pv_threshold=60.0)
    assert (whole[0, 0, 300:].abs() > 0.01).any(-1).all() and torch.equal(kept, whole)
    assert out[0, 0, 384:].abs().max() < 10, "tiles without the peak are left out"


@op_backends("block_sparse_attention")
def test_a_threshold_keeps_a_peak_that_comes_late(backend):
    case, counts, indices = peaked_case(torch.float32)
    for t in "kv":
        case[t] = torch.cat([case[t][:, :, 1:500], case[t][:, :, :1], case[t][:, :, 500:]], 2)
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args)
    with use_backend(backend):
        out, lse = block_sparse_attention(*args, pv_threshold=20.0)
    truth, lse_truth = attention(case, read_mask(case, counts, indices))
    assert (out - truth).abs().max() < 1e-4 and (lse - lse_truth).abs().max() < 1e-4


# -- bad values -----------------------------------------------------------------------------------------------------------


BAD = [
    (dict(columns=[[3, 2, -1]]), "columns[0, 0, 1] is 2; columns must ascend below the 60 real keys of batch row 0"),
    (dict(columns=[[3, 3, -1]]), "columns[0, 0, 1] is 3; columns must ascend"),
    (dict(columns=[[1, 2, 60]]), "columns[0, 0, 2] is 60; columns must ascend below the 60 real keys"),
    (dict(columns=[[1, -1, 2]]), "columns[0, 0, 2] is 2; columns must ascend below the 60 real keys of batch row 0 and be -1"),
    (dict(columns=[[-2, 1, 2]]), "columns[0, 0, 0] is -2; columns must ascend"),
    (dict(columns=[[0, 1, 2], [5, 4, -1]]), "columns[0, 1, 1] is 4; columns must ascend"),
    (dict(order=list(range(59)) + [0]), "order is not a permutation of the 60 real keys of batch row 0; each must"),
    (dict(order=list(range(1, 61))), "order is not a permutation of the 60 real keys"),
    (dict(order=[-1] + list(range(1, 60))), "order is not a permutation of the 60 real keys"),
]


@op_backends("block_sparse_attention")
@pytest.mark.parametrize(("bad", "sentence"), BAD)
def test_a_bad_value_gets_the_same_sentence_from_every_backend(backend, bad, sentence):
    q = k = v = torch.randn(1, 2, 64, 32)
    plan = {}
    if "columns" in bad:
        plan["columns"] = torch.tensor([bad["columns"]], dtype=torch.int32)
    else:
        plan["order"] = torch.tensor(bad["order"] + [0] * 4, dtype=torch.int32).expand(1, 2, 64)
    args = (q, k, v, torch.zeros(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 1, dtype=torch.int32), 16, 16, 0.125)
    plan["last"] = torch.tensor([60], dtype=torch.int32)
    skip_unless(block_sparse_attention, backend, *args, **plan)
    with use_backend(backend), pytest.raises(ContractError) as error:
        block_sparse_attention(*args, **plan)
    assert sentence in str(error.value)
    if backend != "reference":
        out = (torch.full_like(q, 7.0), torch.full((1, 2, 64), 7.0))
        with use_backend(backend), pytest.raises(ContractError):
            block_sparse_attention.out(*args, **plan, out=out)
        assert (out[0] == 7).all() and (out[1] == 7).all(), "nothing is written"


@pytest.mark.parametrize(("bad", "sentence"), [
    (dict(columns=torch.zeros(1, 3, 2, dtype=torch.int32)), "columns must be [1, Hc, C] with Hc dividing 2 query heads"),
    (dict(columns=torch.zeros(1, 1, 2)), "columns must be int32"),
    (dict(near=torch.zeros(1, 2, dtype=torch.int32)), "near must be [2, 2], sink and local tokens per head, got [1, 2]"),
    (dict(near=torch.zeros(2, 2, dtype=torch.int32), causal=False), "near needs causal=True"),
    (dict(dense_rows=-1), "dense_rows=-1 is negative"),
    (dict(order=torch.zeros(1, 1, 64, dtype=torch.int32)), "order must be [1, 2, 64]"),
    (dict(order=torch.zeros(1, 2, 64, dtype=torch.int32), columns=torch.zeros(1, 1, 2, dtype=torch.int32)),
     "order cannot be combined with columns or near"),
    (dict(pv_threshold=-0.5), "pv_threshold=-0.5 is negative"),
])  # fmt: skip
def test_a_plan_that_makes_no_sense_gets_a_sentence(bad, sentence):
    q = torch.randn(1, 2, 64, 32)
    lists = torch.zeros(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 0, dtype=torch.int32)
    with pytest.raises(ContractError) as error:
        block_sparse_attention(q, q, q, *lists, 16, 16, 0.125, **bad)
    assert sentence in str(error.value)


# -- the operator and the plan's own numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["columns and near", "order"])
def test_opcheck_passes_with_every_argument_given(kind):
    q, k, v = (randn(2, h, 70, 32, torch.float32, "tokens_first", h) for h in (4, 2, 2))
    counts, indices = torch.ones(2, 2, 5, dtype=torch.int32), torch.zeros(2, 2, 5, 2, dtype=torch.int32)
    first, last = torch.tensor([0, 25], dtype=torch.int32), torch.tensor([70, 68], dtype=torch.int32)
    columns = torch.tensor([2, 30, -1], dtype=torch.int32).expand(2, 4, 3).contiguous()
    near = torch.tensor([[1, 2], [0, 70], [3, 0], [20, 20]], dtype=torch.int32)
    order = torch.stack([torch.randperm(70), torch.cat([torch.randperm(43), torch.zeros(27)])]).int()[:, None].repeat(1, 2, 1)
    plan = (columns, near, 9, None, 20.0) if kind != "order" else (None, None, 9, order, 20.0)
    args = (q, k, v, counts, indices, 16, 16, 0.125, 0, True, 33, 5.0, first, last, torch.randn(4), *plan)
    tests = ("test_schema", "test_faketensor")  # the others take seconds and do not depend on which arguments are given
    torch.library.opcheck(torch.ops.sparse_attn.block_sparse_attention.default, args, test_utils=tests)


def counted_tiles(case: dict, counts: torch.Tensor, indices: torch.Tensor, plan: dict) -> torch.Tensor:
    """float64 ``[heads]``: tiles read over tiles that some query could reach, one tile at a time."""
    (batch, _, n_q, _), bq, bk = case["q"].shape, case["block_q"], case["block_k"]
    lists = [t.shape[at] for t, at in ((counts, 1), (plan["columns"], 1), (plan["near"], 0)) if t is not None]
    total, possible, none = torch.zeros(max(lists), dtype=torch.float64), 0, torch.zeros(batch, 1, counts.shape[2], 0).int()
    real = real_queries(case) | (not case["causal"])
    able = read_mask(case, none.sum(-1), none, dense_rows=n_q)[:, 0]
    for b in range(batch):
        low, high = bounds(case, b)
        rows = real[b].nonzero()[:, 0]
        for i, block in enumerate(rows.split(bq) if len(rows) else ()):
            could = able[b, block, low:high].any(0)
            tiles = [j for j in range(-(-(high - low) // bk)) if could[j * bk : (j + 1) * bk].any()]
            possible += len(tiles)
            at, end = case["q_start"] + int(block[0]) - low, case["q_start"] + int(block[-1]) - low + 1
            dense = sum(n >= len(rows) - plan["dense_rows"] for n in range(i * bq, i * bq + len(block))) / len(block)
            for h in range(max(lists)):
                p = h * counts.shape[1] // max(lists)
                read = set(indices[b, p, i, : counts[b, p, i]].tolist()) & set(tiles)
                if plan["near"] is not None:
                    sink, local = plan["near"][h].tolist()
                    read |= {j for j in tiles if j * bk < sink or local > 0 and (j + 1) * bk - 1 >= at - local + 1}
                share = float(len(read))
                if plan["columns"] is not None:
                    lines = plan["columns"][b, h * plan["columns"].shape[1] // max(lists)].tolist()
                    share += sum(c >= 0 and c // bk not in read and (c < end or not case["causal"]) for c in lines) / bk
                total[h] += min(dense * len(tiles) + (1 - dense) * share, len(tiles))
    return total / possible if possible else total * math.nan


@settings(max_examples=40)
@given(planned=planned_cases())
def test_density_counts_every_tile_that_is_read(planned):
    case, counts, indices, plan = planned
    index = BlockIndex(counts, indices, (case["block_q"], case["block_k"]), case["q"].shape[2], case["k"].shape[2],
                       *(case[name] for name in ("q_start", "causal", "window", "first", "last")))
    index = index.where(index.to_mask() & index.reachable())
    got = ReadPlan(index, **plan).head_density()
    want = counted_tiles(case, index.counts, index.indices, plan)
    torch.testing.assert_close(got.expand_as(want), want, equal_nan=True, rtol=1e-9, atol=1e-12)
