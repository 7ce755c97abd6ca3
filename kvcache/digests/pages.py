"""What a reader needs to know of each page of keys without reading it: an entry per page, of whatever a method makes of its keys.

Pages are counted from the start of each run, and their entries lie as runs of their own, beside the rows that they describe::

    rows      a a a a a a . . b b b . .      runs a and b, pages of 4 rows
    entries   A A . B .                      '.' is room to grow
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.kept import Queries

from ..store import Meter, empty_rows, side_by_side

# what the entries of a run may grow by before they are copied again, as a share
_GROW = 32

# all tokens of all runs, in pieces: (keys [n, D], sequence, KV head, number of the first one in its run)
Rows = Callable[[], Iterator[tuple[Tensor, int, int, int]]]


class PageDigest:
    """Entries of the pages of one layer, as far as ``update`` has seen its runs. A subclass says what an entry is.

    Args:
        meter: counts the bytes.
        page: rows of a page; the last page of a run may have fewer.

    Attributes:
        names: what an entry is made of; each an attribute, ``[P, width]``, None before the first update.
        learned: what the rows cannot tell again, such as statistics of queries; each an attribute, ``[B, Hkv, ...]``, None before.
            ``clear`` leaves them, ``forget`` does not.
        outlives_rows: whether entries stay right when the rows of their pages have left the layer.
        starts, pages: int64 ``[B, Hkv]`` on the host: first entry and entries of each run.
    """

    names: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[tuple[str, ...]] = ()
    outlives_rows: ClassVar[bool] = True

    def __init__(self, meter: Meter, page: int):
        self._meter, self.page = meter, page
        for name in self.names + self.learned:
            setattr(self, name, None)
        self.clear()

    # -- what a subclass says ---------------------------------------------------------------------------------------------------

    def blank(self, k: Tensor) -> dict[str, Tensor]:
        """``[0, width]`` of the dtype and on the device of an entry, by name; ``k`` is ``[S, D]``."""
        raise NotImplementedError

    def describe(self, keys: Tensor, run: Tensor) -> dict[str, Tensor]:
        """Entries ``[n, width]`` of n pages, by name.

        Args:
            keys: ``[n, m, D]``, n pages of m rows each; only the open last page of a run has m < page.
            run: int64 ``[n]`` on the host, number ``b * Hkv + h`` of the run that each page is of: one for all of them, or each
                another.
        """
        raise NotImplementedError

    def observe(self, queries: Queries, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Attention has read the layer with these queries, whose own tokens are the last rows of each run."""

    def ready(self, rows: Rows) -> None:
        """The reader is about to choose some pages of all; called before each such choice, cheap when nothing is to do."""

    # -- what all share ---------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every page and release the memory; also what to do when rows were moved or replaced."""
        for name in self.names:
            self._hold(name, None)
        self.starts = self.pages = self._room = self._covered = None

    def forget(self) -> None:
        """Forget the request: the pages, and what was learned."""
        self.clear()
        for name in self.learned:
            self._hold(name, None)

    @property
    def n_bytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return sum(_bytes(getattr(self, name)) for name in self.names + self.learned)

    def page_bytes(self) -> int:
        """Bytes per page and KV head."""
        return sum(t.shape[1] * t.element_size() for t in self._entries().values())

    def scan_bytes(self) -> int:
        """Bytes that a choice among all pages reads."""
        return int(self.pages.sum()) * self.page_bytes()

    def _hold(self, name: str, t: Tensor | None) -> None:
        """Make ``t`` the attribute ``name``, and count its bytes instead of those of what it replaces."""
        self._meter.add(_bytes(t) - _bytes(getattr(self, name)))
        setattr(self, name, t)

    def _entries(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in self.names}
        return {name: t for name, t in named.items() if t is not None}

    def update(self, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Follow runs that grew or lost their last rows; rows seen before are not read again, but for those of an open page.

        Args:
            k: ``[S, D]`` keys.
            starts, lengths: int64 ``[B, Hkv]`` on the host; runs may have moved, their rows as they were. Where the first tokens of
                a run have left k, its start is where they would lie.
        """
        pages = (lengths + self.page - 1) // self.page
        if self.pages is None:
            self.pages = self._covered = torch.zeros_like(lengths)
        self._make_room(k, pages)
        first = torch.minimum(self._covered, lengths) // self.page  # of the pages to make
        made = pages - first
        self.pages, self._covered = pages, lengths.clone()
        if int(made.max()) > 1:
            self._make(k, starts, lengths, first)
        elif bool(made.any()):
            self._make_one(k, starts, lengths, first, made == 1)

    def copy_from(self, other: PageDigest) -> None:
        """Hold what another digest of this kind holds, in memory of its own."""
        for name in self.names + self.learned:
            t = getattr(other, name)
            self._hold(name, None if t is None else empty_rows(t, len(t)).copy_(t))
        self.starts, self.pages, self._room, self._covered = other.starts, other.pages, other._room, other._covered

    def recall(self, learned: dict[str, Tensor]) -> None:
        """Learn again what a digest of this kind had learned, by name, in these very tensors."""
        for name, t in learned.items():
            self._hold(name, t)

    def select(self, sequences: Tensor) -> None:
        """Make the sequences numbered ``sequences`` (int64 ``[B']``, host, repeats allowed) the batch."""
        for name in self.learned:
            if (t := getattr(self, name)) is not None:
                self._hold(name, torch.index_select(t, 0, sequences.to(t.device), out=empty_rows(t, len(sequences))))
        if self.pages is None:
            return
        room = self._room[sequences]
        runs = list(zip(self.starts[sequences].flatten().tolist(), self.pages[sequences].flatten().tolist()))
        self._lay_out(room, runs, self._entries())
        self.pages, self._covered = self.pages[sequences], self._covered[sequences]

    def _make_one(self, k: Tensor, starts: Tensor, lengths: Tensor, first: Tensor, where: Tensor) -> None:
        """One page of every run in ``where``: what a generated token asks for."""
        begin, count = (starts + first * self.page)[where], (lengths - first * self.page)[where]
        at, run = (self.starts + first)[where], where.flatten().nonzero()[:, 0]
        for m in count.unique().tolist():
            of = count == m
            rows = (begin[of][:, None] + torch.arange(m)).to(k.device)
            self._write(at[of].to(k.device), self.describe(k[rows], run[of]))

    def _make(self, k: Tensor, starts: Tensor, lengths: Tensor, first: Tensor) -> None:
        runs = zip(*(t.flatten().tolist() for t in (starts, lengths, first, self.starts)))
        for i, (start, length, page, target) in enumerate(runs):
            rows = k[start + page * self.page : start + length]
            whole = len(rows) // self.page
            target += page
            for m, n, some in ((self.page, whole, rows[: whole * self.page]), (len(rows) % self.page, 1, rows[whole * self.page :])):
                if n and m:
                    entries = self.describe(some.unflatten(0, (n, m)), torch.full((n,), i))
                    self._write(slice(target, target + n), entries)
                    target += n

    def _write(self, at: Tensor | slice, entries: dict[str, Tensor]) -> None:
        for name, made in entries.items():
            getattr(self, name)[at] = made.to(getattr(self, name).dtype)

    def _make_room(self, k: Tensor, pages: Tensor) -> None:
        if self._room is not None and bool((pages <= self._room).all()):
            return
        held, kept = self._entries(), torch.minimum(self.pages, pages).flatten().tolist()
        runs = list(zip(self.starts.flatten().tolist(), kept)) if held else []
        self._lay_out(pages + pages // _GROW + 1, runs, held or self.blank(k))

    def _lay_out(self, room: Tensor, runs: list[tuple[int, int]], held: dict[str, Tensor]) -> None:
        """Move the first entries of these runs of ``held`` to new memory of ``room`` entries each, one tensor at a time."""
        bases = side_by_side(room)
        for name, old in held.items():
            new = empty_rows(old, int(room.sum()))
            self._meter.add(new.numel() * new.element_size())
            for (source, n), target in zip(runs, bases.flatten().tolist()):
                new[target : target + n] = old[source : source + n]
            self._meter.add(-old.numel() * old.element_size())
            setattr(self, name, new)
        self.starts, self._room = bases, room


def _bytes(t: Tensor | None) -> int:
    return 0 if t is None else t.numel() * t.element_size()
