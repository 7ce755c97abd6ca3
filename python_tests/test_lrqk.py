"""Factors of queries and keys: the solve against the algorithm as printed, what follows the rows, and which tokens are read."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvcache
import sparse_attn
from kvcache.cache import CacheLayer
from kvcache.config import CacheConfig
from kvcache.digests import Factors
from kvcache.digests.factors import joint_factors
from kvcache.readers import LRQK
from kvcache.store import Meter
from sparse_attn import ContractError
from sparse_attn.kept import Queries

SMALL = LRQK(budget=40, rank=8, recent=8, dense_layers=())


def spectrum(*shape: int, seed: int = 0, decay: float = 1.0) -> torch.Tensor:
    """Vectors whose channels, turned, fall off as ``decay`` says; float64."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=g, dtype=torch.float64))[0]
    return torch.randn(*shape, generator=g, dtype=torch.float64) * torch.arange(1, shape[-1] + 1) ** -decay @ turn


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.mT @ x


# -- the solve ------------------------------------------------------------------------------------------------------------


def objective(q, k, a_q, a_k, weights) -> float:
    """Of factors and the best B of them, with everything of length n written out."""
    total = (q @ k.T - a_q @ a_k.T).square().sum()
    for x, a, weight in zip((q, k), (a_q, a_k), weights):
        total += weight * (x - a @ torch.linalg.lstsq(a, x).solution).square().sum()
    return float(total)


@pytest.mark.parametrize("weights", [(0.1, 0.1), (2.0, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_solve_by_gram_matrices_is_the_alternating_one(rank, weights):
    q, k = spectrum(3 * 70, 16, seed=1), spectrum(90, 16, seed=2)
    scaled = tuple(w * float(gram(x).diagonal().mean()) for w, x in zip(weights, (k, q)))  # each in eigenvalues of the other's
    w_q, w_k = joint_factors(gram(q), gram(k), rank, weights, 0)
    a_q, a_k = q @ w_q, k @ w_k
    before = objective(q, k, a_q, a_k, scaled)
    for rounds in range(1, 5):
        b_q, b_k = (torch.linalg.inv(gram(a)) @ a.T @ x for a, x in ((a_q, q), (a_k, k)))
        a_q = (q @ k.T @ a_k + scaled[0] * q @ b_q.T) @ torch.linalg.inv(gram(a_k) + scaled[0] * b_q @ b_q.T)
        a_k = (k @ q.T @ a_q + scaled[1] * k @ b_k.T) @ torch.linalg.inv(gram(a_q) + scaled[1] * b_k @ b_k.T)
        w_q, w_k = joint_factors(gram(q), gram(k), rank, weights, rounds, tol=0.0)
        torch.testing.assert_close(q @ w_q, a_q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(k @ w_k, a_k, rtol=1e-5, atol=1e-5)
        now = objective(q, k, q @ w_q, k @ w_k, scaled)
        assert now <= before * (1 + 1e-7)
        before = now


def test_it_starts_at_the_best_product_of_that_rank():
    q, k = spectrum(60, 16, seed=1), spectrum(90, 16, seed=2)
    w_q, w_k = joint_factors(gram(q), gram(k), 5, max_iter=0)
    u, s, vt = torch.linalg.svd(q @ k.T, full_matrices=False)
    torch.testing.assert_close(q @ w_q @ (k @ w_k).T, u[:, :5] * s[:5] @ vt[:5], rtol=1e-6, atol=1e-6)


def test_a_solve_is_over_when_a_round_changes_little_whatever_else_is_solved_beside_it():
    q, k = spectrum(2, 60, 16, seed=1), spectrum(2, 90, 16, seed=2, decay=0.3)
    q[1] *= 1e3
    grams = gram(q), gram(k)
    runs = [joint_factors(*grams, 4, (1.0, 1.0), rounds, tol=0.0) for rounds in range(12)]
    over = []
    for i in (0, 1):
        unit = [x[i] / gram(x[i]).diagonal().mean().sqrt() for x in (q, k)]  # its Gram matrix has a mean eigenvalue of 1
        change = [max(float((x @ (b - a)[i]).square().sum()) / 4 for x, a, b in zip(unit, *pair)) for pair in zip(runs, runs[1:])]
        over.append(next(rounds for rounds, x in enumerate(change) if x < 1e-4) + 1)
    found = joint_factors(*grams, 4, (1.0, 1.0), 12, 1e-4)
    for i in (0, 1):
        want = runs[over[i]]
        for w_q, w_k in (tuple(w[i] for w in found), joint_factors(grams[0][i], grams[1][i], 4, (1.0, 1.0), 12, 1e-4)):
            torch.testing.assert_close(w_q @ w_k.T, want[0][i] @ want[1][i].T, rtol=1e-9, atol=1e-9)
    assert over[0] != over[1] and max(over) < 11


def test_few_tokens_or_unknown_queries_are_solved_all_the_same():
    k = spectrum(90, 16, seed=2)
    for q in (torch.zeros(1, 16), spectrum(2, 16), spectrum(1, 16) * 1e-20):
        for keys in (k, k[:3], torch.zeros(1, 16)):
            assert all(w.isfinite().all() for w in joint_factors(gram(q.double()), gram(keys.double()), 6))
    w_q, w_k = joint_factors(torch.zeros(16, 16), gram(k), 6, (0.0, 0.0))
    own = torch.linalg.eigh(gram(k)).eigenvectors[:, -6:]
    torch.testing.assert_close(k @ w_k @ w_q.T, k @ own @ own.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 20, 64])
def test_float32_sums_over_few_directions_are_solved(rank):
    q, k = torch.randn(3000, 7) @ torch.randn(7, 64), torch.randn(1000, 20) @ torch.randn(20, 64) + 30 * torch.randn(64)
    w_q, w_k = joint_factors(gram(q), gram(k), rank)
    assert w_q.isfinite().all() and w_k.isfinite().all()
    if rank >= 20:
        torch.testing.assert_close(q.double() @ w_q @ (k.double() @ w_k).T, q.double() @ k.double().T, rtol=1e-2, atol=1.0)


# -- one layer ------------------------------------------------------------------------------------------------------------


def layer_of(reader: LRQK, q: torch.Tensor, k: torch.Tensor, chunk: int = 0, first: torch.Tensor | None = None) -> CacheLayer:
    """A layer that read the tokens in chunks, but has yet to attend with the last one."""
    core, n = CacheLayer(CacheConfig(None, None, decode=reader), 5, 6, Meter()), k.shape[2]
    chunk = chunk or n - 1
    for at in [*range(0, n - 1, chunk), n - 1]:
        part = slice(at, min(at + chunk, n - 1) if at < n - 1 else n)
        core.append(k[:, :, part], k[:, :, part])
        low = None if first is None else (first - at).clamp(0, k[:, :, part].shape[2]).int()
        core.admit(low)
        if at < n - 1:
            core.observe(Queries(q[:, :, part], torch.zeros(q[:, :, part].shape[:3]), low, None, 0.125))
    return core


def offsets(core: CacheLayer, q: torch.Tensor) -> torch.Tensor:
    """int64 ``[B, Hkv, slots]``, -1 behind: numbers of the tokens that these queries read."""
    (region,) = core.regions(q)
    return (region.starts - core.table()[0][..., None]).masked_fill(region.counts == 0, -1)


def text(n: int = 300, batch: int = 2, heads: int = 4, dim: int = 16, seed: int = 0):
    q, k = spectrum(batch, heads, n, dim, seed=seed), spectrum(batch, 2, n, dim, seed=seed + 1)
    return q.float(), k.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_rank_ranks_as_queries_and_keys_do(dtype):
    q, k = (x.to(dtype) for x in text())
    if dtype == torch.bfloat16:  # levels that rounding cannot swap
        k = (k / k.norm(dim=-1, keepdim=True) * torch.linspace(1, 30, 300)[torch.randperm(300)][:, None]).to(dtype)
        q = q + 4 * k[:, :, -2:-1].sign().repeat_interleave(2, 1)
    core = layer_of(replace(SMALL, rank=16), q, k)
    found = offsets(core, q[:, :, -1:])
    dots = (q[:, :, -1:].unflatten(1, (2, 2)).double() @ k[:, :, None].double().mT).amax(2)[:, :, 0]
    dots[..., 0] = dots[..., -9:] = float("inf")
    best = dots.topk(40).indices.sort().values
    shared = torch.isin(found + 1000 * torch.arange(4).view(2, 2, 1), best + 1000 * torch.arange(4).view(2, 2, 1))
    assert found.shape == best.shape and float(shared.double().mean()) >= (1 if dtype == torch.float32 else 0.95)


def test_a_planted_token_is_read_at_a_small_rank():
    q, k = text(2000)
    for b in (0, 1):
        for h, at in enumerate((777, 1404)):
            k[b, h, at] = q[b, 2 * h : 2 * h + 2, -1].mean(0) * 20
    found = offsets(layer_of(SMALL, q, k), q[:, :, -1:])
    assert all(at in found[b, h] for b in (0, 1) for h, at in enumerate((777, 1404)))


def test_directions_where_no_query_looks_get_no_rank():
    q, k = torch.zeros(1, 2, 500, 16), torch.randn(1, 1, 500, 16)
    q[..., :4], k[..., 4:] = torch.randn(1, 2, 500, 4), 10 * k[..., 4:]  # the keys are large elsewhere
    core = layer_of(replace(SMALL, rank=4), q, k)
    found, best = offsets(core, q[:, :, -1:]), (q[0, :, -1] @ k[0, 0].T).amax(0)
    best[0] = best[-9:] = float("inf")
    assert torch.isin(found[0, 0], best.topk(40).indices).sum() >= 38


@given(st.data())
def test_read_are_the_first_the_recent_and_own_tokens_and_the_budget_is_kept(data):
    n, batch, n_q = data.draw(st.integers(30, 150)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    first = torch.tensor([data.draw(st.integers(0, n - 8)) for _ in range(batch)], dtype=torch.int32)
    q, k = text(n, batch)
    core = layer_of(SMALL, q, k, data.draw(st.sampled_from([0, 17, 64])), first)
    draft = torch.randn(batch, 2, n_q - 1, 16)
    if n_q > 1:  # the last token of the text is a draft's first
        core.append(draft, draft)
        core.admit()
    found = offsets(core, torch.randn(batch, 4, n_q, 16))
    for b in range(batch):
        held = n + n_q - 1 - int(first[b])
        for h in (0, 1):
            read = [i for i in found[b, h].tolist() if i >= 0] if found.shape[2] > 1 else list(range(held))
            assert read == sorted(set(read)) and len(read) == min(held, 40) or found.shape[2] == 1 and n + n_q - 1 - int(first.min()) <= 40
            assert read[0] == 0 and read[-min(held, 8 + n_q) :] == list(range(max(0, held - 8 - n_q), held))


def test_chunks_make_the_factors_of_one_piece_and_a_padded_row_those_of_the_row_alone():
    q, k = text()
    last = q[:, :, -1:]
    whole = layer_of(SMALL, q, k)
    expected = offsets(whole, last)
    for chunk in (1, 17, 100):
        cut = layer_of(SMALL, q, k, chunk)
        assert torch.equal(offsets(cut, last), expected)
        torch.testing.assert_close(cut.digest.factor[:300], whole.digest.factor[:300], rtol=1e-3, atol=1e-3)
    pad = torch.tensor([0, 120], dtype=torch.int32)
    q[1, :, :120] = k[1, :, :120] = float("nan")
    padded = layer_of(SMALL, q, k, 64, pad)
    found = offsets(padded, last)
    for b in (0, 1):
        alone = layer_of(SMALL, q[b : b + 1, :, pad[b] :], k[b : b + 1, :, pad[b] :])
        assert torch.equal(offsets(alone, last[b : b + 1])[0], found[b])


@given(st.data())
def test_every_real_query_counts_once(data):
    n, heads, group = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3]))
    first, last = (torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2)), dtype=torch.int32) for _ in range(2))
    bounds = data.draw(st.sampled_from([(None, None), (first, None), (None, last), (first, last)]))
    q, digest = torch.randn(2, heads * group, n, 8), Factors(Meter(), 4, 8, (0.0, 0.0), 2, 0.0)
    table = torch.zeros(2, heads, dtype=torch.int64)
    for _ in range(2):
        digest.observe(Queries(q, torch.zeros(q.shape[:3]), *bounds, 1.0), None, table, table)
    for b in (0, 1):
        low, high = (0 if bounds[0] is None else int(first[b])), (n if bounds[1] is None else int(last[b]))
        for h in range(heads):
            rows = q[b, h * group : (h + 1) * group, low : max(low, high)].reshape(-1, 8).double()
            torch.testing.assert_close(digest.queries[b, h].double(), 2 * gram(rows), rtol=1e-5, atol=1e-5)


def test_factors_are_solved_when_needed_and_again_when_the_text_has_doubled():
    q, k = text(170)
    core = layer_of(SMALL, q[:, :, :30], k[:, :, :30])
    solved = []
    for t in range(30, 170):
        assert offsets(core, q[:, :, t - 1 : t]).shape[2] == (1 if t <= 40 else 40)
        solved.append(int(core.digest.solved[0, 0]))
        assert bool((core.digest.factor[:t].abs().sum(1) > 0).all()) == (t > 40)
        core.append(k[:, :, t : t + 1], k[:, :, t : t + 1])
        core.admit()
        core.observe(Queries(q[:, :, t : t + 1], torch.zeros(2, 4, 1), None, None, 0.125))
    assert sorted(set(solved)) == [0, 41, 82, 164]
    for b in (0, 1):
        at = core.store.starts[b, 0]
        made = core.store.k[at : at + 170] @ core.digest.to_key[b, 0]
        begin = core.digest.starts[b, 0]
        torch.testing.assert_close(core.digest.factor[begin : begin + 170], made, rtol=1e-4, atol=1e-5)


def test_batches_forks_crops_and_evictions_keep_what_queries_taught():
    q, k = text()
    core = layer_of(SMALL, q, k, 100)
    last, meter = q[:, :, -1:], core._meter
    expected = offsets(core, last)
    fork = core.fork(Meter())
    assert torch.equal(offsets(fork, last), expected) and fork._meter.now == fork.store.n_bytes + fork.digest.n_bytes
    fork.select(torch.tensor([1, 0, 1]))
    assert torch.equal(offsets(fork, last[[1, 0, 1]]), expected[[1, 0, 1]])
    core.append(k[:, :, :7], k[:, :, :7])
    core.admit()
    core.crop(7)
    assert torch.equal(offsets(core, last), expected)
    taught = core.digest.queries.clone()
    core._follow(moved=True)  # what an eviction does
    assert core.digest.solved is None
    assert torch.equal(core.digest.queries, taught) and torch.equal(offsets(core, last), expected)
    assert meter.now == core.store.n_bytes + core.digest.n_bytes
    core.reset()
    assert meter.now == 0


def test_a_token_costs_its_factors():
    q, k = text(4000)
    core = layer_of(SMALL, q, k)
    offsets(core, q[:, :, -1:])
    digest = core.digest
    assert isinstance(digest, Factors) and digest.page_bytes() == 8 * 4
    maps = 4 * (16 * 16 * 4 + 2 * 16 * 8 * 4 + 8)
    assert 4 * 4000 * 8 * 4 + maps <= digest.n_bytes <= 1.05 * 4 * 4000 * 8 * 4 + maps


# -- models -----------------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

from test_cache import assert_close, generate, prompt  # noqa: E402
from test_transformers import FAMILIES, tiny  # noqa: E402


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Llama4", "DeepseekV3", "Mistral")])
def test_every_family_is_dense_within_the_budget(family):
    model, (ids, mask) = tiny(family), prompt()
    expected, logits = generate(model, None, ids, mask)
    with torch.no_grad(), sparse_attn.patch(model, prefill="dense"):
        found, mine = generate(model, kvcache.LRQKCache(model, 400, rank=4, dense_layers=()), ids, mask, prefill_chunk_size=32)
    assert torch.equal(found, expected)
    assert_close(mine, logits)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(rank=0), "rank=0 must be a whole number, 1 or more"),
    (dict(budget=50), "budget=50 leaves no page to choose, since 66 tokens are read in any case"),
    (dict(query_weight=-1.0), "query_weight=-1.0 must be a number, 0 or more"),
    (dict(max_iter=1.5), "max_iter=1.5 must be a whole number, 0 or more"),
    (dict(dense_layers=(-1,)), "dense_layers has -1"),
    (dict(page=16), "lrqk has no entry 'page'"),
])
def test_bad_settings_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ContractError, match=sentence):
        kvcache.make_cache(tiny("Llama"), decode="lrqk", **arguments)


def test_a_rank_above_the_channels_is_told_in_a_sentence():
    model, (ids, mask) = tiny("Llama"), prompt()
    cache = kvcache.LRQKCache(model, 100, rank=17, dense_layers=())
    with torch.no_grad(), sparse_attn.patch(model, prefill="dense"), pytest.raises(ContractError, match="rank=17 is more than the 16 channels"):
        generate(model, cache, ids, mask)


@pytest.mark.parametrize("chunk", [None, 30])
@pytest.mark.parametrize("tiers", [("device", "host"), ("device", "disk")], ids=str)
def test_where_tokens_lie_changes_nothing(tiers, chunk):
    model, (ids, mask) = tiny("Llama"), prompt()
    settings = dict(decode="lrqk", budget=24, rank=6, recent=8, dense_layers=())
    with torch.no_grad(), sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, kvcache.make_cache(model, **settings), ids, mask, prefill_chunk_size=chunk)[1]
        cache = kvcache.make_cache(model, **settings, tiers=tiers)
        assert_close(generate(model, cache, ids, mask, prefill_chunk_size=chunk)[1], expected)
    assert sum(cache.report().tiers.values()) > 0
