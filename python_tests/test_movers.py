"""Pages that a device reads itself: order of copies, page-locked memory, and what is left after a failure."""

import gc
import warnings

import pytest
import torch
from delayed import LOCKED, REFUSED, Delayed, Machine
from hypothesis import given
from hypothesis import strategies as st
from test_archive import generate, prompt
from test_transformers import tiny

import kvcache
import sparse_attn
from kvcache import archive as archives
from kvcache.archive import Archive
from kvcache.codecs import LowRankKeys
from kvcache.movers import Direct, Staged
from kvcache.store import Meter, Store
from kvcache.tiers import Host, Pools
from kvcache.tiers.pool import BACKENDS
from kvcache.tiers.streams import CudaStreams

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="the host engine was not built, and plain.py has no array of pages")
SIZE = 4096


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


# -- the order of copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies_first", [True, False])
def test_a_copy_comes_behind_what_reads_the_slot_and_before_what_waits_for_it(copies_first):
    machine, slot, seen = Machine(), ["old"], []
    streams = CudaStreams(torch.device("cuda", 0), machine)
    machine.launch(lambda: seen.append(slot[0]))  # attention over the page that goes
    event = streams.beside(lambda: machine.launch(lambda: slot.__setitem__(0, "new")))
    assert not event.done()
    machine.launch(lambda: seen.append("keys rebuilt"))  # beside the copy
    event.wait()
    machine.launch(lambda: seen.append(slot[0]))
    assert seen == [], "the host was made to wait"
    machine.run(*((streams._copies, machine.main) if copies_first else (machine.main, streams._copies)))
    assert seen == ["old", "keys rebuilt", "new"] and event.done()


def test_what_is_rebuilt_does_not_wait_for_the_copy():
    machine, seen = Machine(), []
    streams = CudaStreams(torch.device("cuda", 0), machine)
    event = streams.beside(lambda: machine.launch(lambda: seen.append("copied")))
    machine.launch(lambda: seen.append("rebuilt"))
    event.wait()
    machine.launch(lambda: seen.append("attended"))
    while machine.main.step():
        pass
    assert seen == ["rebuilt"], "attention does not wait, or the rebuilding does"
    event.finish()
    assert seen == ["rebuilt", "copied"]


def test_values_are_on_their_way_while_keys_are_rebuilt(monkeypatch):
    streams, order = Delayed(), []
    store, tokens = filled(2, 40)
    archive = Archive(Meter(), 4, 8, Pools(("device", "host"), streams=streams), LowRankKeys(rank=2).layer(Meter(), None))
    archive.take(store, 0)
    archive.prepare(lambda pages: None)
    rebuild = archive._factors.rebuild
    monkeypatch.setattr(archive._factors, "rebuild", lambda *args: (order.append(len(streams.waiting)), rebuild(*args)))
    region = archive.fetch(torch.tensor([[[3, 0], [1, -1]]] * 2).int()).wait()
    assert order == [1] and not streams.waiting
    rows = region.v[region.starts[..., None] + torch.arange(4)]
    assert rows[0, 0, 0, :, 0].tolist() == tokens[0][12:16]


# -- an archive that is read so, beside plain lists ---------------------------------------------------------------------------


def filled(batch: int, n: int, heads: int = 2, start: int = 0) -> tuple[Store, list[list[int]]]:
    """A store of n tokens per sequence, key and value of KV head h are (number, h, ..), and their numbers."""
    store = Store(Meter())
    return store, extend(store, [[] for _ in range(batch)], n, heads, start)


def extend(store: Store, tokens: list[list[int]], n: int, heads: int, start: int) -> list[list[int]]:
    batch = len(tokens)
    number = torch.arange(start, start + batch * n).view(batch, 1, n, 1).expand(batch, heads, n, 1)
    head = torch.arange(heads).view(1, -1, 1, 1).expand(batch, heads, n, 1)
    store.append(torch.cat([number, head], -1).float(), torch.cat([number, head, head], -1).float())
    store.admit(n, None, None, torch.tensor([len(run) for run in tokens]))
    return [[*run, *row] for run, row in zip(tokens, number[:, 0, :, 0].tolist())]


@given(data=st.data())
def test_an_archive_beside_plain_lists(data):
    streams, page, heads = Delayed(), data.draw(st.sampled_from([1, 3, 4])), data.draw(st.sampled_from([1, 2]))
    pools = Pools(("device", "host"), streams=streams)
    meter = Meter()
    store, held = filled(data.draw(st.integers(1, 2)), 3 * page, heads)
    archive, others, at, fetches = Archive(meter, page, data.draw(st.integers(1, 4)), pools), [], 1000, 0
    for _ in range(data.draw(st.integers(3, 14))):
        step = data.draw(st.sampled_from(["take", "fetch", "fetch", "fetch", "forgotten", "select", "copy", "clear", "all"]))
        if step == "take":
            held = extend(store, held, data.draw(st.integers(2, 9)), heads, at)
            at += 1000
            archive.take(store, data.draw(st.integers(0, 5)))
        if archive.pages is None or not bool(archive.pages.any()):
            continue
        here = archive.pages.tolist()
        if step in ("fetch", "forgotten"):
            m = data.draw(st.integers(1, 5))
            draw = [[(data.draw(st.permutations(range(-2, n)))[:m] + [-1] * m)[:m] for n in row] for row in here]
            chosen = torch.tensor(draw).clamp(min=-1).int()
            coming = archive.fetch(chosen)
            fetches += 1
            if step == "forgotten":
                continue
            region = coming.wait()
            for b, h in ((b, h) for b in range(len(held)) for h in range(heads)):
                for p, start, count in zip(chosen[b, h].tolist(), region.starts[b, h].tolist(), region.counts[b, h].tolist()):
                    want = held[b][p * page : (p + 1) * page] if p >= 0 else []
                    assert region.v[start : start + count, 0].tolist() == region.k[start : start + count, 0].tolist() == want
                    assert bool((region.k[start : start + count, 1] == h).all())
        elif step == "select":
            which = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=3))
            archive.select(torch.tensor(which))
            store.select(torch.tensor(which))
            held = [list(held[b]) for b in which]
        elif step == "copy":
            others.append(archive.copy(Meter()))
            archive, others[-1] = others[-1], archive
            meter = archive._meter
        elif step == "clear" and others:
            others.pop().clear()
        elif step == "all":
            for b, run in enumerate(held):
                for h, (k, _, _) in enumerate(archive.rows(b)):
                    assert k[:, 0].tolist() == run[: here[b][h] * page]
        assert meter.now == archive.n_bytes
    assert streams.copies == fetches, "pages passed through the host"


@pytest.mark.parametrize("codec", [None, "lowrank"])
def test_a_model_reads_the_same_pages(codec):
    model, (ids, mask) = tiny("Llama"), prompt()
    settings = dict(decode="quest", budget=24, page=4, dense_layers=()) | (dict(codec=LowRankKeys(rank=8)) if codec else {})
    with sparse_attn.patch(model, prefill="dense"):
        found = []
        for streams in (None, Delayed()):
            cache = kvcache.make_cache(model, **settings, tiers=("device", "host"))
            if streams is not None:
                cache.pools.streams = streams
            found.append((*generate(model, cache, ids, mask, new=24, prefill_chunk_size=30), cache.report()))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        assert found[0][2].hit_rate == found[1][2].hit_rate and found[0][2].moved_bytes == found[1][2].moved_bytes
        assert streams.copies > 10 and not streams.waiting
        core = cache.layers[0].core
        assert isinstance(core.archive._mover, Direct)
        if codec is None:
            beams = dict(attention_mask=mask, num_beams=2, max_new_tokens=8, do_sample=False)
            cache.reset()
            want = model.generate(ids, past_key_values=kvcache.make_cache(model, **settings, tiers=("device", "host")), **beams)
            assert torch.equal(model.generate(ids, past_key_values=cache, **beams), want)


@pytest.mark.parametrize("leave", ["clear", "select", "prepare", "last"])
def test_no_page_is_released_while_it_may_be_read(monkeypatch, leave):
    streams, meter, (store, _) = Delayed(), Meter(), filled(2, 40)
    archive = Archive(meter, 4, 4, Pools(("device", "host"), streams=streams), LowRankKeys(rank=2).layer(meter, None))
    archive.take(store, 0)
    archive.fetch(torch.tensor([[[0, 9, 4], [7, 8, -1]]] * 2).int())
    assert streams.waiting
    released, pool = [], type(archive._values)
    monkeypatch.setattr(pool, "release", lambda self, ids, before=pool.release: (released.append(len(streams.waiting)), before(self, ids)))
    if leave == "prepare":
        archive.prepare(lambda pages: None)
    elif leave == "last":
        del archive
        gc.collect()
    else:
        getattr(archive, leave)(*([torch.tensor([1, 0, 1])] if leave == "select" else []))
    assert released and not any(released)


# -- page-locked memory --------------------------------------------------------------------------------------------------------


def pages(n: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def locked() -> int:
    """KiB of this process that stay in memory."""
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmLck"))


@pytest.mark.parametrize("size", [SIZE, 48, 1000, 3 * SIZE])
def test_pages_are_rows_of_memory_that_is_locked(size):
    before = locked()
    pools = Pools(("device", Host(3000 * SIZE)))
    pool = pools.of(size, LOCKED)
    assert pools.of(size) is pool and pool.array().shape[1] == size
    ids = pool.write(pages(700, size))
    assert locked() - before >= 700 * size // 1024
    for drop in (200, 499):
        assert torch.equal(pool.array()[pool.rows(ids)], pages(700, size)[-len(ids) :])
        pool.release(ids[:drop])
        ids = ids[drop:]
    out = torch.zeros(1, size, dtype=torch.uint8)
    pool.read(ids, out, torch.tensor([0])).wait()
    assert torch.equal(out, pages(700, size)[-1:])
    array = pool.array()
    del pools, pool
    assert locked() > before, "an array outlives its pools"
    del array
    assert locked() == before


def test_the_limit_stays_hard_and_empty_slabs_go_back():
    before, pools = locked(), Pools(("device", Host(3000 * SIZE)))
    pool = pools.of(SIZE, LOCKED)
    ids = pool.write(pages(3000))
    with pytest.raises(kvcache.tiers.CapacityError, match="the host tier holds 12,288,000 of at most 12,288,000 bytes"):
        pool.write(pages(1))
    assert 12_000 <= locked() - before <= 12_000 + 4096
    assert torch.equal(pool.array()[pool.rows(ids)], pages(3000))
    pool.release(ids[:2999])
    assert locked() - before <= 2 * 4096, "memory of the first page and of the last"
    pool.release(ids[2999:])
    assert locked() - before == 4096 and pools.counts()["host"]["bytes"] == 0
    assert torch.equal(pool.array()[pool.rows(pool.write(pages(2000, seed=1)))], pages(2000, seed=1))


@pytest.mark.parametrize("backend, tiers, pin", [("native", ("device", "host", "disk"), LOCKED), ("plain", ("device", "host"), LOCKED),
                                                 ("native", ("device", "host"), None)])
def test_other_pools_have_no_array(backend, tiers, pin):
    pool = Pools(tiers, backend=backend).of(SIZE, pin)
    assert pool.array() is None and torch.equal(pages(3), back(pool, pool.write(pages(3))))


def back(pool, ids: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(ids), pool.page_bytes, dtype=torch.uint8)
    pool.read(ids, out, torch.arange(len(ids))).wait()
    return out


def test_memory_that_cannot_be_locked_is_said_once_and_pages_pass_through_the_host():
    pools = Pools(("device", "host"), streams=Delayed(REFUSED))
    store, held = filled(1, 40)
    archive = Archive(Meter(), 4, 4, pools)
    archive.take(store, 0)
    with pytest.warns(UserWarning, match="refused with error 2 when host memory of the cache was to be page-locked"):
        region = archive.fetch(torch.tensor([[[5], [5]]]).int()).wait()
    assert isinstance(archive._mover, Staged) and region.k[region.starts[0, 0, 0], 0] == held[0][20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        region = archive.fetch(torch.tensor([[[5], [2]]]).int()).wait()
    assert region.k[region.starts[0, 1, 0], 0] == held[0][8]


# -- no memory on the device -----------------------------------------------------------------------------------------------------


class Scarce:
    """``empty_rows`` of a device that has memory for so many more tensors."""

    def __init__(self, monkeypatch, module, name: str = "empty_rows"):
        self.left, self._make = 10**9, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self._make(*args, **kwargs)


@pytest.mark.parametrize("streams", [Delayed, lambda: Delayed(None)], ids=["direct", "staged"])
@pytest.mark.parametrize("left", range(3))
def test_a_fetch_without_memory_leaves_the_archive_as_it_was(monkeypatch, streams, left):
    meter, (store, held) = Meter(), filled(1, 40)
    archive = Archive(meter, 4, 2, Pools(("device", "host"), streams=streams()))
    archive.take(store, 0)
    archive.fetch(torch.tensor([[[5], [5]]]).int()).wait()
    scarce, wanted = Scarce(monkeypatch, archives), torch.tensor([[[0, 9, 4], [7, 8, -1]]]).int()
    scarce.left = left
    if left < 2:
        with pytest.raises(torch.OutOfMemoryError):
            archive.fetch(wanted)
        assert meter.now == archive.n_bytes and archive.wanted == 2
    scarce.left = 10**9
    region = archive.fetch(wanted).wait()
    assert region.k[region.starts[0, 0], 0].tolist() == [held[0][4 * p] for p in (0, 9, 4)]
    assert meter.now == archive.n_bytes and archive.wanted == 7


@pytest.mark.parametrize("where", ["copying", "rebuilding"])
def test_pages_that_did_not_come_are_fetched_again(monkeypatch, where):
    streams, meter, (store, held) = Delayed(), Meter(), filled(1, 40)
    archive = Archive(meter, 4, 4, Pools(("device", "host"), streams=streams), LowRankKeys(rank=2).layer(meter, None))
    archive.take(store, 0)
    archive.prepare(lambda pages: None)
    wanted = torch.tensor([[[0, 9, 4], [7, 8, -1]]]).int()
    with monkeypatch.context() as patch:
        Scarce(patch, *((streams, "beside") if where == "copying" else (archive._factors, "rebuild"))).left = 0
        with pytest.raises(torch.OutOfMemoryError):
            archive.fetch(wanted)
    assert meter.now == archive.n_bytes
    region = archive.fetch(wanted).wait()
    assert region.v[region.starts[0, 0], 0].tolist() == [held[0][4 * p] for p in (0, 9, 4)]
    assert (region.k[region.starts[0, 0], 0] - torch.tensor([held[0][4 * p] for p in (0, 9, 4)])).abs().max() < 0.1


@pytest.mark.parametrize("codec", [None, "lowrank"])
@pytest.mark.parametrize("left", range(4))
def test_pages_that_could_not_leave_are_still_there(monkeypatch, codec, left):
    pools, meter, (store, held) = Pools(("device", "host"), streams=Delayed()), Meter(), filled(2, 24)
    archive = Archive(meter, 4, 8, pools, LowRankKeys(rank=2).layer(meter, None) if codec else None)
    archive.take(store, 8)
    archive.prepare(lambda pages: None)
    held = extend(store, held, 300, 2, 5000)
    before = pools.counts()["host"]["pages"], archive.n_bytes, store.lengths.clone()
    with monkeypatch.context() as patch:
        scarce = Scarce(patch, archive._factors, "append") if codec else Scarce(patch, archive._values, "write")
        scarce.left = left if codec else 0
        failed = left < 2 or not codec
        if failed:
            with pytest.raises(torch.OutOfMemoryError):
                archive.take(store, 8)
            assert (pools.counts()["host"]["pages"], archive.n_bytes) == before[:2] and torch.equal(store.lengths, before[2])
            assert meter.now == archive.n_bytes
    archive.take(store, 8)
    region = archive.fetch(torch.tensor([[[3, 70], [0, 5]]] * 2).int()).wait()
    for b in range(2):
        for h, row in enumerate([[3, 70], [0, 5]]):
            assert region.v[region.starts[b, h], 0].tolist() == [held[b][4 * p] for p in row]
            keys = torch.tensor([held[b][4 * p] for p in row]).float()
            torch.testing.assert_close(region.k[region.starts[b, h], 0], keys, rtol=1e-3, atol=1e-2)


def test_keys_that_could_not_become_factors_are_still_keys(monkeypatch):
    meter, (store, held) = Meter(), filled(1, 40)
    archive = Archive(meter, 4, 8, Pools(("device", "host"), streams=Delayed()), LowRankKeys(rank=2).layer(meter, None))
    archive.take(store, 0)
    with monkeypatch.context() as patch:
        Scarce(patch, archive._factors, "_project").left = 0
        with pytest.raises(torch.OutOfMemoryError):
            archive.prepare(lambda pages: None)
    assert archive.exact and meter.now == archive.n_bytes == 0
    assert [k[:, 0].tolist() for k, _, _ in archive.rows(0)] == held * 2
    archive.prepare(lambda pages: None)
    assert not archive.exact
