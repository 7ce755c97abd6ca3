"""SpargeAttn: pooled scores where a block's tokens resemble each other, everything where they do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import as_table, choose, empty_index, per_head, require_gqa
from .pooled import pool_keys, pool_queries, shares


@dataclass(frozen=True)
class SpargeAttn:
    """Read the key blocks that cover at most ``threshold`` of the pooled mass, and every block whose mean says little about it.

    A block is self-similar when the mean cosine over all pairs of its tokens exceeds ``similarity``. Blocks of keys that are not
    are read by every query block, and query blocks that are not read every key block; mass is counted over the others.
    Source: SpargeAttn, arXiv:2502.18137; defaults of the threshold form in its published code. The default of its later form is
    ``density=0.5, similarity=-1``.
    Differs from that code: the first block and the own diagonal are forced unless ``sink`` or ``recent`` is 0, because a causal
    query may read no key otherwise; ``density`` counts the blocks that a query block can reach, not all that exist, so that 0.5
    reads half and a chunk reads what one shot would; a partly filled block is judged by its real tokens, not always read;
    causality holds inside diagonal tiles (most of the published entry points leak there). The quantised product is not part of
    this pattern.

    Attributes:
        threshold: share of mass not to exceed, in [0, 1]; the best block is kept in any case. One number, or a table
            ``[layers][heads]``. 1 is dense.
        density: read this share of the reachable blocks instead, rounded down to at least one; 0 to use the threshold.
        similarity: mean cosine above which a block is self-similar, in [-1, 1]; one number or a table. Below 0 every block is.
        block_q, block_k: edges of query and key blocks, tokens.
        smooth_k: subtract the mean key of the row before judging key blocks. Pooled shares do not change by it.
        sink: leading blocks always read, without counting.
        recent: likewise trailing blocks, own diagonal included; ignored without causality.
        pv_threshold: nats (the published code counts in powers of two: its 50 is 34.7 nats); see ``ops.block_sparse_attention``.
        gqa: what query heads that share keys do together, see ``choose``.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.98
    density: float = 0.0
    similarity: float | tuple[tuple[float, ...], ...] = 0.6
    block_q: int = 128
    block_k: int = 64
    smooth_k: bool = True
    sink: int = 1
    recent: int = 1
    pv_threshold: float = 0.0
    gqa: str = "per_head"

    def __post_init__(self):
        object.__setattr__(self, "threshold", as_table(self.threshold, 0, 1))
        object.__setattr__(self, "similarity", as_table(self.similarity, -1, 1, "similarity"))
        require(0 <= self.density <= 1, f"density={self.density} is outside [0, 1]; it is a share of the reachable blocks")
        edges = f"block_q={self.block_q}, block_k={self.block_k}"
        require(min(self.block_q, self.block_k) > 0, f"{edges} must be positive; 128 and 64 are usual")
        require(min(self.sink, self.recent) >= 0, f"sink={self.sink} and recent={self.recent} count blocks; use 0 for none")
        require(self.pv_threshold >= 0, f"pv_threshold={self.pv_threshold} is negative; use 0 for never")
        require_gqa(self.gqa)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        k, _ = kv.fetch()
        heads, kv_heads = q.shape[1], k.shape[1]
        index = empty_index(q, kv, ctx, (self.block_q, self.block_k))
        likeness = per_head(self.similarity, ctx.layer, heads, q.device, "similarity")[:, None]
        alike_q = pool_queries(q, index, "unit_mean").square().sum(-1) > likeness  # [B, H, Qb]
        alike_k = self._self_similarity(k, index).repeat_interleave(heads // kv_heads, 1) > likeness  # [B, H, Kb]
        near = index.reachable(sink=self.sink, recent=self.recent if ctx.causal else 0)
        always = ~alike_q[..., None] | ~alike_k[:, :, None] | near
        score = shares(pool_queries(q, index), pool_keys(k, index), ctx.scale, index) * alike_k[:, :, None]

        def chosen(**rule) -> Tensor:
            return choose(score, index, kv_heads, sink=0, recent=0, always=always, gqa=self.gqa, **rule).to_mask()

        reachable = index.reachable().sum(-1)  # [B, 1, Qb]
        keep = chosen(top_k=(reachable * self.density).floor().clamp(min=1).int())
        if not self.density:
            keep |= chosen(threshold=per_head(self.threshold, ctx.layer, heads, q.device), inclusive=False)
        return ReadPlan(index.where(keep), pv_threshold=self.pv_threshold)

    def _self_similarity(self, k: Tensor, index: BlockIndex) -> Tensor:
        """float32 ``[B, Hkv, Kb]``: mean cosine between all pairs of keys of a block."""
        if not self.smooth_k:
            return pool_keys(k, index, "unit_mean").square().sum(-1)
        mean = ops.pool_blocks(k, k.shape[2], "mean", index.first, index.last)  # one block: the mean of the row's real keys
        heads = [pool_keys(k[:, h : h + 1] - mean[:, h : h + 1], index, "unit_mean") for h in range(k.shape[1])]  # a head fits a cache
        return torch.cat(heads, 1).square().sum(-1)
