"""The reference of the host engine, ``csrc/host``: the same behaviour in plain Python, page by page and without threads.

Also what an install without compiler uses. Arrays are numpy's, because both languages can read them as they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator

import numpy as np

from . import errors

# what a disk reads and writes at once
_SECTOR = 4096


class Fence:
    """See ``kvcache.tiers.Fence``; this read is over."""

    def __init__(self, error: Exception | None):
        self._error = error

    def wait(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Yes."""
        return True


class Engine:
    """The tiers behind the device, and the pages of all pools in them.

    Args:
        host: bytes that pages may take in memory; 0 without the tier.
        disk: bytes that they may take in the file, each rounded up to 4 KiB; 0 without the tier.
        folder: of the file.
        threads: of no use here.
    """

    def __init__(self, host: int, disk: int, folder: str, threads: int):
        self.lock, self.process = threading.RLock(), os.getpid()
        self._limits, self._folder = {"host": host, "disk": disk}, folder
        self._names = itertools.count()
        self._memory: dict[int, bytes] = {}  # oldest first
        self._places: dict[int, tuple[int, int, bytes]] = {}  # where in the file, how long, checksum
        self._free: dict[int, list[int]] = {}  # places in the file by their size
        self._end = 0
        self._counts = {tier: {"pages": 0, "bytes": 0, "peak_bytes": 0, "read_bytes": 0} for tier in ("host", "disk")} | {"moved": 0}
        self._file = _open(folder) if disk else None

    def counts(self) -> dict:
        """See ``kvcache.tiers.Pools``."""
        with self.lock:
            return {key: dict(value) if isinstance(value, dict) else value for key, value in self._counts.items()}

    def add(self, pages: list[bytes]) -> list[int]:
        """Names of the pages, which are now held; all of them or, with an exception, none."""
        size, host, held = len(pages[0]), self._limits["host"], self._counts["host"]["bytes"]
        new = {next(self._names): page for page in pages}
        staying = min(len(pages), host // size)
        going = dict(list(new.items())[: len(pages) - staying])  # more than memory ever takes
        moving = []
        for name, page in self._memory.items():
            if held + staying * size <= host:
                break
            moving.append(name)
            going[name], held = page, held - len(page)
        if going:
            if not self._limits["disk"]:
                raise errors.full("host", self._counts["host"]["bytes"], host, len(pages) * size)
            self._put(going)
        for name in moving:
            self._count("host", -1, -len(self._memory.pop(name)))
        self._counts["moved"] += len(moving)
        for name in list(new)[len(pages) - staying :]:
            self._memory[name] = new[name]
            self._count("host", 1, size)
        return list(new)

    def read(self, name: int) -> bytes:
        """A page as it was written."""
        if name in self._memory:
            page = self._memory[name]
            self._counts["host"]["read_bytes"] += len(page)
            return page
        at, size, checksum = self._places[name]
        self._counts["disk"]["read_bytes"] += _padded(size)
        try:
            page = os.pread(self._file.fileno(), size, at)
        except OSError as error:
            raise errors.unreadable(self._folder, error.strerror) from None
        if len(page) < size:
            raise errors.truncated(self._folder)
        if _checksum(page) != checksum:
            raise errors.altered(self._folder)
        return page

    def forget(self, name: int) -> None:
        """Give back the place of a page."""
        if name in self._memory:
            self._count("host", -1, -len(self._memory.pop(name)))
            return
        at, size, _ = self._places.pop(name)
        self._free.setdefault(_padded(size), []).append(at)
        self._count("disk", -1, -_padded(size))

    def _put(self, pages: dict[int, bytes]) -> None:
        """Write pages to the file, all of them or none."""
        need = sum(_padded(len(page)) for page in pages.values())
        held, limit = self._counts["disk"]["bytes"], self._limits["disk"]
        if held + need > limit:
            raise errors.full("disk", held, limit, need)
        made = {}
        try:
            for name, page in pages.items():
                made[name] = (self._place(_padded(len(page))), len(page), _checksum(page))
                rest = memoryview(page.ljust(_padded(len(page)), b"\0"))
                while rest:
                    rest = rest[os.pwrite(self._file.fileno(), rest, made[name][0] + _padded(len(page)) - len(rest)) :]
        except OSError as error:
            for at, size, _ in made.values():
                self._free.setdefault(_padded(size), []).append(at)
            raise errors.unwritten(self._folder, error.strerror, need) from None
        self._places |= made
        self._count("disk", len(made), need)

    def _place(self, size: int) -> int:
        if self._free.get(size):
            return self._free[size].pop()
        self._end += size
        return self._end - size

    def _count(self, tier: str, pages: int, size: int) -> None:
        counts = self._counts[tier]
        counts["pages"] += pages
        counts["bytes"] += size
        counts["peak_bytes"] = max(counts["peak_bytes"], counts["bytes"])


class Pool:
    """Pages of one size; see ``kvcache.tiers.Pool``.

    Args:
        engine: keeps them.
        page_bytes: of each; rows say that themselves here.
    """

    def __init__(self, engine: Engine, page_bytes: int):
        self._engine = engine
        self._holders: dict[int, int] | None = {}

    def write(self, pages: np.ndarray) -> np.ndarray:
        """``pages`` uint8 ``[n, page_bytes]`` -> int64 ``[n]``."""
        with self._open() as holders:
            try:
                names = self._engine.add([page.tobytes() for page in pages]) if len(pages) else []
            except MemoryError:
                raise errors.no_memory(pages.nbytes, os.strerror(errno.ENOMEM)) from None
            holders.update(dict.fromkeys(names, 1))
        return np.array(names, dtype=np.int64)

    def read(self, ids: np.ndarray, out: np.ndarray, slots: np.ndarray) -> Fence:
        """``out`` uint8 ``[m, page_bytes]``; ids and slots int64 ``[n]``."""
        with self._open() as holders:
            _require_held(holders, ids)
            _require_slots(slots, len(out))
            try:
                for name, slot in zip(ids.tolist(), slots.tolist()):
                    out[slot] = np.frombuffer(self._engine.read(name), dtype=np.uint8)
            except errors.TierError as error:
                return Fence(error)
        return Fence(None)

    def hold(self, ids: np.ndarray) -> None:
        """Each id once more."""
        with self._open() as holders:
            _require_held(holders, ids)
            for name in ids.tolist():
                holders[name] += 1

    def release(self, ids: np.ndarray) -> None:
        """Each id once less; 0 frees the page."""
        with self._open() as holders:
            for name, times in zip(*(t.tolist() for t in np.unique(ids, return_counts=True))):
                _require_held(holders, np.array([name]), times)
            for name in ids.tolist():
                holders[name] -= 1
                if not holders[name]:
                    del holders[name]
                    self._engine.forget(name)

    def close(self) -> None:
        """Free everything."""
        if self._engine.process != os.getpid():
            return
        with self._engine.lock:
            for name in self._holders or ():
                self._engine.forget(name)
            self._holders = None

    def __del__(self):
        self.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[int, int]]:
        if self._engine.process != os.getpid():
            raise errors.forked()
        with self._engine.lock:
            if self._holders is None:
                raise errors.closed()
            yield self._holders


class Slots:
    """See ``kvcache.tiers.Slots``."""

    def __init__(self, runs: int, slots: int):
        self._slots, self._runs = slots, [dict() for _ in range(runs)]
        self.hits = self.misses = 0

    def clear(self) -> None:
        """Forget what is where."""
        for run in self._runs:
            run.clear()

    def want(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[runs, m]`` -> int64 slots and bool misses, alike."""
        slot, miss = np.full(ids.shape, -1, dtype=np.int64), np.zeros(ids.shape, dtype=bool)
        wanted = [list(dict.fromkeys(name for name in row if name >= 0)) for row in ids.tolist()]
        most = max(map(len, wanted), default=0)
        if most > self._slots:
            raise errors.too_many(most, self._slots)
        for r, (run, names) in enumerate(zip(self._runs, wanted)):
            new = [name for name in names if name not in run]
            self.hits += len(names) - len(new)
            self.misses += len(new)
            # a run is name -> slot, the longest unwanted first
            unused = sorted(set(range(self._slots)) - set(run.values()))
            unwanted = [name for name in run if name not in set(names)]
            places = unused + [run[name] for name in unwanted]
            for name in unwanted[: max(0, len(new) - len(unused))]:
                del run[name]
            of_new = dict(zip(new, places))
            for name in names:
                run[name] = run.pop(name, None) if name not in of_new else of_new[name]
            seen = set()
            for i, name in enumerate(ids[r].tolist()):
                if name >= 0:
                    slot[r, i], miss[r, i] = run[name], name in of_new and name not in seen
                    seen.add(name)
        return slot, miss


def _open(folder: str):
    try:
        return tempfile.TemporaryFile(dir=folder, prefix=".sparse_attn.", buffering=0)
    except OSError as error:
        raise errors.no_file(folder, error.strerror) from None


def _padded(size: int) -> int:
    return -(-size // _SECTOR) * _SECTOR


def _checksum(page: bytes) -> bytes:
    return hashlib.blake2b(page, digest_size=8).digest()


def _require_held(holders: dict[int, int], ids: np.ndarray, times: int = 1) -> None:
    bad = next((name for name in ids.tolist() if holders.get(name, 0) < times), None)
    if bad is not None:
        raise errors.not_held(bad)


def _require_slots(slots: np.ndarray, rows: int) -> None:
    bad = next((slot for slot in slots.tolist() if not 0 <= slot < rows), None)
    if bad is not None:
        raise errors.no_row(bad, rows)
    if len(np.unique(slots)) < len(slots):
        raise errors.same_row()
