"""XAttention: antidiagonal scores with a mass threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan


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
        alternate: also look at even token distances, which the paper's antidiagonals with an even stride never see.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.9
    stride: int = 8
    block: int = 128
    top_k: int = 0
    sink: int = 1
    recent: int = 1
    alternate: bool = False

    def __post_init__(self):
        if not isinstance(self.threshold, (int, float)):
            object.__setattr__(self, "threshold", tuple(tuple(float(t) for t in row) for row in self.threshold))
        flat = (self.threshold,) if isinstance(self.threshold, (int, float)) else sum(self.threshold, ())
        bad = [t for t in flat if not 0 <= t <= 1]
        require(not bad, f"threshold={bad[0] if bad else ''} is outside [0, 1]; it is a share of attention mass")
        require(self.stride > 0, f"stride={self.stride} must be positive; 4, 8 or 16 are usual")
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")
        require(self.block % self.stride == 0, f"block={self.block} is not a multiple of stride={self.stride}; use 4, 8 or 16")
        require(self.top_k >= 0, f"top_k={self.top_k} is negative; it counts blocks, 0 means use the threshold")
        require(self.sink >= 0, f"sink={self.sink} is negative; it counts blocks")
        require(self.recent >= 1, f"recent={self.recent} leaves queries without their own block; use 1 or more")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        k, _ = kv.fetch()
        n_q, n_k, span = q.shape[2], kv.n_tokens, dict(q_start=ctx.q_start, causal=ctx.causal, window=ctx.window)
        score = ops.antidiagonal_score(q, k, self.block, self.block, self.stride, ctx.scale, **span, alternate=self.alternate,
                                       first=ctx.first, last=ctx.last)
        threshold = None if self.top_k else self._thresholds(ctx.layer, q.shape[1], q.device)
        counts, indices = ops.select_blocks(score, threshold, self.top_k, self.block, self.block, n_q, n_k, **span,
                                            sink=self.sink, recent=self.recent if ctx.causal else 0, first=ctx.first,
                                            last=ctx.last)
        return ReadPlan(BlockIndex(counts, indices, (self.block, self.block), n_q, n_k, first=ctx.first, last=ctx.last, **span))

    def _thresholds(self, layer: int, heads: int, device: torch.device) -> Tensor:
        if isinstance(self.threshold, (int, float)):
            return torch.full((heads,), float(self.threshold), dtype=torch.float64, device=device)
        require(layer < len(self.threshold), f"threshold has {len(self.threshold)} layers but layer {layer} asked; add rows")
        row = self.threshold[layer]
        require(len(row) == heads, f"threshold has {len(row)} heads in layer {layer} but the layer has {heads}; one per head")
        return torch.tensor(row, dtype=torch.float64, device=device)
