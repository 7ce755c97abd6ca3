"""Pages that left the device: write once, read by gather threads, held by whoever shares them; and which of them are in its slots.

``Pools`` are the tiers behind the device of one cache: their limits, memory, file and threads. Each pool in them has the pages of one
size. There are two backends with the same behaviour: the C++ engine, and ``plain`` where that was not built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from sparse_attn.errors import require, warn_once

from . import errors, plain
from .specs import Disk, Host, Tier, as_tiers
from .streams import Pin, Streams, streams_of

try:
    from . import _host
except ImportError:
    _host = None

BACKENDS = ({"native": _host} if _host is not None else {}) | {"plain": plain}

_UNLIMITED = 2**62


class Pools:
    """The tiers behind the device of one cache: every limit holds for all its pools together.

    A full host tier passes its oldest pages on to the disk. They stay there: the slots of the device are what keeps pages at hand
    that are read often. Without a disk, host memory may be page-locked (``of``), and a GPU reads it itself; any other read for a GPU
    passes through a piece that is.

    Args:
        tiers: what ``as_tiers`` takes; the device, and one or two behind it.
        threads: that gather pages, for all pools.
        backend: of ``BACKENDS``; None for the compiled one where it was built.
        streams: where the pages of a device are copied.

    Attributes:
        streams: as given.

    Raises:
        ContractError: if there is nothing behind the device, or the disk's folder cannot be written to.
    """

    def __init__(self, tiers: Iterable[Tier | str | dict], threads: int = 2, backend: str | None = None,
                 streams: Callable[[torch.device], Streams] = streams_of):
        self.tiers, self.streams = as_tiers(tiers), streams
        require(len(self.tiers) > 1, "these tiers are the device alone, which needs no pools; add 'host' or 'disk'")
        require(isinstance(threads, int) and threads >= 1, f"threads={threads!r} must be 1 or more")
        found = {type(tier): tier for tier in self.tiers}
        limits = [0 if tier is None else tier.bytes or _UNLIMITED for tier in (found.get(Host), found.get(Disk))]
        self._backend, self._pools = _backend(backend), {}
        self._engine = self._backend.Engine(*limits, found[Disk].folder if Disk in found else "", threads)

    def of(self, page_bytes: int, pin: Pin | None = None) -> Pool:
        """The pool of pages of so many bytes; always the same one.

        Args:
            pin: how its memory is page-locked, where it comes into being with this call; of no use with a disk, to which pages go
                whatever a device reads, or without the compiled backend.
        """
        require(isinstance(page_bytes, int) and page_bytes >= 1, f"page_bytes={page_bytes!r} must be 1 or more")
        if page_bytes not in self._pools:
            of_use = pin is not None and self._backend is _host and Disk not in map(type, self.tiers)
            locks = (pin.lock, pin.unlock) if of_use else ()
            # of two threads that come first at once, one gets the other's
            self._pools.setdefault(page_bytes, Pool(self._backend.Pool(self._engine, page_bytes, *locks), page_bytes, bool(locks)))
        return self._pools[page_bytes]

    def counts(self) -> dict:
        """Of all pools: ``host`` and ``disk`` with ``pages``, ``bytes``, ``peak_bytes`` and ``read_bytes``, and pages ``moved`` down so far.

        Bytes of the disk are those of its file, where each page is rounded up to 4 KiB. What a GPU reads itself is not in
        ``read_bytes``.
        """
        return self._engine.counts()

    def close(self) -> None:
        """Close all pools."""
        for pool in self._pools.values():
            pool.close()
        self._pools = {}


class Pool:
    """Write-once pages of one size, first in host memory, then on disk: what ``Pools.of`` returns. Any thread may use it.

    Attributes:
        page_bytes: of each page.
    """

    def __init__(self, pool, page_bytes: int, locked: bool = False):
        self._pool, self.page_bytes, self._locked = pool, page_bytes, locked

    def array(self) -> Tensor | None:
        """uint8 ``[room, page_bytes]``: the page-locked memory that has all pages as its rows, and nothing to be read in others; or None.

        A device that reads it must be done before a page is released.
        """
        if not self._locked:
            return None
        refusal = self._pool.refusal()
        if refusal:
            why = "has no addresses left" if refusal < 0 else f"refused with error {refusal}"
            warn_once(f"the system {why} when host memory of the cache was to be page-locked, so that its pages pass through the host on "
                      "their way to the GPU, which is slower; raise the limit (ulimit -l, -v), or give the host tier fewer bytes")
            self._locked = False
            return None
        return torch.from_numpy(self._pool.array())

    def rows(self, ids: Tensor) -> Tensor:
        """int64 ``[n]``: rows of ``array`` of the pages ``ids``, as long as they are held."""
        return torch.from_numpy(self._pool.rows(_numbers(ids, "ids")))

    def write(self, pages: Tensor) -> Tensor:
        """Keep pages, each held once.

        Args:
            pages: ``[n, ...]`` on the host, contiguous, ``page_bytes`` per row; copied.

        Returns:
            int64 ``[n]``: ids; none is ever used again in this pool.

        Raises:
            CapacityError: if the last tier cannot take what would have to go there; everything is then as it was.
        """
        require(pages.device.type == "cpu", f"pages must be on the host; they are on {pages.device}")
        rows = self._rows(pages, "pages")
        require(pages.dim() > 0 and len(pages) == len(rows),
                f"pages {list(pages.shape)} of {pages.dtype} are not rows of {self.page_bytes} bytes; give one row per page")
        return torch.from_numpy(self._pool.write(rows.numpy()))

    def read(self, ids: Tensor, out: Tensor, slots: Tensor) -> Fence:
        """Begin to read the pages ``ids`` into the rows ``slots`` of ``out``; a prefetch is a read that is waited for later.

        Pages may be released meanwhile. A fence that is thrown away waits first. Pages for a GPU are gathered in pinned memory and go
        over in one copy, once their fence is waited for: a kernel launch per page would cost more than the page.

        Args:
            ids: int64 ``[n]``.
            out: contiguous, any shape that is whole pages.
            slots: int64 ``[n]``, each its own: rows of out as ``[*, page_bytes]``.

        Returns:
            the fence, whose ``wait()`` returns when all pages are there and raises TierError if one was lost; ``done()`` asks.
        """
        require(ids.shape == slots.shape, f"{list(ids.shape)} ids for {list(slots.shape)} slots; give one slot per id")
        rows = self._rows(out, "out")
        if rows.device.type == "cpu":
            return self._pool.read(_numbers(ids, "ids"), rows.numpy(), _numbers(slots, "slots"))
        return self._read_over(ids, rows, slots)

    def _read_over(self, ids: Tensor, rows: Tensor, slots: Tensor) -> _Landing:
        bad = slots[(slots < 0) | (slots >= len(rows))]
        if len(bad):
            raise errors.no_row(int(bad[0]), len(rows))
        staged = torch.empty(len(ids), self.page_bytes, dtype=torch.uint8, pin_memory=rows.device.type == "cuda")
        return _Landing(self.read(ids, staged, torch.arange(len(ids))), staged, rows, slots)

    def hold(self, ids: Tensor) -> None:
        """Hold pages once more, int64 ``[n]``: beams and forks share them."""
        self._pool.hold(_numbers(ids, "ids"))

    def release(self, ids: Tensor) -> None:
        """Hold pages once less, int64 ``[n]``; those that nobody holds any more are gone."""
        self._pool.release(_numbers(ids, "ids"))

    def close(self) -> None:
        """Give everything back, reads under way first; so does garbage collection."""
        self._pool.close()

    def _rows(self, t: Tensor, name: str) -> Tensor:
        """uint8 ``[n, page_bytes]``, the same memory."""
        require(t.is_contiguous(), f"{name} must be contiguous; its strides are {list(t.stride())}")
        rows = t.detach().reshape(-1).view(torch.uint8)
        require(len(rows) % self.page_bytes == 0,
                f"{name} {list(t.shape)} of {t.dtype} is not whole pages of {self.page_bytes} bytes; give it another shape")
        return rows.view(-1, self.page_bytes)


class Fence(Protocol):
    """The end of a read: until ``wait`` has returned, the rows that it reads into may hold anything."""

    def wait(self) -> None:
        """Return when all pages are there.

        Raises:
            TierError: if one does not come back as it was written.
        """
        ...

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        ...


class _Landing:
    """A fence whose pages have another step to go, to the device."""

    def __init__(self, fence: Fence, staged: Tensor, rows: Tensor, slots: Tensor):
        self._fence, self._copy = fence, (staged, rows, slots)

    def wait(self) -> None:
        self._fence.wait()
        if self._copy is not None:
            staged, rows, slots = self._copy
            # torch keeps pinned memory until the copy from it is done
            rows.index_copy_(0, slots.to(rows.device), staged.to(rows.device, non_blocking=True))
            self._copy = None

    def done(self) -> bool:
        return self._copy is None


class Slots:
    """Which page each device slot of a run holds; only misses move. A page that stays never changes its slot.

    A missing page takes an unused slot, the lowest first, else that of the page which was longest not wanted. Source: kvcache.md
    25.5 (C).

    Args:
        runs: each has slots of its own.
        slots: per run.
        backend: of ``BACKENDS``; None for the compiled one where it was built.

    Attributes:
        hits, misses: wanted pages so far that were there, and that were not.

    Example:
        >>> slots = Slots(1, 2)
        >>> slots.want(torch.tensor([[7, 3]]))
        (tensor([[0, 1]]), tensor([[True, True]]))
        >>> slots.want(torch.tensor([[4, 3]]))
        (tensor([[0, 1]]), tensor([[ True, False]]))
    """

    def __init__(self, runs: int, slots: int, backend: str | None = None):
        for name, count in (("runs", runs), ("slots", slots)):
            require(isinstance(count, int) and count >= 1, f"{name}={count!r} must be 1 or more")
        self.runs, self.slots = runs, slots
        self._slots = _backend(backend).Slots(runs, slots)

    def want(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where pages are or have to be read to, before they are attended.

        Args:
            ids: int64 ``[runs, m]``, -1 for none.

        Returns:
            int64 ``[runs, m]`` slots of the run, -1 for none; bool ``[runs, m]`` misses: pages to be read (a page named twice, once).

        Raises:
            ContractError: if a run wants more pages than it has slots; nothing has changed then.
        """
        require(ids.dim() == 2 and len(ids) == self.runs, f"ids {list(ids.shape)} are not those of {self.runs} runs; give [{self.runs}, m]")
        slot, miss = self._slots.want(_numbers(ids, "ids"))
        return torch.from_numpy(slot), torch.from_numpy(miss)

    def clear(self) -> None:
        """Every slot is unused again."""
        self._slots.clear()

    @property
    def hits(self) -> int:
        return self._slots.hits

    @property
    def misses(self) -> int:
        return self._slots.misses


def _backend(name: str | None):
    if name is None:
        name = next(iter(BACKENDS))
        if name == "plain":
            warn_once("kvcache.tiers._host was not built, so that Python moves pages one by one; reinstall with a C++ compiler")
    require(name in BACKENDS, f"{name!r}: no such backend; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _numbers(t: Tensor, name: str):
    require(t.dtype == torch.int64 and t.device.type == "cpu", f"{name} must be int64 on the host; got {t.dtype} on {t.device}")
    return t.detach().contiguous().numpy()
