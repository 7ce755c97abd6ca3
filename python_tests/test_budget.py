"""How many tokens each budget gives, against plain Python, and that sums are exact."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.budget import BUDGETS, Budget, DuoHeads, PerHead, Pyramid, Table, Uniform
from sparse_attn.errors import ContractError
from sparse_attn.ops import keep_top

SEEN = torch.tensor([0, 1, 7, 1000, 131072])
ONE_OF_EACH = [Uniform(8), Pyramid(8), Table((8, 8)), PerHead(8), DuoHeads(((True, False), (False, False)))]


def per_layer(budget: Budget, n_layers: int, n_seen: torch.Tensor) -> torch.Tensor:
    """int64 ``[L, B]``."""
    found = [budget.layer_tokens(layer, n_layers, n_seen) for layer in range(n_layers)]
    assert all(t.dtype == torch.int64 and t.shape == n_seen.shape for t in found)
    return torch.stack(found)


@st.composite
def ranked_runs(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranks with ties and +inf in a store with gaps of NaN."""
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    lengths = torch.tensor(draw(st.lists(st.integers(0, 30), min_size=batch * heads, max_size=batch * heads))).view(batch, heads)
    starts = ((lengths.flatten() + 2).cumsum(0) - lengths.flatten()).view(batch, heads)
    rank = torch.full((int(lengths.sum()) + 2 * batch * heads + 3,), math.nan)
    values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, -math.inf]), st.floats(-4, 4, width=32))
    protected = draw(st.integers(0, 3))
    for start, length in zip(starts.flatten().tolist(), lengths.flatten().tolist()):
        rank[start : start + length] = torch.tensor(draw(st.lists(values, min_size=length, max_size=length)))
        rank[max(start, start + length - protected) : start + length] = math.inf
    return rank, starts, lengths


@pytest.mark.parametrize("budget", ONE_OF_EACH, ids=lambda budget: type(budget).__name__)
def test_no_head_is_given_more_than_it_has(budget):
    assert isinstance(budget, Budget) and BUDGETS[next(n for n, cls in BUDGETS.items() if type(budget) is cls)]
    lengths = torch.tensor([[3, 500], [0, 12]])
    starts = torch.tensor([[0, 3], [503, 503]])
    tokens = budget.layer_tokens(0, 2, torch.tensor([500, 12]))
    counts = budget.per_head(torch.rand(515), starts, lengths, tokens, 0)
    assert counts.dtype == torch.int32 and (counts <= lengths).all() and (counts >= 0).all()


def test_uniform_gives_a_number_or_a_share():
    assert per_layer(Uniform(5), 3, SEEN).eq(5).all()
    assert per_layer(Uniform(ratio=0.29), 2, SEEN)[1].tolist() == [1, 1, 2, 290, 38011]
    counts = Uniform(5).per_head(torch.rand(30), torch.tensor([[0, 10]]), torch.tensor([[9, 4]]), torch.tensor([5]), 0)
    assert counts.tolist() == [[5, 4]]


@given(tokens=st.integers(1, 300), beta=st.integers(1, 40), base=st.integers(0, 300), n_layers=st.integers(1, 40),
       seen=st.lists(st.integers(0, 2000), min_size=1, max_size=4))
def test_a_pyramid_is_a_line_that_adds_up(tokens, beta, base, n_layers, seen):
    base = min(base, tokens)
    found = per_layer(Pyramid(tokens, beta=beta, base=base), n_layers, torch.tensor(seen))
    assert found.sum(0).tolist() == [n_layers * tokens] * len(seen)
    for n, column in zip(seen, found.T.tolist()):
        assert column == sorted(column, reverse=True)
        # spec of PyramidKV with W = base: max = 2 Bv - Bv // beta, clipped to n - W
        mean = tokens - base
        high = max(min(2 * mean - mean // beta, n - base), mean)
        low = 2 * mean - high
        for i, got in enumerate(column):
            line = base + high - Fraction((high - low) * i, n_layers - 1) if n_layers > 1 else tokens
            assert math.floor(line) <= got <= math.ceil(line) + (0 < i < n_layers - 1)
        if n_layers > 1:
            assert column[0] == base + high and column[-1] == base + low


def test_a_pyramid_of_shares_follows_the_prompt():
    found = per_layer(Pyramid(ratio=0.2, beta=4), 5, torch.tensor([100, 1000]))
    assert found.T.tolist() == [[35, 28, 20, 12, 5], [350, 275, 200, 125, 50]]


def test_a_table_is_read_as_written():
    assert per_layer(Table([3, 9, 1]), 3, SEEN).T.tolist() == [[3, 9, 1]] * len(SEEN)


def ada(ranks: list[list[float]], tokens: int, safeguard: float) -> list[int]:
    """Counts of one sequence, one token at a time."""
    counts, pool = [], []
    for h, rank in enumerate(ranks):
        best = sorted(range(len(rank)), key=lambda j: (-rank[j], j))
        sure = best[: int(safeguard * tokens)]
        counts.append(0)
        pool += [(-math.inf if j in sure else -rank[j], h, j) for j in range(len(rank))]
    for _, h, _ in sorted(pool)[: len(ranks) * tokens]:
        counts[h] += 1
    return counts


@given(runs=ranked_runs(), data=st.data(), safeguard=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_heads_share_by_rank_and_the_sum_is_exact(runs, data, safeguard):
    rank, starts, lengths = runs
    batch, heads = lengths.shape
    tokens = torch.tensor(data.draw(st.lists(st.integers(3, 20), min_size=batch, max_size=batch)))
    before = rank.clone()
    counts = PerHead(8, safeguard=safeguard).per_head(rank, starts, lengths, tokens, 0)
    assert torch.equal(rank.nan_to_num(), before.nan_to_num()), "the rank is only read"
    assert counts.dtype == torch.int32
    assert counts.sum(1).tolist() == torch.minimum(lengths.sum(1), heads * tokens).tolist()
    for b in range(batch):
        ranks = [rank[s : s + n].tolist() for s, n in zip(starts[b].tolist(), lengths[b].tolist())]
        assert counts[b].tolist() == ada(ranks, int(tokens[b]), safeguard)
    # what is protected stays
    kept = keep_top(rank, starts, lengths, counts, int(counts.max()))
    for b in range(batch):
        for h in range(heads):
            run = rank[starts[b, h] : starts[b, h] + lengths[b, h]]
            assert set(run.isposinf().nonzero()[:, 0].tolist()) <= set(kept[b, h].tolist())


def test_a_head_that_everybody_looks_at_gets_more():
    rank = torch.cat([torch.rand(100) + 1, torch.rand(100)])
    starts, lengths = torch.tensor([[0, 100]]), torch.tensor([[100, 100]])
    counts = [PerHead(40, safeguard=s).per_head(rank, starts, lengths, torch.tensor([40]), 0).tolist()[0] for s in (0.0, 0.2, 1.0)]
    assert counts == [[80, 0], [72, 8], [40, 40]]


def test_retrieval_heads_keep_everything():
    duo = DuoHeads(((True, False), (False, False)), sink=2, recent=3)
    lengths, starts = torch.tensor([[50, 50], [4, 4]]), torch.tensor([[0, 50], [100, 104]])
    for layer, want in ((0, [[50, 5], [4, 4]]), (1, [[5, 5], [4, 4]])):
        tokens = duo.layer_tokens(layer, 2, torch.tensor([50, 4]))
        counts = duo.per_head(torch.rand(108), starts, lengths, tokens, layer)
        assert counts.tolist() == want
        assert tokens.tolist() == [sum(row) // 2 for row in want]


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: Uniform(), "give either tokens or ratio"),
    (lambda: Uniform(5, 0.5), "give either tokens or ratio"),
    (lambda: Uniform(0), "tokens=0 must be a number of tokens per KV head, 1 or more"),
    (lambda: Uniform(2.5), "tokens=2.5 must be a number of tokens"),
    (lambda: Uniform(ratio=1.5), "ratio=1.5 is outside (0, 1]"),
    (lambda: Pyramid(5, beta=0), "beta=0 must be 1 or more"),
    (lambda: Pyramid(5, base=6), "base=6 is more than all 5 tokens"),
    (lambda: Pyramid(5, base=-1), "base=-1 must be a number of tokens, 0 or more"),
    (lambda: PerHead(5, safeguard=1.2), "safeguard=1.2 is outside [0, 1]"),
    (lambda: Table(()), "layers=() must list a number of tokens per layer"),
    (lambda: Table((4, -1)), "must list a number of tokens per layer, each 1 or more"),
    (lambda: Table((4, 4)).layer_tokens(0, 3, SEEN), "the table has 2 layers, the model 3"),
    (lambda: DuoHeads(()), "full must be a table [layers][kv heads] of True and False"),
    (lambda: DuoHeads(((1, 0),)), "full must be a table [layers][kv heads] of True and False"),
    (lambda: DuoHeads(((True,),), sink=-1), "sink=-1 must be a number of tokens, 0 or more"),
    (lambda: DuoHeads(((True,),), sink=0, recent=0), "nothing stays"),
    (lambda: DuoHeads(((True,),)).layer_tokens(0, 2, SEEN), "full has 1 layers but the model has 2"),
    (lambda: DuoHeads(((True,),)).per_head(SEEN.float(), SEEN[None], SEEN[None], SEEN[:1], 0), "full has 1 heads in layer 0"),
    (lambda: Uniform(20).require_room(21), "a budget of 20 tokens has no room for the 21 that always stay"),
    (lambda: PerHead(20).require_room(21), "a budget of 20 tokens has no room for the 21"),
    (lambda: Pyramid(400, beta=20).require_room(21), "a budget of 20 tokens in the highest layer has no room"),
    (lambda: Table((30, 20, 25)).require_room(21), "a budget of 20 tokens in layer 1 has no room"),
    (lambda: DuoHeads(((True,),), 10, 10).require_room(21), "a budget of 20 tokens per streaming head has no room"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)


def test_a_budget_with_room_is_accepted():
    for budget in (Uniform(20), Uniform(ratio=0.01), PerHead(20), Pyramid(400), Pyramid(30, base=20), Table((30, 20)),
                   DuoHeads(((True,),), 10, 10)):
        budget.require_room(20)
