"""The sets that probe patterns choose, held to the methods as their papers word them: loops over floats, in float64."""

import functools
import json
import math
import operator
from dataclasses import dataclass, replace

import pytest
import torch
from rows import randn

from sparse_attn.config import SparseAttnConfig
from sparse_attn.errors import ContractError, NotServed
from sparse_attn.patterns import Dense, FlexPrefill, MInference, ProxyAttn, SampleAttention, VerticalSlash, XAttention
from sparse_attn.patterns.per_head import merge, parts, select_per_head
from sparse_attn.patterns.probe import covering, largest, marked, slash_tiles, tails
from sparse_attn.types import BlockIndex, LayerContext, ReadPlan, ResidentKV

SCALE = 0.3
# heads, key heads, queries, keys: whole blocks, ragged ones, one chunk of several, a chunk off the grid, shorter than a probe
SHAPES = [(2, 2, 192, 192), (4, 1, 211, 211), (4, 2, 96, 224), (4, 1, 70, 250), (2, 1, 5, 9)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of two batch rows, with a line, a slash and a common direction to find."""
    heads, kv_heads, n_q, n_k = shape
    q, k = randn(2, heads, n_q, 16, torch.float32, "plain", 0), randn(2, kv_heads, n_k, 16, torch.float32, "plain", 1)
    q[:, 0] += 1.0
    k[:, :, n_k // 3] += 1.5
    back = n_k - n_q + n_q // 2
    q[:, -1, n_q // 2 :] += 1.5 * k[:, -1, back - n_q // 2 : n_k - n_q // 2]
    return q, k


def select(selector, q, k, layer: int = 0, **more) -> ReadPlan:
    return selector.select(q, ResidentKV(k, k), LayerContext(layer, SCALE, k.shape[2] - q.shape[2], **more))


def dot(a, b) -> float:
    return sum(map(operator.mul, a, b))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def attention_rows(q, k, rows) -> dict[int, list[float]]:
    """Exact causal attention of some rows of one head: position -> probabilities."""
    start, found = len(k) - len(q), {}
    for r in rows:
        t = start + r
        found[t] = softmax([SCALE * dot(q[r], k[p]) for p in range(t + 1)])
    return found


@functools.cache
def masses(q, k, rows: frozenset[int]) -> tuple[list[float], list[float]]:
    """Probability per key and per distance, summed over the rows."""
    lines, slashes = [0.0] * len(k), [0.0] * len(k)
    for t, probabilities in attention_rows(q, k, rows).items():
        for p, x in enumerate(probabilities):
            lines[p] += x
            slashes[t - p] += x
    return lines, slashes


def last_rows(n: int, window: int, segments: int = 1) -> frozenset[int]:
    """The last ``window`` rows of each segment of n rows."""
    edges = [(s * n // segments, (s + 1) * n // segments) for s in range(segments)]
    return frozenset(r for a, b in edges for r in range(max(a, b - window), b))


def ranked(mass: list[float], forced: set[int] | frozenset[int] = frozenset()) -> list[int]:
    return sorted(range(len(mass)), key=lambda j: (j not in forced, -mass[j], j))


def pooled(mass: list[float], block: int) -> list[float]:
    return [math.fsum(mass[j : j + block]) for j in range(0, len(mass), block)]


def crossed(distances: set[int], n_q: int, n_k: int, block: int) -> set[tuple[int, int]]:
    """Tiles with a query and key at one of the distances, pair by pair."""
    at = [(r // block, n_k - n_q + r) for r in range(n_q)]
    return {(i, (t - o) // block) for i, t in at for o in distances if t >= o}


def reachable(n_q: int, n_k: int, block: int) -> set[tuple[int, int]]:
    return crossed(set(range(n_k)), n_q, n_k, block)


def read(plan: ReadPlan, b: int, h: int) -> set[tuple[int, int]]:
    return {tuple(x) for x in plan.blocks.to_mask()[b, h].nonzero().tolist()}


def columns(plan: ReadPlan, b: int, h: int) -> list[int]:
    return [] if plan.columns is None else [p for p in plan.columns[b, h].tolist() if p >= 0]


def near(plan: ReadPlan, h: int) -> list[int]:
    return [0, 0] if plan.near is None else plan.near[h].tolist()


def heads_of(q, k):
    """Every batch row and head as plain floats: b, h, q, k."""
    group = q.shape[1] // k.shape[1]
    each = [(b, h) for b in range(len(q)) for h in range(q.shape[1])]
    return [(b, h, *(tuple(map(tuple, x.double().tolist())) for x in (q[b, h], k[b, h // group]))) for b, h in each]


# vertical-slash


def vertical_slash_oracle(q, k, s: VerticalSlash) -> tuple[set, set]:
    n_q, n_k = len(q), len(k)
    rows = last_rows(n_q, s.window)
    if s.probe == "spread":
        rows |= last_rows(n_q, math.ceil(s.window / 8), 8)
    lines, slashes = masses(q, k, rows)
    columns = set(ranked(lines, set(range(s.sink_tokens)))[: max(s.vertical, s.sink_tokens)])
    distances = set(ranked(slashes, set(range(s.recent_tokens)))[: max(s.slash, s.recent_tokens)])
    tiles = crossed(distances, n_q, n_k, s.block)
    for j in range(-(-n_k // s.block)):
        inside = {p for p in columns if p // s.block == j}
        if s.promote and len(inside) >= s.promote * s.block:
            columns -= inside
            tiles |= {(i, c) for i, c in reachable(n_q, n_k, s.block) if c == j}
    return tiles, columns


@every_shape
@pytest.mark.parametrize("selector", [
    VerticalSlash(40, 12, window=16, sink_tokens=3, recent_tokens=5, block=32), VerticalSlash(14, 30, window=20, sink_tokens=11, recent_tokens=4, block=16),
    VerticalSlash(40, 3, 8, "last", 2, 1, promote=0.0, block=32), VerticalSlash(0, 0, 8, "last", 0, 1, promote=0.1, block=32),
], ids=repr)  # fmt: skip
def test_vertical_slash_reads_what_the_paper_says(shape, selector):
    q, k = tensors(shape)
    plan = select(selector, q, k)
    for b, h, *floats in heads_of(q, k):
        tiles, lines = vertical_slash_oracle(*floats, selector)
        assert read(plan, b, h) == tiles
        listed = plan.columns[b, h].tolist()
        assert listed == sorted(lines) + [-1] * (len(listed) - len(lines))


def test_vertical_slash_sizes_may_differ_per_head():
    q, k = tensors((4, 2, 192, 192))
    base = dict(window=16, sink_tokens=1, recent_tokens=1, promote=0.0, block=32)
    table = select(VerticalSlash(((9, 9, 9, 9), (4, 8, 12, 16)), ((1, 1, 1, 1), (2, 3, 5, 7)), **base), q, k, layer=1)
    for h, (vertical, slash) in enumerate([(4, 2), (8, 3), (12, 5), (16, 7)]):
        one = select(VerticalSlash(vertical, slash, **base), q, k)
        assert read(one, 1, h) == read(table, 1, h)
        assert columns(table, 1, h) == columns(one, 1, h)


def test_a_line_that_only_early_queries_read_is_found_by_the_spread_probe_alone():
    q, k = (0.1 * randn(1, 1, 1024, 16, torch.float32, "plain", i) for i in (0, 1))
    k[:, :, 50], q[:, :, :512], q[:, :, 512:] = 4.0, 4.0, -4.0  # the second half of the prompt is about something else
    found = {}
    for probe in ("spread", "last"):
        plan = select(VerticalSlash(1, 1, probe=probe, sink_tokens=0, recent_tokens=1), q, k)
        found[probe] = columns(plan, 0, 0) == [50]
    assert found == {"spread": True, "last": False}


# worked numbers


def geometry(n: int, block: int, n_q: int | None = None) -> BlockIndex:
    n_q = n_q or n
    return BlockIndex.empty(1, 1, n_q, n, (block, block), n - n_q)


def distances(*at: int, n: int) -> torch.Tensor:
    return torch.zeros(1, 1, n, dtype=torch.bool).index_fill_(2, torch.tensor(at), True)


@pytest.mark.parametrize(("offsets", "tiles"), [((0, 100, 300), [0, 2, 3, 4]), ((0, 40), [3, 4]), ((64,), [3]), ((319,), [0]), ((63,), [3, 4])])
def test_slashes_are_aligned_outward_to_tiles(offsets, tiles):
    found = slash_tiles(distances(*offsets, n=320), geometry(320, 64))
    assert found[0, 0, 4].nonzero().flatten().tolist() == tiles
    chunk = slash_tiles(distances(*offsets, n=320), geometry(320, 64, n_q=64))
    assert chunk[0, 0, 0].nonzero().flatten().tolist() == tiles


def test_the_rules_on_one_row():
    mass = torch.tensor([[[4.0, 1.0, 3.0, 2.0]]])
    nothing, ends = torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, False, True])

    def kept(threshold, forced):
        return covering(mass, threshold, forced)[0, 0].nonzero().flatten().tolist()

    assert [kept(p, nothing) for p in (0.0, 0.75, 0.9, 1.0)] == [[], [0, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert [kept(p, ends) for p in (0.0, 0.6, 0.75, 1.0)] == [[0, 3], [0, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert covering(torch.zeros(1, 1, 4), 0.9, ends)[0, 0].tolist() == ends.tolist()
    tied = largest(torch.tensor([[[1.0, 2.0, 1.0, 0.0, 1.0, float("inf")]]]), 4, torch.tensor([4]))
    assert tied.tolist() == [[[0, 1, 2, 5]]]
    assert largest(torch.zeros(1, 2, 5), 3, torch.tensor([2, 0])).tolist() == [[[0, 1, 5], [5, 5, 5]]]
    assert marked(torch.tensor([[[0, 4, 5]]]), 5).tolist() == [[[True, False, False, False, True]]]
    assert tails(10, 3, 2).tolist() == [1, 2, 4, 5, 8, 9] and tails(3, 8, 2).tolist() == [0, 1, 2] and tails(0, 4, 2).tolist() == []


# FlexPrefill


def js_distance(a: list[float], b: list[float]) -> float:
    total = 0.0
    for x, y in zip(a, b):
        m = (x + y) / 2
        total += sum(z * math.log(z / m) for z in (x, y) if z > 0)
    return math.sqrt(max(total, 0.0) / 2)


def mean(rows: list[list[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows)]


@functools.cache
def flex_distance(q, k, s: FlexPrefill) -> float:
    """Between the pooled estimate and what the last rows do."""
    rows = last_rows(len(q), s.block)
    lines, _ = masses(q, k, rows)
    keys = [mean(k[j : j + s.block]) for j in range(0, len(k), s.block)]
    probe = mean([q[r] for r in rows])
    return js_distance(softmax([SCALE * dot(probe, key) for key in keys]), [x / len(rows) for x in pooled(lines, s.block)])


def flex_oracle(q, k, s: FlexPrefill) -> set:
    n_q, n_k, b = len(q), len(k), s.block
    rows = last_rows(n_q, b)
    lines, slashes = ([x / len(rows) for x in mass] for mass in masses(q, k, rows))
    least = max(1, math.ceil(s.min_budget / b))
    aware = flex_distance(q, k, s) < s.gate

    def count(mass):
        sums, tokens = 0.0, 1
        for x in sorted(mass, reverse=True):
            sums += x
            tokens += sums <= s.threshold
        return least if aware else max(least, tokens // b + 1)

    columns = ranked(pooled(lines, b), {0})[: count(lines)]
    bands = ranked(pooled(slashes, b), {0})[: count(slashes)]
    tiles = crossed({o for t in bands for o in range(t * b, min((t + 1) * b, n_k))}, n_q, n_k, b)
    tiles |= {(i, j) for i, j in reachable(n_q, n_k, b) if j in columns}
    if aware:
        scores = {}
        for i in range(-(-n_q // b)):
            query = mean(q[i * b : (i + 1) * b])
            seen = sorted(j for a, j in reachable(n_q, n_k, b) if a == i)
            for j, x in zip(seen, softmax([SCALE * dot(query, mean(k[j * b : (j + 1) * b])) for j in seen])):
                scores[i, j] = x
        sums = 0.0
        for pair in sorted(scores, key=lambda pair: (-scores[pair], pair)):
            sums += scores[pair]
            if sums > s.threshold * -(-n_q // b):
                break
            tiles.add(pair)
    return tiles


@every_shape
@pytest.mark.parametrize("threshold, min_budget", [(0.5, 0), (0.8, 48)])
def test_flexprefill_reads_what_the_paper_says(shape, threshold, min_budget):
    q, k = tensors(shape)
    floats = heads_of(q, k)
    base = FlexPrefill(threshold, 0.0, min_budget, 16)
    distances = sorted(flex_distance(qh, kh, base) for _, _, qh, kh in floats)
    middle = len(distances) // 2
    for gate in (0.0, (distances[middle - 1] + distances[middle]) / 2, 1.0):
        selector = replace(base, gate=gate)
        plan = select(selector, q, k)
        for b, h, qh, kh in floats:
            assert read(plan, b, h) == flex_oracle(qh, kh, selector), (gate, b, h)


def test_a_head_whose_estimate_is_exact_although_it_has_zeros_is_trusted():
    q, k = torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)
    q[..., 0], k[:, :, :64, 0] = 1.0, 4000.0  # the second half gets exactly no mass
    trusted = select(FlexPrefill(0.9, 1e-3, 0, 32), q, k)
    # pairs that cover 0.9 by pooled score leave (3, 1) out, slashes that cover 0.9 cross it
    assert (3, 1) not in read(trusted, 0, 0) and (3, 1) in read(select(FlexPrefill(0.9, 0.0, 0, 32), q, k), 0, 0)


# SampleAttention


def covering_set(mass: list[float], threshold: float, forced: set[int]) -> set[int]:
    kept, total, before = set(forced), math.fsum(mass), math.fsum(mass[j] for j in forced)
    for j in ranked(mass, forced)[len(forced) :]:
        if not before < threshold * total:
            break
        kept.add(j)
        before += mass[j]
    return kept


def sample_oracle(q, k, s: SampleAttention) -> set:
    n_q, n_k, b = len(q), len(k), s.block
    rows = last_rows(n_q, s.window, max(1, math.ceil(s.sample_share * n_q / s.window)))
    lines, slashes = (pooled(mass, b) for mass in masses(q, k, rows))
    near = {t for t in range(len(slashes)) if t * b < math.ceil(s.recent_share * n_k)}
    bands = covering_set(slashes, s.slash_threshold, near)
    columns = covering_set(lines, s.vertical_threshold, set())
    tiles = crossed({o for t in bands for o in range(t * b, min((t + 1) * b, n_k))}, n_q, n_k, b)
    return tiles | {(i, j) for i, j in reachable(n_q, n_k, b) if j in columns}


@every_shape
@pytest.mark.parametrize("selector", [SampleAttention(0.5, 0.4, 0.2, 8, 0.0759, 16), SampleAttention(0.2, 0.7, 0.5, 16, 0.08, 32)], ids=repr)
def test_sampleattention_reads_what_the_paper_says(shape, selector):
    q, k = tensors(shape)
    plan = select(selector, q, k)
    for b, h, *floats in heads_of(q, k):
        assert read(plan, b, h) == sample_oracle(*floats, selector)


# ProxyAttn


def proxy_oracle(q, k, q_mean, k_mean, s: ProxyAttn) -> set:
    n_q, n_k, b = len(q), len(k), s.block
    start = n_k - n_q
    score = {}
    for r in range(0, n_q, s.stride):
        keys = [p for p in range(0, n_k, s.stride) if p <= start + r]
        for p, x in zip(keys, softmax([SCALE * dot(q_mean[r], k_mean[p]) for p in keys])):
            score[r // b, p // b] = max(x, score.get((r // b, p // b), 0.0))
    lines = pooled(masses(q, k, last_rows(n_q, b))[0], b)
    budget, sums = 0, 0.0
    for x in sorted(lines, reverse=True):
        if sums >= s.threshold * math.fsum(lines):
            break
        budget, sums = budget + 1, sums + x
    tiles = set()
    for i in range(-(-n_q // b)):
        seen = sorted(j for a, j in reachable(n_q, n_k, b) if a == i)
        own = (start + i * b) // b
        forced = {j for j in seen if j == 0 or j >= own}
        keep = max(math.ceil(budget / len(lines) * len(seen) - 1e-9), math.ceil(s.min_budget / b), len(forced))
        rest = sorted((j for j in seen if j not in forced), key=lambda j: (-score.get((i, j), 0.0), j))
        tiles |= {(i, j) for j in [*sorted(forced), *rest][:keep]}
    return tiles


@every_shape
@pytest.mark.parametrize("selector", [ProxyAttn(0.6, 1, 4, min_budget=0, block=16), ProxyAttn(0.8, 2, 2, min_budget=40, block=16)], ids=repr)
def test_proxyattn_reads_what_the_paper_says(shape, selector):
    q, k = tensors(shape)
    selector = replace(selector, proxies=math.gcd(selector.proxies, k.shape[1]))
    plan = select(selector, q, k)
    group, kv_group = q.shape[1] // selector.proxies, k.shape[1] // selector.proxies
    for b, h, *floats in heads_of(q, k):
        g = h // group
        means = [x[b, g * n : (g + 1) * n].double().mean(0).tolist() for x, n in ((q, group), (k, kv_group))]
        assert read(plan, b, h) == proxy_oracle(*floats, *means, selector)


def test_a_copy_is_found_at_multiples_of_the_stride_alone():
    found = {}
    for at in (100, 101):
        q, k = (randn(1, 1, 512, 64, torch.float32, "plain", i) for i in (0, 1))
        q[:, :, -16:] = 3 * k[:, :, at : at + 16]
        found[at] = (15, at // 32) in read(select(ProxyAttn(0.0, min_budget=96, block=32), q, k), 0, 0)
    assert found == {100: True, 101: False}


def test_proxies_divide_the_key_heads():
    q, k = tensors((4, 2, 96, 96))
    with pytest.raises(ContractError, match="proxies=4 does not divide the 2 key heads; use 1 or a divisor"):
        select(ProxyAttn(proxies=4), q, k)


# mixtures

SMALL = {"name": "vertical_slash", "vertical": 5, "slash": 3, "sink_tokens": 1, "recent_tokens": 2, "block": 16}
LARGE = {**SMALL, "vertical": 30, "slash": 9, "probe": "last"}
SHAPE = {"name": "a_shape", "sink_tokens": 3, "recent_tokens": 40}
BLOCKS = {"name": "xattention", "threshold": 0.6, "block": 16}


@pytest.mark.parametrize("row", [
    [SMALL, SMALL, LARGE, LARGE], [SMALL, LARGE, LARGE, SMALL], [SMALL, "dense", BLOCKS, SMALL], [BLOCKS, "dense", "dense", BLOCKS],
    [SHAPE, LARGE, "dense", SHAPE], [SHAPE, SHAPE, SHAPE, "dense"], ["dense"] * 4, [SMALL] * 4,
], ids=lambda row: "-".join(e if isinstance(e, str) else f"{e['name']}{e.get('vertical', '')}" for e in row))  # fmt: skip
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_head_of_a_mixture_reads_what_its_own_pattern_reads(row, kv_heads):
    q, k = tensors((4, kv_heads, 150, 211))
    plan = select(MInference([[SMALL] * 4, row]), q, k, layer=1)
    for h, entry in enumerate(row):
        if entry == "dense":
            assert plan.blocks is None or near(plan, h) == [0, 211]
            continue
        alone = select(MInference(entry), q[:, h : h + 1], k[:, h * kv_heads // 4 : h * kv_heads // 4 + 1])
        assert near(plan, h) == near(alone, 0)
        for b in range(2):
            assert read(plan, b, h) == read(alone, b, 0)
            assert columns(plan, b, h) == columns(alone, b, 0)


def test_a_mixture_without_causality_lists_every_block_of_its_dense_heads():
    q, k = tensors((4, 2, 96, 96))
    ctx = LayerContext(0, SCALE, 0, causal=False)
    plan = MInference([[BLOCKS, "dense", BLOCKS, BLOCKS]]).select(q, ResidentKV(k, k), ctx)
    assert plan.near is None and plan.blocks.head_density()[1] == 1.0 and plan.blocks.head_density()[0] < 0.9
    with pytest.raises(NotServed, match="needs causal attention"):
        MInference([[BLOCKS, "dense", BLOCKS, SMALL]]).select(q, ResidentKV(k, k), ctx)


@dataclass(frozen=True)
class Given:
    """A plan that carries its heads' numbers, whatever it is asked."""

    plan: ReadPlan

    def select(self, q, kv, ctx):
        assert ctx.carry is None and (ctx.sinks is None or len(ctx.sinks) == q.shape[1])
        return self.plan


def test_heads_are_cut_into_evenly_shared_parts():
    a, b = Dense(), XAttention()
    assert parts([a, a, b, b], 2) == [(a, [0, 1]), (b, [2, 3])]
    assert parts([a, b, a, b, a, a], 2) == [(a, [0, 2]), (b, [1, 3]), (a, [4, 5])]
    assert parts([a, a, a, b], 4) == [(a, [0, 1, 2]), (b, [3])]


def test_plans_that_cannot_be_one_get_a_sentence():
    q, k = tensors((2, 2, 96, 96))
    kv, ctx = ResidentKV(k, k), LayerContext(0, SCALE, 0, carry={}, sinks=torch.zeros(2))
    listed = {b: ReadPlan(BlockIndex.dense(2, 1, 96, 96, (b, b))) for b in (16, 32)}
    shape = ReadPlan(BlockIndex.empty(2, 1, 96, 96, (64, 64)), near=torch.tensor([[3, 7]], dtype=torch.int32))

    def both(first, second):
        return select_per_head([Given(first), Given(second)], q, kv, ctx)

    for first, second, sentence in (
        (listed[16], listed[32], r"selectors choose blocks of \(16, 16\) and \(32, 32\) tokens; heads of a layer must agree"),
        (listed[16], replace(listed[16], dense_rows=5), "selectors ask for 0 and 5 dense rows; heads of a layer must agree"),
        (listed[16], replace(listed[16], order=k[..., 0].int()), "a selector that reorders keys cannot be mixed per head"),
    ):
        with pytest.raises(ContractError, match=sentence):
            both(first, second)
    with pytest.raises(ContractError, match="there are 3 selectors but the layer has 2 heads; give one per head"):
        select_per_head([Dense()] * 3, q, kv, ctx)
    joined = both(shape, listed[16])
    assert joined.blocks.block == (16, 16) and joined.near.tolist() == [[3, 7], [0, 0]] and joined.blocks.head_density().tolist() == [0, 1]
    assert both(shape, ReadPlan()).near.tolist() == [[3, 7], [0, 96]]
    careful = [both(replace(listed[16], pv_threshold=a), replace(listed[16], pv_threshold=b)).pv_threshold for a, b in ((9, 5), (9, 0))]
    assert careful == [9, 0]
    assert merge([([0], ReadPlan()), ([1], ReadPlan())], 2, q, kv, ctx).blocks is None


def test_a_profile_is_its_own_json():
    table = [[SMALL, "dense"], [LARGE, {"name": "vertical_slash"}]]
    config = SparseAttnConfig(prefill={"name": "minference", "heads": table})
    written = json.loads(json.dumps(config.to_json()))
    assert written["prefill"] == {"name": "minference", "heads": table}
    assert SparseAttnConfig.from_json(written) == config and len({config.prefill, MInference(table), MInference()}) == 2


@pytest.mark.parametrize(("heads", "sentence"), [
    ("vertical_flash", "'vertical_flash': no such method"), ([["dense", {"name": "dense", "x": 1}]], "dense has no argument 'x'"),
    ([["dense", 3]], "heads names 3; an entry is a method's name or a dict with 'name'"), (["dense"], "is no method and no table"),
    (7, "heads=7 is no method and no table [layers][heads] of methods"), ([[{"vertical": 3}]], "the method has no 'name'"),
    ([[{"name": "vertical_slash", "vertical": -3}]], "vertical=-3 is negative"),
])  # fmt: skip
def test_a_bad_profile_gets_a_sentence(heads, sentence):
    with pytest.raises(ContractError) as error:
        MInference(heads)
    assert sentence in str(error.value)


def test_a_profile_of_another_model_gets_a_sentence():
    q, k = tensors((2, 2, 96, 96))
    with pytest.raises(ContractError, match="heads has 1 layers but layer 1 asked; add rows"):
        select(MInference([["dense", "dense"]]), q, k, layer=1)
    with pytest.raises(ContractError, match="there are 3 selectors but the layer has 2 heads; give one per head"):
        select(MInference([["dense"] * 3]), q, k)


@pytest.mark.parametrize(("bad", "sentence"), [
    (lambda: VerticalSlash(vertical=-1), "vertical=-1 is negative"), (lambda: VerticalSlash(slash=((3, -2),)), "slash=-2 is negative"),
    (lambda: VerticalSlash(window=0), "window=0 leaves no query to probe"), (lambda: VerticalSlash(probe="first"), "probe='first' is not known"),
    (lambda: VerticalSlash(sink_tokens=-1), "sink_tokens=-1"), (lambda: VerticalSlash(recent_tokens=0), "recent_tokens=0 leaves queries"),
    (lambda: VerticalSlash(promote=1.5), "promote=1.5 is outside"), (lambda: VerticalSlash(block=0), "block=0"),
    (lambda: FlexPrefill(threshold=1.1), "threshold=1.1 is outside"), (lambda: FlexPrefill(gate=-0.1), "gate=-0.1 is negative"),
    (lambda: FlexPrefill(min_budget=-1), "min_budget=-1 is negative"), (lambda: FlexPrefill(block=0), "block=0"),
    (lambda: SampleAttention(-0.1), "vertical_threshold=-0.1 is outside"), (lambda: SampleAttention(0.5, 2), "slash_threshold=2 is outside"),
    (lambda: SampleAttention(sample_share=0), "sample_share=0 is outside"), (lambda: SampleAttention(window=0), "window=0"),
    (lambda: SampleAttention(recent_share=0), "recent_share=0 is outside"), (lambda: SampleAttention(block=-4), "block=-4"),
    (lambda: ProxyAttn(threshold=float("nan")), "threshold=nan is outside"), (lambda: ProxyAttn(proxies=0), "proxies=0 leaves no head"),
    (lambda: ProxyAttn(stride=3), "block=128 is not a multiple of stride=3"), (lambda: ProxyAttn(stride=0), "stride=0 must be positive"),
    (lambda: ProxyAttn(min_budget=-2), "min_budget=-2 is negative"), (lambda: ProxyAttn(block=0), "block=0"),
])  # fmt: skip
def test_bad_fields_of_probe_patterns_get_a_sentence(bad, sentence):
    with pytest.raises(ContractError) as error:
        bad()
    assert sentence in str(error.value)


@pytest.mark.parametrize("selector", [VerticalSlash(), FlexPrefill(), SampleAttention(), ProxyAttn()], ids=lambda s: type(s).__name__)
def test_without_causality_no_key_has_a_distance(selector):
    q, k = tensors((2, 2, 96, 96))
    with pytest.raises(NotServed, match="needs causal attention"):
        selector.select(q, ResidentKV(k, k), LayerContext(0, SCALE, 0, causal=False))
