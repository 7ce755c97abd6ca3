"""Pages in host memory and on disk against a dict: whatever happens to a tier, a page comes back as it was written or not at all."""

import gc
import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.tiers import TIERS, CapacityError, Device, Disk, Host, Pools, Slots, TierError, as_tiers
from kvcache.tiers.pool import BACKENDS
from sparse_attn import ContractError

SIZE = 4096
everywhere = pytest.mark.parametrize("backend", list(BACKENDS))


def pages(n: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def back(pool, ids: torch.Tensor) -> torch.Tensor:
    """Pages as they are read, in reversed slots to see that those are obeyed."""
    out = torch.zeros(len(ids), pool.page_bytes, dtype=torch.uint8)
    pool.read(ids, out, torch.arange(len(ids)).flip(0)).wait()
    return out.flip(0)


def open_files(folder) -> list[int]:
    """Descriptors of files in ``folder`` that have no name any more."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(str(folder)) and target.endswith("(deleted)"):
            found.append(int(name))
    return found


@pytest.mark.parametrize(("tiers", "made"), [
    (("device",), (Device(),)),
    (("device", "host", {"name": "disk", "bytes": 8192, "folder": "x"}), (Device(), Host(), Disk(8192, "x"))),
    ([Device(), Disk(folder="x")], (Device(), Disk(None, "x"))),
])
def test_tiers_by_name_and_json_form(tiers, made):
    assert as_tiers(tiers) == made == as_tiers(made)
    assert [type(tier) for tier in made] == [cls for cls in TIERS.values() if cls in map(type, made)]


@pytest.mark.parametrize(("tiers", "sentence"), [
    ("host", "must be a list"), ((), "tiers=none must begin"), (("host",), "must begin with the device"),
    (("device", "disk", "host"), "go down"), (("device", "host", "host"), "at most once"), (("device", "tape"), "'tape': no such tier"),
    (("device", 3), "3 is no tier"), (("device", {"name": "host", "byte": 1}), "no argument 'byte'; it has bytes"),
    (("device", {"name": "host", "bytes": 0}), "bytes=0 of the host tier"), (("device", {"name": "disk", "bytes": True}), "bytes=True of the disk"),
])
def test_wrong_tiers_are_refused(tiers, sentence):
    with pytest.raises(ContractError, match=sentence):
        as_tiers(tiers)


@everywhere
@given(data=st.data())
def test_any_life_of_pools(backend, data):
    sizes = data.draw(st.lists(st.sampled_from([1, 100, 4096, 5000]), min_size=1, max_size=3, unique=True))
    host = data.draw(st.sampled_from([None, 0, 1, 9000, 30000]))
    disk = data.draw(st.sampled_from([None, 0, 40960])) if host is None or host else data.draw(st.sampled_from([None, 40960]))
    tiers = ["device"] + ([Host(host)] if host != 0 else []) + ([Disk(disk)] if disk != 0 else [])
    tiers = tiers if len(tiers) > 1 else ["device", "host"]
    pools = Pools(tiers, backend=backend)
    model, holders, gone, moved = {}, {}, [], 0  # (size, id) -> page, times held
    for step in range(data.draw(st.integers(1, 15))):
        what, size = data.draw(st.sampled_from(["write", "write", "read", "hold", "release"])), data.draw(st.sampled_from(sizes))
        pool, here = pools.of(size), [key for key in model if key[0] == size]
        if what == "write":
            new = pages(data.draw(st.integers(0, 5)), size, step)
            before = pools.counts()
            try:
                ids = pool.write(new)
            except CapacityError:
                assert pools.counts() == before
                continue
            assert ids.dtype == torch.int64 and not {(size, i) for i in ids.tolist()} & {*model, *gone}
            model |= {(size, i): page for i, page in zip(ids.tolist(), new)}
            holders |= {(size, i): 1 for i in ids.tolist()}
        elif here:
            keys = data.draw(st.lists(st.sampled_from(here), max_size=4))
            ids = torch.tensor([i for _, i in keys], dtype=torch.int64)
            if what == "read":
                assert torch.equal(back(pool, ids), torch.stack([model[key] for key in keys]) if keys else torch.zeros(0, size, dtype=torch.uint8))
            elif what == "hold":
                pool.hold(ids)
                for key in keys:
                    holders[key] += 1
            else:
                enough = all(keys.count(key) <= holders[key] for key in keys)
                before = pools.counts()
                if not enough:
                    with pytest.raises(ContractError, match="nobody holds page"):
                        pool.release(ids)
                    assert pools.counts() == before
                    continue
                pool.release(ids)
                for key in keys:
                    holders[key] -= 1
                for key in {*keys}:
                    if not holders[key]:
                        del model[key]
                        gone.append(key)
                        with pytest.raises(ContractError, match="nobody holds page"):
                            back(pool, torch.tensor([key[1]]))
        counts = pools.counts()
        assert counts["host"]["pages"] + counts["disk"]["pages"] == len(model)
        assert counts["moved"] >= moved
        moved = counts["moved"]
        for tier, limit in (("host", host), ("disk", disk)):
            assert counts[tier]["bytes"] <= counts[tier]["peak_bytes"] and (limit is None or not limit or counts[tier]["peak_bytes"] <= limit)
    for size in sizes:
        keys = [key for key in model if key[0] == size]
        if keys:
            assert torch.equal(back(pools.of(size), torch.tensor([i for _, i in keys])), torch.stack([model[key] for key in keys]))
    pools.close()
    counts = pools.counts()
    assert counts["host"]["pages"] == counts["disk"]["pages"] == counts["host"]["bytes"] == counts["disk"]["bytes"] == 0


@everywhere
def test_the_oldest_pages_of_any_pool_go_down_first(backend, tmp_path):
    pools = Pools(("device", Host(4 * SIZE), Disk(folder=tmp_path)), backend=backend)
    keys, values = pools.of(SIZE), pools.of(2 * SIZE)
    old, new = keys.write(pages(2)), values.write(pages(1, 2 * SIZE))
    more = keys.write(pages(1, seed=1))
    counts = pools.counts()
    assert counts["moved"] == 1 and counts["host"]["bytes"] == 4 * SIZE and counts["disk"] == {
        "pages": 1, "bytes": SIZE, "peak_bytes": SIZE, "read_bytes": 0}
    back(keys, old[:1])
    assert pools.counts()["disk"]["read_bytes"] == SIZE, "the oldest page is not the one on disk"
    assert torch.equal(back(keys, torch.cat([old, more])), torch.cat([pages(2), pages(1, seed=1)]))
    assert torch.equal(back(values, new), pages(1, 2 * SIZE))


@everywhere
@pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (3, 16, 128)), (torch.float32, (3, 1024)), (torch.int8, (3, 4096))])
def test_pages_of_any_dtype(backend, dtype, shape):
    pool = Pools(("device", "host"), backend=backend).of(SIZE)
    new = pages(3).view(-1).view(dtype).view(shape)
    out = torch.zeros(5, SIZE, dtype=torch.uint8).view(-1).view(dtype)
    pool.read(pool.write(new), out, torch.tensor([4, 0, 2])).wait()
    assert torch.equal(out.view(torch.uint8).view(5, SIZE)[[4, 0, 2]], pages(3)) and not out.view(torch.uint8).view(5, SIZE)[[1, 3]].any()


@everywhere
@pytest.mark.parametrize("tiers", [("device", Host(4 * SIZE)), ("device", Disk(4 * SIZE)), ("device", Host(2 * SIZE), Disk(2 * SIZE))])
def test_a_full_last_tier_loses_nothing(backend, tiers):
    pools = Pools(tiers, backend=backend)
    pool = pools.of(SIZE)
    ids = pool.write(pages(3))
    before = pools.counts()
    name = "disk" if type(tiers[-1]) is Disk else "host"
    with pytest.raises(CapacityError, match=rf"the {name} tier holds .* of at most .* raise its bytes=.*nothing that the tiers hold is lost"):
        pool.write(pages(2))
    assert pools.counts() == before
    ids = torch.cat([ids, pool.write(pages(1, seed=1))])
    assert torch.equal(back(pool, ids), torch.cat([pages(3), pages(1, seed=1)]))
    pool.release(ids[:2])
    assert torch.equal(back(pool, pool.write(pages(2, seed=2))), pages(2, seed=2))


@everywhere
def test_a_disk_that_is_really_full_loses_nothing(backend, tmp_path):
    pools = Pools(("device", Host(4 * SIZE), Disk(5 * SIZE, tmp_path)), backend=backend)
    pool = pools.of(SIZE)
    ids = pool.write(pages(6))
    before, limits = pools.counts(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * SIZE + 100, limits[1]))
    try:
        with pytest.raises(CapacityError, match=f"the disk tier cannot write .* bytes to {tmp_path}: File too large; make room there"):
            pool.write(pages(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pools.counts() == before
    assert torch.equal(back(pool, ids), pages(6))
    assert torch.equal(back(pool, torch.cat([ids, pool.write(pages(3, seed=1))])), torch.cat([pages(6), pages(3, seed=1)]))


@everywhere
@pytest.mark.parametrize("kind", ["missing", "a file", "not ours"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(backend, kind, tmp_path):
    folder = {"missing": tmp_path / "no", "a file": tmp_path / "file", "not ours": tmp_path / "locked"}[kind]
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    if kind == "not ours" and os.access(folder, os.W_OK):
        folder = "/proc"  # root may write anywhere but here
    with pytest.raises(ContractError, match=f"cannot make a file in {folder}: .*; give Disk a folder that can be written to"):
        Pools(("device", Disk(folder=folder)), backend=backend)


@everywhere
@pytest.mark.parametrize("size", [SIZE, 1000])
@pytest.mark.parametrize("fault", ["truncated", "altered", "half written", "an older page"])
def test_a_page_that_was_damaged_is_found(backend, fault, size, tmp_path):
    pool = Pools(("device", Disk(folder=tmp_path)), backend=backend).of(size)
    first = pool.write(pages(4, size))
    (file,) = open_files(tmp_path)
    with open(f"/proc/self/fd/{file}", "r+b") as spill:
        stale = spill.read()
        pool.release(first)
        ids = pool.write(pages(4, size, seed=1))
        assert torch.equal(back(pool, ids), pages(4, size, seed=1))
        if fault == "truncated":
            spill.truncate(SIZE)
        elif fault == "an older page":
            spill.seek(0)
            spill.write(stale)
        else:
            spill.seek(2 * SIZE + (size - 1 if fault == "altered" else 512))
            byte = spill.read(1)
            spill.seek(-1, 1)
            spill.write(bytes([byte[0] ^ 1]) if fault == "altered" else bytes(4096 - 512))
    fence = pool.read(ids, torch.zeros(4, size, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(TierError, match="was truncated" if fault == "truncated" else "was altered or only half written"):
        fence.wait()
    assert fence.done()
    lost = 0
    for i in range(4):
        try:
            assert torch.equal(back(pool, ids[i : i + 1]), pages(4, size, seed=1)[i : i + 1])
        except TierError:
            lost += 1
    assert lost == {"truncated": 3, "altered": 1, "half written": 1, "an older page": 4}[fault]


@everywhere
def test_the_file_is_private_has_no_name_and_goes_with_the_pools(backend, tmp_path):
    one, other = (Pools(("device", Disk(folder=tmp_path)), backend=backend) for _ in range(2))
    files = open_files(tmp_path)
    assert len(files) == 2 and os.listdir(tmp_path) == []
    assert all(stat.S_IMODE(os.fstat(file).st_mode) == 0o600 for file in files)
    ids, others = one.of(SIZE).write(pages(3)), other.of(SIZE).write(pages(3, seed=1))
    assert torch.equal(back(one.of(SIZE), ids), pages(3)) and torch.equal(back(other.of(SIZE), others), pages(3, seed=1))
    del one
    assert len(open_files(tmp_path)) == 1
    assert torch.equal(back(other.of(SIZE), others), pages(3, seed=1))


KILLED = """
import os, signal, sys, torch
from kvcache.tiers import Disk, Pools
pools = Pools(("device", Disk(folder=sys.argv[1])), backend=sys.argv[2])
pools.of(4096).write(torch.zeros(100, 4096, dtype=torch.uint8))
print("written", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@everywhere
def test_a_killed_process_leaves_no_file(backend, tmp_path):
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), backend], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "written\n" and ran.returncode == -signal.SIGKILL, ran.stderr
    assert os.listdir(tmp_path) == []


@everywhere
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_process_does_not_touch_the_pools_of_its_parent(backend, tmp_path):
    pool = Pools(("device", Disk(folder=tmp_path)), backend=backend).of(SIZE)
    ids = pool.write(pages(50))
    back(pool, ids)
    child = os.fork()
    if not child:
        refused = 0
        for call in (lambda: pool.write(pages(1)), lambda: back(pool, ids), lambda: pool.release(ids), lambda: pool.hold(ids)):
            try:
                call()
            except ContractError as error:
                refused += "was forked" in str(error)
        pool.close()
        del pool
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert torch.equal(back(pool, ids), pages(50))


@everywhere
def test_a_system_without_memory_loses_nothing(backend):
    pools = Pools(("device", "host"), backend=backend)
    pool = pools.of(SIZE)
    # more than tests before this one may give back meanwhile, in pages that fit no hole of the heap
    ids, big = pool.write(pages(3)), torch.zeros(50, 10_000 * SIZE, dtype=torch.uint8)
    gc.collect()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = pools.counts()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, limits[1]))
    try:
        with pytest.raises(CapacityError, match="the host tier cannot get 2,048,000,000 bytes of memory: Cannot allocate memory"):
            pools.of(big.shape[1]).write(big)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert pools.counts() == before
    assert torch.equal(back(pool, ids), pages(3))


@everywhere
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_pages_go_over_to_a_device_once_they_are_waited_for(backend, device):
    pool = Pools(("device", "host"), backend=backend).of(SIZE)
    ids, out, slots = pool.write(pages(100)), torch.zeros(200, SIZE // 2, dtype=torch.bfloat16, device=device), torch.randperm(200)[:100]
    rows = out.view(torch.uint8)
    begin = pool.read if device == "cuda" else lambda ids, out, slots: pool._read_over(ids, rows, slots)
    fence = begin(ids, out, slots)
    assert not fence.done() and not rows.any()
    fence.wait()
    fence.wait()
    assert fence.done() and torch.equal(rows.cpu()[slots], pages(100)) and int(rows.any(1).sum()) == 100
    with pytest.raises(ContractError, match="no row 200 for a page among the 200"):
        begin(ids[:1], out, torch.tensor([200]))


@everywhere
def test_a_read_under_way_survives_the_release_of_its_pages(backend, tmp_path):
    pools = Pools(("device", Host(64 * SIZE), Disk(folder=tmp_path)), backend=backend)
    pool = pools.of(SIZE)
    for round in range(20):
        ids = pool.write(pages(100, seed=round))
        out = torch.zeros(100, SIZE, dtype=torch.uint8)
        fence = pool.read(ids, out, torch.arange(100))
        pool.release(ids)
        again = pool.write(pages(100, seed=-round - 1))
        fence.wait()
        assert torch.equal(out, pages(100, seed=round))
        pool.release(again)
    assert pools.counts()["host"]["pages"] == pools.counts()["disk"]["pages"] == 0


@everywhere
def test_a_page_that_is_read_goes_down_when_the_read_is_over(backend, tmp_path):
    size, n = 2**18, 192  # whole slabs, so that the new page takes the place of the old one
    pools = Pools(("device", Host(n * size), Disk(folder=tmp_path)), backend=backend)
    pool, out = pools.of(size), torch.zeros(n, size, dtype=torch.uint8)
    ids = pool.write(pages(n, size))
    fence = pool.read(ids.flip(0), out, torch.arange(n).flip(0))  # the oldest page last
    pool.write(pages(1, size, seed=1))
    fence.wait()
    assert torch.equal(out, pages(n, size)) and pools.counts()["moved"] == 1


@everywhere
def test_a_fence_that_is_thrown_away_waits(backend, tmp_path):
    pool = Pools(("device", Disk(folder=tmp_path)), backend=backend).of(SIZE)
    ids, out = pool.write(pages(200)), torch.zeros(200, SIZE, dtype=torch.uint8)
    pool.read(ids, out, torch.arange(200))
    assert torch.equal(out, pages(200))


@everywhere
def test_many_threads_may_use_a_pool(backend, tmp_path):
    pools = Pools(("device", Host(50 * SIZE), Disk(folder=tmp_path)), threads=3, backend=backend)
    failures = []

    def life(number: int) -> None:
        try:
            pool = pools.of(SIZE)
            for round in range(15):
                new = pages(20, seed=100 * number + round)
                ids = pool.write(new)
                pool.hold(ids)
                assert torch.equal(back(pool, ids), new)
                pool.release(ids)
                assert torch.equal(back(pool, ids.flip(0)), new.flip(0))
                pool.release(ids)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=life, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pools.counts()["host"]["pages"] == pools.counts()["disk"]["pages"] == 0


@everywhere
def test_bad_input_gets_a_sentence(backend):
    with pytest.raises(ContractError, match="the device alone"):
        Pools(("device",), backend=backend)
    pools = Pools(("device", "host"), backend=backend)
    pool = pools.of(SIZE)
    ids, out, slots = pool.write(pages(2)), torch.zeros(4, SIZE, dtype=torch.uint8), torch.arange(2)
    for call, sentence in [
        (lambda: pools.of(0), "page_bytes=0"),
        (lambda: pool.write(pages(2, 100)), r"pages \[2, 100\] of torch.uint8 is not whole pages of 4096 bytes"),
        (lambda: pool.write(pages(2).view(4, -1)), "are not rows of 4096 bytes"),
        (lambda: pool.write(pages(4)[::2]), "must be contiguous"),
        (lambda: pool.read(ids, out[:, 1:].contiguous(), slots), "not whole pages of 4096"),
        (lambda: pool.read(ids, out.t(), slots), "must be contiguous"),
        (lambda: pool.read(ids, out, torch.arange(3)), r"\[2\] ids for \[3\] slots"),
        (lambda: pool.read(ids.int(), out, slots), "ids must be int64"),
        (lambda: pool.read(ids, out, slots + 3), "no row 4 for a page among the 4"),
        (lambda: pool.read(ids, out, slots - 1), "no row -1"),
        (lambda: pool.read(ids, out, slots * 0), "each its own slot"),
        (lambda: pool.read(ids + 2**40, out, slots), "nobody holds page"),
        (lambda: pool.hold(torch.tensor([-1])), "nobody holds page -1"),
    ]:
        with pytest.raises(ContractError, match=sentence):
            call()
    assert torch.equal(back(pool, ids), pages(2)) and not out.any()
    pool.close()
    with pytest.raises(ContractError, match="was closed"):
        pool.write(pages(1))


@everywhere
@given(data=st.data())
def test_slots_keep_hits_and_reuse_what_was_longest_not_wanted(backend, data):
    runs, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    slots, held = Slots(runs, count, backend=backend), [{} for _ in range(runs)]  # slot -> (id, when it was last wanted)
    hits = misses = clock = 0
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.integers(0, 9)) == 0:
            slots.clear()
            held = [{} for _ in range(runs)]
        m = data.draw(st.integers(1, count + 1))
        rows = [data.draw(st.lists(st.integers(-1, 8), min_size=m, max_size=m)) for _ in range(runs)]
        if max(len({*row} - {-1}) for row in rows) > count:
            with pytest.raises(ContractError, match=rf"wants {count + 1} pages at once and has {count} slots"):
                slots.want(torch.tensor(rows))
            continue
        slot, miss = slots.want(torch.tensor(rows))
        for run, row, places, missed in zip(held, rows, slot.tolist(), miss.tolist()):
            before, names = dict(run), list(dict.fromkeys(name for name in row if name >= 0))
            there = {name: at for at, (name, _) in before.items()}
            free = [at for at in range(count) if at not in before]
            free += sorted((at for at, (name, _) in before.items() if name not in names), key=lambda at: before[at][1])
            expected = {name: there[name] if name in there else free.pop(0) for name in names}
            assert places == [expected.get(name, -1) for name in row]
            assert missed == [name >= 0 and name not in there and row.index(name) == i for i, name in enumerate(row)]
            hits, misses = hits + sum(name in there for name in names), misses + sum(name not in there for name in names)
            for name in names:
                clock += 1
                run[expected[name]] = (name, clock)
        assert (slots.hits, slots.misses) == (hits, misses)


@everywhere
def test_wrong_slots_are_refused(backend):
    for call, sentence in [(lambda: Slots(0, 1, backend=backend), "runs=0"), (lambda: Slots(1, 0, backend=backend), "slots=0"),
                           (lambda: Slots(2, 1, backend=backend).want(torch.zeros(1, 1, dtype=torch.int64)), "not those of 2 runs"),
                           (lambda: Slots(1, 1, backend="abacus"), "'abacus': no such backend")]:
        with pytest.raises(ContractError, match=sentence):
            call()
