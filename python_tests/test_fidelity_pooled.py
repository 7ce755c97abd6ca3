"""What each pattern over pooled blocks selects, against its published rule written out in plain Python floats."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from sparse_attn.errors import ContractError, NotServed
from sparse_attn.patterns import PBS, BlockTopK, CritiPrefill, MoBA, Prism, SpargeAttn, VMoBA
from sparse_attn.types import LayerContext, ReadPlan, ResidentKV


@dataclass
class Case:
    """Inputs of one call as tensors, and one head at a time as lists of rows."""

    q: torch.Tensor
    k: torch.Tensor
    causal: bool = True
    scale: float = 0.0

    def __post_init__(self):
        self.scale = self.scale or self.q.shape[3] ** -0.5
        self.heads, self.n_q, self.n_k = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        self.group = self.heads // self.k.shape[1]
        self.q_start = self.n_k - self.n_q if self.causal else 0

    def rows(self, head: int) -> tuple[list, list]:
        return self.q[0, head].tolist(), self.k[0, head // self.group].tolist()

    def plan(self, selector, layer: int = 0, carry: dict | None = None) -> ReadPlan:
        context = LayerContext(layer, self.scale, self.q_start, causal=self.causal, carry=carry)
        return selector.select(self.q, ResidentKV(self.k, self.k), context)

    def query_blocks(self, block: int) -> list:
        """(rows, position of the first, position of the last) of each query block."""
        edges = range(0, self.n_q, block)
        blocks = [range(e, min(e + block, self.n_q)) for e in edges]
        return [(rows, self.q_start + rows[0], self.q_start + rows[-1]) for rows in blocks]

    def reachable(self, end: int, block: int) -> list[int]:
        return [j for j in range(-(-self.n_k // block)) if not self.causal or j * block <= end]

    def near(self, start: int, end: int, block: int, sink: int, recent: int) -> set[int]:
        """The first blocks, and the last ones counted back from the block of position ``start``."""
        found = self.reachable(end, block)
        return {j for j in found if j < sink or recent and self.causal and j >= start // block - recent + 1}


def case(heads: int, kv_heads: int, n_q: int, n_k: int, seed: int, causal: bool = True, spread: float = 3.0) -> Case:
    """Tokens around a few shared directions, so that blocks differ, and some are much alike."""
    g, dim = torch.Generator().manual_seed(seed), 8
    topics = torch.randn(7, dim, generator=g)

    def tokens(h: int, n: int) -> torch.Tensor:
        topic = torch.randint(7, (h, -(-n // 11)), generator=g).repeat_interleave(11, 1)[:, :n]
        noise = torch.rand(h, -(-n // 11), generator=g).repeat_interleave(11, 1)[:, :n, None]
        return (topics[topic] + noise * 2 * torch.randn(h, n, dim, generator=g))[None] * spread**0.5

    return Case(tokens(heads, n_q), tokens(kv_heads, n_k), causal, 0.4)


CASES = [case(1, 1, 96, 96, 0), case(4, 1, 101, 101, 1), case(4, 2, 45, 150, 2), case(2, 2, 70, 131, 3)]
every_case = pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c.heads}x{c.k.shape[1]}-{c.n_q}-{c.n_k}")
MIXED = case(2, 1, 64, 90, 4, causal=False)
either_way = pytest.mark.parametrize("c", [*CASES, MIXED, case(2, 2, 80, 80, 5, causal=False)],
                                     ids=lambda c: f"{c.heads}x{c.k.shape[1]}-{c.n_q}-{c.n_k}-{c.causal}")


def dot(a: list, b: list) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(rows: list) -> list:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def pooled(rows: list, block: int, rule=mean) -> list:
    return [rule(rows[e : e + block]) for e in range(0, len(rows), block)]


def softmax(logits: dict) -> dict:
    top = max(logits.values(), default=0.0)
    weights = {j: math.exp(x - top) for j, x in logits.items()}
    return {j: w / math.fsum(weights.values()) for j, w in weights.items()}


def ranked(mass: dict) -> list:
    return sorted(mass, key=lambda j: (-mass[j], j))


def top_p(mass: dict, p: float, before: float = 0.0, inclusive: bool = True) -> set:
    """Largest first: kept while the sum before is below ``p`` of the total, or (exclusive) the sum with it is at most that."""
    total, kept = before + math.fsum(mass.values()), set()
    for j in ranked(mass):
        if not (before < p * total if inclusive else before + mass[j] <= p * total):
            break
        kept.add(j)
        before += mass[j]
    return kept


def listed(plan: ReadPlan, heads: int) -> list:
    """Sets of blocks, ``[H][Qb]``."""
    mask = plan.blocks.to_mask()[0]
    mask = mask.repeat_interleave(heads // mask.shape[0], 0)
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in mask]


# block_topk


@either_way
@pytest.mark.parametrize(("top_k", "sink", "recent"), [(1, 0, 0), (3, 0, 0), (3, 1, 1), (1, 1, 2), (5, 2, 1)])
def test_block_topk_keeps_the_best_pooled_products(c, top_k, sink, recent):
    got = listed(c.plan(BlockTopK(top_k=top_k, block=16, sink=sink, recent=recent)), c.heads)
    for h in range(c.heads):
        q, k = c.rows(h)
        keys = pooled(k, 16)
        for i, (rows, start, end) in enumerate(c.query_blocks(16)):
            forced = c.near(start, end, 16, sink, recent)
            query = mean([q[t] for t in rows])
            others = {j: dot(query, keys[j]) for j in c.reachable(end, 16) if j not in forced}
            assert got[h][i] == forced | set(ranked(others)[: max(0, top_k - len(forced))])


def test_block_topk_breaks_ties_to_the_lower_block():
    c = Case(torch.ones(1, 1, 96, 8), torch.ones(1, 1, 96, 8))
    assert listed(c.plan(BlockTopK(top_k=2, block=16, sink=0, recent=0)), 1)[0][4] == {0, 1}


# pbs


def pbs_order(c: Case, kv_head: int, segment: int, window: int) -> list[int]:
    received = [0.0] * c.n_k
    for h in range(kv_head * c.group, (kv_head + 1) * c.group):
        q, k = c.rows(h)
        for t in range(max(0, c.n_q - window), c.n_q):
            for p, share in softmax({p: dot(q[t], k[p]) * c.scale for p in range(c.q_start + t + 1)}).items():
                received[p] += share / c.group
    order = []
    for low in range(0, c.n_k - segment + 1, segment):
        order += sorted(range(low, low + segment), key=lambda p: (-received[p], p))
    return order + list(range(len(order), c.n_k))


@every_case
@pytest.mark.parametrize(("p", "block", "segment", "window", "sink"),
                         [(0.6, 16, 32, 16, 1), (0.9, 8, 32, 20, 0), (0.3, 16, 16, 200, 1)])  # fmt: skip
def test_pbs_sorts_inside_segments_and_covers_the_earlier_ones(c, p, block, segment, window, sink):
    plan = c.plan(PBS(threshold=p, block=block, segment=segment, window=window, sink=sink))
    got = listed(plan, c.heads)
    for h in range(c.heads):
        q, k = c.rows(h)
        order = pbs_order(c, h // c.group, segment, window)
        assert plan.order[0, h // c.group].tolist() == order
        slots = pooled(order, block, rule=list)
        keys = [mean([k[p] for p in slot]) for slot in slots]
        for i, (rows, start, end) in enumerate(c.query_blocks(block)):
            query = mean([q[t] for t in rows])
            segments = {j: j * block // segment for j in range(len(slots)) if min(slots[j]) <= end}
            own = {j for j, s in segments.items() if s >= start // segment}
            first = {j for j in segments if 0 in slots[j]} if sink else set()
            earlier = softmax({j: dot(query, keys[j]) * c.scale for j in segments if j not in own})
            assert got[h][i] == own | first | top_p(earlier, p)


def test_pbs_on_the_worked_example():
    q, k = torch.zeros(1, 1, 1000, 8), torch.randn(1, 1, 1000, 8)  # equal shares everywhere: ties stay where they are
    c = Case(q, k)
    for p, read in ((0.0, {0, 4, 5}), (0.5, {0, 1, 4, 5}), (0.51, {0, 1, 2, 4, 5}), (1.0, {0, 1, 2, 3, 4, 5})):
        plan = c.plan(PBS(threshold=p))
        assert listed(plan, 1)[0][5] == read  # two of the four earlier blocks are half of what tau is about
        assert plan.order[0, 0].tolist() == list(range(1000))
    order = Case(torch.randn(1, 1, 1000, 8), k).plan(PBS()).order[0, 0]
    assert order[768:].tolist() == list(range(768, 1000))
    for low in (0, 256, 512):
        assert sorted(order[low : low + 256].tolist()) == list(range(low, low + 256)) != order[low : low + 256].tolist()


# prism


@either_way
@pytest.mark.parametrize(("p", "high", "low"), [(0.6, 0.5, 0.75), (0.9, 0.25, 1.0)])
def test_prism_covers_each_band_with_its_own_temperature(c, p, high, low):
    got = listed(c.plan(Prism(threshold=p, block=16, high=high, low=low)), c.heads)
    dim = 8
    fast = [x for x in range(dim) if x % 4 < 4 * high]
    slow = [x for x in range(dim) if x % 4 >= 4 - 4 * low]
    assert Prism(high=high, low=low).bands(dim) == (tuple(fast), tuple(slow))

    def rms(rows: list, band: list) -> float:
        return math.sqrt(math.fsum(row[x] ** 2 for row in rows for x in band) / len(rows) / len(band))

    for h in range(c.heads):
        queries, keys = (pooled(x, 16) for x in c.rows(h))
        for i, (_, start, end) in enumerate(c.query_blocks(16)):
            read = c.near(start, end, 16, 1, 1)
            for band in (fast, slow):
                tau = math.sqrt(len(band) / dim) * math.prod(rms(x, band) / rms(x, list(range(dim))) for x in (queries, keys))
                factor = c.scale * math.sqrt(dim) / (tau * math.sqrt(len(band)))
                logits = {j: dot([queries[i][x] for x in band], [keys[j][x] for x in band]) for j in c.reachable(end, 16)}
                read |= top_p(softmax({j: factor * x for j, x in logits.items()}), p)
            assert got[h][i] == read


def test_prism_bands_of_a_usual_head():
    fast, slow = Prism().bands(128)
    assert fast == (*range(32), *range(64, 96)) and slow == (*range(16, 64), *range(80, 128))


def test_prism_finds_a_needle_in_fast_channels_that_the_plain_mean_does_not():
    # the fast pair turns within a block and nearly cancels; what is left of it points at block 2, the slow channels at block 0
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    q[..., 48:, 0], k[..., 32:48, 0] = 0.1, 0.1
    q[..., 48:, 3], k[..., 0:16, 3] = 2.0, 2.0
    c = Case(q, k)
    assert listed(c.plan(BlockTopK(top_k=1, block=16, sink=0, recent=0)), 1)[0][3] == {0}
    assert 2 in listed(c.plan(Prism(threshold=0.3, block=16, high=0.25, low=0.75, sink=0)), 1)[0][3]


# spargeattn


def self_similarity(rows: list) -> float:
    return math.fsum(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a in rows for b in rows) / len(rows) ** 2


@either_way
@pytest.mark.parametrize(("fields", "p", "density"), [
    (dict(threshold=0.7, similarity=0.3), 0.7, 0), (dict(threshold=0.3, similarity=-1.0), 0.3, 0),
    (dict(threshold=0.05, similarity=0.5, smooth_k=False, sink=0, recent=0), 0.05, 0),
    (dict(density=0.3, similarity=0.3, sink=0, recent=0), 1, 0.3), (dict(density=0.5, similarity=-1.0, smooth_k=False), 1, 0.5),
])  # fmt: skip
def test_spargeattn_reads_what_has_no_common_direction_and_covers_the_rest(c, fields, p, density):
    selector = SpargeAttn(block_q=16, block_k=8, **fields)
    got, mixed = listed(c.plan(selector), c.heads), 0
    for h in range(c.heads):
        q, k = c.rows(h)
        middle = mean(k) if selector.smooth_k else [0.0] * 8
        moved = [[x - m for x, m in zip(row, middle, strict=True)] for row in k]
        alike = [x > selector.similarity for x in pooled(moved, 8, self_similarity)]
        keys = pooled(k, 8)
        for i, (rows, start, end) in enumerate(c.query_blocks(16)):
            found = c.reachable(end, 8)
            block = [q[t] for t in rows]
            mass = softmax({j: dot(mean(block), keys[j]) * c.scale for j in found if alike[j]})
            if density:
                kept = set(ranked(mass)[: max(1, int(density * len(found)))])
            else:
                kept = top_p(mass, p, inclusive=False) | set(ranked(mass)[:1])
            if self_similarity(block) <= selector.similarity:
                kept = set(found)
            assert got[h][i] == kept | {j for j in found if not alike[j]} | c.near(start, end, 8, selector.sink, selector.recent)
            mixed += bool(mass) and len(mass) < len(found)
    assert mixed or selector.similarity < 0


def worked_row() -> Case:
    """One query over four keys, each its own block, with shares .4, .1, .3, .2."""
    return Case(torch.tensor([4.0, 1.0, 3.0, 2.0]).log().view(1, 1, 1, 4), torch.eye(4)[None, None], scale=1.0)


def test_spargeattn_on_the_worked_row():
    for p, read in ((0.75, {0, 2}), (0.3, {0}), (1.0, {0, 1, 2, 3})):
        assert listed(worked_row().plan(SpargeAttn(threshold=p, block_q=1, block_k=1, sink=0, recent=0)), 1)[0][0] == read


def test_what_all_keys_share_matters_to_spargeattn_only_unsmoothed():
    c = CASES[1]
    moved = replace(c, k=c.k + 5)
    smooth, rough = (SpargeAttn(0.5, similarity=0.3, block_q=16, block_k=8, smooth_k=smooth) for smooth in (True, False))
    assert listed(c.plan(smooth), 4) == listed(moved.plan(smooth), 4)
    assert listed(c.plan(rough), 4) != listed(moved.plan(rough), 4)


def test_spargeattn_counts_pv_threshold_in_nats():
    assert CASES[0].plan(SpargeAttn(pv_threshold=34.7)).pv_threshold == 34.7


# critiprefill


def criti_share(c: Case, kv_head: int, segment: int, block: int) -> list[dict]:
    """Softmax shares of the blocks wholly before each segment."""
    keys = c.k[0, kv_head].tolist()
    bounds = pooled(keys, block, lambda rows: [[pick(column) for column in zip(*rows, strict=True)] for pick in (max, min)])
    shares = []
    for rows, start, _ in c.query_blocks(segment):
        logits = {j: 0.0 for j in range(len(bounds)) if (j + 1) * block <= start}
        for h in range(kv_head * c.group, (kv_head + 1) * c.group):
            columns = list(zip(*(c.q[0, h, t].tolist() for t in rows), strict=True))
            ends = [[max(column) for column in columns], [min(column) for column in columns]]
            for j in logits:
                logits[j] += c.scale / c.group * max(sum(dot(x, bound) for x in ends) / 2 for bound in bounds[j])
        shares.append(softmax(logits))
    return shares


def criti_blocks(c: Case, shares: list[dict], budget: int, segment: int, block: int, dense_below: int) -> list[set]:
    read = []
    for i, (_, start, end) in enumerate(c.query_blocks(segment)):
        found = set(c.reachable(end, block))
        dense = i == -(-c.n_q // segment) - 1 or start < dense_below
        own = {j for j in found if (j + 1) * block > start}
        read.append(found if dense else own | set(ranked(shares[i])[: budget // block]))
    return read


@every_case
@pytest.mark.parametrize(("budget", "segment", "block", "dense_below"), [(16, 16, 8, 0), (8, 20, 8, 75), (40, 8, 16, 0)])
def test_critiprefill_reads_a_budget_of_earlier_tokens_per_segment(c, budget, segment, block, dense_below):
    selector = CritiPrefill(budget=budget, segment=segment, block=block, fusion=0.0, dense_below=dense_below)
    got = listed(c.plan(selector), c.heads)
    for h in range(c.heads):
        shares = criti_share(c, h // c.group, segment, block)
        assert got[h] == criti_blocks(c, shares, budget, segment, block, dense_below)


def test_critiprefill_mixes_in_the_layer_before():
    layers, carry, before = [case(4, 2, 120, 120, seed, spread=1.0) for seed in (6, 7, 8)], {}, None
    selector, alone_differs = CritiPrefill(budget=16, segment=16, block=8, dense_below=0), False
    for number, c in enumerate(layers):
        fresh = [criti_share(c, g, 16, 8) for g in range(2)]
        fused = fresh
        if before:
            pairs = [zip(*both, strict=True) for both in zip(before, fresh, strict=True)]
            fused = [[{j: 0.25 * b[j] + 0.75 * s[j] for j in s} for b, s in pair] for pair in pairs]
        got = listed(c.plan(selector, layer=number + 3, carry=carry), 4)
        assert got == [criti_blocks(c, fused[h // 2], 16, 16, 8, 0) for h in range(4)]
        alone_differs |= got != [criti_blocks(c, fresh[h // 2], 16, 16, 8, 0) for h in range(4)]
        before = fused
    assert alone_differs
    alone = listed(layers[0].plan(selector, layer=3, carry={}), 4)
    for left in (carry, {"critiprefill": carry["critiprefill"]}, {"critiprefill": (3, carry["critiprefill"][1])}):
        assert listed(layers[0].plan(selector, layer=3, carry=left), 4) == alone  # a new forward ignores what is left of the old one


def test_critiprefill_fusion_is_not_served_without_an_equal_layer_before():
    c, carry = CASES[0], {}
    with pytest.raises(NotServed, match="needs what an earlier layer carries over"):
        c.plan(CritiPrefill())
    c.plan(CritiPrefill(), layer=0, carry=carry)
    with pytest.raises(NotServed, match=r"layers of equal shape, got \[1, 1, 1, 3\] in layer 0 and \[1, 1, 1, 4\] in layer 1"):
        CASES[1].plan(CritiPrefill(), layer=1, carry=carry)


# moba


@every_case
@pytest.mark.parametrize(("top_k", "block_q", "block_k"), [(1, 16, 16), (3, 1, 16), (2, 13, 24), (3, 16, 8)])
def test_moba_reads_what_any_query_of_the_block_picks(c, top_k, block_q, block_k):
    got = listed(c.plan(MoBA(top_k=top_k, block_q=block_q, block_k=block_k)), c.heads)
    for h in range(c.heads):
        q, k = c.rows(h)
        keys = pooled(k, block_k)
        for i, (rows, _, _) in enumerate(c.query_blocks(block_q)):
            read = set()
            for t in rows:
                own = (c.q_start + t) // block_k
                read |= {own, *ranked({j: dot(q[t], keys[j]) for j in range(own)})[: top_k - 1]}
            assert got[h][i] == read


# vmoba


def vmoba_own(c: Case, start: int, end: int, block: int) -> set[int]:
    return set(range(start // block, end // block + 1)) if c.causal or c.n_q == c.n_k else set()


@either_way
@pytest.mark.parametrize(("p", "top_k"), [(0.25, 0), (0.7, 0), (0.0, 0), (0.25, 1), (0.25, 4)])
@pytest.mark.parametrize("scope", ["block", "head", "all"])
def test_vmoba_covers_a_share_of_stretched_gates(c, p, top_k, scope):
    if top_k and scope != "block":
        return
    got = listed(c.plan(VMoBA(threshold=p, top_k=top_k, scope=scope, block=16)), c.heads)
    gates, own = {}, set()
    for h in range(c.heads):
        queries, keys = (pooled(x, 16) for x in c.rows(h))
        for i, (_, start, end) in enumerate(c.query_blocks(16)):
            gates |= {(h, i, j): dot(queries[i], keys[j]) for j in c.reachable(end, 16)}
            own |= {(h, i, j) for j in vmoba_own(c, start, end, 16)}
    read = set(own)
    for pool in {{"block": key[:2], "head": key[:1], "all": ()}[scope] for key in gates}:
        inside = {key: g for key, g in gates.items() if key[: len(pool)] == pool}
        low, high = min(inside.values()), max(inside.values())
        inside = {key: (g - low) / (high - low) if high > low else 1.0 for key, g in inside.items()}
        others = {key: g for key, g in inside.items() if key not in own}
        mine = math.fsum(g for key, g in inside.items() if key in own)
        read |= set(ranked(others)[: max(0, top_k - (len(inside) - len(others)))]) if top_k else top_p(others, p, before=mine)
    assert {(h, i, j) for h, head in enumerate(got) for i, row in enumerate(head) for j in row} == read


def test_vmoba_on_the_worked_row():
    c = Case(torch.tensor([4.0, 1.0, 3.0, 2.0]).view(1, 1, 1, 4), torch.eye(4)[None, None])
    for scope in ("block", "head", "all"):
        assert listed(c.plan(VMoBA(threshold=0.75, block=1, scope=scope)), 1)[0][0] == {0, 2, 3}
        assert listed(c.plan(VMoBA(threshold=0.1, block=1, scope=scope)), 1)[0][0] == {3}


def test_vmoba_ranks_equal_gates_as_equal():
    c = Case(torch.ones(1, 1, 64, 8), torch.ones(1, 1, 64, 8))
    assert listed(c.plan(VMoBA(threshold=0.5, block=16)), 1)[0][3] == {0, 3}


# what they have in common


@pytest.mark.parametrize("selector", [Prism(block=16), SpargeAttn(block_q=16, block_k=16, similarity=-1.0), VMoBA(block=16),
                                      PBS(block=16, segment=16)], ids=repr)  # fmt: skip
def test_a_threshold_table_reaches_each_layer_and_head(selector):
    table = replace(selector, threshold=[[0.1, 0.1, 1.0, 0.1], [1.0, 0.1, 0.1, 0.1]])
    for layer, dense in ((0, 2), (1, 0)):
        density = CASES[1].plan(table, layer).blocks.head_density().tolist()
        assert density[dense] == 1.0 and max(density[:dense] + density[dense + 1 :]) < 0.9


def test_a_similarity_table_reaches_each_head():
    table = SpargeAttn(density=0.1, similarity=[[1.0, -1.0, -1.0, -1.0]], block_q=16, block_k=8)
    density = CASES[1].plan(table).blocks.head_density().tolist()
    assert density[0] == 1.0 and max(density[1:]) < 0.6


@pytest.mark.parametrize("selector", [PBS(), CritiPrefill(), MoBA()], ids=repr)
def test_what_needs_positions_is_not_served_without_causality(selector):
    with pytest.raises(NotServed, match="needs causal attention"):
        MIXED.plan(selector)


@pytest.mark.parametrize(("selector", "fields", "sentence"), [
    (BlockTopK, dict(top_k=0), "top_k=0 reads nothing"), (BlockTopK, dict(block=0), "block=0 must be positive"),
    (BlockTopK, dict(sink=-1), "sink=-1 and recent=1 count blocks"), (BlockTopK, dict(gqa="any"), "gqa='any' is no policy"),
    (PBS, dict(threshold=1.1), "threshold=1.1 is outside [0, 1]"), (PBS, dict(block=0), "block=0 must be positive"),
    (PBS, dict(segment=200), "segment=200 is not a multiple of block=128"), (PBS, dict(window=0), "window=0 leaves no query"),
    (PBS, dict(sink=2), "sink=2 must be 0 or 1"), (PBS, dict(segment=0), "segment=0 is not a multiple"),
    (Prism, dict(threshold=[[0.5, -0.1]]), "threshold=-0.1 is outside"), (Prism, dict(high=0.0), "high=0.0 is outside (0, 1]"),
    (Prism, dict(low=1.5), "low=1.5 is outside"), (Prism, dict(recent=-1), "recent=-1 count"), (Prism, dict(block=0), "block=0"),
    (SpargeAttn, dict(similarity=2.0), "similarity=2.0 is outside [-1, 1]"), (SpargeAttn, dict(density=1.2), "density=1.2 is"),
    (SpargeAttn, dict(block_k=0), "block_k=0 must be positive"), (SpargeAttn, dict(pv_threshold=-1.0), "pv_threshold=-1.0 is"),
    (SpargeAttn, dict(sink=-1), "sink=-1"), (SpargeAttn, dict(threshold=float("nan")), "threshold=nan is outside"),
    (CritiPrefill, dict(budget=31), "budget=31 is less than one block=32"), (CritiPrefill, dict(segment=0), "segment=0"),
    (CritiPrefill, dict(fusion=1.0), "fusion=1.0 is outside [0, 1)"), (CritiPrefill, dict(dense_below=-1), "dense_below=-1"),
    (MoBA, dict(top_k=0), "top_k=0 leaves queries"), (MoBA, dict(block_q=0), "block_q=0"), (MoBA, dict(gqa=""), "gqa=''"),
    (VMoBA, dict(scope="chunk"), "scope='chunk' is not known; use block, head, all"), (VMoBA, dict(block=0), "block=0"),
    (VMoBA, dict(top_k=-1), "top_k=-1 is negative"), (VMoBA, dict(top_k=2, scope="all"), "top_k=2 counts blocks per query block"),
])  # fmt: skip
def test_bad_fields_get_a_sentence(selector, fields, sentence):
    with pytest.raises(ContractError) as error:
        selector(**fields)
    assert sentence in str(error.value)


def test_prism_needs_channel_pairs():
    with pytest.raises(NotServed, match="needs an even head_dim, got 7"):
        Case(torch.ones(1, 1, 16, 7), torch.ones(1, 1, 16, 7)).plan(Prism())
