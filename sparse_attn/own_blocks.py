"""Attention over the key blocks that a model's own indexer chose for each query."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .attention import Attended
from .types import BlockIndex, KVView, LayerContext, ReadPlan


def attend_own_blocks(q: Tensor, kv: KVView, ctx: LayerContext, indices: Tensor, block: int) -> Attended:
    """Attention of every query over its own block and the earlier ones that its list names.

    MiniMax-M3 passes such lists to the attention function of every implementation but eager and sdpa. Lists that differ from
    token to token would leave one query per tile. So the heads that share a list become the rows of a tile for the blocks before
    a query's own, which it sees whole; its own block, which every query reads, is walked causally; and the two are merged by
    their log-sum-exp. 15 times faster than a tile per query at 2K tokens, 16 heads and one key head on AVX-512.

    Args:
        q: ``[B, H, Nq, D]``.
        kv: its keys are counted from key 0, as the model counts its blocks: no left padding.
        ctx: causal, without a sliding window.
        indices: int ``[B, Hi, Nq, S]`` distinct key blocks in any order, -1 for none; Hi divides H and H / Hi heads share a list.
        block: keys in a block.
    """
    plan = own_plan(q.shape[2], kv.n_tokens, ctx, indices, block)
    k, v = kv.fetch(plan.blocks)
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    lists = max(indices.shape[1], k.shape[1])
    shared = heads // lists

    position = torch.arange(n_q, device=q.device)[:, None] + ctx.q_start
    earlier = plan.blocks.where(plan.blocks.to_mask() & (torch.arange(-(-n_k // block), device=q.device) < position // block))
    rows = q.unflatten(1, (lists, shared)).transpose(2, 3).flatten(2, 3)  # [B, lists, Nq * shared, D]
    far, far_lse = ops.block_sparse_attention(rows, k, v, earlier.counts, earlier.indices, shared, block, ctx.scale, causal=False,
                                              softcap=ctx.softcap, last=ctx.last)
    far, far_lse = (x.unflatten(2, (n_q, shared)).transpose(2, 3).flatten(1, 2) for x in (far, far_lse))

    ahead = ctx.q_start % block  # rows that bring query blocks onto the edges of key blocks
    aligned = torch.nn.functional.pad(q, (0, 0, ahead, 0))
    own = torch.arange(-(-aligned.shape[2] // block), dtype=torch.int32, device=q.device) + ctx.q_start // block
    own = own[None, None, :, None].expand(batch, -1, -1, -1)
    near, lse = ops.block_sparse_attention(aligned, k, v, torch.ones_like(own[..., 0]), own, block, block, ctx.scale,
                                           ctx.q_start - ahead, softcap=ctx.softcap, last=ctx.last, sinks=ctx.sinks)
    near, lse = near[:, :, ahead:], lse[:, :, ahead:]

    far_lse = far_lse.masked_fill(lse.isneginf(), float("-inf"))  # a padded query reads nothing
    total = torch.logaddexp(far_lse, lse)
    share = ((x - total).exp().nan_to_num(0.0)[..., None] for x in (far_lse, lse))
    out = sum(part * weight for part, weight in zip((far, near), share, strict=True)).to(q.dtype)
    return Attended(out, total, plan, plan.blocks)


def own_plan(n_q: int, n_k: int, ctx: LayerContext, indices: Tensor, block: int) -> ReadPlan:
    """The lists as they are: a query block is one token, a key block what the model's indexer calls a block."""
    none = -(-n_k // block)
    rising = indices.masked_fill(indices < 0, none).sort(-1).values
    counts, rising = (rising < none).sum(-1).int(), rising.masked_fill(rising == none, -1).int()
    return ReadPlan(BlockIndex(counts, rising, (1, block), n_q, n_k, ctx.q_start, True, 0, ctx.first, ctx.last))
