"""Chorus: several cheap estimators rank blocks together, exact probes correct the ranking and set each head's budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import NotServed, require
from ..ops.spans import by_block
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import as_table, empty_index, per_head
from .prism import Prism, band_scores
from .probe import covering, largest, marked, observe


@dataclass(frozen=True)
class Chorus:
    """Read single columns, and per head as many blocks as exact probes say it needs, ranked by what its whole group estimates.

    Our own method, put together from what the evidence says works:

    * A few rows at both ends of evenly spaced query blocks, and more at the very end, attend exactly (SampleAttention and
      MInference together). They say which keys matter to everybody and to the question, and how many blocks a head needs.
    * Keys that take much mass from everywhere, the attention sink first of all, are read as columns (MInference's verticals):
      a whole block for one token would be most of what a sharp head reads.
    * Antidiagonals with both parities (XAttention, arXiv:2503.16428, without its blind spot for even distances) see every block,
      and so do two bands of pooled channels (Prism, arXiv:2602.08426). Both blur, so they rank blocks well, but a threshold on
      them reads more than a sharp head needs.
    * One ranking per group of heads, one budget per head (ProxyAttn, arXiv:2509.24745): heads agree on where, not on how much.

    What it cannot do: a query block that did not probe gets the largest budget of those that did, so a head that needs many
    blocks in one place only, between two probes, is under-read there.
    Cannot serve attention without causality, nor an odd head_dim.

    Attributes:
        threshold: share of the exact mass of a probed query block that a head's budget covers, in [0, 1]; a number or a table
            ``[layers][heads]``. 1 is dense.
        stride: tile edge of an antidiagonal, tokens; must divide ``block``.
        block: edge of query and key blocks, tokens.
        probes: the text is cut into so many parts; the block at the end of each probes, in the last part its last rows instead.
        tail: rows that probe together, in a block half at its start and half at its end, tokens.
        window: rows at the very end that probe, ``tail`` at a time, tokens.
        columns: at most so many keys are read as columns, the sink included.
        column_mass: least share of a group's mass, averaged over all probes, that makes a key a column.
        sink_tokens: leading keys always read, as columns.
        recent: trailing blocks always read, own diagonal included.
        slack: blocks added to each head's budget, because query blocks between the probes may need more.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.95
    stride: int = 16
    block: int = 64
    probes: int = 8
    tail: int = 16
    window: int = 64
    columns: int = 64
    column_mass: float = 0.005
    sink_tokens: int = 4
    recent: int = 1
    slack: int = 0

    def __post_init__(self):
        object.__setattr__(self, "threshold", as_table(self.threshold, 0, 1))
        require(0 < self.column_mass <= 1, f"column_mass={self.column_mass} is outside (0, 1]; it is a share of attention mass")
        for name in ("stride", "block", "probes", "tail", "window", "recent"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be 1 or more")
        require(self.block % self.stride == 0, f"block={self.block} is not a multiple of stride={self.stride}; use 4, 8 or 16")
        for name in ("slack", "sink_tokens"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; use 0 for none")
        require(self.columns >= self.sink_tokens,
                f"columns={self.columns} cannot hold sink_tokens={self.sink_tokens}; allow at least as many")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if not ctx.causal:
            raise NotServed("needs causal attention")
        if q.shape[3] % 2:
            raise NotServed(f"needs an even head_dim, got {q.shape[3]}")
        k, _ = kv.fetch()
        index = empty_index(q, kv, ctx, self.block)
        share = per_head(self.threshold, ctx.layer, q.shape[1], q.device)
        mass, at, own, high = self._probe(q, k, ctx, index)
        columns, taken = self._columns(mass, index)
        exact = by_block(mass.masked_fill(taken[:, :, None], 0.0).flatten(1, 2), self.block).unflatten(1, mass.shape[1:3])
        k_blocks, key_block = exact.shape[3], torch.arange(exact.shape[3], device=q.device)
        # what the columns cover counts like the forced blocks: first, and towards the share
        covered = (mass.sum(-1) - exact.sum(-1)).clamp(min=0)[..., None]
        counted = exact.scatter_add(3, own[:, None, :, None].expand(-1, q.shape[1], -1, 1), covered)
        forced = (key_block > own[:, None, :, None] - self.recent) & (key_block <= high[:, None, :, None])
        budget = covering(counted, share[:, None, None], forced.expand_as(counted)).sum(-1).amax(-1, keepdim=True) + self.slack
        budget = torch.maximum(budget, torch.where(share >= 1, k_blocks, 0)[:, None]).int()
        # a block that probed knows better than the average, to which early keys would count more, having less to share with:
        # so a share counts relative to an even one
        reached = own[:, None, :, None] >= key_block
        rank = (exact * (own + 1)[:, None, :, None]).sum(2, keepdim=True) / (k_blocks * reached.sum(2, keepdim=True).clamp(min=1))
        rank = rank.expand(-1, -1, index.counts.shape[2], -1)
        rank = rank.scatter_reduce(2, at[:, None, :, None].expand_as(exact), exact, "amax", include_self=False)
        rank = rank + ops.antidiagonal_score(q, k, *index.block, self.stride, ctx.scale, ctx.q_start, window=ctx.window,
                                             alternate=True, first=ctx.first, last=ctx.last)
        for score in band_scores(q, k, ctx.scale, index, Prism().bands(q.shape[3])):
            rank = rank + score / 2
        group = q.shape[1] // k.shape[1]
        rank = rank.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1)
        counts, indices = ops.select_blocks(rank, None, budget, *index.block, index.n_q, index.n_k, ctx.q_start, ctx.causal,
                                            ctx.window, 0, self.recent, ctx.first, ctx.last)
        return ReadPlan(replace(index, counts=counts, indices=indices), columns)

    def _probe(self, q: Tensor, k: Tensor, ctx: LayerContext, index: BlockIndex) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exact mass of S groups of ``tail`` rows: those inside the text, then those that end it.

        Few rows a group, because what one row alone needs is lost in the sum over many.

        Returns:
            mass: float32 ``[B, H, S, Nk]``; rows sum to 1, or to 0 where a group has no query.
            at: int64 ``[B, S]`` the query block that probed.
            own, high: int64 ``[B, S]`` the key blocks of its first and last query.
        """
        start, real = index.rows()  # on the host
        n_q, row = real.sum(1, keepdim=True), torch.arange(self.tail)
        blocks, half = (real > 0).sum(1, keepdim=True), self.tail // 2
        groups = []
        for s in range(1, self.probes):
            edge = ((s * blocks) // self.probes - 1).clamp(min=0) * self.block
            end = torch.minimum(edge + self.block, n_q)
            groups.append(torch.where(row < half, edge + row, torch.maximum(end - self.tail + row, edge + half)))
        groups += [n_q - (g + 1) * self.tail + row for g in range(-(-self.window // self.tail))]
        masses, ats = [], []
        for rows in groups:
            rows = torch.where((rows >= 0) & (rows < n_q), rows, -1)
            columns, _ = observe(q, k, rows.int().to(q.device), ctx)
            masses.append(columns / columns.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
            ats.append(rows[:, -1].clamp(min=0) // self.block)
        at = torch.stack(ats, 1)
        own, last = start.gather(1, at), real.gather(1, at)
        high = (own + last - 1).clamp(min=0) // self.block
        return torch.stack(masses, 2), at.to(q.device), own.clamp(min=0).to(q.device) // self.block, high.to(q.device)

    def _columns(self, mass: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
        """Columns of each head, int32 ``[B, H, C]`` as a ReadPlan has them, and bool ``[B, H, Nk]``: is the key one?"""
        n_k = mass.shape[3]
        end = index.last[:, None] if index.last is not None else torch.full((1, 1), n_k, device=mass.device)
        real = end - index.first.clamp(min=0)[:, None] if index.first is not None else end
        key = torch.arange(n_k, device=mass.device)
        sink = ((key < self.sink_tokens) & (key < real.clamp(max=n_k)))[:, None]
        mean = mass.mean(2)
        most = min(self.columns, n_k)
        count = (sink | (mean >= self.column_mass)).sum(-1).clamp(max=most)
        listed = largest(mean.masked_fill(sink, float("inf")), most, count)
        return listed.masked_fill(listed == n_k, -1).int(), marked(listed, n_k)
