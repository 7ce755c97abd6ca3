"""What each policy keeps, against plain Python one query and one token at a time. A new policy adds a function and a row."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from kvcache.policies import POLICIES, ChunkKV, HeavyHitter, KeyDiff, KNorm, Random, SnapKV, Streaming, Tova
from kvcache.types import CachePolicy, Seen
from sparse_attn.errors import ContractError
from sparse_attn.ops import keep_top

DIM = 8


class World:
    """A batch of texts and a cache of their tokens, kept as lists of positions.

    Attributes:
        q, k: of each text, ``[H, n, D]`` and ``[Hkv, n, D]``.
        left: whether shorter texts begin later instead of ending earlier.
        kept: positions per text and KV head. state: the policy's number of each.
        history: per text the chunks so far, as (first position, end, positions kept before by each KV head).
    """

    def __init__(self, lengths: list[int], kv_heads: int = 2, group: int = 4, left: bool = False, softcap: float = 0.0,
                 sinks: bool = False, layer: int = 3):
        self.g = torch.Generator().manual_seed(sum(lengths) + 100 * group)
        self.heads, self.kv_heads, self.group, self.left = kv_heads * group, kv_heads, group, left
        self.q, self.k = ([torch.randn(h, n, DIM, generator=self.g) for n in lengths] for h in (self.heads, kv_heads))
        self.scale, self.softcap, self.layer = DIM**-0.5, softcap, layer
        self.sinks = torch.randn(self.heads, generator=self.g) if sinks else None
        self.lengths, self.columns = lengths, 0
        self.kept: list[list[list[int]]] = [[[] for _ in range(kv_heads)] for _ in lengths]
        self.state: list[list[list[float]]] = [[[] for _ in range(kv_heads)] for _ in lengths]
        self.history: list[list[tuple[int, int, list[list[int]]]]] = [[] for _ in lengths]
        self.seen = [0] * len(lengths)

    def logit(self, b: int, head: int, i: int, j: int) -> float:
        x = self.scale * sum(x * y for x, y in zip(self.q[b][head, i].tolist(), self.k[b][head // self.group, j].tolist()))
        return self.softcap * math.tanh(x / self.softcap) if self.softcap else x

    def weights(self, b: int, head: int, i: int, visible: list[int]) -> tuple[list[float], float]:
        """exp(logit) of the visible positions, and the sum that divides them."""
        found = [math.exp(self.logit(b, head, i, j)) for j in visible]
        return found, sum(found) + (math.exp(float(self.sinks[head])) if self.sinks is not None else 0.0)

    def feed(self, policy: CachePolicy, columns: int) -> None:
        """The next columns of the batch reach the cache."""
        widest, start = max(self.lengths), self.columns
        self.columns = min(start + columns, widest)
        bounds = []
        for b, n in enumerate(self.lengths):
            shift = widest - n if self.left else 0
            begin, end = (min(max(edge - shift, 0), n) for edge in (start, self.columns))
            bounds.append((begin + shift - start if end > begin else 0, end - begin))
            if end > begin:
                self.history[b].append((begin, end, [list(kept) for kept in self.kept[b]]))
            self.seen[b] = end
            for h in range(self.kv_heads):
                self.kept[b][h] += range(begin, end)
                self.state[b][h] += [0.0] * (end - begin)
        seen = self.show(bounds, self.columns - start)
        state = policy.observe(seen)
        assert state.dtype == torch.float32 and state.shape == seen.state.shape
        self.state = self.read(seen, state)

    def show(self, bounds: list[tuple[int, int]], columns: int) -> Seen:
        """The rows of the cache in a store with gaps full of garbage; bounds are first row and number of real queries."""
        batch, rows = len(self.lengths), [(b, h) for b in range(len(self.lengths)) for h in range(self.kv_heads)]
        starts, at = torch.zeros(batch, self.kv_heads, dtype=torch.int64), 2
        for b, h in reversed(rows):
            starts[b, h] = at
            at += len(self.kept[b][h]) + (b + 2 * h) % 3
        k, state, positions = torch.full((at, DIM), math.nan), torch.full((at,), math.nan), torch.full((at,), 2**31 - 1)
        for b, h in rows:
            run = slice(int(starts[b, h]), int(starts[b, h]) + len(self.kept[b][h]))
            positions[run], state[run] = torch.tensor(self.kept[b][h], dtype=torch.int64), torch.tensor(self.state[b][h])
            k[run] = self.k[b][h, self.kept[b][h]]
        q, lse = torch.full((batch, self.heads, columns, DIM), math.nan), torch.full((batch, self.heads, columns), -math.inf)
        for b, (first, n) in enumerate(bounds):
            begin = self.seen[b] - n
            q[b, :, first : first + n] = self.q[b][:, begin : self.seen[b]]
            for head in range(self.heads):
                before = [j for j in self.kept[b][head // self.group] if j < begin]
                for i in range(n):
                    lse[b, head, first + i] = math.log(self.weights(b, head, begin + i, [*before, *range(begin, begin + i + 1)])[1])
        whole = all(n == columns for _, n in bounds)
        first, last = (torch.tensor([edge(*x) for x in bounds], dtype=torch.int32) for edge in (lambda f, n: f, lambda f, n: f + n))
        return Seen(
            k=k, v=k, starts=starts, lengths=torch.tensor([[len(kept) for kept in heads] for heads in self.kept]),
            positions=positions.int(), state=state, n_seen=torch.tensor(self.seen), n_new=torch.tensor([n for _, n in bounds]),
            q=q, lse=lse, q_first=None if whole else first, q_last=None if whole else last, scale=self.scale, softcap=self.softcap,
            sinks=self.sinks, layer=self.layer, n_layers=8,
        )  # fmt: skip

    def read(self, seen: Seen, values: torch.Tensor) -> list[list[list[float]]]:
        return [[values[start : start + n].tolist() for start, n in zip(*pair)]
                for pair in zip(seen.starts.tolist(), seen.lengths.tolist())]

    def rank(self, policy: CachePolicy) -> list[list[list[float]]]:
        """As a cache asks: the queries are gone by now."""
        seen = self.show([(0, 0)] * len(self.lengths), 0)
        rank = policy.rank(seen, seen.state)
        assert rank.dtype == torch.float32 and rank.shape == seen.state.shape
        return self.read(seen, rank)

    def evict(self, policy: CachePolicy, tokens: int) -> None:
        sinks, recent = policy.protect
        for b, heads in enumerate(self.rank(policy)):
            for h, rank in enumerate(heads):
                kept, n = self.kept[b][h], len(self.kept[b][h])
                safe = torch.tensor([math.inf if j < sinks or j >= self.seen[b] - recent else r for j, r in zip(kept, rank)])
                table = (torch.tensor([[x]]) for x in (0, n))
                ids = keep_top(safe, *table, torch.tensor([[tokens]], dtype=torch.int32), tokens)[0, 0].tolist()
                self.kept[b][h] = [kept[i] for i in ids if i >= 0]
                self.state[b][h] = [self.state[b][h][i] for i in ids if i >= 0]


# -- the oracles: rank of the tokens in world.kept[b][h] -----------------------------------------------------------------


def newest(world: World, policy: Streaming, b: int, h: int) -> list[float]:
    return [float(j) for j in world.kept[b][h]]


def short_keys(world: World, policy: KNorm, b: int, h: int) -> list[float]:
    return [-math.sqrt(sum(x * x for x in world.k[b][h, j].tolist())) for j in world.kept[b][h]]


def odd_keys(world: World, policy: KeyDiff, b: int, h: int) -> list[float]:
    unit = []
    for j in world.kept[b][h]:
        key = world.k[b][h, j].tolist()
        unit.append([x / math.sqrt(sum(y * y for y in key)) for x in key])
    mean = [sum(column) / len(unit) for column in zip(*unit)]
    norm = math.sqrt(sum(x * x for x in mean))
    return [-sum(x * y for x, y in zip(key, mean)) / norm for key in unit]


def lots(world: World, policy: Random, b: int, h: int) -> list[float]:
    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    found = []
    for j in world.kept[b][h]:
        x = policy.seed % 2**32
        for part in (0, world.layer, h, j):
            x = mixed((x + part) % 2**32)
        found.append((x >> 8) / 2**24)
    return found


def hits(world: World, policy: HeavyHitter, b: int, h: int) -> list[float]:
    mass: dict[int, float] = {}
    for begin, end, kept in world.history[b]:
        mass = {j: mass[j] * (policy.decay ** (end - begin) if policy.normalize == "ema" else 1) for j in kept[h]}
        mass |= dict.fromkeys(range(begin, end), 0.0)
        for head in range(h * world.group, (h + 1) * world.group):
            for i in range(begin, end):
                visible = [*kept[h], *range(begin, i + 1)]
                weights, total = world.weights(b, head, i, visible)
                for j, weight in zip(visible, weights):
                    mass[j] += weight / total
    return [mass[j] / (world.seen[b] - j if policy.normalize == "visible" else 1) for j in world.kept[b][h]]


def votes(world: World, policy: SnapKV | Tova, b: int, h: int) -> list[float]:
    window, decay = getattr(policy, "window", 1), getattr(policy, "decay", 0.0)
    state: dict[int, float] = {}
    for begin, end, kept in world.history[b]:
        run, first = [*kept[h], *range(begin, end)], max(begin, end - window)
        per_head = []
        for head in range(h * world.group, (h + 1) * world.group):
            sums = dict.fromkeys(run, 0.0)
            for i in range(first, end):
                visible = [j for j in run if j <= i]
                weights, total = world.weights(b, head, i, visible)
                for j, weight in zip(visible, weights):
                    sums[j] += weight / total
            per_head.append(pooled(policy, [sums[j] for j in run if j < first]) + [sums[j] for j in run if j >= first])
        join = {"mean": lambda x: sum(x) / len(x), "sum": sum, "max": max}[getattr(policy, "reduce", "mean")]
        state = {j: decay * state.get(j, 0.0) + join(found) for j, *found in zip(run, *per_head)}
    return [state[j] for j in world.kept[b][h]]


def pooled(policy: SnapKV | Tova, values: list[float]) -> list[float]:
    half = getattr(policy, "kernel", 1) // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [max(x) if getattr(policy, "pool", "mean") == "max" else sum(x) / len(x) for x in around]


def votes_of_all(world: World, policy: Tova, b: int, h: int) -> list[float]:
    return [sum(x) / len(x) for x in zip(*(votes(world, policy, b, each) for each in range(world.kv_heads)))]


def chunks(world: World, policy: ChunkKV, b: int, h: int) -> list[float]:
    inner = ORACLES[policy.inner](world, POLICIES[policy.inner](), b, h)
    members: dict[int, list[float]] = {}
    for j, value in zip(world.kept[b][h], inner):
        members.setdefault(j // policy.chunk, []).append(value)
    return [sum(x) / len(x) for x in (members[j // policy.chunk] for j in world.kept[b][h])]


ORACLES = {"streaming": newest, "knorm": short_keys, "keydiff": odd_keys, "random": lots, "heavy_hitter": hits, "snapkv": votes,
           "tova": votes_of_all, "chunkkv": chunks}


# -- the rows -----------------------------------------------------------------------------------------------------------


def look_at(world: World, at: int) -> None:
    """Every query looks at one token."""
    for q, k in zip(world.q, world.k):
        q[..., 0] = 6.0
        k[:, :, 0] = 0.0
        k[:, at, 0] = 4.0


def shorten(world: World, at: int) -> None:
    for k in world.k:
        k[:, at] *= 0.01


def turn_away(world: World, at: int) -> None:
    """All keys point one way but one."""
    for k in world.k:
        k[..., 0] += 4.0
        k[:, at, 0] -= 9.0


@dataclass(frozen=True)
class Row:
    """A policy, whether it ranks alike however a prompt is cut, and how to plant a token that it must keep (None: no way)."""

    policy: CachePolicy
    cut: bool = True
    plant: Callable[[World, int], None] | None = None
    name: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "name", next(name for name, cls in POLICIES.items() if type(self.policy) is cls))


ROWS = [
    Row(Streaming()),
    Row(Random()),
    Row(Random(seed=-7)),
    Row(KNorm(), plant=shorten),
    Row(KeyDiff(), plant=turn_away),
    Row(HeavyHitter(), plant=look_at),
    Row(HeavyHitter("visible"), plant=look_at),
    Row(HeavyHitter("ema", decay=0.9), cut=False, plant=look_at),
    Row(SnapKV(), cut=False, plant=look_at),
    Row(SnapKV(window=6), plant=look_at),
    Row(SnapKV(window=3, kernel=7, pool="max", reduce="max"), plant=look_at),
    Row(SnapKV(window=6, kernel=1, reduce="sum", decay=0.5), cut=False, plant=look_at),
    Row(Tova(), plant=look_at),
    Row(ChunkKV(chunk=4), cut=False, plant=look_at),
    Row(ChunkKV("knorm", chunk=5), plant=shorten),
    Row(ChunkKV("heavy_hitter", chunk=3), plant=look_at),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row.policy))


def test_every_policy_has_a_row_and_an_oracle():
    # locret's heads fit one shape of layer: test_locret.py
    assert {row.name for row in ROWS} == set(POLICIES) - {"locret"} == set(ORACLES)


def assert_ranks_equal_the_oracle(world: World, row: Row) -> None:
    for b, heads in enumerate(world.rank(row.policy)):
        for h, rank in enumerate(heads):
            assert rank == pytest.approx(ORACLES[row.name](world, row.policy, b, h), rel=2e-5, abs=2e-6)


@each_row
@pytest.mark.parametrize("group", [1, 4, 8])
def test_ranks_equal_the_oracle(row, group):
    """One text in one piece, and a ragged batch in chunks, padded on either side."""
    for lengths, columns, left in (([23], 23, False), ([21, 12, 3], 8, False), ([3, 20], 7, True)):
        world = World(lengths, kv_heads=2 if group < 8 else 1, group=group, left=left)
        while world.columns < max(lengths):
            world.feed(row.policy, columns)
        assert_ranks_equal_the_oracle(world, row)


@each_row
def test_ranks_equal_the_oracle_after_evictions(row):
    world = World([30, 17], softcap=4.0, sinks=True)
    for columns in (12, 9, 1, 1, 7):
        world.feed(row.policy, columns)
        assert_ranks_equal_the_oracle(world, row)
        world.evict(row.policy, 10)
    assert all(len(kept) == 10 for heads in world.kept for kept in heads)


@each_row
def test_ranks_do_not_depend_on_how_a_prompt_is_cut(row):
    if not row.cut:
        pytest.skip("what each chunk's queries see is part of this method")
    found = []
    for columns in ([26], [5, 9, 3, 9], [20, 6]):
        world = World([26, 26])
        for each in columns:
            world.feed(row.policy, each)
        found.append(world.rank(row.policy))
    for other in found[1:]:
        for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert other[b][h] == pytest.approx(found[0][b][h], rel=1e-5, abs=1e-6)


@each_row
def test_a_sequence_ranks_alike_alone_and_in_a_batch(row):
    together, alone = World([24, 11]), World([24, 11])
    for name in ("q", "k", "lengths", "kept", "state", "history", "seen"):
        setattr(alone, name, getattr(alone, name)[:1])
    for world in (together, alone):
        for columns in (9, 9, 6):
            world.feed(row.policy, columns)
    for h in range(2):
        assert together.rank(row.policy)[0][h] == pytest.approx(alone.rank(row.policy)[0][h], rel=1e-5, abs=1e-6)


@each_row
def test_a_planted_token_survives_evictions(row):
    if row.plant is None:
        pytest.skip("this method does not look at what tokens hold")
    world, at = World([150], group=2), 17
    row.plant(world, at)
    for columns in (100, 30, 10, 1, 9):
        world.feed(row.policy, columns)
        world.evict(row.policy, sum(row.policy.protect) + 6)
    assert all(at in kept for heads in world.kept for kept in heads)


def test_streaming_keeps_sinks_and_the_newest():
    world = World([40])
    for columns in (20, 1, 19):
        world.feed(Streaming(), columns)
        world.evict(Streaming(), 10)
    assert world.kept[0][0] == world.kept[0][1] == [0, 1, 2, 3, *range(34, 40)]


def test_tova_keeps_one_set_for_all_heads():
    world = World([30, 24], kv_heads=4, group=2)
    for columns in (12, 12, 1, 5):
        world.feed(Tova(), columns)
        world.evict(Tova(), 9)
    assert all(kept == heads[0] for heads in world.kept for kept in heads)
    world.kept[0][1], world.state[0][1] = world.kept[0][1][1:], world.state[0][1][1:]
    with pytest.raises(ContractError, match="one set of tokens for all heads"):
        world.rank(Tova())


def test_chunks_stay_or_go_whole():
    policy = ChunkKV("random", chunk=5)
    world = World([200])
    world.feed(policy, 200)
    world.evict(policy, sum(policy.protect) + 41)
    for kept in world.kept[0]:
        counts = [sum(j // 5 == c for j in kept) for c in range(1, 33)]  # chunks of no protected token
        assert sum(0 < n < 5 for n in counts) <= 1 and sum(n == 5 for n in counts) >= 7


def test_draws_differ_by_seed_layer_and_head_and_are_even():
    world = World([2000], kv_heads=2, group=1)
    world.kept, world.state, world.seen = [[list(range(2000))] * 2], [[[0.0] * 2000] * 2], [2000]
    found = [world.rank(Random(seed))[0][h] for seed in (0, 1) for h in (0, 1)]
    world.layer = 4
    found.append(world.rank(Random())[0][0])
    for i, one in enumerate(found):
        assert len(set(one)) > 1995 and 0 <= min(one) and max(one) < 1
        assert abs(sum(one) / 2000 - 0.5) < 0.02
        for other in found[:i]:
            assert abs(torch.corrcoef(torch.tensor([one, other]))[0, 1]) < 0.08


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: SnapKV(kernel=4), "kernel=4 has no middle"),
    (lambda: SnapKV(window=0), "window=0 is no query"),
    (lambda: SnapKV(pool="median"), "pool='median' is not known; use one of mean, max"),
    (lambda: SnapKV(reduce="min"), "reduce='min' is not known; use one of mean, max, sum"),
    (lambda: SnapKV(decay=1.5), "decay=1.5 is outside [0, 1]"),
    (lambda: HeavyHitter("mean"), "normalize='mean' is not known; use one of sum, visible, ema"),
    (lambda: HeavyHitter("ema", decay=0.0), "decay=0.0 is outside (0, 1]"),
    (lambda: ChunkKV("h2o"), "inner='h2o': no such policy; there are heavy_hitter"),
    (lambda: ChunkKV("chunkkv"), "inner='chunkkv': no such policy"),
    (lambda: ChunkKV(chunk=0), "chunk=0 must be 1 or more tokens"),
    (lambda: Random(seed=0.5), "seed=0.5 must be a whole number"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)
