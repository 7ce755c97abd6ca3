"""Every pattern, one row each: what must hold for all of them, and what each declares about itself."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch, attention, attention_mask, plan_mask, real_queries
from rows import attention_cases, randn

from sparse_attn.attention import sparse_attention
from sparse_attn.errors import ContractError
from sparse_attn.patterns import (
    PATTERNS, PBS, AShape, Auto, BigBird, BlockRank, BlockTopK, Chorus, CritiPrefill, Dense, Duo, FlexPrefill, MInference,
    MoBA, Neighborhood, Prism, ProxyAttn, SampleAttention, SpargeAttn, TriangleMix, TriShape, VerticalSlash, VMoBA, XAttention,
)  # fmt: skip
from sparse_attn.types import LayerContext, ReadPlan, ResidentKV, Selector, dense_index


@dataclass(frozen=True)
class PatternRow:
    """What a pattern declares: its densest form, how sparse it is on random and on planted input, and what it may do."""

    selector: Selector
    everything: Selector | None  # the same pattern asked to read all of it; None if it has no such form
    max_density: float  # on a planted needle in 4,096 random tokens
    finds_needle: bool  # with the needle's question at the very end
    reads_itself: bool = True  # every query reads its own key
    looks_ahead: bool = False  # what early queries read depends on later ones: a probe, or a budget shared by all query blocks
    segments: bool = False  # needs to be told where documents begin


ROWS = [
    PatternRow(Dense(), Dense(), 1.0, True),
    # closed forms
    PatternRow(AShape(sink_tokens=20, recent_tokens=70, block=64), AShape(recent_tokens=9999), 0.13, False),
    PatternRow(BigBird(sink=1, recent=2, random=2, block=64), BigBird(random=9999), 0.15, False),
    PatternRow(BlockRank(block=64), None, 0.19, True, looks_ahead=True, segments=True),
    PatternRow(Duo(((False,),) * 4, sink_tokens=20, recent_tokens=70, block=64), Duo(((0.5,),) * 4, sparsity=0.0), 0.13, False),
    PatternRow(Neighborhood(window=70, block=64), Neighborhood(window=9999), 0.10, False),
    PatternRow(Neighborhood(window=128, dilation=3, block=32), None, 0.07, False),
    PatternRow(TriShape(20, 70, 40, block=64), TriShape(20, 70, 9999), 0.14, True, looks_ahead=True),
    PatternRow(TriangleMix(20, 70, 40, block=64), TriangleMix(start_layer=3), 0.14, True, looks_ahead=True),
    # block scores
    PatternRow(BlockTopK(top_k=4), BlockTopK(top_k=999), 0.13, True),
    PatternRow(BlockTopK(top_k=2, block=32, sink=0, recent=0), BlockTopK(top_k=999, block=32), 0.04, True, reads_itself=False),
    *(
        PatternRow(BlockTopK(top_k=4, block=32, gqa=g), BlockTopK(top_k=999, gqa=g), 0.07, True)
        for g in ("sum", "union", "vote", "shared")
    ),
    *(
        PatternRow(CritiPrefill(budget=budget, segment=16, block=16, dense_below=below, fusion=fusion),
                   CritiPrefill(budget=9999, segment=16, block=16), 0.05, True, looks_ahead=True)
        for below, fusion, budget in ((0, 0.25, 32), (40, 0.0, 64))
    ),  # the last segment is dense: what a query reads depends on whether others follow
    PatternRow(MoBA(top_k=2, block_q=16, block_k=64), MoBA(top_k=999, block_q=64, block_k=64), 0.39, True),
    PatternRow(MoBA(top_k=2, block_q=8, block_k=128, gqa="sum"), MoBA(top_k=999, block_k=256, gqa="sum"), 0.45, True),
    *(
        PatternRow(PBS(threshold=0.5, block=b, segment=2 * b, gqa=g), PBS(threshold=1.0, block=b, segment=4 * b, gqa=g), 0.58,
                   True, looks_ahead=True)
        for b, g in ((64, "per_head"), (32, "sum"))
    ),
    *(
        PatternRow(Prism(threshold=0.5, block=64, gqa=g), Prism(threshold=1.0, block=64, gqa=g), 0.73, True, looks_ahead=True)
        for g in ("per_head", "union")
    ),
    *(
        PatternRow(SpargeAttn(**fields), SpargeAttn(threshold=1.0), 0.64, True, looks_ahead=fields.get("smooth_k", True))
        for fields in (
            dict(threshold=0.5, similarity=0.007),
            dict(density=0.3, similarity=-1.0, block_q=64, smooth_k=False, pv_threshold=34.7),
            dict(threshold=0.5, similarity=0.014, block_q=64, smooth_k=False, gqa="vote"),
        )
    ),
    *(
        PatternRow(VMoBA(block=64, scope=s), VMoBA(threshold=1.0, block=64, scope=s), 0.22, True, looks_ahead=s != "block")
        for s in ("block", "head", "all")
    ),
    PatternRow(VMoBA(top_k=3, block=32), VMoBA(top_k=999, block=64), 0.05, True),
    *(
        PatternRow(XAttention(threshold=0.5, stride=s, block=64), XAttention(threshold=1.0, stride=s, block=64), 0.55, True)
        for s in (4, 8, 16)
    ),
    PatternRow(XAttention(top_k=4, stride=8, block=64, alternate=True), XAttention(top_k=999, stride=8, block=64), 0.13, True),
    *(
        PatternRow(XAttention(threshold=0.5, block=64, gqa=g), XAttention(threshold=1.0, block=64, gqa=g), 0.55, True)
        for g in ("sum", "union", "vote", "shared")
    ),
    # probes
    PatternRow(FlexPrefill(0.5, gate=0.0, min_budget=128, block=64), FlexPrefill(1.0, gate=0.0, block=64), 0.14, True, looks_ahead=True),
    PatternRow(FlexPrefill(0.5, gate=1.0, min_budget=0, block=64), FlexPrefill(1.0, gate=1.0, block=64), 0.31, False, looks_ahead=True),
    PatternRow(ProxyAttn(0.5, min_budget=192, block=64), ProxyAttn(1.0, block=64), 0.1, False, looks_ahead=True),
    PatternRow(SampleAttention(0.3, 0.3, window=16, block=64), SampleAttention(1.0, 1.0, block=64), 0.38, True, looks_ahead=True),
    PatternRow(VerticalSlash(64, 100), VerticalSlash(slash=9999), 0.15, True, looks_ahead=True),
    PatternRow(VerticalSlash(64, 100, probe="last", promote=0.0), VerticalSlash(slash=9999, promote=0.0), 0.12, True, looks_ahead=True),
    # mixtures
    PatternRow(Auto(XAttention(threshold=0.5, block=64), far_from=100), Auto(XAttention(threshold=1.0, block=64)), 0.55, True),
    PatternRow(Chorus(threshold=0.2, stride=8, block=32), Chorus(threshold=1.0, block=32), 0.36, True, looks_ahead=True),
    PatternRow(MInference({"name": "vertical_slash", "vertical": 64, "slash": 100}), MInference({"name": "vertical_slash", "slash": 9999}),
               0.15, True, looks_ahead=True),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row.selector)[:60])


def context(case: dict, row: PatternRow | None = None) -> LayerContext:
    names = ("scale", "q_start", "causal", "window", "softcap", "first", "last", "sinks")
    segments = None
    if row is not None and row.segments:  # documents of 100 tokens
        segments = (torch.arange(case["k"].shape[2], dtype=torch.int32) // 100).expand(case["k"].shape[0], -1)
    return LayerContext(layer=2, n_layers=4, carry={}, segments=segments, **{name: case[name] for name in names})


def attend(case: dict, selector: Selector, row: PatternRow | None = None):
    return sparse_attention(case["q"], ResidentKV(case["k"], case["v"]), context(case, row), selector)


def plant(tokens: int, at: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q and k ``[1, 1, tokens, 256]`` whose last ``length`` queries copy the keys from ``at`` on."""
    q, k = (randn(1, 1, tokens, 256, torch.float32, "plain", s) for s in (seed, seed + 1))
    q[:, :, -length:] = 3 * k[:, :, at : at + length]
    return q, k


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_start: int = 0) -> dict:
    """A causal case without window, padding or sinks."""
    return dict(q=q, k=k, v=v, scale=q.shape[3] ** -0.5, q_start=q_start, causal=True, window=0, softcap=0.0, first=None, last=None,
                sinks=None)


def at_the_end(case: dict) -> dict:
    """The same case, causal, its queries being the last tokens."""
    return {**case, "causal": True, "q_start": case["k"].shape[2] - case["q"].shape[2]}


def test_every_pattern_has_a_row():
    assert {type(row.selector) for row in ROWS} == set(PATTERNS.values())


@every_row
@given(case=attention_cases())
def test_reading_everything_equals_dense(row, case):
    if row.everything is None:
        return
    index = dense_index(case["q"], ResidentKV(case["k"], case["v"]), context(case), (case["block_q"], case["block_k"]))
    seen = attention_mask(case, index.counts, index.indices)
    truth, _ = attention(case, seen)
    by_torch, _ = attention(case, seen, case["q"].dtype)
    got = attend(case, row.everything, row)
    assert_as_good_as_torch(got.out, by_torch, truth)
    assert got.plan.blocks is None or got.plan.blocks.n_reachable() == 0 or got.plan.density() == 1.0


@every_row
@given(case=attention_cases())
def test_what_is_computed_is_what_the_plan_says(row, case):
    got = attend(case, row.selector, row)
    seen = plan_mask(case, got.plan)
    truth, _ = attention(case, seen)
    by_torch, _ = attention(case, seen, case["q"].dtype)
    assert_as_good_as_torch(got.out, by_torch, truth)
    if row.reads_itself and case["causal"]:
        itself = torch.arange(case["k"].shape[2]) == case["q_start"] + torch.arange(case["q"].shape[2])[:, None]
        assert (seen & itself).any(-1)[real_queries(case)[:, None].expand(seen.shape[:3])].all()


@every_row
@given(case=attention_cases(), data=st.data())
def test_a_future_token_changes_nothing_before_its_own_query_block(row, case, data):
    case = {**at_the_end(case), "first": None, "last": None}
    before = attend(case, row.selector, row)
    p = data.draw(st.integers(0, case["k"].shape[2] - 1))
    changed = {**case, **{name: case[name].clone() for name in "kv"}}
    changed["k"][:, :, p], changed["v"][:, :, p] = 3.0, 100.0
    selector = row.selector
    if row.looks_ahead:  # then the plan may change; under the same plan nothing may
        selector = Fixed(before.plan)
    after = attend(changed, selector, row)
    edge = before.plan.blocks.block[0] if before.plan.blocks else 1
    untouched = max(0, p - case["q_start"]) // edge * edge  # later rows of p's own block share its list
    assert torch.equal(before.out[:, :, :untouched], after.out[:, :, :untouched])


@dataclass(frozen=True)
class Fixed:
    """A plan made earlier."""

    plan: ReadPlan

    def select(self, q, kv, ctx):
        return self.plan


@every_row
@given(case=attention_cases())
def test_a_padded_row_equals_the_row_alone(row, case):
    batch, _, n_q, _ = case["q"].shape
    n_k = case["k"].shape[2]
    if not case["causal"] or case["q_start"] + n_q != n_k or case["first"] is None or row.segments:
        return
    together = attend(case, row.selector, row).out
    for b in range(batch):
        f, e = int(case["first"][b]), int(case["last"][b])
        r0, r1 = max(0, f - case["q_start"]), max(0, e - case["q_start"])
        if r0 >= r1:
            assert (together[b] == 0).all()
            continue
        alone = {**case, "first": None, "last": None, "q_start": case["q_start"] + r0 - f, "q": case["q"][b : b + 1, :, r0:r1],
                 "k": case["k"][b : b + 1, :, f:e], "v": case["v"][b : b + 1, :, f:e]}
        assert torch.equal(together[b : b + 1, :, r0:r1], attend(alone, row.selector, row).out)


@every_row
def test_chunks_of_whole_blocks_equal_one_shot(row):
    if row.looks_ahead:
        return
    q, k, v = (randn(2, h, 512, 64, torch.float32, "tokens_first", i) for i, h in enumerate((4, 2, 2)))
    whole = attend(plain(q, k, v), row.selector, row).out
    for start in range(0, 512, 192):
        end = min(start + 192, 512)
        chunk = plain(q[:, :, start:end], k[:, :, :end], v[:, :, :end], start)
        torch.testing.assert_close(attend(chunk, row.selector, row).out, whole[:, :, start:end], atol=2e-6, rtol=1e-5)


@every_row
def test_a_planted_needle_is_read(row):
    tokens, found, densities = 4096, [], []
    for seed, at in enumerate((301, 1111, 2003, 3333)):
        q, k = plant(tokens, at, 32, 10 * seed)
        plan = attend(plain(q, k, k), row.selector, row).plan
        densities.append(plan.density())
        last = plain(q[:, :, -1:], k, k, tokens - 1)
        found.append(bool(plan_mask(last, last_row(plan))[0, 0, 0, at + 31]))
    assert all(found) == row.finds_needle
    assert sum(densities) / len(densities) <= row.max_density


def last_row(plan: ReadPlan) -> ReadPlan:
    """The part of a plan that concerns the last query alone."""
    if plan.blocks is None:
        return plan
    blocks = replace(plan.blocks, counts=plan.blocks.counts[:, :, -1:], indices=plan.blocks.indices[:, :, -1:], n_q=1,
                     q_start=plan.blocks.n_k - 1)
    return replace(plan, blocks=blocks)


def test_an_even_distance_copy_is_invisible_to_even_strides_unless_they_alternate():
    q, k = plant(4096, 3072, 32, 0)  # distance 992: never on an antidiagonal of even stride
    case = dict(q=q, k=k, v=k, scale=0.0625, q_start=0, causal=True, window=0, softcap=0.0, first=None, last=None, sinks=None)
    block = 3072 // 64
    seen = {}
    for alternate in (False, True):
        selector = XAttention(top_k=4, stride=8, block=64, alternate=alternate)
        seen[alternate] = bool(attend(case, selector).plan.blocks.to_mask()[0, 0, -1, block])
    assert seen == {False: False, True: True}


def test_a_threshold_table_is_per_layer_and_head():
    q, k = randn(1, 2, 512, 64, torch.float32, "plain", 0), randn(1, 2, 512, 64, torch.float32, "plain", 1)
    table = XAttention(threshold=((1.0, 0.0), (0.0, 1.0)), stride=8, block=64)
    for layer, dense_head in ((0, 0), (1, 1)):
        plan = table.select(q, ResidentKV(k, k), LayerContext(layer, 0.125, 0))
        density = plan.blocks.head_density().tolist()
        assert density[dense_head] == 1.0 and density[1 - dense_head] < 0.6
    with pytest.raises(ContractError, match="threshold has 2 layers but layer 2 asked"):
        table.select(q, ResidentKV(k, k), LayerContext(2, 0.125, 0))


@pytest.mark.parametrize(("field", "sentence"), [
    (dict(threshold=1.5), "threshold=1.5 is outside"), (dict(threshold=-0.1), "outside"), (dict(stride=3), "multiple of stride=3"),
    (dict(stride=0), "stride=0 must be positive"), (dict(recent=0), "recent=0 leaves queries"), (dict(top_k=-1), "top_k=-1"),
    (dict(threshold=float("nan")), "outside"), (dict(block=0), "block=0"),
])  # fmt: skip
def test_bad_fields_get_a_sentence(field, sentence):
    with pytest.raises(ContractError) as error:
        replace(XAttention(), **field)
    assert sentence in str(error.value)
