"""Pages of one layer that left its store for slower memory, and the slots on the device that hold those a step reads.

Pages are whole, never change, and leave oldest first, so page p of a run is always its tokens ``p * page`` to ``(p + 1) * page``::

    run       0 0 0 0 1 1 1 1 2 2 2 2 3 3          pages of 4 tokens
    archive   0 0 0 0 1 1 1 1                      here; the store has the rest
    slots     1 1 1 1 . . . .                      on the device: page 1 was read last

Keys and values are pages of their own, because a codec may keep keys in another form. How they come to the slots is in ``movers.py``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import ContractError, require
from sparse_attn.kept import Region

from .movers import Direct, Mover, PageTable, Shelf, Staged
from .store import Meter, Part, Store, empty_rows
from .tiers import Event, Fence, Pin, Pools
from .types import KeyForm

# tokens of each run that come back at a time for a chunk of a prompt
_PIECE = 4096
_NOT_SHARED = ("the KV heads of a layer hold different tokens, and the lowrank codec makes one matrix of all heads; use codec='plain'")


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some pages of KV heads ``heads`` of sequence b: k ``[h, n, D]``, v and positions int32 ``[h, n]`` on the host."""

    b: int
    heads: slice
    k: Tensor
    v: Tensor | None
    positions: Tensor


class Archive:
    """The oldest pages of the runs of one layer.

    Args:
        meter: counts the bytes on the device.
        page: tokens of a page.
        slots: pages of each run that fit on the device beside the store.
        pools: the other tiers.
        factors: what keys become once they are read for the first time; None to keep them as they are.

    Attributes:
        pages: int64 ``[B, Hkv]`` on the host: how many pages of each run are here; None before the first.
    """

    def __init__(self, meter: Meter, page: int, slots: int, pools: Pools, factors: KeyForm | None = None):
        self._meter, self.page, self._n_slots, self._pools, self._factors = meter, page, slots, pools, factors
        self._tally = torch.zeros(2, dtype=torch.int64)  # wanted, missed; where they were counted
        self._blank()

    def _blank(self) -> None:
        self.pages: Tensor | None = None
        self._at: PageTable | None = None
        self._fitted = False
        self._mover: Mover | None = None  # while there are slots
        self._coming: Fetch | None = None  # the last one
        self._moved: Tensor | int = 0
        self._k = self._v = None  # [B * Hkv * slots * page, D], the slots
        self._like: tuple[Tensor, Tensor] | None = None  # rows of k and v, none of them
        self._keys = self._values = None  # pools

    # -- what is here -----------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> Tensor | None:
        """int64 ``[B, Hkv]`` on the host; None where there are none."""
        return None if self.pages is None else self.pages * self.page

    @property
    def exact(self) -> bool:
        """Whether keys still come back as they came."""
        return not self._fitted

    @property
    def n_bytes(self) -> int:
        """On the device: slots, what tells of them, and factors."""
        return self._slot_bytes() + (self._factors.n_bytes if self._factors is not None else 0)

    # these ask the device, which a step does not
    @property
    def wanted(self) -> int:
        """Pages that steps asked for so far."""
        return int(self._tally[0])

    @property
    def missed(self) -> int:
        """Of those the ones that had to come from another tier."""
        return int(self._tally[1])

    @property
    def moved(self) -> int:
        """Bytes that the last step brought to the device."""
        return int(self._moved)

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self._release()
        self._drop_slots()
        if self._factors is not None:
            self._factors.clear()
        self._blank()

    def _release(self) -> None:
        if self.pages is None:
            return
        self._finish()
        here = self._here()
        self._values.release(self._at.values[here])
        self._keys.release(self._at.keys[self._as_they_came(here)])

    def _finish(self) -> None:
        """Before pages are released: nobody reads them any more."""
        if self._mover is not None:
            self._mover.finish()

    def _as_they_came(self, here: Tensor) -> Tensor:
        """Of these pages those whose keys are in their pool."""
        return here & (self._at.keys >= 0)

    def _here(self) -> Tensor:
        """bool ``[B, Hkv, room]``: which entries of the tables are pages."""
        return torch.arange(self._at.keys.shape[2]) < self.pages[..., None]

    def __del__(self):
        if not sys.is_finalizing():  # the process takes its pools along, and torch is half gone
            with contextlib.suppress(ContractError):  # pools that went first, with the same cache
                self._release()

    # -- coming and going -------------------------------------------------------------------------------------------------------

    def take(self, store: Store, leave: int | Tensor) -> None:
        """Move the first whole pages of each run of ``store`` here, all but its last ``leave`` tokens (``[B, Hkv]``) at the least.

        Raises:
            CapacityError: if the last tier is full; the store has them still.
        """
        n = (store.lengths - leave).clamp(min=0) // self.page
        if not bool(n.any()):
            return
        if self.pages is None:
            self._begin(store, n)
        rows = store.rows_of(store.starts, n * self.page)
        count = len(rows) // self.page
        going = (store.v, store.positions, *([] if self._fitted else [store.k]))
        v, positions, *k = (t[rows].reshape(count, -1).cpu() for t in going)
        self._at.grow(int((self.pages + n).max()))
        values = self._values.write(v)
        try:
            keys = None if self._fitted else self._keys.write(*k)
            if self._fitted:
                self._append_factors(store, n)
        except Exception:
            self._values.release(values)
            raise
        slot = torch.arange(self._at.keys.shape[2])
        new = (slot >= self.pages[..., None]) & (slot < (self.pages + n)[..., None])
        self._at.values[new] = values
        if keys is not None:
            self._at.keys[new] = keys
        self._at.positions[new] = positions
        self.pages = self.pages + n
        store.forget_first(n * self.page)

    def _begin(self, store: Store, n: Tensor) -> None:
        like = empty_rows(store.k, 0), empty_rows(store.v, 0)  # a view would keep the rows of today
        pin = self._pin(like[0])
        self._keys, self._values = (self._pools.of(self.page * t.shape[1] * t.element_size(), pin) for t in like)
        shape = (*n.shape, 0)
        self._at = PageTable(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64),
                             torch.zeros((*shape, self.page), dtype=torch.int32))
        self._like, self.pages = like, torch.zeros_like(n)

    def _pin(self, like: Tensor) -> Pin | None:
        """How pages of such rows are page-locked, if anything on their device can read them then."""
        at = torch.zeros(1, dtype=torch.int64, device=like.device)
        rows = torch.zeros(1, 16, dtype=torch.uint8, device=like.device)
        slow = like.is_cuda and ops.gather_pages.chosen(rows, rows, at, at) == "reference"
        return None if slow else self._pools.streams(like.device).pin

    def _append_factors(self, store: Store, n: Tensor) -> None:
        """All sequences or, with an exception, none."""
        tokens = (n * self.page).tolist()
        for counts in tokens:
            require(len(set(counts)) == 1, _NOT_SHARED)
        with self._factors.unless_it_fails():
            for b, (starts, (count, *_)) in enumerate(zip(store.starts.tolist(), tokens)):
                if count:
                    keys = torch.stack([store.k[start : start + count] for start in starts])
                    at = torch.stack([store.positions[start : start + count] for start in starts])
                    self._factors.append(b, keys, _shared(at))

    def prepare(self, exact: Callable[[Tensor], Tensor | None]) -> None:
        """Before the first page is read: turn keys into what the codec keeps.

        Args:
            exact: says which of the first pages (int64 ``[B, Hkv]``) keep their keys as they are: int32 ``[B, Hkv, m]`` numbers, -1 for
                none; None for none at all.
        """
        if self._factors is None or self._fitted:
            return
        require(bool((self.pages == self.pages[:, :1]).all()), _NOT_SHARED)

        def pieces() -> Iterator[tuple[int, Tensor, Tensor]]:
            for piece in self._pieces(values=False):
                yield piece.b, piece.k, _shared(piece.positions)

        going = self._here()
        try:
            self._factors.fit(pieces, len(self.pages))
            chosen = exact(self.pages)
        except Exception:
            self._factors.clear()
            raise
        if chosen is not None:
            going &= ~torch.zeros_like(going).scatter_(2, chosen.cpu().long().clamp(min=0), chosen.cpu() >= 0)
        self._drop_slots()
        self._keys.release(self._at.keys[going])
        self._at.keys[going] = -1
        self._fitted = True

    # -- what is read -----------------------------------------------------------------------------------------------------------

    def fetch(self, chosen: Tensor) -> Fetch:
        """Begin to bring pages (int32 ``[B, Hkv, P]`` numbers, each once per run, -1 for none) to the slots."""
        batch, heads, m = chosen.shape
        if self._coming is not None and not self._coming.landed:  # its pages are not where the slots say
            self._drop_slots()
        self._make_slots(batch * heads, m, chosen.device)
        self._coming = Fetch(None, [])
        wanted, slot, miss = self._mover.place(chosen.reshape(-1, m))
        at = slot.clamp(min=0) + torch.arange(len(slot), device=slot.device)[:, None] * self._n_slots
        coming, at = wanted.long().where(miss, -1).view(batch, heads, m), at.view(batch, heads, m)
        fences, moved = self._bring(self._mover, coming, at, self._k, self._v)
        self._tally = self._tally.to(miss.device) + torch.stack([(wanted >= 0).sum(), miss.sum()])
        self._moved = moved
        counts = torch.where(wanted < 0, 0, self.page).int()
        region = Region(self._k, self._v, *(t.view(batch, heads, m).to(chosen.device) for t in (at * self.page, counts)), own=False)
        self._coming = Fetch(region, fences)
        return self._coming

    def parts(self) -> Iterator[Part]:
        """Everything, in order, a piece at a time; the next one takes the memory of the one before."""
        for piece in self._pieces():
            yield Part(slice(piece.b, piece.b + 1), piece.heads, piece.k[None], piece.v[None])

    def regions(self) -> Iterator[Region]:
        """The same, as pages."""
        batch, heads = self.pages.shape
        self._moved = int(self.pages.sum()) * self.page * sum(t.shape[1] * t.element_size() for t in self._like[self._fitted :])
        for piece in self._pieces():
            count, n, _ = piece.k.shape
            starts, counts = torch.zeros(batch, heads, 1, dtype=torch.int64), torch.zeros(batch, heads, 1, dtype=torch.int32)
            starts[piece.b, piece.heads, 0], counts[piece.b, piece.heads] = torch.arange(count) * n, n
            yield Region(piece.k.flatten(0, 1), piece.v.flatten(0, 1), starts.to(piece.k.device), counts.to(piece.k.device), own=False)

    def keys(self, b: int) -> Iterator[tuple[int, Tensor]]:
        """KV head and keys ``[n, D]`` of a sequence, a piece of a run at a time, in order."""
        for piece in self._pieces(values=False, only=b):
            yield from enumerate(piece.k, piece.heads.start)

    def rows(self, b: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """All tokens of a sequence, in memory of their own: for each KV head k ``[N, D]``, v and positions int32 ``[N]``."""
        found = [[(t[:0], u[:0], self._at.positions[b, h, : int(n)].flatten())] for t, u in [self._like] for h, n in enumerate(self.pages[b])]
        for piece in self._pieces(only=b):
            for i, h in enumerate(range(self.pages.shape[1])[piece.heads]):
                found[h].append((piece.k[i].clone(), piece.v[i].clone()))
        return [(torch.cat([x[0] for x in run]), torch.cat([x[1] for x in run]), run[0][2]) for run in found]

    def _pieces(self, values: bool = True, only: int | None = None) -> Iterator[_Piece]:
        """All pages, a few of each run at a time; of sequence ``only``, where given."""
        heads, step = self.pages.shape[1], max(_PIECE // self.page, 1)
        most = min(step, int(self.pages.max())) * heads
        k, v = (empty_rows(t, most * self.page if wanted else 0) for t, wanted in zip(self._like, (True, values)))
        size = k.numel() * k.element_size() + v.numel() * v.element_size()
        self._meter.add(size)
        try:
            for b in range(len(self.pages)) if only is None else [only]:
                for of, count in _alike(self.pages[b].tolist()):
                    for first in range(0, count, step):
                        at = slice(first, min(first + step, count))
                        yield self._piece(b, of, at, k, v if values else None)
        finally:
            self._meter.add(-size)

    def _piece(self, b: int, heads: slice, at: slice, k: Tensor, v: Tensor | None) -> _Piece:
        count, n = heads.stop - heads.start, at.stop - at.start
        pages, to = torch.full((*self.pages.shape, n), -1), torch.zeros((*self.pages.shape, n), dtype=torch.int64)
        pages[b, heads], to[b, heads] = torch.arange(at.start, at.stop), torch.arange(count * n).view(count, n)
        fences, _ = self._bring(Staged(self._shelf), pages, to, k, v)
        for fence in fences:
            fence.wait()
        k, v = (None if t is None else t[: count * n * self.page].view(count, n * self.page, t.shape[1]) for t in (k, v))
        return _Piece(b, heads, k, v, self._at.positions[b, heads, at].flatten(1))

    def _bring(self, mover: Mover, pages: Tensor, to: Tensor, k: Tensor, v: Tensor | None) -> tuple[list[Fence | Event], Tensor]:
        """Begin to bring pages (int64 ``[B, Hkv, m]`` numbers, -1 for none) to the pages ``to`` of k and v; also the bytes that move."""
        keys, values = mover.find(pages)
        fences = mover.read(keys, values, to, k, v)
        if self._fitted:
            rest = pages.where(keys < 0, -1)
            if not isinstance(mover, Staged) or bool((rest >= 0).any()):
                self._factors.rebuild(rest.int(), self.page, k, to * self.page)
        sizes = [self.page * t.shape[1] * t.element_size() for t in self._like]
        return fences, (keys >= 0).sum() * sizes[0] + (values >= 0).sum() * sizes[1]

    # -- slots ------------------------------------------------------------------------------------------------------------------

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self._keys, self._values, self._at)

    def _make_slots(self, runs: int, wanted: int, device: torch.device) -> None:
        direct = self._keys.array() is not None and self._values.array() is not None
        if self._mover is None or self._n_slots < wanted or isinstance(self._mover, Direct) != direct:
            self._drop_slots()
            n = self._n_slots if wanted <= self._n_slots else wanted + wanted // 8
            k, v = (empty_rows(t, runs * n * self.page) for t in self._like)
            streams = self._pools.streams(device)
            mover = Direct(self._shelf, runs, n, device, streams) if direct else Staged(self._shelf, runs, n)
            self._mover, self._k, self._v, self._n_slots = mover, k, v, n
            self._meter.add(self._slot_bytes())
        if isinstance(self._mover, Direct):
            before = self._mover.n_bytes
            self._mover.know(self.pages)
            self._meter.add(self._mover.n_bytes - before)

    def _slot_bytes(self) -> int:
        if self._mover is None:
            return 0
        return sum(t.numel() * t.element_size() for t in (self._k, self._v)) + self._mover.n_bytes

    def _drop_slots(self) -> None:
        self._finish()
        self._meter.add(-self._slot_bytes())
        self._mover = self._k = self._v = None

    # -- the batch --------------------------------------------------------------------------------------------------------------

    def select(self, sequences: Tensor) -> None:
        """Make the sequences numbered ``sequences`` (host, repeats allowed) the batch; pages are shared, not copied."""
        if self.pages is None:
            return
        self._drop_slots()
        before, here = self._at, self._here()
        there = self._as_they_came(here)
        self._at, self.pages = self._at.of(sequences), self.pages[sequences]
        self._hold()
        self._values.release(before.values[here])
        self._keys.release(before.keys[there])
        if self._fitted:
            self._factors.select(sequences)

    def copy(self, meter: Meter) -> Archive:
        """The same pages, shared; slots of its own."""
        factors = None if self._factors is None else self._factors.copy(meter)
        twin = Archive(meter, self.page, self._n_slots, self._pools, factors)
        twin._like, twin._fitted, twin._keys, twin._values = self._like, self._fitted, self._keys, self._values
        if self.pages is not None:
            twin.pages, twin._at = self.pages.clone(), self._at.of(torch.arange(len(self.pages)))
            twin._hold()
        return twin

    def _hold(self) -> None:
        here = self._here()
        self._values.hold(self._at.values[here])
        self._keys.hold(self._at.keys[self._as_they_came(here)])


@dataclass(eq=False)
class Fetch:
    """Pages on their way to the slots; ``landed`` once they are there, and not if one was lost or nobody waited."""

    region: Region | None
    fences: list[Fence | Event]
    landed: bool = False

    def wait(self) -> Region:
        """Where they are, once they are there: for the host, or for what the device is given from now on."""
        for fence in self.fences:
            fence.wait()
        self.landed = True
        return self.region


def _shared(positions: Tensor) -> Tensor:
    """int64 ``[n]``: the positions that every KV head has, of ``[Hkv, n]``."""
    require(bool((positions == positions[:1]).all()), _NOT_SHARED)
    return positions[0].long()


def _alike(counts: list[int]) -> Iterator[tuple[slice, int]]:
    """All heads at once if they have the same number of pages, else each; and that number."""
    if len(set(counts)) == 1:
        yield slice(0, len(counts)), counts[0]
        return
    yield from ((slice(i, i + 1), count) for i, count in enumerate(counts))
