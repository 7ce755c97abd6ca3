"""Dual chunk attention: a model reads texts longer than it was trained for, with distances it was trained for.

Positions are cut into chunks of ``L = chunk - local``. A query at position p sees a key j tokens into its chunk at distance

    p mod L - j                  in its own chunk: the true distance;
    min(p mod L + L, chunk) - j  in the chunk before: the true distance up to ``local``, then no larger than ``chunk``;
    chunk - j                    in any chunk before that.

Attention depends on differences of angles only, so keys stay in the cache as the model rotated them. Own chunk: nothing moves.
Chunk before: only queries past ``local`` turn back. Earlier chunks: queries turn to ``chunk`` and keys to j, or, where there are
fewer query than key vectors to turn, queries turn to the same distance from each key chunk in turn. The parts are merged by
their log-sum-exps (ops.merge_attention).
Source: Dual Chunk Attention, arXiv:2402.17463, as used by Qwen2.5-1M, arXiv:2501.15383.

Differs from vLLM's backend for Qwen2.5-1M:
- Its cache holds keys rotated by p mod L and its queries arrive unrotated; here both arrive at their true rotation and are
  turned in float32, because transformers rotates before the cache. Narrow dtypes round once more.
- Its length factor is that of the whole prompt, and its cached keys keep the factor of the time they were written. Here it is
  that of the keys a query can see, so one forward, chunked prefill and decoding agree.
- A method that chooses blocks does so in each of three regions by itself, so a threshold holds per region and more is read than
  over one range; vLLM ranks one row of logits over all regions. Keys of earlier chunks have no causal order to a query that is
  always behind them: methods that need one (vertical lines and slashes, local windows) choose in the query's own chunk only and
  read earlier chunks whole, with one warning.
- An empty region is left out instead of being filled with dummy columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .attention import Attended, sparse_attention
from .errors import require
from .ops.spans import spans
from .patterns import Dense
from .rotary import Rotation
from .types import KVView, LayerContext, ResidentKV, Selector


@dataclass(frozen=True)
class DualChunk:
    """How far apart a query and a key may appear to be.

    Up to ``chunk`` keys, nothing changes. The keys of a row must be consecutive positions: not for caches that evict.

    Attributes:
        chunk: largest distance, tokens; the length that the model was trained for (Qwen2.5-1M: 262144).
        local: tokens before a query that keep their true distance across a chunk border; at most half of chunk
            (Qwen2.5-1M: 8192).
        trained: tokens; with more keys in sight than this, a query's logits are multiplied by ``f * f`` with
            ``f = 0.1 * ln(keys in sight / trained) + 1``. 0 for never. The factor goes onto the query, once and squared: YaRN
            scales query and key by f each, but a key in the cache cannot know how many keys a later query will see.
        critical: choose blocks with queries at p mod L + L and p mod L + chunk, so that diagonals stay straight for methods that
            look for them, as published; False chooses with the distances that attention uses.

    Example:
        >>> DualChunk(chunk=2048, local=256).period
        1792
        >>> round(DualChunk(chunk=2048, local=256, trained=2048).factor(16384).item(), 4)
        1.2079
    """

    chunk: int
    local: int
    trained: int = 0
    critical: bool = True

    def __post_init__(self):
        for name in ("chunk", "local", "trained"):
            tokens = getattr(self, name)
            whole, least = isinstance(tokens, int) and not isinstance(tokens, bool), int(name != "trained")
            require(whole and tokens >= least, f"{name}={tokens!r} must be a number of tokens, {least} or more")
        few = 2 * self.local <= self.chunk
        require(few, f"local={self.local} is more than half of chunk={self.chunk}; a tenth of it is usual")
        require(isinstance(self.critical, bool), f"critical={self.critical!r} must be true or false")

    @property
    def period(self) -> int:
        """Tokens from one chunk's start to the next, L."""
        return self.chunk - self.local

    def changes(self, n_seen: int) -> bool:
        """Does attention over so many keys differ from the plain one at all?"""
        return n_seen > min(self.chunk, self.trained or self.chunk)

    def factor(self, n_seen: Tensor | int) -> Tensor:
        """f for queries that see so many keys, float64."""
        n_seen = torch.as_tensor(n_seen, dtype=torch.float64)
        return (0.1 * (n_seen / (self.trained or math.inf)).log() + 1).clamp(min=1)


class Part(NamedTuple):
    """Queries of one chunk over one region of keys; ``chooser`` is what a selector sees in place of ``q``."""

    q: Tensor
    chooser: Tensor
    k: Tensor
    v: Tensor
    q_start: int
    causal: bool


@dataclass(frozen=True, eq=False)
class DualAttended:
    """Result of one call.

    Attributes:
        out: ``[B, H, Nq, Dv]``, laid out as ``[B, Nq, H, Dv]``; 0 for padding.
        lse: float32 ``[B, H, Nq]``, natural log.
        density: float64 ``[H]`` pairs read over pairs causally reachable; None if every part read everything.
        first: the first part that was computed and how, to ask which backend ran; None if no query was real.
    """

    out: Tensor
    lse: Tensor
    density: Tensor | None
    first: tuple[Part, LayerContext, Attended] | None


def dual_chunk_attention(q: Tensor, kv: KVView, ctx: LayerContext, selector: Selector, dual: DualChunk,
                         rotation: Rotation) -> DualAttended:
    """Attention of ``q`` ``[B, H, Nq, D]``, rotated like the keys at true positions, with the distances of ``dual``.

    Positions count from each row's first real key. A layer with a sliding window has no use for this (``ctx.window`` is 0).
    """
    require(ctx.causal and not ctx.window, "dual chunk attention needs a causal layer without a window; call sparse_attention")
    require(ctx.segments is None, "dual chunk attention knows no documents, but segment ids were given; leave one of them out")
    (k, v), (batch, heads, n_q, _) = kv.fetch(), q.shape
    out = q.new_zeros(batch, n_q, heads, v.shape[3]).transpose(1, 2)
    lse = torch.full((batch, heads, n_q), float("-inf"), device=q.device)
    read, reachable, sparse, first = torch.zeros(heads, dtype=torch.float64, device=q.device), 0, False, None
    alone = spans(batch, n_q, k.shape[2], ctx.q_start, True, ctx.first, ctx.last)
    together = ctx.first is None and ctx.last is None
    for b, span in enumerate(alone[:1] if together else alone):
        row = slice(None) if together else slice(b, b + 1)
        parts = _parts(q[row, :, span.rows], k[row, :, span.keys], v[row, :, span.keys], span.q_start, dual, rotation,
                       isinstance(selector, Dense))
        for chunk, (at, regions) in enumerate(parts):
            outs, lses = [], []
            for i, part in enumerate(regions):
                # a sink counts once, in the part that every query has; what one layer leaves for the next stays in its part
                carry = None if ctx.carry is None else ctx.carry.setdefault(("dual_chunk", b, chunk, i), {})
                local = replace(ctx, q_start=part.q_start, causal=part.causal, first=None, last=None, carry=carry,
                                sinks=ctx.sinks if part.causal else None)
                found = sparse_attention(part.q, ResidentKV(part.k, part.v), local, selector, part.chooser)
                outs.append(found.out)
                lses.append(found.lse)
                first = first or (part, local, found)
                rows, n_k = part.q.shape[2], part.k.shape[2]
                pairs = len(part.q) * (rows * (part.q_start + 1) + rows * (rows - 1) // 2 if part.causal else rows * n_k)
                density = found.plan.head_density().to(q.device)
                read += pairs * density.repeat_interleave(heads // len(density))
                reachable, sparse = reachable + pairs, sparse or found.plan.blocks is not None
            here = slice(span.rows.start + at.start, span.rows.start + at.stop)
            out[row, :, here], lse[row, :, here] = ops.merge_attention(torch.stack(outs), torch.stack(lses))
    return DualAttended(out, lse, read / reachable if sparse else None, first)


def _parts(q: Tensor, k: Tensor, v: Tensor, start: int, dual: DualChunk, rotation: Rotation,
           dense: bool) -> Iterator[tuple[slice, list[Part]]]:
    """The rows of each chunk that has queries, and its regions; ``start`` is the position of query 0."""
    period, stop = dual.period, start + q.shape[2]
    if dual.trained and dual.changes(stop):
        f = dual.factor(torch.arange(start + 1, stop + 1)).to(q.device)
        q = (q * (f * f)[:, None]).to(q.dtype)
    last = (stop - 1) // period if q.shape[2] else -1
    by_query = dense and q.shape[1] * q.shape[2] < k.shape[1] * period
    far = k[:, :, : max(0, last - 1) * period]
    if not by_query:
        position = torch.arange(far.shape[2])
        far = rotation.move(far, position, position % period)
    for chunk in range(start // period, last + 1):
        own, before = chunk * period, (chunk - 1) * period
        at = torch.arange(max(start, own), min(stop, own + period))
        rows = slice(int(at[0]) - start, int(at[-1]) + 1 - start)
        mine = q[:, :, rows]
        keys = slice(own, int(at[-1]) + 1)
        regions = [Part(mine, mine, k[:, :, keys], v[:, :, keys], int(at[0]) - own, True)]
        if chunk >= 1:
            near = rotation.move(mine, at, at.clamp(max=before + dual.chunk))
            keys = slice(before, own)
            regions.append(Part(near, mine if dual.critical else near, k[:, :, keys], v[:, :, keys], 0, False))
        if chunk >= 2 and by_query:
            for edge in range(0, before, period):
                there = rotation.move(mine, at, torch.full_like(at, edge + dual.chunk))
                keys = slice(edge, edge + period)
                regions.append(Part(there, there, far[:, :, keys], v[:, :, keys], 0, False))
        elif chunk >= 2:
            there = rotation.move(mine, at, torch.full_like(at, dual.chunk))
            chooser = rotation.move(mine, at, at % period + dual.chunk) if dual.critical else there
            regions.append(Part(there, chooser, far[:, :, :before], v[:, :, :before], 0, False))
        yield rows, regions
