"""Attention over what a cache kept: how a cache layer shows itself to our attention function, and the attention itself.

``Cache.update`` is followed at once by the attention of the same layer, in the same thread: the layer leaves a note with the
tensors that it returns, and the attention function that receives them takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .attention import Attended, sparse_attention
from .types import LayerContext, ResidentKV, Selector

# at most this many queries are attended run by run, or page by page, at memory speed
FEW_QUERIES = 16

_notes = threading.local()


@dataclass(frozen=True, eq=False)
class Queries:
    """What attention learned about the queries of one chunk.

    Attributes:
        q: ``[B, H, Nq, D]``, rotated.
        lse: float32 ``[B, H, Nq]``.
        first, last: int32 ``[B]``, the real queries of each sequence; None for all.
        scale, softcap, sinks: as in LayerContext.
    """

    q: Tensor
    lse: Tensor
    first: Tensor | None
    last: Tensor | None
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


class Part(Protocol):
    """Runs of one length, seen as ordinary tensors; see ``kvcache.store.Part``."""

    rows: slice
    heads: slice
    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """Keys and values of one memory, and the pages of them that a few queries read: arguments of ``ops.paged_attention``.

    Attributes:
        own: whether the last rows are the queries' own tokens; otherwise all of them are older.
    """

    k: Tensor
    v: Tensor
    starts: Tensor
    counts: Tensor
    own: bool = True


class KeptKV(Protocol):
    """A cache layer between ``update`` and the end of attention. Its tokens lie in runs: see ``ops.paged_attention``."""

    k: Tensor  # [S, D]
    v: Tensor  # [S, Dv]

    def admit(self, first: Tensor | None, last: Tensor | None) -> None:
        """Say which of the appended tokens (int32 ``[B]`` bounds, None for all) are real; the others are dropped."""

    def withdraw(self) -> None:
        """Attention refused: forget the appended tokens."""

    @property
    def kv_heads(self) -> int:
        """Runs of each sequence."""

    @property
    def n_tokens(self) -> int:
        """Of the longest run, wherever they are."""

    def parts(self) -> list[Part]:
        """All runs, as few views, but for what ``older`` brings."""

    def older(self) -> Iterator[Part]:
        """Tokens before those of ``parts`` that lie elsewhere, a piece of each run at a time; valid until the next is asked for."""

    def regions(self, q: Tensor, first: Tensor | None, last: Tensor | None) -> Iterator[Region]:
        """What a few queries read; the first region holds their own tokens. Valid until the next one is asked for.

        q is ``[B, H, Nq, D]``; int32 ``[B]`` bounds say which queries are real, None for all.
        """

    def observe(self, queries: Queries) -> None:
        """Attention is over: score, evict."""


def leave(kept: KeptKV, k: Tensor) -> None:
    """Tell the attention that will be given ``k`` where it comes from."""
    _notes.last = (kept, k)


def take(k: Tensor) -> tuple[KeptKV | None, bool]:
    """The layer that the last ``update`` of this thread was of, and whether ``k`` is what it returned."""
    kept, given = getattr(_notes, "last", (None, None))
    clear()
    return kept, given is k


def clear() -> None:
    """Forget a layer whose attention never came: its forward failed, or nobody ran it."""
    _notes.last = (None, None)


@dataclass(frozen=True, eq=False)
class KeptAttended:
    """Result of ``attend_kept``.

    Attributes:
        out: ``[B, H, Nq, Dv]``, laid out as ``[B, Nq, H, Dv]``; 0 where a query is padding.
        lse: float32 ``[B, H, Nq]``; -inf there.
        calls: the calls that made it up, each with its keys and context; empty for few queries.
    """

    out: Tensor
    lse: Tensor
    calls: list[tuple[Tensor, ResidentKV, LayerContext, Attended]]


def attend_kept(q: Tensor, kept: KeptKV, ctx: LayerContext, selector: Selector, few: Selector) -> KeptAttended:
    """Attention of a chunk's queries over a layer's runs, their own tokens being the last real ones of each run.

    Every kept token is older than the chunk, so causality by place in the run is causality by position.

    Args:
        q: ``[B, H, Nq, D]``.
        ctx: ``first`` and ``last`` bound the real queries here; ``q_start`` is not read.
        selector: decides what a chunk reads where all heads keep equally many tokens.
        few: reads everything; for heads that keep different numbers, whose blocks have no common grid.
    """
    batch, heads, n_q, _ = q.shape
    if n_q <= FEW_QUERIES:
        found = _Sum()
        for r in kept.regions(q, ctx.first, ctx.last):
            sinks = ctx.sinks if r.own else None
            found.add(*ops.paged_attention(q, r.k, r.v, r.starts, r.counts, ctx.scale, r.own, ctx.softcap, sinks, ctx.first, ctx.last))
        return KeptAttended(*found.total(q.dtype), [])
    parts = list(kept.parts())
    group = heads // sum(p.k.shape[1] for p in parts if p.rows.start == 0)
    low = [0] * batch if ctx.first is None else ctx.first.tolist()
    high = [n_q] * batch if ctx.last is None else ctx.last.tolist()
    if len(set(zip(low, high))) > 1:
        parts = [_row(p, b) for p in parts for b in range(p.k.shape[0])]
    calls, whole = [], len(parts) == 1
    out = q.new_zeros(batch, n_q, heads, kept.v.shape[1]).transpose(1, 2) if not whole or (low[0], high[0]) != (0, n_q) else None
    lse = torch.full((batch, heads, n_q), float("-inf"), device=q.device)
    for part in parts:
        rows = slice(low[part.rows.start], high[part.rows.start])
        if rows.start == rows.stop:
            continue
        of = slice(part.heads.start * group, part.heads.stop * group)
        queries, n_k = q[part.rows, of, rows], part.k.shape[2]
        own = LayerContext(ctx.layer, ctx.scale, n_k - queries.shape[2], softcap=ctx.softcap, n_layers=ctx.n_layers,
                           sinks=None if ctx.sinks is None else ctx.sinks[of], carry=ctx.carry if whole else None)
        kv = ResidentKV(part.k, part.v)
        attended = sparse_attention(queries, kv, own, selector if queries.shape[1] == heads else few)
        calls.append((queries, kv, own, attended))
        lse[part.rows, of, rows] = attended.lse
        if out is None:
            out = attended.out
        else:
            out[part.rows, of, rows] = attended.out
    return KeptAttended(*_with_older(q, kept, ctx, few, _Sum(out, lse), list(zip(low, high))).total(q.dtype), calls)


class _Sum:
    """Attention over the union of disjoint keys, a part at a time, kept in float32 while there are several."""

    def __init__(self, out: Tensor | None = None, lse: Tensor | None = None):
        self.out, self.lse = out, lse

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.out is None:
            self.out, self.lse = out, lse
        else:
            wide = torch.promote_types(out.dtype, torch.float32)
            self.out, self.lse = ops.merge_attention(torch.stack([self.out.to(wide), out.to(wide)]), torch.stack([self.lse, lse]))

    def total(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.out.to(dtype), self.lse


def _with_older(q: Tensor, kept: KeptKV, ctx: LayerContext, reads_all: Selector, found: _Sum, real: list[tuple[int, int]]) -> _Sum:
    """Add what lies elsewhere; all of it is older than every query."""
    group = q.shape[1] // kept.kv_heads
    for part in kept.older():
        out, lse = torch.zeros_like(found.out), torch.full_like(found.lse, float("-inf"))
        heads = slice(part.heads.start * group, part.heads.stop * group)
        for at, low, high in _alike(part, real):
            if low == high:
                continue
            own = LayerContext(ctx.layer, ctx.scale, 0, causal=False, softcap=ctx.softcap, n_layers=ctx.n_layers)
            rows = slice(at.start - part.rows.start, at.stop - part.rows.start)
            attended = sparse_attention(q[at, heads, low:high], ResidentKV(part.k[rows], part.v[rows]), own, reads_all)
            out[at, heads, low:high], lse[at, heads, low:high] = attended.out, attended.lse
        found.add(out, lse)
    return found


def _alike(part: Part, real: list[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    """The sequences of a part that have the same real queries, at once if all have."""
    of = real[part.rows]
    if len(set(of)) == 1:
        yield part.rows, *of[0]
        return
    for b, bounds in enumerate(of, part.rows.start):
        yield slice(b, b + 1), *bounds


@dataclass(frozen=True, eq=False)
class _Row:
    rows: slice
    heads: slice
    k: Tensor
    v: Tensor


def _row(part: Part, b: int) -> _Row:
    at = part.rows.start + b
    return _Row(slice(at, at + 1), part.heads, part.k[b : b + 1], part.v[b : b + 1])
