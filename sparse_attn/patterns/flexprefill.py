"""FlexPrefill: every head decides by itself between vertical-slash and pooled scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..ops.spans import Span, by_block, query_bounds
from ..types import KVView, LayerContext, ReadPlan
from .choose import empty_index, per_head
from .probe import largest, marked, observe, packed, probed_blocks, rows_alone, slash_tiles, tails


@dataclass(frozen=True)
class FlexPrefill:
    """Vertical lines and slashes of whole blocks, as many as cover ``threshold`` of the last rows' mass; in heads whose pooled
    attention agrees with what the last rows really do, the best pairs of pooled blocks instead.

    Always read: the first block, the diagonal, and ``min_budget`` tokens of lines and of slashes. The numbers of lines and of
    slashes follow from tokens but choose blocks (the paper's rule), so a head of scattered keys is covered by less than
    ``threshold``.
    Source: FlexPrefill, arXiv:2502.20766, sections 3.1 to 3.3 and its code.

    Differs from the code: (1) a slash of blocks stands for the token distances ``[t, t + 1) * block`` and is read as all tiles
    that these cross, the one at ``t + 1`` too, and distances are pooled from the diagonal on; the code reads tile ``t`` only and
    so half of what it chose. (2) A distribution with zeros has a distance, where the code gets NaN and falls to vertical-slash.
    (3) Counts are divided by ``block``, not always by 128. (4) No upper budget.

    Attributes:
        threshold: share of mass to cover, in [0, 1]. 1 is dense.
        gate: Jensen-Shannon distance (square root, nats) below which a head trusts pooled scores; 0 for never.
        min_budget: least tokens of vertical lines, and of slashes.
        block: edge of query and key blocks, and the last queries that probe, tokens.
    """

    threshold: float = 0.95
    gate: float = 0.1
    min_budget: int = 1024
    block: int = 128

    def __post_init__(self):
        require(0 <= self.threshold <= 1, f"threshold={self.threshold} is outside [0, 1]; it is a share of attention mass")
        require(self.gate >= 0, f"gate={self.gate} is negative; it is a distance, 0 trusts no pooled score")
        require(self.min_budget >= 0, f"min_budget={self.min_budget} is negative; it counts tokens")
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        alone, n_k, block = rows_alone(q, kv, ctx), kv.n_tokens, self.block
        index, (k, _) = empty_index(q, kv, ctx, block), kv.fetch()
        vertical, slash = observe(q, k, packed([tails(span.n_q, 1, block) for span in alone], q.device), ctx)
        lines, bands = by_block(vertical, block), by_block(slash, block)
        k_pooled = ops.pool_blocks(k, block, "mean", ctx.first, ctx.last) if self.gate else None
        aware = self._aware(q, k_pooled, lines, alone, ctx) if self.gate else None

        def top(mass: Tensor, blocks: Tensor) -> Tensor:
            count = self._count(mass) if aware is None else self._count(mass).masked_fill(aware, self._least())
            most = blocks.shape[-1]
            forced = torch.arange(most, device=q.device) == 0
            return marked(largest(blocks.masked_fill(forced, float("inf")), most, count), most)

        distances = top(slash, bands).repeat_interleave(block, -1)[..., :n_k]
        tiles = slash_tiles(distances, index) | top(vertical, lines)[:, :, None]
        if aware is None:
            return ReadPlan(index.where(tiles & index.reachable()))
        geometry = (block, block, q.shape[2], n_k, ctx.q_start, ctx.causal, ctx.window, ctx.first, ctx.last)
        bounds = query_bounds(q.shape[0], q.shape[2], n_k, ctx.q_start, ctx.causal, ctx.first, ctx.last)
        q_pooled = ops.pool_blocks(q, block, "mean", *bounds)
        score = ops.pooled_score(q_pooled, k_pooled, torch.full(q.shape[:2], ctx.scale, device=q.device), *geometry)
        threshold = per_head(self.threshold, ctx.layer, q.shape[1], q.device)
        # a head without a score chooses no pair of blocks
        listed = ops.select_global(score * aware[..., None, None], threshold, "head", *geometry, always=tiles, inclusive=False)
        return ReadPlan(replace(index, counts=listed[0], indices=listed[1]))

    def _least(self) -> int:
        return max(1, -(-self.min_budget // self.block))

    def _count(self, mass: Tensor) -> Tensor:
        """int64 ``[B, H]``: blocks that as many tokens fill as the largest masses need for the threshold; at least one."""
        covered = mass.double().sort(-1, descending=True).values.cumsum(-1)
        tokens = (covered <= self.threshold * covered[..., -1:]).sum(-1) + 1
        return (tokens // self.block + 1).clamp(min=self._least())

    def _aware(self, q: Tensor, k_pooled: Tensor, lines: Tensor, alone: list[Span], ctx: LayerContext) -> Tensor:
        """bool ``[B, H]``: does the probe rows' mean query, asked of each block's mean key, find what the rows attend to?"""
        block = self.block
        probe = torch.stack([q[b, :, max(s.rows.start, s.rows.stop - block) : s.rows.stop].float().mean(1) for b, s in enumerate(alone)])
        seen = torch.zeros(q.shape[0], k_pooled.shape[2], dtype=torch.bool)
        for b, span in enumerate(alone):
            blocks = probed_blocks(span, block, block, ctx.window)
            seen[b, blocks.start : blocks.stop] = True
        logits = (probe.unflatten(1, (k_pooled.shape[1], -1)) @ k_pooled.mT).flatten(1, 2) * ctx.scale
        if ctx.softcap:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        estimate = logits.masked_fill(~seen[:, None].to(q.device), float("-inf")).softmax(-1).nan_to_num(0.0)
        truth = lines / lines.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return ops.js_distance(estimate, truth) < self.gate
