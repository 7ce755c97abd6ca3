"""XAttention: antidiagonal scores with a mass threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..types import KVView, LayerContext, ReadPlan
from .choose import as_table, choose, empty_index, per_head, require_gqa


@dataclass(frozen=True)
class XAttention:
    """Read the blocks that cover ``threshold`` of the mass estimated from antidiagonals.

    The first ``sink`` blocks and the query block's own diagonal are always read and count towards the threshold.
    Source: XAttention, arXiv:2503.16428; defaults as in its published code, except the forced blocks, see ops.

    Attributes:
        threshold: share of mass to cover, in [0, 1]; one number, or a table ``[layers][heads]``. 1 is dense.
        stride: tile edge of an antidiagonal, tokens; must divide ``block``. Larger is cheaper and coarser.
        block: edge of query and key blocks, tokens.
        top_k: read this many blocks per query block instead of covering a threshold; 0 to use the threshold.
        sink: leading blocks always read.
        recent: trailing blocks always read, own diagonal included.
        gqa: what query heads that share keys do together: per_head, sum, union, vote or shared, see ``choose``.
        alternate: also look at even token distances, which the paper's antidiagonals with an even stride never see.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.9
    stride: int = 8
    block: int = 128
    top_k: int = 0
    sink: int = 1
    recent: int = 1
    alternate: bool = False
    gqa: str = "per_head"

    def __post_init__(self):
        object.__setattr__(self, "threshold", as_table(self.threshold, 0, 1))
        require(self.stride > 0, f"stride={self.stride} must be positive; 4, 8 or 16 are usual")
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")
        require(self.block % self.stride == 0, f"block={self.block} is not a multiple of stride={self.stride}; use 4, 8 or 16")
        require(self.top_k >= 0, f"top_k={self.top_k} is negative; it counts blocks, 0 means use the threshold")
        require(self.sink >= 0, f"sink={self.sink} is negative; it counts blocks")
        require(self.recent >= 1, f"recent={self.recent} leaves queries without their own block; use 1 or more")
        require_gqa(self.gqa)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        k, _ = kv.fetch()
        score = ops.antidiagonal_score(q, k, self.block, self.block, self.stride, ctx.scale, q_start=ctx.q_start, causal=ctx.causal,
                                       window=ctx.window, alternate=self.alternate, first=ctx.first, last=ctx.last)
        threshold = None if self.top_k else per_head(self.threshold, ctx.layer, q.shape[1], q.device)
        top_k = torch.tensor(self.top_k, dtype=torch.int32, device=q.device).expand(1, 1, 1) if self.top_k else None
        return ReadPlan(choose(score, empty_index(q, kv, ctx, self.block), k.shape[1], threshold=threshold, top_k=top_k,
                               sink=self.sink, recent=self.recent, gqa=self.gqa))
