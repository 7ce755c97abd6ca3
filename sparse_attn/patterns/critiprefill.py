"""CritiPrefill: one selection per segment of queries, from element-wise bounds, remembered from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotServed, require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import choose, empty_index
from .pooled import pool_keys, pool_queries


@dataclass(frozen=True)
class CritiPrefill:
    """Read, for each segment of queries, ``budget`` earlier tokens in the blocks whose bounds score best, and the segment itself.

    A segment is represented by the middle of its channel-wise minimum and maximum, a block of keys by both; the score is the
    larger product, averaged over the query heads that share keys, so lists are per key head. Softmax shares of the earlier blocks
    are then mixed with those that the layer before used, because neighbouring layers find the same blocks critical. The last
    segment of a call reads everything.
    Source: CritiPrefill, arXiv:2409.12490; defaults as in its published code. That code also runs the first layer dense: see
    ``SparseAttnConfig.dense_layers``.
    Differs from that code: logits carry the softmax scale, because without it the softmax of a bound is nearly one-hot and
    mixing layers would keep one layer's choice; a budget larger than what lies before a segment reads all of that, never the
    future; segments begin with the call, so that a chunk or a later turn is served.

    Attributes:
        budget: earlier tokens read by each segment, in whole blocks.
        segment: queries that read the same blocks, tokens.
        block: edge of key blocks, tokens.
        fusion: weight of the shares that the last layer of the same forward used, in [0, 1); 0 treats layers alone. Above 0 the
            method needs ``ctx.carry`` and layers of equal shape; calls without are not served.
        dense_below: segments that begin at a position before this read everything.
    """

    budget: int = 2048
    segment: int = 512
    block: int = 32
    fusion: float = 0.25
    dense_below: int = 4096

    def __post_init__(self):
        edges = f"segment={self.segment}, block={self.block}"
        require(min(self.segment, self.block) > 0, f"{edges} must be positive; 512, 32 are usual")
        require(self.budget >= self.block, f"budget={self.budget} is less than one block={self.block}; it counts tokens")
        require(0 <= self.fusion < 1, f"fusion={self.fusion} is outside [0, 1); it is the weight of the layer before")
        require(self.dense_below >= 0, f"dense_below={self.dense_below} is negative; it counts tokens, use 0 for none")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if not ctx.causal:
            raise NotServed("needs causal attention")
        k, _ = kv.fetch()
        index = empty_index(q, kv, ctx, (self.segment, self.block))
        reachable, own = index.reachable(), index.reachable(recent=1)
        share = self._fused(self._share(q, k, ctx.scale, index, reachable & ~own), ctx)
        start, real = (x[:, None, :, None].to(q.device) for x in index.rows())
        later = real.sum(2, keepdim=True) - real.cumsum(2)  # queries after the segment
        always = own | (later == 0) | (start < self.dense_below)
        top_k = torch.full((1, 1, 1), self.budget // self.block, dtype=torch.int32, device=q.device)
        return ReadPlan(choose(share, index, k.shape[1], top_k=top_k, sink=0, recent=0, always=always))

    def _share(self, q: Tensor, k: Tensor, scale: float, index: BlockIndex, candidate: Tensor) -> Tensor:
        """float32 ``[B, Hkv, Qb, Kb]``: softmax over the candidates of the group's mean score."""
        middle = (pool_queries(q, index, "max") + pool_queries(q, index, "min")) / 2
        middle = middle.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, Qb, D]
        bound = torch.maximum(*(middle @ pool_keys(k, index, kind)[:, :, None].mT for kind in ("max", "min"))).mean(2) * scale
        return bound.masked_fill(~candidate, float("-inf")).softmax(-1).nan_to_num(0.0)

    def _fused(self, share: Tensor, ctx: LayerContext) -> Tensor:
        """``share`` mixed with the last layer's, which it replaces."""
        if not self.fusion:
            return share
        if ctx.carry is None:
            raise NotServed(f"with fusion={self.fusion} needs what an earlier layer carries over, and nothing does; use fusion=0")
        layer, before = ctx.carry.get("critiprefill", (ctx.layer, None))
        if layer < ctx.layer:  # else a leftover of an earlier forward
            if before.shape != share.shape:
                shapes = f"{list(before.shape)} in layer {layer} and {list(share.shape)} in layer {ctx.layer}"
                raise NotServed(f"with fusion={self.fusion} needs layers of equal shape, got {shapes}; use fusion=0")
            share = self.fusion * before + (1 - self.fusion) * share
        ctx.carry["critiprefill"] = (ctx.layer, share)
        return share
