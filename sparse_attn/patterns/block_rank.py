"""BlockRank: a prompt of many documents, each of which reads only itself and the instruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotServed, require
from ..types import KVView, LayerContext, ReadPlan
from .choose import empty_index


@dataclass(frozen=True)
class BlockRank:
    """Read one's own document and the instruction; the question, at the end, reads everything.

    ``LayerContext.segments`` numbers the documents: segment 0 is the instruction, the row's last segment the question. Tokens of
    no document (-1) are treated as both: they read everything, and everything after them reads them.
    Source: BlockRank, arXiv:2510.05396, section 3.1. Differs from the paper: at block granularity, so tokens that share a block
    with another document's also read that one's blocks (a superset, exact where documents begin on block edges); positions stay
    those of the prompt; its auxiliary loss and its ranking by attention are not here. Made for models trained so: others lose
    what documents tell each other.
    Cannot serve a prompt whose documents nobody named (pass ``segment_ids`` to the model, or use ``handle.segments``), nor
    attention without causality.

    Attributes:
        block: edge of query and key blocks, tokens.
    """

    block: int = 64

    def __post_init__(self):
        require(self.block > 0, f"block={self.block} must be positive; 64 is usual")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if ctx.segments is None:
            raise NotServed("needs to know the documents; pass segment_ids or use handle.segments")
        if not ctx.causal:
            raise NotServed("needs causal attention")
        n_k, ids = kv.n_tokens, ctx.segments
        require(ids.dim() == 2 and ids.shape[0] == q.shape[0] and ids.shape[1] >= n_k,
                f"segment ids {list(ids.shape)} do not cover the prompt; give one for each of {q.shape[0]} x {n_k} tokens")
        index = empty_index(q, kv, ctx, self.block)
        reachable = index.reachable()
        first = ctx.first.long()[:, None] if ctx.first is not None else 0
        end = ctx.last.long()[:, None] - first if ctx.last is not None else n_k - first
        start, real = (x.to(q.device)[..., None] for x in index.rows())
        step = torch.arange(self.block, device=q.device)
        rows = _documents(ids, start + step, step < real, first)
        at = step + self.block * torch.arange(reachable.shape[3], device=q.device)[None, :, None]
        keys = _documents(ids, at, at < (end[..., None] if isinstance(end, Tensor) else end), first)
        asks = rows.free | (rows.high == ids.amax(1, keepdim=True))
        told = keys.free | (keys.low == 0)
        same = (rows.low[..., None] <= keys.high[:, None]) & (keys.low[:, None] <= rows.high[..., None])
        keep = same | asks[..., None] | told[:, None]
        return ReadPlan(index.where(keep[:, None] & reachable))


@dataclass(frozen=True, eq=False)
class _Documents:
    """Lowest and highest document that each block holds, ``[B, blocks]``, and whether it holds a token of none."""

    low: Tensor
    high: Tensor
    free: Tensor


def _documents(ids: Tensor, at: Tensor, real: Tensor, first: Tensor | int) -> _Documents:
    """What the tokens ``at`` ``[B or 1, blocks, block]``, counted from each row's first real key, belong to."""
    at = at + (first[..., None] if isinstance(first, Tensor) else first)
    at = at.clamp(max=ids.shape[1] - 1).expand(ids.shape[0], -1, -1)
    found = ids.long().gather(1, at.flatten(1)).view_as(at)
    most = torch.iinfo(torch.int64).max
    inside = real & (found >= 0)
    low, high = found.masked_fill(~inside, most).amin(-1), found.masked_fill(~inside, -1).amax(-1)
    return _Documents(low, high, (real & (found < 0)).any(-1))
