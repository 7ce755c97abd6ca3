"""What a reader needs to know of each page of keys without reading it: the smallest and largest value of every channel.

Pages are counted from the start of each run, and lie as runs of their own, beside the rows that they describe::

    rows      a a a a a a . . b b b . .      runs a and b, pages of 4 rows
    pages     A A . B .                      '.' is room to grow
"""

from __future__ import annotations

import torch
from torch import Tensor

from .store import Meter, empty_rows

# what the pages of a run may grow by before they are copied again, as a share
_GROW = 32


class PageDigest:
    """Smallest and largest keys of the pages of one layer (Quest, arXiv:2406.10774), as far as ``update`` has seen its runs.

    Args:
        meter: counts the bytes.
        page: rows of a page; the last page of a run may have fewer.

    Attributes:
        low, high: ``[P, D]`` in the dtype of the keys; None before the first update.
        starts, pages: int64 ``[B, Hkv]`` on the host: first page and pages of each run.
    """

    def __init__(self, meter: Meter, page: int):
        self._meter, self.page = meter, page
        self.low = self.high = None
        self.clear()

    def clear(self) -> None:
        """Forget every page and release the memory; also what to do when rows were moved or replaced."""
        self._meter.add(-self.n_bytes)
        self.low = self.high = self.starts = self.pages = self._room = self._covered = None

    @property
    def n_bytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return 0 if self.low is None else 2 * self.low.numel() * self.low.element_size()

    def page_bytes(self) -> int:
        """Bytes per page and KV head."""
        return 2 * self.low.shape[1] * self.low.element_size()

    def update(self, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Follow runs that grew or lost their last rows; rows seen before are not read again, but for those of an open page.

        Args:
            k: ``[S, D]`` keys.
            starts, lengths: int64 ``[B, Hkv]`` on the host; runs may have moved, their rows as they were.
        """
        pages = (lengths + self.page - 1) // self.page
        if self.low is None:
            self.pages = self._covered = torch.zeros_like(lengths)
        self._make_room(k, pages)
        first = torch.minimum(self._covered, lengths) // self.page  # of the pages to make
        made = pages - first
        self.pages, self._covered = pages, lengths.clone()
        if int(made.max()) > 1:
            self._make(k, starts, lengths, first)
        elif bool(made.any()):
            self._make_one(k, starts, lengths, first, made == 1)

    def _make_one(self, k: Tensor, starts: Tensor, lengths: Tensor, first: Tensor, where: Tensor) -> None:
        """One page of every run in ``where``: what a generated token asks for."""
        begin, last = (starts + first * self.page)[where], (starts + lengths - 1)[where]
        rows = torch.minimum(begin[:, None] + torch.arange(self.page), last[:, None])  # a row twice changes nothing
        keys = k[rows.to(k.device)]
        at = (self.starts + first)[where].to(k.device)
        self.low.index_copy_(0, at, keys.amin(1))
        self.high.index_copy_(0, at, keys.amax(1))

    def _make(self, k: Tensor, starts: Tensor, lengths: Tensor, first: Tensor) -> None:
        runs = zip(*(t.flatten().tolist() for t in (starts, lengths, first, self.starts)))
        for start, length, page, target in runs:
            rows = k[start + page * self.page : start + length]
            whole = len(rows) // self.page
            target += page
            for name, ends in (("low", torch.amin), ("high", torch.amax)):
                digest = getattr(self, name)
                if whole:
                    digest[target : target + whole] = ends(rows[: whole * self.page].unflatten(0, (whole, self.page)), 1)
                if whole * self.page < len(rows):
                    digest[target + whole] = ends(rows[whole * self.page :], 0)

    def _make_room(self, like: Tensor, pages: Tensor) -> None:
        if self.low is not None and bool((pages <= self._room).all()):
            return
        room = pages + pages // _GROW + 1
        bases = room.flatten().cumsum(0).view_as(room) - room
        kept = torch.minimum(self.pages, pages).flatten().tolist()
        for name in ("low", "high"):
            old, new = getattr(self, name), empty_rows(like, int(room.sum()))
            self._meter.add(new.numel() * new.element_size())
            if old is not None:
                for source, target, n in zip(self.starts.flatten().tolist(), bases.flatten().tolist(), kept):
                    new[target : target + n] = old[source : source + n]
                self._meter.add(-old.numel() * old.element_size())
            setattr(self, name, new)
        self.starts, self._room = bases, room
