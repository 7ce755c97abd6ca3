"""The rows of a cache layer against lists of lists: whatever is done to them, the right tokens are where the tables say."""

import contextlib
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache import store as module
from kvcache.store import Meter, Store
from sparse_attn import ContractError


class Lists:
    """What a store should hold: one list of (position, key) per sequence and head."""

    def __init__(self, batch: int, heads: int):
        self.runs = [[[] for _ in range(heads)] for _ in range(batch)]
        self.n_seen = [0] * batch

    def append(self, keys: torch.Tensor, low: list[int], high: list[int]) -> None:
        for b, row in enumerate(self.runs):
            for h, run in enumerate(row):
                run += [(self.n_seen[b] + i, float(keys[b, h, at, 0])) for i, at in enumerate(range(low[b], high[b]))]
            self.n_seen[b] += high[b] - low[b]


def assert_holds(store: Store, lists: Lists, meter: Meter) -> None:
    for b, row in enumerate(lists.runs):
        for h, run in enumerate(row):
            rows = slice(int(store.starts[b, h]), int(store.starts[b, h] + store.lengths[b, h]))
            assert list(zip(store.positions[rows].tolist(), store.k[rows, 0].tolist())) == run
            assert store.v[rows, 1].tolist() == [-key for _, key in run]
            assert store.state[rows].tolist() == [float(position) for position, _ in run]
    assert meter.now == store.n_bytes <= meter.peak
    k, v = store.rectangle()
    n = store.longest
    for b, row in enumerate(lists.runs):
        for h, run in enumerate(row):
            assert k[b, h, n - len(run) :, 0].tolist() == [key for _, key in run]
    seen = [(b, h) for part in store.parts() for b in range(part.rows.start, part.rows.stop) for h in range(part.heads.start, part.heads.stop)]
    assert seen == [(b, h) for b in range(len(lists.runs)) for h in range(len(lists.runs[0]))]


@given(st.data())
def test_any_life_of_a_store(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    meter = Meter()
    store, lists, number = Store(meter), Lists(batch, heads), 0
    for _ in range(data.draw(st.integers(1, 12))):
        steps = ["chunk", "token", "keep", "keep_apart", "replace", "drop", "select", "shrink", "copy", "pack"] if store.k is not None else ["chunk", "token"]
        step = data.draw(st.sampled_from(steps))
        batch = len(lists.runs)
        lengths = [[len(run) for run in row] for row in lists.runs]
        if step in ("chunk", "token"):
            n = 1 if step == "token" else data.draw(st.integers(2, 9))
            low = [data.draw(st.integers(0, n)) if step == "chunk" else 0 for _ in range(batch)]
            high = [data.draw(st.integers(a, n)) if step == "chunk" else n for a in low]
            keys = torch.arange(number, number + batch * heads * n, dtype=torch.float32).view(batch, heads, n, 1).repeat(1, 1, 1, 3)
            number += keys.numel()
            before = torch.tensor(lists.n_seen)
            store.append(keys, -keys[..., :2], data.draw(st.sampled_from([0, 0, 5, 30])))
            real = store.admit(n, torch.tensor(low, dtype=torch.int32), torch.tensor(high, dtype=torch.int32), before)
            assert real.tolist() == [b - a for a, b in zip(low, high)]
            lists.append(keys, low, high)
            store.state.copy_(store.positions)
        elif step in ("keep", "keep_apart"):
            kept = [[sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=n))) if n else [] for n in row] for row in lengths]
            slots = max(len(ids) for row in kept for ids in row)
            ids = torch.tensor([[ids + [-1] * (slots - len(ids)) for ids in row] for row in kept], dtype=torch.int32).view(batch, heads, slots)
            shown = store.rectangle()[0]
            old = shown.clone()
            store.keep(ids, torch.tensor([[len(ids) for ids in row] for row in kept]).view(batch, heads), in_place=step == "keep")
            assert step == "keep" or torch.equal(shown, old), "somebody still read the old rows"
            lists.runs = [[[run[i] for i in ids] for run, ids in zip(*both)] for both in zip(lists.runs, kept)]
        elif step == "replace":
            where = torch.tensor([[n > 0 and data.draw(st.booleans()) for n in row] for row in lengths]).view(batch, heads)
            victims = torch.tensor([[data.draw(st.integers(0, max(0, n - 1))) for n in row] for row in lengths]).view(batch, heads)
            store.replace(victims, where)
            for b, h in where.nonzero().tolist():
                run = lists.runs[b][h]
                run[int(victims[b, h])] = run[-1]
                run.pop()
        elif step == "drop":
            n = [data.draw(st.integers(0, min(row))) for row in lengths]
            store.drop(torch.tensor(n))
            lists.runs = [[run[: len(run) - k] for run in row] for row, k in zip(lists.runs, n)]
            lists.n_seen = [seen - k for seen, k in zip(lists.n_seen, n)]
        elif step == "select":
            chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
            store.select(torch.tensor(chosen))
            lists.runs = [[list(run) for run in lists.runs[b]] for b in chosen]
            lists.n_seen = [lists.n_seen[b] for b in chosen]
        elif step == "shrink":
            store.shrink()
        elif step == "pack":
            fresh, seen = Store(Meter()), torch.tensor(lists.n_seen)
            packed = store.packed()
            assert len(packed["k"]) == sum(map(sum, lengths))
            # dropping what had moved to another place, as no cache does, leaves tokens that were never seen
            at = [[[position for position, _ in run] for run in row] for row in lists.runs]
            sound = all(len({*run}) == len(run) and max(run, default=-1) < n for row, n in zip(at, lists.n_seen) for run in row)
            with contextlib.nullcontext() if sound else pytest.raises(ContractError, match="not those of different tokens"):
                fresh.fill(packed, seen)
            if sound:
                store, meter = fresh, fresh._meter
        else:
            apart = Meter()
            twin = store.copy(apart)
            store.clear()
            assert meter.now == 0
            store, meter = twin, apart
        assert_holds(store, lists, meter)


def filled(meter: Meter) -> Store:
    store, rows = Store(meter), torch.zeros(1, 1, 100, 8)
    store.append(rows, rows)
    store.admit(100, None, None, torch.zeros(1, dtype=torch.int64))
    return store


def test_new_memory_counts_beside_the_old_one():
    for change in (lambda s: s.select(torch.tensor([0, 0])), lambda s: s.keep(torch.arange(100).view(1, 1, 100).int(), torch.tensor([[100]]), False)):
        meter = Meter()
        store = filled(meter)
        held = store.n_bytes
        change(store)
        assert meter.now == store.n_bytes and meter.peak == held + store.n_bytes


def test_growing_holds_one_tensor_twice_at_a_time(monkeypatch):
    store = filled(Meter())
    old, alive, make = weakref.ref(store.k), [], module.empty_rows
    monkeypatch.setattr(module, "empty_rows", lambda like, n: (alive.append(old() is not None), make(like, n))[1])
    store.append(torch.zeros(1, 1, 100, 8), torch.zeros(1, 1, 100, 8))
    assert alive == [True, False, False, False]
