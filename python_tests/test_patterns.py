"""Every pattern, one row each: what must hold for all of them, and what each declares about itself."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_good_as_torch, attention, attention_mask
from rows import attention_cases, randn

from sparse_attn.attention import sparse_attention
from sparse_attn.errors import ContractError
from sparse_attn.patterns import PATTERNS, Dense, XAttention
from sparse_attn.types import LayerContext, ResidentKV, Selector, dense_index


@dataclass(frozen=True)
class PatternRow:
    """What a pattern declares: its densest form, and how sparse it is on random and on planted input."""

    selector: Selector
    everything: Selector  # the same pattern asked to read all of it
    max_density: float  # on a planted needle in 4,096 random tokens
    finds_needle: bool


ROWS = [
    PatternRow(Dense(), Dense(), 1.0, True),
    *(
        PatternRow(XAttention(threshold=0.5, stride=s, block=64), XAttention(threshold=1.0, stride=s, block=64), 0.55, True)
        for s in (4, 8, 16)
    ),
    PatternRow(XAttention(top_k=4, stride=8, block=64, alternate=True), XAttention(top_k=999, stride=8, block=64), 0.13, True),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row.selector))


def context(case: dict) -> LayerContext:
    names = ("scale", "q_start", "causal", "window", "softcap", "first", "last", "sinks")
    return LayerContext(layer=0, **{name: case[name] for name in names})


def attend(case: dict, selector: Selector):
    return sparse_attention(case["q"], ResidentKV(case["k"], case["v"]), context(case), selector)


def plant(tokens: int, at: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q and k ``[1, 1, tokens, 256]`` whose last ``length`` queries copy the keys from ``at`` on."""
    q, k = (randn(1, 1, tokens, 256, torch.float32, "plain", s) for s in (seed, seed + 1))
    q[:, :, -length:] = 3 * k[:, :, at : at + length]
    return q, k


def test_every_pattern_has_a_row():
    assert {type(row.selector) for row in ROWS} == set(PATTERNS.values())


@every_row
@given(case=attention_cases())
def test_reading_everything_equals_dense(row, case):
    index = dense_index(case["q"], ResidentKV(case["k"], case["v"]), context(case), (case["block_q"], case["block_k"]))
    seen = attention_mask(case, index.counts, index.indices)
    truth, _ = attention(case, seen)
    plain, _ = attention(case, seen, case["q"].dtype)
    got = attend(case, row.everything)
    assert_as_good_as_torch(got.out, plain, truth)
    assert got.plan.blocks is None or got.plan.blocks.n_reachable() == 0 or got.plan.blocks.density() == 1.0


@every_row
@given(case=attention_cases())
def test_nothing_unreachable_is_read_and_the_own_block_always_is(row, case):
    case["causal"], case["q_start"] = True, case["k"].shape[2] - case["q"].shape[2]
    blocks = attend(case, row.selector).plan.blocks
    if blocks is None:
        return
    mask, reachable = blocks.to_mask(), blocks.reachable()
    assert not (mask & ~reachable).any()
    own = reachable & (reachable.int().flip(-1).cumsum(-1).flip(-1) == 1)  # the last reachable block of each row
    assert (mask | ~own).all()


@every_row
@given(case=attention_cases(), data=st.data())
def test_a_future_token_changes_nothing_before_its_own_query_block(row, case, data):
    case["causal"], case["first"], case["last"] = True, None, None
    case["q_start"] = case["k"].shape[2] - case["q"].shape[2]
    before = attend(case, row.selector).out
    p = data.draw(st.integers(0, case["k"].shape[2] - 1))
    changed = {**case, **{name: case[name].clone() for name in "kv"}}
    changed["k"][:, :, p], changed["v"][:, :, p] = 3.0, 100.0
    after = attend(changed, row.selector).out
    edge = getattr(row.selector, "block", 1)
    untouched = max(0, p - case["q_start"]) // edge * edge  # later rows of p's own block share its list
    assert torch.equal(before[:, :, :untouched], after[:, :, :untouched])


@every_row
@given(case=attention_cases())
def test_a_padded_row_equals_the_row_alone(row, case):
    batch, _, n_q, _ = case["q"].shape
    n_k = case["k"].shape[2]
    if not case["causal"] or case["q_start"] + n_q != n_k or case["first"] is None:
        return
    together = attend(case, row.selector).out
    for b in range(batch):
        f, e = int(case["first"][b]), int(case["last"][b])
        r0, r1 = max(0, f - case["q_start"]), max(0, e - case["q_start"])
        if r0 >= r1:
            assert (together[b] == 0).all()
            continue
        alone = {**case, "first": None, "last": None, "q_start": case["q_start"] + r0 - f, "q": case["q"][b : b + 1, :, r0:r1],
                 "k": case["k"][b : b + 1, :, f:e], "v": case["v"][b : b + 1, :, f:e]}
        assert torch.equal(together[b : b + 1, :, r0:r1], attend(alone, row.selector).out)


@every_row
def test_chunks_of_whole_blocks_equal_one_shot(row):
    q, k, v = (randn(2, h, 512, 64, torch.float32, "tokens_first", i) for i, h in enumerate((4, 2, 2)))
    case = dict(q=q, k=k, v=v, scale=0.125, q_start=0, causal=True, window=0, softcap=0.0, first=None, last=None, sinks=None)
    whole = attend(case, row.selector).out
    for start in range(0, 512, 192):
        end = min(start + 192, 512)
        chunk = {**case, "q": q[:, :, start:end], "k": k[:, :, :end], "v": v[:, :, :end], "q_start": start}
        torch.testing.assert_close(attend(chunk, row.selector).out, whole[:, :, start:end], atol=2e-6, rtol=1e-5)


@every_row
def test_a_planted_needle_is_read(row):
    tokens, found, densities = 4096, [], []
    for seed, at in enumerate((301, 1111, 2003, 3333)):
        q, k = plant(tokens, at, 32, 10 * seed)
        case = dict(q=q, k=k, v=k, scale=0.0625, q_start=0, causal=True, window=0, softcap=0.0, first=None, last=None, sinks=None)
        blocks = attend(case, row.selector).plan.blocks
        densities.append(blocks.density() if blocks else 1.0)
        edge = row.selector.block if blocks else 1
        found.append(blocks is None or bool(blocks.to_mask()[0, 0, -1, at // edge]))
    assert all(found) == row.finds_needle
    assert sum(densities) / len(densities) <= row.max_density


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
