"""Closed-form patterns against the rules of their papers, token by token or block by block in plain Python."""

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from oracle import plan_mask
from rows import randn

import sparse_attn
from sparse_attn import SparseAttnConfig, XAttention
from sparse_attn.config import as_selector
from sparse_attn.errors import ContractError, NotServed
from sparse_attn.patterns import PATTERNS, AShape, BigBird, BlockRank, Duo, Neighborhood, TriangleMix, TriShape
from sparse_attn.types import LayerContext, ResidentKV

# heads, key heads, queries, keys
SHAPES = [(1, 1, 130, 130), (4, 1, 80, 80), (4, 2, 64, 133), (8, 2, 17, 90), (2, 2, 1, 90)]
every_shape = pytest.mark.parametrize(("heads", "kv_heads", "n_q", "n_k"), SHAPES)


def read(selector, heads: int, kv_heads: int, n_q: int, n_k: int, window: int = 0, batch: int = 1, first=None, last=None, **known):
    """bool ``[B, H, Nq, Nk]`` of what a selector reads for the last ``n_q`` of ``n_k`` tokens."""
    q, k = randn(batch, heads, n_q, 16, torch.float32, "plain", 0), randn(batch, kv_heads, n_k, 16, torch.float32, "plain", 1)
    context = dict(scale=0.25, q_start=n_k - n_q, causal=True, window=window, first=first, last=last)
    plan = selector.select(q, ResidentKV(k, k), LayerContext(**{"layer": 1, "n_layers": 4} | context | known))
    return plan_mask(dict(q=q, k=k, **context), plan)


def by_rule(rule, heads: int, n_q: int, n_k: int) -> torch.Tensor:
    """bool ``[1, H, Nq, Nk]`` from ``rule(head, t, p)`` for p <= t."""
    rows = range(n_k - n_q, n_k)
    return torch.tensor([[[[p <= t and bool(rule(h, t, p)) for p in range(n_k)] for t in rows] for h in range(heads)]])


@every_shape
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (7, 40), (64, 64), (5000, 3), (3, 5000)])
def test_a_shape_is_exact_to_the_token(heads, kv_heads, n_q, n_k, sink, recent):
    want = by_rule(lambda h, t, p: t - p < recent or p < sink, heads, n_q, n_k)
    assert torch.equal(read(AShape(sink, recent, block=32), heads, kv_heads, n_q, n_k), want)
    windowed = by_rule(lambda h, t, p: t - p < 50 and (t - p < recent or p < sink), heads, n_q, n_k)
    assert torch.equal(read(AShape(sink, recent), heads, kv_heads, n_q, n_k, window=50), windowed)


@every_shape
def test_tri_shape_ends_in_dense_rows(heads, kv_heads, n_q, n_k):
    want = by_rule(lambda h, t, p: t - p < 20 or p < 6 or t >= n_k - 25, heads, n_q, n_k)
    assert torch.equal(read(TriShape(6, 20, 25, block=32), heads, kv_heads, n_q, n_k), want)


def test_triangle_mix_turns_at_half_of_the_layers():
    shape = (2, 1, 90, 90)
    triangle = by_rule(lambda h, t, p: t - p < 20 or p < 6 or t >= 90 - 25, 2, 90, 90)
    everything = by_rule(lambda h, t, p: True, 2, 90, 90)
    cases = [(4, 1, None, False), (4, 2, None, True), (5, 2, None, True), (4, 1, 1, True), (0, 3, 4, False)]
    for n_layers, layer, start, deep in cases:
        got = read(TriangleMix(6, 20, 25, start), *shape, layer=layer, n_layers=n_layers)
        assert torch.equal(got, triangle if deep else everything), (n_layers, layer, start)
    early = TriangleMix(6, 20, 25, early=AShape(0, 1))
    assert torch.equal(read(early, *shape, layer=0), by_rule(lambda h, t, p: t == p, 2, 90, 90))
    with pytest.raises(NotServed, match="needs the number of layers"):
        read(TriangleMix(), *shape, n_layers=0)


def test_defaults_are_those_of_the_papers():
    assert (AShape().sink_tokens, AShape().recent_tokens) == (128, 3968)
    assert (TriShape().sink_tokens, TriShape().recent_tokens, TriShape().dense_rows) == (128, 3968, 100)
    assert (TriangleMix().sink_tokens, TriangleMix().recent_tokens, TriangleMix().dense_rows) == (8, 512, 128)
    assert (Duo().sink_tokens, Duo().recent_tokens) == (64, 256)


def test_a_selector_inside_a_selector_has_a_json_form():
    config = SparseAttnConfig(TriangleMix(early=XAttention(threshold=((0.5, 1.0),))))
    written = json.loads(json.dumps(config.to_json()))
    assert written["prefill"]["early"]["name"] == "xattention" and SparseAttnConfig.from_json(written) == config
    assert as_selector({"name": "triangle_mix", "early": "a_shape"}).early == AShape()
    with pytest.raises(ContractError, match="'a_shap': no such method"):
        as_selector({"name": "triangle_mix", "early": "a_shap"})


# -- DuoAttention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2)])
def test_duo_streams_the_heads_that_do_not_retrieve(heads, kv_heads):
    table = ((True, True), (False, True), (True, False))
    for layer in range(3):
        want = by_rule(lambda h, t, p: table[layer][h * kv_heads // heads] or t - p < 15 or p < 4, heads, 70, 100)
        assert torch.equal(read(Duo(table, None, 4, 15, block=32), heads, kv_heads, 70, 100, layer=layer), want)


def streams(gates: list[list[float]], sparsity: float) -> list[list[bool]]:
    """Heads at or below the quantile, by numpy's definition of it, equal gates told apart by a falling whiff of index."""
    flat = [gate - 1e-9 * i for i, gate in enumerate(g for row in gates for g in row)]
    cut = torch.tensor(flat, dtype=torch.float64).quantile(sparsity).item()
    cut = {0: -1.0, 1: 2.0}.get(sparsity, cut)
    below = iter([gate <= cut for gate in flat])
    return [[next(below) for _ in row] for row in gates]


@pytest.mark.parametrize("sparsity", [0, 0.05, 0.25, 0.5, 0.62, 0.75, 1])
def test_duo_binarises_gates_at_the_quantile(sparsity):
    picked = random.Random(3)
    gates = [[round(picked.random(), 1) for _ in range(4)] for _ in range(3)]  # one decimal: many are equal
    assert len({g for row in gates for g in row}) < 12
    for layer, row in enumerate(streams(gates, sparsity)):
        got = read(Duo(gates, sparsity, 0, 1), 4, 4, 40, 40, layer=layer)
        assert [bool(got[0, h, -1, 0]) for h in range(4)] == [not s for s in row]


@pytest.mark.parametrize(("fields", "sentence"), [
    (dict(retrieval=((0.5, 0.1),)), "give sparsity"), (dict(retrieval=((True,),), sparsity=0.5), "sparsity would have no effect"),
    (dict(retrieval=((True, 0.5),)), "only True and False, or only finite numbers"), (dict(retrieval=((),)), "must be a table"),
    (dict(retrieval=((float("nan"),),), sparsity=0.5), "only finite numbers"), (dict(retrieval=((0.5,),), sparsity=2), "outside"),
    (dict(retrieval=0.5, sparsity=0.5), "must be a table"), (dict(recent_tokens=0), "recent_tokens=0 leaves queries"),
])  # fmt: skip
def test_a_bad_duo_table_gets_a_sentence(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        Duo(**fields)


def test_a_duo_table_that_does_not_fit_gets_a_sentence():
    with pytest.raises(ContractError, match="2 heads in layer 1 but the layer has 4 key heads"):
        read(Duo(((True, False),) * 2), 4, 4, 9, 9)
    with pytest.raises(ContractError, match="retrieval has 1 layers but layer 1 asked"):
        read(Duo(((True, False),)), 2, 2, 9, 9)
    with pytest.raises(NotServed, match="needs a table of retrieval heads"):
        read(Duo(), 2, 2, 9, 9)


# -- neighborhood and BigBird ---------------------------------------------------------------------------------------------


@every_shape
def test_a_neighborhood_looks_back_over_its_window(heads, kv_heads, n_q, n_k):
    assert torch.equal(read(Neighborhood(17), heads, kv_heads, n_q, n_k), by_rule(lambda h, t, p: t - p < 17, heads, n_q, n_k))


@every_shape
@pytest.mark.parametrize(("window", "dilation"), [(33, 2), (16, 3), (64, 2)])
def test_a_dilated_neighborhood_steps_over_blocks(heads, kv_heads, n_q, n_k, window, dilation):
    def rule(h, t, p):
        i = (t - (n_k - n_q)) // 16  # query block, counted from the first query
        low, high = n_k - n_q + 16 * i, min(n_k - n_q + 16 * i + 15, n_k - 1)
        steps = range(-(-window // 16))
        return any(p // 16 == own - dilation * s for own in (low // 16, high // 16) for s in steps)

    assert torch.equal(read(Neighborhood(window, dilation, block=16), heads, kv_heads, n_q, n_k), by_rule(rule, heads, n_q, n_k))


def mixed(x: int) -> int:
    """One splitmix64 step, in whole numbers."""
    most = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & most
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & most
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & most
    return x ^ (x >> 31)


@functools.cache
def drawn(seed: int, layer: int, head: int, own: int, candidates: tuple[int, ...], count: int) -> list[int]:
    ranked = []
    for block in candidates:
        x = 0
        for part in (seed, layer, head, own, block):
            x = mixed(x ^ part)
        ranked.append((-(x >> 40), block))
    return [block for _, block in sorted(ranked)[:count]]


@every_shape
def test_bigbird_reads_the_window_the_first_blocks_and_its_draw(heads, kv_heads, n_q, n_k):
    block, sink, recent, count, seed, layer = 16, 1, 2, 3, 5, 1

    def rule(h, t, p):
        low = n_k - n_q + (t - n_k + n_q) // block * block
        high, own = min(low + block, n_k) - 1, low // block
        forced = [j for j in range(high // block + 1) if j < sink or j > own - recent]
        others = [j for j in range(high // block + 1) if j not in forced]
        return p // block in forced + drawn(seed, layer, h * kv_heads // heads, own, tuple(others), count)

    got = read(BigBird(sink, recent, count, seed, block), heads, kv_heads, n_q, n_k, layer=layer)
    assert torch.equal(got, by_rule(rule, heads, n_q, n_k))


def test_bigbird_draws_evenly_and_anew_per_head_layer_and_seed():
    def draw(seed=0, layer=0, head=0):
        return read(BigBird(0, 1, 4, seed, block=1), 2, 2, 200, 200, layer=layer)[0, head]

    drawn_at = draw()[100:, :100].sum(0)  # 100 queries draw 4 of 100..199 others each: 2.8 a key in the mean
    assert abs(drawn_at.double().mean() - sum(4 / t for t in range(100, 200))) < 0.3
    assert drawn_at.max() < 13 and (drawn_at > 0).sum() > 80
    draws = [draw(), draw(seed=1), draw(layer=1), draw(head=1)]
    assert all((a & b)[100:].sum() < 130 for i, a in enumerate(draws) for b in draws[:i]), "100 of them are each query's own"


# -- documents ------------------------------------------------------------------------------------------------------------


def documents(lengths: list[int], before: int = 0, after: int = 0) -> list[int]:
    return [-1] * before + [d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * after


def may_read(t: int, p: int, ids: list[int]) -> bool:
    """The paper's rule, by token."""
    return p <= t and (ids[p] == ids[t] or ids[p] == 0 or ids[t] == max(ids) or -1 in (ids[p], ids[t]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1)])
@pytest.mark.parametrize("n_q", [128, 70, 16])
def test_documents_on_block_edges_are_exact(heads, kv_heads, n_q):
    ids = documents([16, 32, 16, 48, 16])
    got = read(BlockRank(block=16), heads, kv_heads, n_q, 128, segments=torch.tensor([ids], dtype=torch.int32))
    want = by_rule(lambda h, t, p: may_read(t, p, ids), heads, n_q, 128)
    assert torch.equal(got, want) if n_q % 16 == 0 else (got | ~want).all()


def test_ragged_documents_read_their_blocks_and_no_others():
    ids = documents([21, 30, 5, 3, 50, 19])

    def rule(h, t, p):  # some token of the query's block may read some token of the key's
        rows, keys = (range(x // 16 * 16, min(x // 16 * 16 + 16, 128)) for x in (t, p))
        return any(ids[a] == ids[b] or ids[b] == 0 or ids[a] == 5 for a in rows for b in keys)

    got = read(BlockRank(block=16), 2, 1, 128, 128, segments=torch.tensor([ids], dtype=torch.int32))
    assert torch.equal(got, by_rule(rule, 2, 128, 128))
    assert (got | ~by_rule(lambda h, t, p: may_read(t, p, ids), 2, 128, 128)).all()


def test_documents_of_a_padded_row_are_those_of_the_row_alone():
    rows = [(documents([21, 30, 5, 3, 50, 19]), 0, 128), (documents([9, 40, 30], 37, 12), 37, 116), (documents([9, 40, 30]), 0, 79)]
    padded = torch.tensor([ids + [-1] * (128 - len(ids)) for ids, _, _ in rows], dtype=torch.int32)
    first, last = (torch.tensor([row[i] for row in rows], dtype=torch.int32) for i in (1, 2))
    together = read(BlockRank(block=16), 2, 1, 128, 128, batch=3, first=first, last=last, segments=padded)
    for b, (ids, f, e) in enumerate(rows):
        alone = read(BlockRank(block=16), 2, 1, e - f, e - f, segments=torch.tensor([ids[f:e]], dtype=torch.int32))
        assert torch.equal(together[b, :, f:e, f:e], alone[0])


def test_tokens_of_no_document_read_and_are_read_by_everything():
    ids = documents([16, 16]) + [-1] * 16 + [2] * 32 + [3] * 16
    got = read(BlockRank(block=16), 1, 1, 96, 96, segments=torch.tensor([ids], dtype=torch.int32))
    assert torch.equal(got, by_rule(lambda h, t, p: may_read(t, p, ids), 1, 96, 96))


def test_chunks_read_what_the_whole_prompt_reads_when_its_end_is_known():
    ids = torch.tensor([documents([16, 32, 16, 48, 16])], dtype=torch.int32)
    whole = read(BlockRank(block=16), 1, 1, 128, 128, segments=ids)
    for start in (0, 48, 96):
        end = min(start + 48, 128)
        got = read(BlockRank(block=16), 1, 1, end - start, end, segments=ids)
        assert torch.equal(got, whole[:, :, start:end, :end])


def test_missing_and_short_segments_get_a_sentence():
    with pytest.raises(NotServed, match="needs to know the documents"):
        read(BlockRank(), 1, 1, 20, 20)
    for ids in (torch.zeros(1, 19, dtype=torch.int32), torch.zeros(2, 20, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)):
        with pytest.raises(ContractError, match=r"segment ids \[.*\] do not cover the prompt; give one for each of 1 x 20 tokens"):
            read(BlockRank(), 1, 1, 20, 20, segments=ids)


# -- all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [AShape(), TriShape(), TriangleMix(start_layer=0), Duo(((True,),) * 2), Neighborhood(),
                                      Neighborhood(dilation=2), BigBird()], ids=repr)
def test_a_position_needs_causality(selector):
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(NotServed, match="needs causal attention"):
        selector.select(q, ResidentKV(q, q), LayerContext(1, 0.5, 0, causal=False))


@pytest.mark.parametrize(("cls", "field", "sentence"), [
    (AShape, dict(sink_tokens=-1), "sink_tokens=-1"), (AShape, dict(recent_tokens=2**31), "recent_tokens=2147483648"),
    (AShape, dict(block=0), "block=0 must be positive"), (TriShape, dict(dense_rows=-1), "dense_rows=-1 is negative"),
    (TriangleMix, dict(start_layer=-1), "start_layer=-1"), (TriangleMix, dict(early="dense"), "early='dense' is not a selector"),
    (TriangleMix, dict(dense_rows=-1), "dense_rows=-1"), (Neighborhood, dict(window=0), "window=0 leaves queries"),
    (Neighborhood, dict(dilation=0), "dilation=0 must be 1 or more"), (BigBird, dict(recent=0), "recent=0 leaves queries"),
    (BigBird, dict(sink=-1), "sink=-1"), (BigBird, dict(random=-1), "random=-1"), (BigBird, dict(seed=-1), "seed=-1"),
    (BigBird, dict(block=0), "block=0"), (BlockRank, dict(block=0), "block=0"),
])  # fmt: skip
def test_bad_fields_get_a_sentence(cls, field, sentence):
    with pytest.raises(ContractError, match=sentence):
        cls(**field)


def test_the_table_of_patterns_names_every_pattern():
    table = (Path(sparse_attn.__file__).parent / "patterns" / "README.md").read_text()
    assert [name for name in PATTERNS if f"| `{name}` |" not in table] == []
