"""Rows of one layer: which token lies where, and how much memory that takes. Knows nothing about policies or attention.

The tokens of sequence b and KV head h are a *run*: ``lengths[b, h]`` consecutive rows of the flat tensors, from ``starts[b, h]``.
Padding is never stored and heads may keep different numbers of tokens::

    rows      a a a a . . b b . . . . c c c c c .      runs a, b, c in segments of 6, 6 and 6 rows; '.' is room to grow
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

# what a run may grow by before it is copied again, as a share of its length and in rows
_GROW, _GROW_ROWS = 32, 8


class Meter:
    """Bytes that the layers of one cache hold, now and at the highest."""

    def __init__(self):
        self.now = self.peak = 0

    def add(self, n_bytes: int) -> None:
        """Count an allocation, or with a minus sign its release."""
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True, eq=False)
class Part:
    """Runs that one attention call can see as ordinary tensors: sequences ``rows``, KV heads ``heads``, one length for all."""

    rows: slice
    heads: slice
    k: Tensor  # [B', H', N, D], a view
    v: Tensor


class Store:
    """Keys, values, positions and policy state of one layer, as runs of rows.

    Attributes:
        k, v: ``[S, D]`` and ``[S, Dv]``; None before the first append.
        positions: int32 ``[S]``, counted from each sequence's first real token.
        state: float32 ``[S]``, whatever the policy keeps per token; 0 for new ones.
        k_true: the keys as the model rotated them, where ``k`` holds them rotated to other positions; else None.
        starts, lengths: int64 ``[B, Hkv]`` on the host.
    """

    def __init__(self, meter: Meter):
        self._meter = meter
        self.clear()

    def clear(self) -> None:
        """Forget every token and release the memory."""
        if getattr(self, "k", None) is not None:
            self._meter.add(-self.n_bytes)
        self.k = self.v = self.positions = self.state = self.k_true = None
        self.starts = self.lengths = self._bases = self._room = None

    # -- what is there --------------------------------------------------------------------------------------------------------

    @property
    def n_bytes(self) -> int:
        """Bytes allocated, room to grow included."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def row_bytes(self) -> int:
        """Bytes per token and KV head."""
        return sum(t[0].numel() * t.element_size() for t in self._tensors().values())

    @property
    def longest(self) -> int:
        """Tokens of the longest run."""
        return int(self.lengths.max()) if self.k is not None else 0

    def table(self) -> tuple[Tensor, Tensor]:
        """``starts`` and ``lengths`` where the rows are."""
        return tuple(t.to(self.k.device, non_blocking=True) for t in (self.starts, self.lengths))

    def parts(self) -> Iterator[Part]:
        """All runs as few views: one if every run has the same length, else one per sequence or per run."""
        batch, heads = self.lengths.shape
        if self._regular(self.starts, self.lengths):
            yield self._part(slice(0, batch), slice(0, heads))
            return
        for b in range(batch):
            if self._regular(self.starts[b : b + 1], self.lengths[b : b + 1]):
                yield self._part(slice(b, b + 1), slice(0, heads))
            else:
                for h in range(heads):
                    yield self._part(slice(b, b + 1), slice(h, h + 1))

    def rectangle(self) -> tuple[Tensor, Tensor]:
        """``[B, Hkv, N, D]`` each, N the longest run, shorter ones behind zeros; a view where every run has the same length."""
        (batch, heads), n = self.lengths.shape, self.longest
        parts = list(self.parts())
        if len(parts) == 1:
            return parts[0].k, parts[0].v
        k, v = (t.new_zeros(batch, heads, n, t.shape[1]) for t in (self.k, self.v))
        for part in parts:
            k[part.rows, part.heads, n - part.k.shape[2] :] = part.k
            v[part.rows, part.heads, n - part.v.shape[2] :] = part.v
        return k, v

    # -- what changes it ------------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, headroom: int = 0) -> None:
        """Write new rows ``[B, Hkv, N, D]`` behind each run; they count once ``admit`` says which of them are real.

        Args:
            headroom: rows per run that appends to come will need besides; memory is taken for them ahead, but never for more than
                the run would double by.
        """
        batch, heads, n, dim = k.shape
        if self.k is None:
            self.starts = self.lengths = torch.zeros(batch, heads, dtype=torch.int64)
            self._allocate(k.new_empty(0, dim), v.new_empty(0, v.shape[3]), torch.full((batch, heads), n + headroom))
        else:
            self._make_room(n, headroom)
        ends = self.starts + self.lengths
        if n == 1:
            rows = ends.flatten().to(k.device, non_blocking=True)
            self.k.index_copy_(0, rows, k.reshape(-1, dim))
            self.v.index_copy_(0, rows, v.reshape(-1, v.shape[3]))
            return
        for (b, h), end in zip(_pairs(batch, heads), ends.flatten().tolist()):
            self.k[end : end + n] = k[b, h]
            self.v[end : end + n] = v[b, h]

    def admit(self, n: int, first: Tensor | None, last: Tensor | None, n_seen: Tensor) -> Tensor:
        """Of the ``n`` appended rows keep those from ``first`` to ``last`` of each sequence; int64 ``[B]``: how many.

        Args:
            first, last: int32 ``[B]``; None for 0 and n.
            n_seen: int64 ``[B]`` tokens of each sequence before these.
        """
        batch, heads = self.lengths.shape
        low = torch.zeros(batch, dtype=torch.int64) if first is None else first.cpu().long().clamp(0, n)
        high = torch.full((batch,), n) if last is None else last.cpu().long().clamp(0, n)
        high = torch.maximum(low, high)
        self.starts = self.starts.clone()
        for b in range(batch) if bool(low.any()) else ():
            skip, real = int(low[b]), int(high[b] - low[b])
            for h in range(heads):
                end = int(self.starts[b, h] + self.lengths[b, h])
                if not int(self.lengths[b, h]):
                    self.starts[b, h] += skip
                elif skip and real:
                    for t in (self.k, self.v):
                        t[end : end + real] = t[end + skip : end + skip + real].clone()
        ends, real = (self.starts + self.lengths).flatten().tolist(), high - low
        if n == 1 and bool((real == 1).all()):
            # one token: what comes from the host does not wait for the device
            rows, at = (t.to(self.k.device, non_blocking=True) for t in (torch.tensor(ends), n_seen.int().repeat_interleave(heads)))
            self.positions.index_copy_(0, rows, at)
            self.state.index_fill_(0, rows, 0.0)
            self._true(rows)
        else:
            for (b, _), end in zip(_pairs(batch, heads), ends):
                rows = slice(end, end + int(real[b]))
                self.positions[rows] = torch.arange(int(n_seen[b]), int(n_seen[b] + real[b]), dtype=torch.int32, device=self.k.device)
                self.state[rows] = 0.0
                self._true(rows)
        self.lengths = self.lengths + real[:, None]
        return real

    def keep(self, ids: Tensor, counts: Tensor, in_place: bool = True) -> None:
        """Keep the tokens at ``ids`` (int32 ``[B, Hkv, slots]`` offsets in their runs, ascending, -1 behind) and no others.

        Args:
            counts: int64 ``[B, Hkv]`` on the host, how many of each run.
            in_place: False leaves the old rows as they are, for whoever still reads them, and moves to new memory.
        """
        kept = ids >= 0
        sources = (ids + self.starts.to(ids.device)[..., None])[kept]
        if in_place:
            slots = torch.arange(ids.shape[2], device=ids.device)
            targets = (slots + self._bases.to(ids.device)[..., None])[kept]
            for t in self._tensors().values():
                ops.move_rows(t, sources, targets)
            self.starts, self.lengths = self._bases.clone(), counts.clone()
            return
        self._renew(sources, counts.clone())

    def replace(self, victims: Tensor, where: Tensor) -> None:
        """Overwrite the token at ``victims`` (int64 ``[B, Hkv]`` offsets) with the run's last one, which leaves its place.

        One row moves per run whatever its length; the order inside a run is by position no more.

        Args:
            where: bool ``[B, Hkv]`` on the host, which runs lose a token.
        """
        sources = (self.starts + self.lengths - 1)[where].to(self.k.device)
        targets = (self.starts.to(self.k.device) + victims)[where.to(self.k.device)]
        for t in self._tensors().values():
            ops.move_rows(t, sources, targets)
        self.lengths = self.lengths - where.long()

    def forget_first(self, n: Tensor) -> None:
        """Let go of the first ``n`` (int64 ``[B, Hkv]`` on the host) tokens of every run; their rows are used again when room is needed."""
        self.starts, self.lengths = self.starts + n, self.lengths - n

    def drop(self, n: Tensor) -> None:
        """Forget the last ``n`` (int64 ``[B]``) appended tokens of every run of a sequence."""
        self.lengths = self.lengths - n[:, None]

    def select(self, sequences: Tensor) -> None:
        """Make the sequences numbered ``sequences`` (int64 ``[B']``, repeats allowed) the batch."""
        sequences = sequences.cpu()
        lengths = self.lengths[sequences]
        self._renew(self.rows_of(self.starts[sequences], lengths), lengths)

    def shrink(self) -> None:
        """Give back the room that no run uses, but for what the next few tokens need."""
        wanted = self.lengths + _growth(self.lengths)
        if int(wanted.sum()) < len(self.positions):
            self._reallocate(wanted)

    def copy(self, meter: Meter) -> Store:
        """The same tokens in memory of their own, counted by ``meter``."""
        twin = Store(meter)
        if self.k is not None:
            rows = {name: empty_rows(t, len(t)).copy_(t) for name, t in self._tensors().items()}
            twin._set(rows, self.starts.clone(), self.lengths.clone(), self._room, self._bases)
        return twin

    def packed(self) -> dict[str, Tensor]:
        """``lengths``, and the rows of all runs one behind the other, in memory of their own; nothing before the first append."""
        if self.k is None:
            return {}
        rows = self.rows_of(self.starts, self.lengths)
        return {"lengths": self.lengths.clone()} | {name: _taken(t, rows) for name, t in self._tensors().items()}

    def fill(self, packed: dict[str, Tensor], n_seen: Tensor) -> None:
        """Hold what ``packed`` returned; the tensors are the store's own from now on.

        Args:
            n_seen: int64 ``[B]`` tokens of each sequence so far, evicted ones included.

        Raises:
            ContractError: if these are not the rows of a store.
        """
        lengths, rows = packed["lengths"].cpu(), {name: t for name, t in packed.items() if name != "lengths"}
        require(lengths.dim() == 2 and len(lengths) == len(n_seen) and bool((lengths >= 0).all()),
                f"lengths {list(lengths.shape)} are not those of the runs of {len(n_seen)} sequences")
        total, missing = int(lengths.sum()), {"k", "v", "positions", "state"} - set(rows)
        require(not missing, f"there are no rows of {', '.join(sorted(missing))}")
        for name, t in rows.items():
            dtype = {"positions": torch.int32, "state": torch.float32}.get(name, rows["k"].dtype)
            dim = 2 if name in ("k", "v", "k_true") else 1
            require((len(t), t.dim(), t.dtype) == (total, dim, dtype),
                    f"{name} is {t.dtype} {list(t.shape)}, not {dtype} of {total} rows in {dim} dimensions")
        # the order inside a run is not always that of the text
        owner = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
        at, bound = rows["positions"].cpu().long(), n_seen.cpu()[owner // lengths.shape[1]]
        known = (owner * (1 + int(n_seen.max())) + at).sort().values
        require(bool(((at >= 0) & (at < bound)).all()) and bool((known.diff() > 0).all()),
                "positions are not those of different tokens that the sequences have seen")
        self.clear()
        self._set(rows, side_by_side(lengths), lengths, lengths)

    def remember_true_keys(self) -> None:
        """From now on keep every key as the model rotated it beside the one that is attended."""
        if self.k_true is None:
            self.k_true = empty_rows(self.k, len(self.k)).copy_(self.k)
            self._meter.add(self.k_true.numel() * self.k_true.element_size())

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k, "v": self.v, "positions": self.positions, "state": self.state, "k_true": self.k_true}
        return {name: t for name, t in named.items() if t is not None}

    def _true(self, rows) -> None:
        if self.k_true is not None:
            self.k_true[rows] = self.k[rows]

    def rows_of(self, starts: Tensor, lengths: Tensor) -> Tensor:
        """int64: all rows of these runs, one run behind the other, where the rows are."""
        runs = zip(starts.flatten().tolist(), lengths.flatten().tolist())
        return torch.cat([torch.arange(s, s + n) for s, n in runs]).to(self.k.device)

    def _set(self, rows: dict[str, Tensor], starts: Tensor, lengths: Tensor, room: Tensor, bases: Tensor | None = None) -> None:
        for name, t in rows.items():
            setattr(self, name, t)
        self.starts, self.lengths, self._room = starts, lengths, room
        self._bases = starts.clone() if bases is None else bases
        self._meter.add(self.n_bytes)

    def _renew(self, sources: Tensor, lengths: Tensor) -> None:
        """Move to new memory that holds the rows ``sources`` (run by run) and no room; both exist until it is done."""
        old = self.n_bytes
        self._set({name: _taken(t, sources) for name, t in self._tensors().items()}, side_by_side(lengths), lengths, lengths)
        self._meter.add(-old)

    def _allocate(self, k: Tensor, v: Tensor, room: Tensor) -> None:
        n = int(room.sum())
        bases = side_by_side(room)
        counters = (torch.empty(0, dtype=dtype, device=k.device) for dtype in (torch.int32, torch.float32))
        rows = {name: empty_rows(like, n) for name, like in zip(("k", "v", "positions", "state"), (k, v, *counters))}
        self._set(rows, bases.clone(), self.lengths, room, bases)

    def _make_room(self, n: int, headroom: int) -> None:
        """See that every run can grow by ``n`` rows."""
        if bool((self.starts + self.lengths + n <= self._bases + self._room).all()):
            return
        wanted = self.lengths + n
        if int(wanted.sum()) > len(self.positions):
            # a token at a time would copy everything each time
            spare = _growth(self.lengths) if n == 1 else (headroom - self.lengths).clamp(min=0).minimum(self.lengths)
            self._reallocate(wanted + spare)
            return
        self._move_runs(side_by_side(self.lengths), descending=False)
        spare = (len(self.positions) - int(wanted.sum())) // wanted.numel()
        self._room = wanted + spare
        self._bases = side_by_side(self._room)
        self._move_runs(self._bases, descending=True)

    def _move_runs(self, starts: Tensor, descending: bool) -> None:
        sources, targets = self.rows_of(self.starts, self.lengths), self.rows_of(starts, self.lengths)
        if descending:
            sources, targets = sources.flip(0), targets.flip(0)
        for t in self._tensors().values():
            ops.move_rows(t, sources, targets)
        self.starts = starts.clone()

    def _reallocate(self, room: Tensor) -> None:
        """Move every run to the start of a segment of ``room`` rows, one tensor at a time so that little exists twice."""
        bases = side_by_side(room)
        runs = list(zip(self.starts.flatten().tolist(), bases.flatten().tolist(), self.lengths.flatten().tolist()))
        for name in list(self._tensors()):
            old = getattr(self, name)
            new = empty_rows(old, int(room.sum()))
            self._meter.add(new.numel() * new.element_size())
            for source, target, n in runs:
                new[target : target + n] = old[source : source + n]
            setattr(self, name, new)
            self._meter.add(-old.numel() * old.element_size())
            del old
        self.starts, self._bases, self._room = bases.clone(), bases, room

    @staticmethod
    def _regular(starts: Tensor, lengths: Tensor) -> bool:
        """Can these runs be seen as one ``[B, Hkv, N, D]`` tensor?"""
        if int(lengths.min()) != int(lengths.max()):
            return False
        flat = starts.flatten()
        return len(flat) < 3 or bool((flat.diff() == flat[1] - flat[0]).all())

    def _part(self, rows: slice, heads: slice) -> Part:
        starts = self.starts[rows, heads]
        n, (batch, count) = int(self.lengths[rows, heads].min()), starts.shape
        at = int(starts[0, 0])
        step = int(starts.flatten()[1]) - at if starts.numel() > 1 else 0

        def view(t: Tensor) -> Tensor:
            width = t.shape[1]
            return t.as_strided((batch, count, n, width), (step * count * width, step * width, width, 1), at * width + t.storage_offset())

        return Part(rows, heads, view(self.k), view(self.v))


def empty_rows(like: Tensor, n: int) -> Tensor:
    """``n`` rows like those of a tensor, that may be written whether or not gradients or inference mode are on at the time."""
    with torch.inference_mode(False):
        return torch.empty(n, *like.shape[1:], dtype=like.dtype, device=like.device)


def _taken(t: Tensor, rows: Tensor) -> Tensor:
    return torch.index_select(t, 0, rows, out=empty_rows(t, len(rows)))


def side_by_side(rooms: Tensor) -> Tensor:
    """Where segments of so many rows begin that follow each other."""
    return rooms.flatten().cumsum(0).view_as(rooms) - rooms


def _growth(lengths: Tensor) -> Tensor:
    return (lengths // _GROW).clamp(min=_GROW_ROWS)


def _pairs(batch: int, heads: int) -> Iterator[tuple[int, int]]:
    return ((b, h) for b in range(batch) for h in range(heads))
