"""VMoBA: gates between mean queries and mean keys, cut off by a share of the gates instead of a count."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import as_table, choose, empty_index, per_head
from .pooled import pool_keys, pool_queries

# dimensions of gates [B, H, Qb, Kb] that one scope ranks together
SCOPES = {"block": (-1,), "head": (-2, -1), "all": (-3, -2, -1)}


@dataclass(frozen=True)
class VMoBA:
    """Read the own block, then blocks by falling gate until ``threshold`` of the sum of gates is covered.

    A gate is the product of mean query and mean key, stretched over its scope so that the smallest reachable gate is 0 and the
    largest 1 (equal gates are all 1): no temperature enters, the softmax scale does not either. The own block counts first.
    Source: VMoBA, arXiv:2506.23858; threshold as in its published code.
    Differs from the paper: a query block gates by its mean query where the paper gates every token, because lists are per query
    block; its scope per key chunk is not offered, since it bounds no query's work; where nothing beside the own block is chosen
    only that is read, not everything; causal attention and sliding windows are served too. Tokens are taken as they come: the
    cycle of 1D, 2D and 3D layouts of video tokens is the model's to do. Query heads that share keys choose alone.

    Attributes:
        threshold: share of the gates to cover, in [0, 1]; a number, or a table ``[layers][heads]``. 1 is dense.
        top_k: with scope block, read this many blocks per query block instead, own ones included; 0 to use the threshold.
        scope: which gates are stretched and ranked together: ``block`` those of one query block (paper: query_head), ``head`` those
            of all query blocks of a head (head_global), ``all`` those of all heads of a batch row (overall; the
            largest threshold holds).
        block: edge of query and key blocks, tokens. Without causality a query has an own block if there are as many queries as
            keys.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.25
    top_k: int = 0
    scope: str = "block"
    block: int = 128

    def __post_init__(self):
        object.__setattr__(self, "threshold", as_table(self.threshold, 0, 1))
        require(self.top_k >= 0, f"top_k={self.top_k} is negative; it counts blocks, 0 means use the threshold")
        require(self.scope in SCOPES, f"scope={self.scope!r} is not known; use {', '.join(SCOPES)}")
        fits = not self.top_k or self.scope == "block"
        require(fits, f"top_k={self.top_k} counts blocks per query block; use it with scope='block'")
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        k, _ = kv.fetch()
        index = empty_index(q, kv, ctx, self.block)
        reachable, own = index.reachable(), self._own(index)
        gate = (pool_queries(q, index).unflatten(1, (k.shape[1], -1)) @ pool_keys(k, index)[:, :, None].mT).flatten(1, 2)
        gate = self._stretched(gate, reachable)
        threshold = per_head(self.threshold, ctx.layer, q.shape[1], q.device)
        if self.scope == "block":
            # own blocks rank first; gates are at most 1
            most = torch.maximum(self._count(gate, own, threshold[:, None]), own.sum(-1)).int()
            return ReadPlan(choose(gate.masked_fill(own, 2.0), index, k.shape[1], top_k=most, sink=0, recent=0))
        return ReadPlan(index.where(self._by_scope(gate, index, own, threshold)))

    def _own(self, index: BlockIndex) -> Tensor:
        """bool ``[B, 1, Qb, Kb]``: does the block hold a query's own key?"""
        if index.causal:
            return index.reachable(recent=1)
        if index.n_q != index.n_k:
            return index.reachable(sink=0)
        edge = torch.arange(index.counts.shape[2], device=index.counts.device) * self.block
        if index.first is not None:
            edge = edge - index.first.clamp(min=0)[:, None]  # key block 0 begins behind the padding
        start = edge.expand(index.counts.shape[0], -1)[:, None, :, None]
        column = torch.arange(edge.shape[-1], device=edge.device)
        return index.reachable() & (column >= start // self.block) & (column <= (start + self.block - 1) // self.block)

    def _stretched(self, gate: Tensor, reachable: Tensor) -> Tensor:
        """Gates from 0 to 1 within their scope, 0 where nothing is reachable."""
        low = gate.masked_fill(~reachable, float("inf")).amin(SCOPES[self.scope], keepdim=True)
        spread = gate.masked_fill(~reachable, float("-inf")).amax(SCOPES[self.scope], keepdim=True) - low
        return torch.where(spread > 0, (gate - low) / spread, 1.0).masked_fill(~reachable, 0.0)

    def _count(self, gate: Tensor, own: Tensor, threshold: Tensor) -> Tensor:
        """int64 ``[B, H, Qb]``: blocks that a query block reads, its own included."""
        if self.top_k:
            return torch.full(gate.shape[:3], self.top_k, device=gate.device)
        others = gate.double().masked_fill(own, 0.0).sort(-1, descending=True).values
        after = others.cumsum(-1)
        mine = gate.double().masked_fill(~own, 0.0).sum(-1)
        need = threshold * (mine + after[..., -1]) - mine
        joined = (after.roll(1, -1).index_fill(-1, torch.tensor([0], device=gate.device), 0.0) < need[..., None]) & (others > 0)
        return torch.where(threshold >= 1, gate.shape[3], joined.sum(-1) + own.sum(-1))

    def _by_scope(self, gate: Tensor, index: BlockIndex, own: Tensor, threshold: Tensor) -> Tensor:
        """bool ``[B, H, Qb, Kb]``: the own blocks, and what one ranking per head or batch row adds to them."""
        others = gate.masked_fill(own, 0.0)
        dims = SCOPES[self.scope]
        total, spare = (x.sum(dims, dtype=torch.float64).view(len(gate), -1) for x in (gate, others))  # [B, H or 1]
        # the share of the others that is still needed once the own blocks are counted
        share = ((threshold * total - (total - spare)) / spare.clamp(min=1e-300)).clamp(0, 1).masked_fill(threshold >= 1, 1.0)
        rows = []
        for b in range(len(gate)):  # the share differs per batch row, and select_global takes one per head
            bounds = (x[b : b + 1] if x is not None else None for x in (index.first, index.last))
            counts, indices = ops.select_global(
                others[b : b + 1], share[b].expand(len(threshold)), self.scope, *index.block, index.n_q, index.n_k,
                index.q_start, index.causal, index.window, *bounds, own[b : b + 1],
            )  # fmt: skip
            rows.append(replace(index, counts=counts, indices=indices).to_mask())
        return torch.cat(rows)
