"""How pages of one layer come to its slots on the device: through the host, or read by the device itself.

Both know which slot has which page, by the same rule (``kvcache.tiers.Slots``), and both begin a read and return fences. What differs is
where the numbers are: on the host, which then has to know what the device chose; or on the device, which then asks nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_attn import ops

from .tiers import Event, Fence, Pool, Slots, Streams

# what a table of pages grows by
_TABLE = 256


@dataclass
class PageTable:
    """Where the pages of all runs lie, on the host.

    Attributes:
        keys, values: int64 ``[B, Hkv, room]`` numbers in their pools; -1 for keys that are in another form alone.
        positions: int32 ``[B, Hkv, room, page]`` of the tokens.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def grow(self, room: int) -> None:
        """See that ``room`` pages of each run fit; all of it or, with an exception, nothing."""
        missing = room - self.keys.shape[2]
        if missing > 0:
            more = max(missing, _TABLE, self.keys.shape[2] // 4)
            with torch.inference_mode(False):  # written later whatever mode is on then
                found = (self.keys, self.values, self.positions)
                wider = [torch.cat([t, t.new_full((*t.shape[:2], more, *t.shape[3:]), -1)], 2) for t in found]
            self.keys, self.values, self.positions = wider

    def of(self, sequences: Tensor) -> PageTable:
        """That of these sequences, repeats allowed."""
        with torch.inference_mode(False):
            return PageTable(self.keys[sequences], self.values[sequences], self.positions[sequences])


@dataclass(frozen=True)
class Shelf:
    """The pools in which the pages of a layer lie, and their table."""

    keys: Pool
    values: Pool
    table: PageTable


class Mover(Protocol):
    """The slots of all runs of a layer: which page is in which, and how others come."""

    def place(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give pages slots of their run: int32 ``[runs, m]`` on the device, each once per run, -1 for none.

        Returns:
            wanted, int64 slots (-1 for none) and bool misses ``[runs, m]``, where the mover has its numbers.
        """
        ...

    def find(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """int64, like ``pages`` ``[B, Hkv, m]``: where keys and values of those pages are; -1 for none."""
        ...

    def read(self, keys: Tensor, values: Tensor, to: Tensor, k: Tensor, v: Tensor | None) -> list[Fence | Event]:
        """Begin to read what ``find`` found to the pages ``to`` of k and v; no values where v is None."""
        ...

    def finish(self) -> None:
        """Return once no page is being read that a release would not wait for itself."""
        ...

    @property
    def n_bytes(self) -> int:
        """On the device."""
        ...


class Staged:
    """Through the host: gather threads put pages together, and they go over in one piece once they are waited for.

    Args:
        shelf: of the pages.
        runs, slots: of the device, per run; 0 where pages are only read.
    """

    n_bytes = 0

    def __init__(self, shelf: Shelf, runs: int = 0, slots: int = 0):
        self._shelf, self._slots = shelf, Slots(runs, slots) if slots else None

    def place(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Mover``."""
        wanted = wanted.cpu()
        return wanted, *self._slots.want(wanted.long())

    def find(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Mover``: numbers in the pools."""
        return tuple(_found(table, pages) for table in (self._shelf.table.keys, self._shelf.table.values))

    def read(self, keys: Tensor, values: Tensor, to: Tensor, k: Tensor, v: Tensor | None) -> list[Fence | Event]:
        """See ``Mover``."""
        fences = []
        for pool, ids, out in ((self._shelf.keys, keys, k), (self._shelf.values, values, v)):
            there = ids >= 0
            if out is not None and bool(there.any()):
                fences.append(pool.read(ids[there], out, to[there]))
        return fences

    def finish(self) -> None:
        """See ``Mover``: pools wait for their reads."""


class Direct:
    """By the device: it says which pages are missing and reads them from page-locked memory of the host; nothing is synchronised.

    Values are copied beside what is computed meanwhile, such as the keys that are rebuilt from factors.

    Args:
        shelf: of the pages; every pool has its array.
        runs, slots: of the device, per run.
        device: of the slots.
        streams: of the device.
    """

    def __init__(self, shelf: Shelf, runs: int, slots: int, device: torch.device, streams: Streams):
        self._shelf, self._streams, self._last = shelf, streams, None
        with torch.inference_mode(False):
            self._held = torch.full((runs, slots), -1, dtype=torch.int32, device=device)
            self._order = torch.arange(slots, dtype=torch.int32, device=device).repeat(runs, 1)
            self._rows = [table[:, :, :0].to(device) for table in (shelf.table.keys, shelf.table.values)]
        self._known = torch.zeros(shelf.table.keys.shape[:2], dtype=torch.int64)

    @property
    def n_bytes(self) -> int:
        """See ``Mover``."""
        return sum(t.numel() * t.element_size() for t in (self._held, self._order, *self._rows))

    def know(self, pages: Tensor) -> None:
        """The runs have these many pages by now (int64 ``[B, Hkv]``, host): the device's tables follow the host's."""
        if torch.equal(pages, self._known):
            return
        first, last, table = int(self._known.min()), int(pages.max()), self._shelf.table
        wider = []
        with torch.inference_mode(False):
            for pool, ids, rows in zip((self._shelf.keys, self._shelf.values), (table.keys, table.values), self._rows):
                new = torch.full_like(ids[:, :, first:last], -1)
                here = (ids[:, :, first:last] >= 0) & (torch.arange(first, last) < pages[..., None])
                new[here] = pool.rows(ids[:, :, first:last][here])
                more = ids.shape[2] - rows.shape[2] if rows.shape[2] < last else 0
                room = torch.cat([rows, rows.new_full((*rows.shape[:2], more), -1)], 2) if more else rows
                room[:, :, first:last] = new.to(rows.device, non_blocking=True)
                wider.append(room)
        self._rows, self._known = wider, pages.clone()

    def place(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Mover``."""
        slots, misses = ops.place_pages(self._held, self._order, wanted)
        return wanted, slots.long(), misses

    def find(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Mover``: rows of the pools' arrays."""
        return tuple(_found(rows, pages) for rows in self._rows)

    def read(self, keys: Tensor, values: Tensor, to: Tensor, k: Tensor, v: Tensor | None) -> list[Fence | Event]:
        """See ``Mover``."""

        def copy() -> None:
            for pool, rows, out in ((self._shelf.values, values, v), (self._shelf.keys, keys, k)):
                ops.gather_pages(out.view(torch.uint8).view(-1, pool.page_bytes), pool.array(), rows, to)

        self._last = self._streams.beside(copy, keys, values, to, k, v)
        return [self._last]

    def finish(self) -> None:
        """See ``Mover``."""
        if self._last is not None:
            self._last.finish()


def _found(table: Tensor, pages: Tensor) -> Tensor:
    if not table.shape[2]:
        return torch.full_like(pages, -1)
    return table.gather(2, pages.clamp(min=0)).where(pages >= 0, -1)
