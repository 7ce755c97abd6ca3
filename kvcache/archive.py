"""Pages of one layer that left its store for slower memory, and the slots on the device that hold those a step reads.

Pages are whole, never change, and leave oldest first, so page p of a run is always its tokens ``p * page`` to ``(p + 1) * page``::

    run       0 0 0 0 1 1 1 1 2 2 2 2 3 3          pages of 4 tokens
    archive   0 0 0 0 1 1 1 1                      here; the store has the rest
    slots     1 1 1 1 . . . .                      on the device: page 1 was read last

Keys and values are pages of their own, because a codec may keep keys in another form.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.errors import ContractError, require
from sparse_attn.kept import Region

from .store import Meter, Part, Store, empty_rows
from .tiers import Fence, Pools, Slots
from .types import KeyForm

# tokens of each run that come back at a time for a chunk of a prompt
_PIECE = 4096
_NOT_SHARED = ("the KV heads of a layer hold different tokens, and the lowrank codec makes one matrix of all heads; use codec='plain'")
# what a table of pages grows by
_TABLE = 256


@dataclass
class _Pages:
    """Where the pages of all runs lie.

    Attributes:
        keys, values: int64 ``[B, Hkv, room]`` numbers in their pools; -1 for keys that are in another form alone.
        positions: int32 ``[B, Hkv, room, page]`` of the tokens.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def grow(self, room: int) -> None:
        """See that ``room`` pages of each run fit."""
        missing = room - self.keys.shape[2]
        if missing > 0:
            more = max(missing, _TABLE, self.keys.shape[2] // 4)
            with torch.inference_mode(False):  # written later whatever mode is on then
                for name in ("keys", "values", "positions"):
                    t = getattr(self, name)
                    setattr(self, name, torch.cat([t, t.new_full((*t.shape[:2], more, *t.shape[3:]), -1)], 2))

    def of(self, sequences: Tensor) -> _Pages:
        with torch.inference_mode(False):
            return _Pages(self.keys[sequences], self.values[sequences], self.positions[sequences])


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
        wanted, missed: pages that steps asked for so far, and of those the ones that had to come from another tier.
        moved: bytes that the last step brought to the device.
    """

    def __init__(self, meter: Meter, page: int, slots: int, pools: Pools, factors: KeyForm | None = None):
        self._meter, self.page, self._n_slots, self._pools, self._factors = meter, page, slots, pools, factors
        self.wanted = self.missed = 0
        self._blank()

    def _blank(self) -> None:
        self.pages: Tensor | None = None
        self._at: _Pages | None = None
        self._fitted = False
        self._slots: Slots | None = None
        self._coming: Fetch | None = None  # the last one
        self.moved = 0
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
        """On the device: slots and factors."""
        held = sum(t.numel() * t.element_size() for t in (self._k, self._v) if t is not None)
        return held + (self._factors.n_bytes if self._factors is not None else 0)

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
        here = self._here()
        self._values.release(self._at.values[here])
        self._keys.release(self._at.keys[self._as_they_came(here)])

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
            self._like = empty_rows(store.k, 0), empty_rows(store.v, 0)  # a view would keep the rows of today
            self._keys, self._values = (self._pools.of(self.page * t.shape[1] * t.element_size()) for t in self._like)
            self.pages, shape = torch.zeros_like(n), (*n.shape, 0)
            self._at = _Pages(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64),
                              torch.zeros((*shape, self.page), dtype=torch.int32))
        rows = store.rows_of(store.starts, n * self.page)
        count = len(rows) // self.page
        values = self._values.write(store.v[rows].reshape(count, -1).cpu())
        try:
            keys = None if self._fitted else self._keys.write(store.k[rows].reshape(count, -1).cpu())
            if self._fitted:
                self._append_factors(store, n)
        except Exception:
            self._values.release(values)
            raise
        self._at.grow(int((self.pages + n).max()))
        slot = torch.arange(self._at.keys.shape[2])
        new = (slot >= self.pages[..., None]) & (slot < (self.pages + n)[..., None])
        self._at.values[new] = values
        if keys is not None:
            self._at.keys[new] = keys
        self._at.positions[new] = store.positions[rows].view(count, self.page).cpu()
        self.pages = self.pages + n
        store.forget_first(n * self.page)

    def _append_factors(self, store: Store, n: Tensor) -> None:
        for b, (starts, counts) in enumerate(zip(store.starts.tolist(), (n * self.page).tolist())):
            require(len(set(counts)) == 1, _NOT_SHARED)
            if counts[0]:
                keys = torch.stack([store.k[start : start + count] for start, count in zip(starts, counts)])
                at = torch.stack([store.positions[start : start + count] for start, count in zip(starts, counts)])
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

        self._factors.fit(pieces, len(self.pages))
        going, chosen = self._here(), exact(self.pages)
        if chosen is not None:
            going &= ~torch.zeros_like(going).scatter_(2, chosen.cpu().long().clamp(min=0), chosen.cpu() >= 0)
        self._keys.release(self._at.keys[going])
        self._at.keys[going] = -1
        self._fitted = True

    # -- what is read -----------------------------------------------------------------------------------------------------------

    def fetch(self, chosen: Tensor) -> Fetch:
        """Begin to bring pages (int32 ``[B, Hkv, P]`` numbers, each once per run, -1 for none) to the slots."""
        batch, heads, m = chosen.shape
        if self._coming is not None and not self._coming.landed:  # its pages are not where the slots say
            self._drop_slots()
        self._make_slots(batch * heads, m)
        self._coming = Fetch(None, [])
        wanted = chosen.cpu().long().view(-1, m)
        slot, miss = self._slots.want(wanted)
        at = slot.clamp(min=0) + torch.arange(len(slot))[:, None] * self._n_slots
        coming, at = wanted.where(miss, -1).view(batch, heads, m), at.view(batch, heads, m)
        fences, moved = self._bring(coming, at, self._k, self._v)
        self.wanted, self.missed, self.moved = self.wanted + int((wanted >= 0).sum()), self.missed + int(miss.sum()), moved
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
        self.moved = int(self.pages.sum()) * self.page * sum(t.shape[1] * t.element_size() for t in self._like[self._fitted :])
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
        fences, _ = self._bring(pages, to, k, v)
        for fence in fences:
            fence.wait()
        k, v = (None if t is None else t[: count * n * self.page].view(count, n * self.page, t.shape[1]) for t in (k, v))
        return _Piece(b, heads, k, v, self._at.positions[b, heads, at].flatten(1))

    def _bring(self, pages: Tensor, to: Tensor, k: Tensor, v: Tensor | None) -> tuple[list[Fence], int]:
        """Begin to bring pages (int64 ``[B, Hkv, m]`` numbers, -1 for none) to the pages ``to`` of k and v; also the bytes that move."""
        b, h, i = (pages >= 0).nonzero(as_tuple=True)
        at, slots = (b, h, pages[b, h, i]), to[b, h, i]
        keys = self._at.keys[at]
        there = keys >= 0
        fences = [self._keys.read(keys[there], k, slots[there])] if bool(there.any()) else []
        if v is not None:
            fences.append(self._values.read(self._at.values[at], v, slots))
        if not bool(there.all()):
            rest = pages.clone()
            rest[b[there], h[there], i[there]] = -1
            self._factors.rebuild(rest.int(), self.page, k, to * self.page)
        sizes = [self.page * t.shape[1] * t.element_size() for t in self._like]
        return fences, int(there.sum()) * sizes[0] + len(keys) * sizes[1]

    # -- slots ------------------------------------------------------------------------------------------------------------------

    def _make_slots(self, runs: int, wanted: int) -> None:
        if self._slots is not None and self._n_slots >= wanted:
            return
        self._drop_slots()
        if wanted > self._n_slots:
            self._n_slots = wanted + wanted // 8
        self._slots = Slots(runs, self._n_slots)
        self._k, self._v = (empty_rows(t, runs * self._n_slots * self.page) for t in self._like)
        self._meter.add(self._k.numel() * self._k.element_size() + self._v.numel() * self._v.element_size())

    def _drop_slots(self) -> None:
        if self._slots is not None:
            self._meter.add(-self._k.numel() * self._k.element_size() - self._v.numel() * self._v.element_size())
        self._slots = self._k = self._v = None

    # -- the batch --------------------------------------------------------------------------------------------------------------

    def select(self, sequences: Tensor) -> None:
        """Make the sequences numbered ``sequences`` (host, repeats allowed) the batch; pages are shared, not copied."""
        if self.pages is None:
            return
        before, here = self._at, self._here()
        there = self._as_they_came(here)
        self._at, self.pages = self._at.of(sequences), self.pages[sequences]
        self._hold()
        self._values.release(before.values[here])
        self._keys.release(before.keys[there])
        if self._fitted:
            self._factors.select(sequences)
        self._drop_slots()

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
    fences: list[Fence]
    landed: bool = False

    def wait(self) -> Region:
        """Where they are, once they are there."""
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
