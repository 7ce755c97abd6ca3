"""Every op on every backend against float64, and what must hold whatever the numbers are."""

import pytest
import torch
from conftest import op_backends, skip_unless, skip_unless_it_looks
from hypothesis import given
from hypothesis import strategies as st
from oracle import antidiagonal_shares, assert_as_good_as_torch, attention, attention_mask, kept_blocks
from rows import attention_args, attention_cases, listed_cases, most, plain_args, randn, share

from sparse_attn.errors import ContractError
from sparse_attn.ops import OPS, antidiagonal_score, block_sparse_attention, select_blocks, use_backend
from sparse_attn.ops.spans import reach, spans


# -- block_sparse_attention ---------------------------------------------------------------------------------------------


@op_backends("block_sparse_attention")
@given(listed=listed_cases())
def test_attention_is_as_accurate_as_torch(backend, listed):
    case, counts, indices = listed
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args)
    seen = attention_mask(case, counts, indices)
    truth, lse_truth = attention(case, seen)
    plain, lse_plain = attention(case, seen, case["q"].dtype)
    with use_backend(backend):
        out, lse = block_sparse_attention(*args)
    assert out.dtype == case["q"].dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous(), "out must be laid out as [B, Nq, H, Dv]"
    assert_as_good_as_torch(out, plain, truth)
    assert torch.equal(lse.isneginf(), lse_truth.isneginf()), "lse is -inf exactly where nothing is seen"
    there = ~lse_truth.isneginf()
    if there.any():
        # a kernel may sum the probabilities as rounded to its input's dtype, so that out and lse agree
        floor = max(1e-5, torch.finfo(case["q"].dtype).eps / 4)
        assert_as_good_as_torch(lse[there], lse_plain[there], lse_truth[there], floor)
    assert (out[~there] == 0).all(), "a row that sees nothing must be 0"


@op_backends("block_sparse_attention")
def test_attention_of_peaked_and_huge_logits_is_finite_and_right(backend):
    for dtype, size in ((torch.float32, 60.0), (torch.bfloat16, 60.0), (torch.float16, 15.0)):
        case = dict(q=randn(1, 2, 200, 64, dtype, "plain", 0) * size, k=randn(1, 1, 200, 64, dtype, "plain", 1) * size,
                    v=randn(1, 1, 200, 64, dtype, "plain", 2), block_q=64, block_k=64, scale=0.125, q_start=0, causal=True,
                    window=0, softcap=0.0, first=None, last=None, sinks=None)
        case["k"][0, 0, 150] *= 30  # the maximum arrives late: logits in the tens of thousands
        counts = torch.arange(1, 5, dtype=torch.int32).expand(1, 1, 4).contiguous()
        indices = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
        args = attention_args(case, counts, indices)
        skip_unless(block_sparse_attention, backend, *args)
        seen = attention_mask(case, counts, indices)
        with use_backend(backend):
            out, lse = block_sparse_attention(*args)
        truth, lse_truth = attention(case, seen)
        assert out.isfinite().all() and lse.isfinite().all()
        assert (lse - lse_truth).abs().max() <= 1e-5 * lse_truth.abs().max()
        # a logit of 4e4 carries a float32 rounding of 2e-3: compare where the winner is clear
        assert ((out - truth).abs() < 0.02).double().mean() > 0.995


@op_backends("block_sparse_attention")
@given(listed=listed_cases(), data=st.data())
def test_a_future_key_changes_nothing_before_it(backend, listed, data):
    case, counts, indices = listed
    case["causal"], n_k = True, case["k"].shape[2]
    case["q_start"] = n_k - case["q"].shape[2]
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args)
    p = data.draw(st.integers(0, n_k - 1))
    with use_backend(backend):
        before, _ = block_sparse_attention(*args)
        changed = {**case, "k": case["k"].clone(), "v": case["v"].clone()}
        changed["k"][:, :, p], changed["v"][:, :, p] = 7.0, 1e4
        after, _ = block_sparse_attention(*attention_args(changed, counts, indices))
    untouched = max(0, p - case["q_start"])
    assert torch.equal(before[:, :, :untouched], after[:, :, :untouched])


@op_backends("block_sparse_attention")
@given(listed=listed_cases())
def test_a_padded_row_equals_the_row_alone(backend, listed):
    case, counts, indices = listed
    args = attention_args(case, counts, indices)
    skip_unless(block_sparse_attention, backend, *args)
    (batch, _, n_q, _), n_k = case["q"].shape, case["k"].shape[2]
    with use_backend(backend):
        together, lse = block_sparse_attention(*args)
        for b, span in enumerate(spans(batch, n_q, n_k, case["q_start"], case["causal"], case["first"], case["last"])):
            if not span.n_q or not span.n_k:
                continue
            alone = {**case, "first": None, "last": None, "q_start": span.q_start, "q": case["q"][b : b + 1, :, span.rows],
                     "k": case["k"][b : b + 1, :, span.keys], "v": case["v"][b : b + 1, :, span.keys]}
            qb, kb = -(-span.n_q // case["block_q"]), -(-span.n_k // case["block_k"])
            index = indices[b : b + 1, :, :qb].masked_fill(indices[b : b + 1, :, :qb] >= kb, -1)
            kept = (index >= 0).sum(-1, dtype=torch.int32).minimum(counts[b : b + 1, :, :qb])
            out, lse_alone = block_sparse_attention(*attention_args(alone, kept, index))
            assert torch.equal(together[b : b + 1, :, span.rows], out)
            assert torch.equal(lse[b : b + 1, :, span.rows], lse_alone)


@op_backends("block_sparse_attention")
@given(case=attention_cases())
def test_two_halves_merged_by_lse_equal_the_whole(backend, case):
    case = {**case, "first": None, "last": None, "sinks": None}
    kb, qb = -(-case["k"].shape[2] // case["block_k"]), -(-case["q"].shape[2] // case["block_q"])
    lists = torch.arange(kb, dtype=torch.int32).expand(case["q"].shape[0], 1, qb, kb)

    def attend(indices):
        indices = indices.contiguous()
        counts = torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32)
        args = attention_args(case, counts, indices)
        skip_unless(block_sparse_attention, backend, *args)
        with use_backend(backend):
            out, lse = block_sparse_attention(*args)
        return out.double(), lse.double()

    (whole, lse), (a, lse_a), (b, lse_b) = attend(lists), attend(lists[..., : kb // 2]), attend(lists[..., kb // 2 :])
    merged_lse = torch.logaddexp(lse_a, lse_b)
    weight = lambda part: (part - merged_lse).exp().nan_to_num(0.0)[..., None]  # noqa: E731
    step = torch.finfo(case["q"].dtype).eps
    # float32 logits of size 40 are themselves off by 40 steps; in the narrow dtypes the rounding of out is larger than that
    steps = 80 if case["q"].dtype == torch.float32 else 8
    torch.testing.assert_close(a * weight(lse_a) + b * weight(lse_b), whole, atol=steps * step, rtol=2 * step)
    torch.testing.assert_close(merged_lse, lse, atol=max(1e-4, step / 2), rtol=1e-5)


@op_backends("block_sparse_attention")
def test_a_given_output_is_filled_completely(backend):
    q, k, v = (randn(2, h, 100, 64, torch.float32, "plain", i) for i, h in enumerate((4, 2, 2)))
    index = torch.arange(2, dtype=torch.int32).expand(2, 4, 2, 2).contiguous()
    args = (q, k, v, torch.full((2, 4, 2), 2, dtype=torch.int32), index, 64, 64, 0.125)
    skip_unless(block_sparse_attention, backend, *args)
    if backend == "reference":
        pytest.skip("reference: makes its own outputs")
    out, lse = torch.full((2, 100, 4, 64), float("nan")).transpose(1, 2), torch.full((2, 4, 100), float("nan"))
    with use_backend(backend):
        block_sparse_attention.out(*args, out=(out, lse))
        want, want_lse = block_sparse_attention(*args)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


# -- antidiagonal_score -------------------------------------------------------------------------------------------------


@st.composite
def score_cases(draw) -> dict:
    case = draw(attention_cases(90))
    stride = draw(st.sampled_from([2, 4, 8, 16]))
    return dict(case, stride=stride, alternate=draw(st.booleans()), block_q=stride * draw(st.integers(1, 4)),
                block_k=stride * draw(st.integers(1, 4)))


def score_args(case: dict) -> tuple:
    names = ("q", "k", "block_q", "block_k", "stride", "scale", "q_start", "causal", "window", "alternate", "first", "last")
    return tuple(case[name] for name in names)


@op_backends("antidiagonal_score")
@given(case=score_cases())
def test_antidiagonal_shares_equal_the_loop_over_token_pairs(backend, case):
    args = score_args(case)
    skip_unless(antidiagonal_score, backend, *args)
    with use_backend(backend):
        got = antidiagonal_score(*args)
    (batch, heads, n_q, _), n_k = case["q"].shape, case["k"].shape[2]
    group = heads // case["k"].shape[1]
    want = torch.zeros(got.shape, dtype=torch.float64)
    for b, span in enumerate(spans(batch, n_q, n_k, case["q_start"], case["causal"], case["first"], case["last"])):
        for h in range(heads if span.n_q and span.n_k else 0):
            alone = antidiagonal_shares(case["q"][b, h, span.rows], case["k"][b, h // group, span.keys], case["block_q"],
                                        case["block_k"], case["stride"], case["scale"], span.q_start, case["causal"],
                                        case["window"], case["alternate"])
            want[b, h, : alone.shape[0], : alone.shape[1]] = alone
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-4)


# -- select_blocks ------------------------------------------------------------------------------------------------------


@st.composite
def selection_cases(draw) -> dict:
    case = draw(attention_cases(150))
    (batch, heads, n_q, _), n_k = case["q"].shape, case["k"].shape[2]
    shape = batch, heads, -(-n_q // case["block_q"]), -(-n_k // case["block_k"])
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    score = torch.rand(shape, generator=g)
    score = draw(st.sampled_from([score, (score * 4).floor(), score**8, torch.zeros(shape), (score < 0.2).float()]))
    top_k = draw(st.sampled_from([0, 0, 1, 2, 3]))
    shares = torch.rand(heads, generator=g, dtype=torch.float64)
    shares[: heads // 2] = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    keys = ("block_q", "block_k", "q_start", "causal", "window", "first", "last")
    always = draw(st.sampled_from([None, score.flip(0) > 0.8, score[:, :1, :, :] > 0.5]))
    most = [None, torch.tensor([[[1]]]), torch.randint(0, 5, shape[:3], generator=g), torch.arange(heads)[None, :, None]][top_k]
    return dict({name: case[name] for name in keys}, score=score, threshold=None if top_k else shares,
                top_k=most.int() if top_k else None, n_q=n_q, n_k=n_k, always=always, inclusive=draw(st.booleans()),
                sink=draw(st.sampled_from([1, 0, 2])), recent=draw(st.sampled_from([1, 0, 2])) if case["causal"] else 0)


@op_backends("select_blocks")
@given(case=selection_cases())
def test_selection_equals_one_block_at_a_time(backend, case):
    skip_unless(select_blocks, backend, **case)
    with use_backend(backend):
        counts, indices = select_blocks(**case)
    batch, heads, qb, kb = case["score"].shape
    for b, span in enumerate(spans(batch, case["n_q"], case["n_k"], case["q_start"], case["causal"], case["first"], case["last"])):
        low, own, high = reach(span, case["block_q"], case["block_k"], case["causal"], case["window"])
        for h in range(heads):
            for i in range(qb):
                reachable = list(range(int(low[i]), int(high[i]) + 1)) if i < len(low) else []
                forced = [j for j in reachable if j < case["sink"] or (case["recent"] and j >= int(own[i]) - case["recent"] + 1)]
                share_h = None if case["threshold"] is None else float(case["threshold"][h])
                most = case["top_k"].expand(batch, heads, qb)[b, h, i] if share_h is None else 0
                want = kept_blocks(case["score"][b, h, i].double().tolist(), reachable, forced, share_h, int(most), case["inclusive"])
                if case["always"] is not None:
                    besides = case["always"].expand(case["score"].shape)[b, h, i]
                    want = sorted({*want, *(j for j in reachable if besides[j])})
                got = indices[b, h, i].tolist()
                assert got == want + [-1] * (kb - len(want)) and counts[b, h, i] == len(want)


@op_backends("select_blocks")
@pytest.mark.parametrize(("mass", "threshold", "kept"), [
    ([4, 1, 3, 2], 0.75, [0, 2, 3]), ([4, 1, 3, 2], 0.60, [0, 3]), ([4, 1, 3, 2], 0.0, [0, 3]),
    ([4, 1, 3, 2], 1.0, [0, 1, 2, 3]), ([0, 0, 0, 0], 0.9, [0, 3]), ([0, 0, 0, 5], 0.9, [0, 3]),
])  # fmt: skip
def test_selection_of_the_worked_examples(backend, mass, threshold, kept):
    score = torch.tensor(mass, dtype=torch.float32).expand(1, 1, 4, 4).contiguous()
    skip_unless(select_blocks, backend, score, share(threshold, 1), None, 1, 1, 4, 4)
    with use_backend(backend):
        counts, indices = select_blocks(score, share(threshold, 1), None, 1, 1, 4, 4)
    assert indices[0, 0, 3, : counts[0, 0, 3]].tolist() == kept
    assert indices[0, 0, 0].tolist() == [0, -1, -1, -1], "the first row reads its own block and nothing else"


@op_backends("select_blocks")
def test_ties_go_to_the_lower_index(backend):
    score = torch.ones(1, 2, 1, 400)
    score[0, 1, 0, ::2] = 2.0
    for rule in (dict(threshold=share(0.25, 2), top_k=None), dict(threshold=None, top_k=most(100))):
        args = dict(score=score, **rule, block_q=1, block_k=1, n_q=1, n_k=400, causal=False, sink=0, recent=0)
        skip_unless(select_blocks, backend, **args)
        with use_backend(backend):
            counts, indices = select_blocks(**args)
        equal, even = (indices[0, h, 0, : counts[0, h, 0]].tolist() for h in (0, 1))
        assert equal == list(range(100))
        assert even == list(range(0, 2 * len(even), 2)) and len(even) == (75 if rule["threshold"] is not None else 100)


@op_backends("select_blocks")
def test_without_forced_blocks_selection_is_inclusive_top_p(backend):
    score = torch.tensor([4.0, 1, 3, 2]).expand(1, 1, 1, 4).contiguous()
    skip_unless(select_blocks, backend, score, share(0.75, 1), None, 1, 1, 1, 4, causal=False, sink=0, recent=0)
    with use_backend(backend):
        counts, indices = select_blocks(score, share(0.75, 1), None, 1, 1, 1, 4, causal=False, sink=0, recent=0)
    assert indices[0, 0, 0].tolist() == [0, 2, 3, -1]


# -- every op -----------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(1, 4, 64, 32), torch.zeros(1, 2, 64, 32)
LIST = (torch.ones(1, 4, 1, dtype=torch.int32), torch.zeros(1, 4, 1, 1, dtype=torch.int32))
SCORE = torch.ones(1, 4, 4, 4)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: antidiagonal_score(Q, K[:, :1].expand(1, 3, 64, 32), 16, 16, 4, 1.0), "4 query heads are not a multiple of 3"),
    (lambda: antidiagonal_score(Q, K, 16, 16, 5, 1.0), "block_q=16 is not a multiple of stride=5"),
    (lambda: antidiagonal_score(Q, K.half(), 16, 16, 4, 1.0), "q is torch.float32 but k is torch.float16"),
    (lambda: antidiagonal_score(Q.int(), K.int(), 16, 16, 4, 1.0), "dtype torch.int32 is not supported"),
    (lambda: antidiagonal_score(Q, K, 16, 16, 4, 1.0, 3), "lie past the 64 keys"),
    (lambda: antidiagonal_score(Q, K, 16, 16, 4, 1.0, first=torch.zeros(2, dtype=torch.int32)), "first must be int32 [1]"),
    (lambda: select_blocks(SCORE, None, None, 16, 16, 64, 64), "either threshold or top_k"),
    (lambda: select_blocks(SCORE, share(0.5, 3), None, 16, 16, 64, 64), "threshold must be float64 [4]"),
    (lambda: select_blocks(SCORE, share(0.5, 4), None, 16, 16, 80, 64), "make (5, 4)"),
    (lambda: select_blocks(SCORE, share(0.5, 4), None, 16, 16, 64, 64, causal=False), "recent=1 needs causal=True"),
    (lambda: block_sparse_attention(Q, K, K[:, :, :63], *LIST, 64, 64, 1.0), "v must be [B, Hkv, Nk, Dv]"),
    (lambda: block_sparse_attention(Q, K, K, LIST[0], LIST[1].float(), 64, 64, 1.0), "indices must be int32"),
    (lambda: block_sparse_attention(Q, K, K, *LIST, 32, 64, 1.0), "must begin with [1, 4, 2]"),
    (lambda: block_sparse_attention(Q, K, K, *LIST, 64, 64, 1.0, sinks=torch.zeros(3)), "sinks must be [4]"),
    (lambda: block_sparse_attention(Q.clone().requires_grad_(), K, K, *LIST, 64, 64, 1.0), "inference only"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError, match="(?s).*") as error:
        call()
    assert sentence in str(error.value)


@op_backends("select_blocks", "block_sparse_attention")
@pytest.mark.parametrize(("op", "args", "sentence"), [
    (select_blocks, (SCORE * float("nan"), share(0.5, 4), None, 16, 16, 64, 64), "score has a NaN"),
    (select_blocks, (-SCORE, share(0.5, 4), None, 16, 16, 64, 64), "score has a NaN"),
    (select_blocks, (SCORE, share(1.5, 4), None, 16, 16, 64, 64), "threshold has an entry outside [0, 1]"),
    (select_blocks, (SCORE, share(float("nan"), 4), None, 16, 16, 64, 64), "threshold has an entry outside [0, 1]"),
    (block_sparse_attention, (Q, K, K, LIST[0], LIST[1] + 1, 64, 64, 1.0), "but 64 keys make 1 blocks of 64"),
    (block_sparse_attention, (Q, K, K, LIST[0], LIST[1] - 1, 64, 64, 1.0), "but 64 keys make 1 blocks of 64"),
    (block_sparse_attention, (Q, K, K, LIST[0] + 1, LIST[1], 64, 64, 1.0), "but there are 1 slots; counts must be 0..slots"),
])  # fmt: skip
def test_bad_values_get_a_sentence_from_every_backend(backend, op, args, sentence):
    skip_unless(op, backend, *args)
    skip_unless_it_looks(backend)
    for _ in range(2):  # the second call finds the contract already checked
        with use_backend(backend), pytest.raises(ContractError) as error:
            op(*args)
        assert sentence in str(error.value)


@pytest.mark.parametrize("name", list(OPS))
def test_opcheck_passes(name):
    torch.library.opcheck(getattr(torch.ops.sparse_attn, name).default, plain_args(name))


@pytest.mark.parametrize("name", list(OPS))
def test_compiled_equals_eager(name):
    args = plain_args(name)
    torch._dynamo.reset()  # all ops share the line below, and a line may only be compiled so often
    compiled = torch.compile(lambda *a: OPS[name](*a), fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, args), results(OPS[name], args), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


def results(call, args: tuple) -> list[torch.Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    return [x for x in torch.utils._pytree.tree_leaves((call(*copies), copies)) if isinstance(x, torch.Tensor)]
