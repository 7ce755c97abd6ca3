"""Pooling, pooled scores, global selection and the distance of rows, against loops in float64 that share no code with the package."""

import math

import pytest
import torch
from conftest import op_backends, running_on, skip_unless, skip_unless_it_looks
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch
from rows import DTYPES, plain_args, randn, share

from sparse_attn.errors import ContractError
from sparse_attn.ops import OPS, js_distance, pool_blocks, pooled_score, select_blocks, select_global, use_backend

LAYOUTS = ["plain", "tokens_first", "sliced", "dim_strided"]
OURS = ("pool_blocks", "pooled_score", "select_global", "js_distance")


def bounds(draw, batch: int, n: int) -> tuple:
    """first and last of each row, or None twice; some rows are empty, some bounds lie outside the tensor."""
    if not draw(st.booleans()):
        return None, None
    first = [draw(st.integers(-2, n)) for _ in range(batch)]
    last = [draw(st.integers(max(f, 0), n + 2)) for f in first]
    return torch.tensor(first, dtype=torch.int32), torch.tensor(last, dtype=torch.int32)


def real(bound: torch.Tensor | None, b: int, otherwise: int, n: int) -> int:
    return min(max(int(bound[b]), 0), n) if bound is not None else otherwise


# -- pool_blocks --------------------------------------------------------------------------------------------------------


@st.composite
def pool_cases(draw) -> dict:
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    x = randn(batch, draw(st.sampled_from([1, 2, 3, 8])), n, draw(st.sampled_from([1, 7, 64, 80, 128])), draw(st.sampled_from(DTYPES)),
              draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 99)))
    first, last = bounds(draw, batch, n)
    x[:, :, draw(st.integers(0, n - 1))] = 0
    return dict(x=x, block=draw(st.sampled_from([1, 5, 16, 64, 200])), kind=draw(st.sampled_from(["mean", "max", "min", "unit_mean"])),
                first=first, last=last)


def pooled_truth(case: dict, dtype: torch.dtype) -> torch.Tensor:
    x, block = case["x"], case["block"]
    batch, heads, n, dim = x.shape
    truth = torch.zeros(batch, heads, math.ceil(n / block), dim, dtype=dtype)
    for b in range(batch):
        low, high = real(case["first"], b, 0, n), real(case["last"], b, n, n)
        for j, t in enumerate(range(low, high, block)):
            tokens = x[b, :, t : min(t + block, high)].to(dtype)
            if case["kind"] == "unit_mean":
                tokens = torch.nn.functional.normalize(tokens, dim=-1)
            truth[b, :, j] = {"max": tokens.amax, "min": tokens.amin}.get(case["kind"], tokens.mean)(1)
    return truth


@op_backends("pool_blocks")
@given(case=pool_cases())
def test_pooling_equals_one_block_at_a_time(backend, case):
    skip_unless(pool_blocks, backend, **case)
    with use_backend(backend):
        got = pool_blocks(**case)
    truth = pooled_truth(case, torch.float64)
    assert got.dtype == torch.float32 and got.is_contiguous()
    if case["kind"] in ("max", "min"):
        assert torch.equal(got.double(), truth)
    else:
        assert_as_good_as_torch(got, pooled_truth(case, torch.float32), truth, floor=1e-6)
    assert (got[truth == 0] == 0).all(), "blocks without a real token are exactly 0"


@op_backends("pool_blocks")
def test_unit_means_survive_tokens_whose_squares_leave_float32(backend):
    x = torch.tensor([1e-25, 1.0, 1e30, 0.0])[:, None] * torch.randn(1, 2, 4, 24)
    skip_unless(pool_blocks, backend, x, 1, "unit_mean")
    with use_backend(backend):
        sizes = pool_blocks(x, 1, "unit_mean").norm(dim=-1)
    torch.testing.assert_close(sizes, torch.tensor([1.0, 1, 1, 0]).expand(1, 2, 4))


@op_backends("pool_blocks")
@pytest.mark.parametrize("kind", ["mean", "max", "min", "unit_mean"])
def test_a_nan_marks_its_channel_and_infinities_count(backend, kind):
    x = torch.randn(1, 1, 40, 40)
    x[0, 0, 3, 5], x[0, 0, 25, 39] = math.nan, math.inf
    skip_unless(pool_blocks, backend, x, 20, kind)
    with use_backend(backend):
        got = pool_blocks(x, 20, kind)[0, 0]
    assert got[0].isnan().tolist() == ([True] * 40 if kind == "unit_mean" else [d == 5 for d in range(40)])
    if kind != "unit_mean":
        assert got[1].isinf().tolist() == [d == 39 and kind != "min" for d in range(40)]


@op_backends("pool_blocks")
def test_more_heads_than_are_pooled_together_are_all_pooled(backend):
    x = randn(2, 45, 37, 128, torch.bfloat16, "tokens_first", 0)
    skip_unless(pool_blocks, backend, x, 16, "max")
    with use_backend(backend):
        assert torch.equal(pool_blocks(x, 16, "max").double(), pooled_truth(dict(x=x, block=16, kind="max", first=None, last=None), torch.float64))


# -- pooled_score -------------------------------------------------------------------------------------------------------


def reached(case: dict, b: int) -> list[list[int]]:
    """Key blocks that each query block reaches, from token pairs; [] where it is padding."""
    n_q, n_k, block_q, block_k = (case[name] for name in ("n_q", "n_k", "block_q", "block_k"))
    low, high = real(case["first"], b, 0, n_k), real(case["last"], b, n_k, n_k)
    key, at = torch.arange(n_k), case["q_start"] + torch.arange(n_q)[:, None]
    pairs = ((key >= low) & (key < high)).expand(n_q, n_k)
    alive = torch.ones(n_q, dtype=torch.bool)
    if case["causal"]:
        alive = ((at >= low) & (at < high))[:, 0]
        pairs = pairs & (key <= at) & alive[:, None]
        if case["window"]:
            pairs = pairs & (key > at - case["window"])
    rows = alive.nonzero()[:, 0]
    found = [((pairs[rows[i : i + block_q]].any(0).nonzero()[:, 0] - low) // block_k).unique().tolist() for i in range(0, len(rows), block_q)]
    return found + [[] for _ in range(math.ceil(n_q / block_q) - len(found))]


@st.composite
def geometries(draw) -> dict:
    """Positions, blocks and padding, and how many batch rows and heads there are."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 8]))
    causal, n_k = draw(st.sampled_from([True, True, True, False])), draw(st.integers(1, 150))
    n_q = draw(st.integers(1, n_k))
    first, last = bounds(draw, batch, n_k)
    return dict(block_q=draw(st.sampled_from([1, 4, 16, 48])), block_k=draw(st.sampled_from([2, 4, 16, 48])), n_q=n_q, n_k=n_k,
                q_start=draw(st.sampled_from([n_k - n_q, (n_k - n_q) // 2])) if causal else 0, causal=causal,
                window=draw(st.sampled_from([0, 0, 1, 17, 64])) if causal else 0, first=first, last=last), batch, kv_heads * group, kv_heads


@st.composite
def pooled_cases(draw) -> dict:
    case, batch, heads, kv_heads = draw(geometries())
    dim, layout, seed = draw(st.sampled_from([1, 7, 64, 80])), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 99))
    case["q_pooled"] = randn(batch, heads, math.ceil(case["n_q"] / case["block_q"]), dim, torch.float32, layout, seed)
    case["k_pooled"] = randn(batch, kv_heads, math.ceil(case["n_k"] / case["block_k"]), dim, torch.float32, layout, seed + 1)
    case["scale"] = torch.randn(heads, batch, generator=torch.Generator().manual_seed(seed)).T * draw(st.sampled_from([0.1, 1.0]))
    return case


def pooled_shares(case: dict, dtype: torch.dtype) -> torch.Tensor:
    q, k, scale = (case[name].to(dtype) for name in ("q_pooled", "k_pooled", "scale"))
    group = q.shape[1] // k.shape[1]
    shares = torch.zeros(*q.shape[:3], k.shape[2], dtype=dtype)
    for b in range(q.shape[0]):
        for i, blocks in enumerate(reached(case, b)):
            if blocks:
                logits = (q[b, :, i, None] * k[b].repeat_interleave(group, 0)[:, blocks]).sum(-1) * scale[b][:, None]
                shares[b, :, i, blocks] = logits.softmax(-1)
    return shares


@op_backends("pooled_score")
@given(case=pooled_cases())
def test_pooled_shares_equal_softmax_over_the_blocks_of_token_pairs(backend, case):
    skip_unless(pooled_score, backend, **case)
    with use_backend(backend):
        got = pooled_score(**case)
    truth = pooled_shares(case, torch.float64)
    assert got.dtype == torch.float32
    assert_as_good_as_torch(got, pooled_shares(case, torch.float32), truth)
    for b in range(len(got)):
        for i, blocks in enumerate(reached(case, b)):
            hidden = [j for j in range(got.shape[3]) if j not in blocks]
            assert (got[b, :, i, hidden] == 0).all(), "what is not reached is exactly 0"
            if blocks:
                torch.testing.assert_close(got[b, :, i].sum(-1), torch.ones(got.shape[1]), atol=1e-5, rtol=0)


@op_backends("pooled_score")
def test_a_bad_key_block_empties_only_the_rows_that_reach_it(backend):
    q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 40, 16)
    args = (q, k, torch.full((1, 2), 0.25), 4, 4, 160, 160)
    skip_unless(pooled_score, backend, *args)
    with use_backend(backend):
        whole = pooled_score(*args)
        for bad in (math.nan, math.inf, 3e38):
            k[0, 0, 21] = bad
            got = pooled_score(*args)
            assert torch.equal(got[:, :, :21], whole[:, :, :21]) and not got.isnan().any()
            if bad != bad:
                assert (got[:, :, 21:] == 0).all()


@op_backends("pooled_score")
@given(case=pooled_cases(), data=st.data())
def test_a_padded_row_of_scores_equals_the_row_alone(backend, case, data):
    skip_unless(pooled_score, backend, **case)
    b = data.draw(st.integers(0, len(case["q_pooled"]) - 1))
    alone = {name: t[b : b + 1] if isinstance(t, torch.Tensor) else t for name, t in case.items()}
    with use_backend(backend):
        assert torch.equal(pooled_score(**case)[b], pooled_score(**alone)[0])


# -- select_global ------------------------------------------------------------------------------------------------------


@st.composite
def global_cases(draw) -> dict:
    case, batch, heads, _ = draw(geometries())
    shape = batch, heads, math.ceil(case["n_q"] / case["block_q"]), math.ceil(case["n_k"] / case["block_k"])
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    score = torch.rand(shape, generator=g)
    score = draw(st.sampled_from([score, (score * 4).floor(), score**40, torch.zeros(shape), (score < 0.2).float(), score.mT.contiguous().mT]))
    shares = torch.rand(heads, generator=g, dtype=torch.float64)
    shares[: draw(st.sampled_from([0, heads // 2, heads]))] = draw(st.sampled_from([0.0, 0.25, 0.9, 1.0]))
    always = draw(st.sampled_from([None, score.flip(0) > 0.8, score[:, :1] > 0.5, torch.ones(1, 1, 1, 1, dtype=torch.bool)]))
    return dict(case, score=score, threshold=shares, scope=draw(st.sampled_from(["head", "all"])), always=always, inclusive=draw(st.booleans()))


def globally_kept(case: dict, b: int) -> set[tuple[int, int, int]]:
    """(head, query block, key block) of one batch row, one pair at a time."""
    heads, score, shares = case["score"].shape[1], case["score"][b].double().tolist(), case["threshold"].tolist()
    rows, kept = reached(case, b), set()
    for pool in [range(heads)] if case["scope"] == "all" else [[h] for h in range(heads)]:
        pairs = [(h, i, j) for h in pool for i, blocks in enumerate(rows) for j in blocks]
        p, total, before = max(shares[h] for h in pool), 0.0, 0.0
        for h, i, j in pairs:
            total += score[h][i][j]
        for h, i, j in sorted(pairs, key=lambda pair: -score[pair[0]][pair[1]][pair[2]]):
            after = before + score[h][i][j]
            if p >= 1 or after > before and (before < p * total if case["inclusive"] else after <= p * total):
                kept.add((h, i, j))
            before = after
        if case["always"] is not None:
            besides = case["always"].expand(case["score"].shape)[b].tolist()
            kept |= {(h, i, j) for h, i, j in pairs if besides[h][i][j]}
    return kept


@op_backends("select_global")
@given(case=global_cases())
def test_global_selection_equals_one_pair_at_a_time(backend, case):
    skip_unless(select_global, backend, **case)
    with use_backend(backend):
        counts, indices = select_global(**case)
    batch, heads, q_blocks, k_blocks = case["score"].shape
    for b in range(batch):
        kept = globally_kept(case, b)
        for h in range(heads):
            for i in range(q_blocks):
                want = [j for j in range(k_blocks) if (h, i, j) in kept]
                assert indices[b, h, i].tolist() == want + [-1] * (k_blocks - len(want)) and counts[b, h, i] == len(want)


@op_backends("select_global")
@pytest.mark.parametrize(("inclusive", "kept"), [(True, [0, 2, 3]), (False, [0, 2])])
@pytest.mark.parametrize(("scope", "shape"), [("head", (1, 1, 1, 4)), ("head", (1, 1, 2, 2)), ("all", (1, 2, 2, 1)), ("all", (1, 4, 1, 1))])
def test_the_worked_example_of_both_rules_holds_however_the_pairs_lie(backend, inclusive, kept, scope, shape):
    score = torch.tensor([4.0, 1, 3, 2]).view(shape)
    args = (score, share(0.75, shape[1]), scope, 1, 1, shape[2], shape[3], 0, False)
    skip_unless(select_global, backend, *args, inclusive=inclusive)
    with use_backend(backend):
        _, indices = select_global(*args, inclusive=inclusive)
    mask = torch.zeros(*shape[:3], shape[3] + 1, dtype=torch.bool).scatter_(-1, indices.long() % (shape[3] + 1), True)[..., :-1]
    assert mask.flatten().nonzero()[:, 0].tolist() == kept


@op_backends("select_global")
def test_global_ties_go_to_the_lower_head_then_query_block_then_key_block(backend):
    args = (torch.ones(1, 3, 4, 5), share(0.5, 3), "all", 1, 1, 4, 5, 0, False)
    skip_unless(select_global, backend, *args)
    with use_backend(backend):
        assert select_global(*args)[0].flatten().tolist() == [5, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0]
        assert select_global(*args[:2], "head", *args[3:])[1][0, 1].tolist() == [[0, 1, 2, 3, 4]] * 2 + [[-1] * 5] * 2


@op_backends("select_global")
def test_a_budget_may_exceed_what_fits_a_bucket_and_a_float(backend):
    """Thousands of pairs over 60 octaves: sums must be the reference's to the last bit, or the cut moves."""
    score = torch.rand(2, 3, 40, 300) ** 60
    args = (score.transpose(2, 3).contiguous().mT, torch.tensor([0.999999, 0.5, 0.0], dtype=torch.float64), "head", 1, 1, 40, 300, 260)
    skip_unless(select_global, backend, *args)
    for scope in ("head", "all"):
        with use_backend(backend):
            got = select_global(*args[:2], scope, *args[3:])
        want = select_global.reference(*args[:2], scope, *args[3:])
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@op_backends("select_blocks")
@pytest.mark.parametrize(("inclusive", "kept"), [(True, [0, 2, 3, -1]), (False, [0, 2, -1, -1])])
def test_the_worked_example_of_both_rules_holds_for_one_row(backend, inclusive, kept):
    args = (torch.tensor([[[[4.0, 1, 3, 2]]]]), share(0.75, 1), None, 1, 1, 1, 4, 0, False, 0, 0, 0)
    skip_unless(select_blocks, backend, *args, inclusive=inclusive)
    with use_backend(backend):
        assert select_blocks(*args, inclusive=inclusive)[1].flatten().tolist() == kept


# -- js_distance --------------------------------------------------------------------------------------------------------


def distance(p: list[float], q: list[float]) -> float:
    def divergence(x: list[float]) -> float:
        return math.fsum(a * math.log(2 * a / (b + c)) for a, b, c in zip(x, p, q) if a)

    return math.sqrt(max(0.0, divergence(p) + divergence(q)) / 2)


@op_backends("js_distance")
@given(batch=st.integers(1, 3), heads=st.sampled_from([1, 2, 3, 8]), n=st.integers(0, 90), sharp=st.sampled_from([0.01, 1.0, 30.0]),
       layout=st.sampled_from(["plain", "sliced", "dim_strided"]), seed=st.integers(0, 99))
def test_distances_equal_the_sum_term_by_term(backend, batch, heads, n, sharp, layout, seed):
    p, q = ((randn(1, batch, heads, n, torch.float32, layout, seed + i)[0] * sharp).softmax(-1) for i in range(2))
    p, q = (x.mT.contiguous().mT if layout == "dim_strided" else x for x in (p, q))
    skip_unless(js_distance, backend, p, q)
    with use_backend(backend):
        got = js_distance(p, q)
    want = torch.tensor([[distance(a, b) for a, b in zip(*row)] for row in zip(p.tolist(), q.tolist())])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), atol=1e-7, rtol=1e-6)


@op_backends("js_distance")
def test_distances_of_the_worked_examples(backend):
    p = torch.tensor([[[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, math.nan, 0]]])
    q = torch.tensor([[[0.5, 0.25, 0.25, 0], [0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75], [0.25, 0.25, 0, 0]]])
    skip_unless(js_distance, backend, p, q)
    with use_backend(backend):
        got = js_distance(p, q)[0]
        assert torch.equal(js_distance(q, p)[0][:3], got[:3])
    assert got[0].item() == pytest.approx(math.sqrt(0.5 * 0.1438 + 0.5 * 0.0719), abs=1e-4)
    assert got[1] == 0 and got[2].item() == pytest.approx(math.sqrt(math.log(2)), rel=1e-7) and got[3].isnan()


# -- all four -----------------------------------------------------------------------------------------------------------

SCORE = torch.ones(1, 4, 4, 4)
POOLED = torch.ones(1, 4, 4, 8)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: pool_blocks(POOLED, 16, "median"), "kind='median' is not known; use mean, max, min, unit_mean"),
    (lambda: pool_blocks(POOLED, 0, "mean"), "block=0 must be positive"),
    (lambda: pool_blocks(POOLED.int(), 16, "mean"), "dtype torch.int32 is not supported"),
    (lambda: pool_blocks(POOLED, 16, "mean", first=torch.zeros(2, dtype=torch.int32)), "first must be int32 [1]"),
    (lambda: pooled_score(POOLED.half(), POOLED, SCORE[0, :1, 0], 16, 16, 64, 64), "q_pooled must be float32 with 4 dimensions"),
    (lambda: pooled_score(POOLED, POOLED, SCORE[0, :1, 0], 16, 16, 65, 65), "q_pooled has 4 blocks but 65 queries make 5"),
    (lambda: pooled_score(POOLED, POOLED[:, :3], SCORE[0, :1, 0], 16, 16, 64, 64), "4 query heads are not a multiple of 3 key heads"),
    (lambda: pooled_score(POOLED, POOLED, SCORE[0, :1, 0, :3], 16, 16, 64, 64), "scale must be [1, 4]"),
    (lambda: select_global(SCORE, share(0.5, 4), "row", 16, 16, 64, 64), "scope='row' is not known; use head, all"),
    (lambda: select_global(SCORE, share(0.5, 3), "head", 16, 16, 64, 64), "threshold must be float64 [4]"),
    (lambda: select_global(SCORE, share(0.5, 4), "head", 16, 16, 80, 64), "make (5, 4)"),
    (lambda: select_global(SCORE, share(0.5, 4), "head", 16, 16, 64, 64, always=SCORE), "always must be bool and broadcast"),
    (lambda: js_distance(SCORE[0], SCORE[0, :, :3]), "must have one shape"),
    (lambda: js_distance(SCORE[0], SCORE), "q must be float32 [B, H, N]"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)


@op_backends("select_global")
@pytest.mark.parametrize(("score", "threshold", "sentence"), [
    (math.nan, 0.5, "score has a NaN, infinite or negative entry"), (-1.0, 0.5, "score has a NaN, infinite or negative entry"),
    (math.inf, 0.5, "score has a NaN, infinite or negative entry"), (1.0, 1.5, "threshold has an entry outside [0, 1]"),
    (1.0, -0.1, "threshold has an entry outside [0, 1]"), (1.0, math.nan, "threshold has an entry outside [0, 1]"),
])  # fmt: skip
def test_bad_values_get_a_sentence_from_every_backend(backend, score, threshold, sentence):
    bad, shares = SCORE.clone(), share(0.5, 4)
    bad[0, 3, 0, 3], shares[3] = score, threshold  # out of reach, and looked at all the same
    skip_unless(select_global, backend, bad, shares, "head", 16, 16, 64, 64)
    skip_unless_it_looks(backend)
    for _ in range(2):  # the second call finds the contract already checked
        with use_backend(backend), pytest.raises(ContractError) as error:
            select_global(bad, shares, "head", 16, 16, 64, 64)
        assert sentence in str(error.value)


@pytest.mark.parametrize("name", OURS)
@op_backends(*OURS)
def test_no_tokens_and_no_heads_give_empty_outputs(backend, name):
    empty = {
        "pool_blocks": [(torch.ones(2, 3, 0, 8), 16, "mean"), (torch.ones(0, 3, 5, 8), 16, "max"), (torch.ones(1, 2, 5, 0), 2, "unit_mean")],
        "pooled_score": [(torch.ones(1, 2, 0, 8), torch.ones(1, 1, 2, 8), torch.ones(1, 2), 4, 4, 0, 8),
                         (torch.ones(1, 2, 2, 8), torch.ones(1, 1, 0, 8), torch.ones(1, 2), 4, 4, 8, 0, 0, False)],
        "select_global": [(torch.ones(1, 2, 0, 2), share(0.5, 2), "head", 4, 4, 0, 8), (torch.ones(0, 2, 2, 2), share(0.5, 2), "all", 4, 4, 8, 8),
                          (torch.ones(1, 2, 2, 0), share(0.5, 2), "all", 4, 4, 8, 0, 0, False)],
        "js_distance": [(torch.ones(1, 2, 0), torch.ones(1, 2, 0)), (torch.ones(0, 2, 3), torch.ones(0, 2, 3))],
    }[name]
    for args in empty:
        skip_unless(OPS[name], backend, *args)
        with use_backend(backend):
            found = torch.utils._pytree.tree_leaves(OPS[name](*args))
        assert all((t == 0).all() for t in found), "nothing is kept and no share is given"


@pytest.mark.parametrize("name", OURS)
def test_the_number_of_threads_does_not_change_a_bit(name):
    found, args = [], plain_args(name)
    for threads in (1, 3):
        with running_on(threads):
            found.append(torch.utils._pytree.tree_leaves(OPS[name](*args)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
