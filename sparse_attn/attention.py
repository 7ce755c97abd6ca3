"""Select, fetch, attend: the only place where the stages meet."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import ops
from .errors import NotServed, warn_once
from .types import BlockIndex, KVView, LayerContext, ReadPlan, Selector, dense_index

# a full list is walked as quickly in any block size; this one makes the fewest list entries that still balance two threads
_DENSE_BLOCK = (128, 128)


@dataclass(frozen=True, repr=False)
class Attended:
    """Result of one attention call.

    Attributes:
        out: ``[B, H, Nq, Dv]``, laid out as ``[B, Nq, H, Dv]``.
        lse: float32 ``[B, H, Nq]``, natural log.
        plan: what the selector chose.
        blocks: the lists that were walked; every reachable block where the plan is dense.
        refusal: why the selector could not serve this call, which then ran dense; None where it did.
    """

    out: Tensor
    lse: Tensor
    plan: ReadPlan
    blocks: BlockIndex
    refusal: str | None = None


def sparse_attention(q: Tensor, kv: KVView, ctx: LayerContext, selector: Selector, chooser: Tensor | None = None) -> Attended:
    """Attention of ``q`` ``[B, H, Nq, D]`` over the part of ``kv`` that ``selector`` chooses when shown ``chooser``, or q."""
    plan, refusal = ReadPlan(), None
    try:
        plan = selector.select(q if chooser is None else chooser, kv, ctx)
    except NotServed as reason:
        refusal = f"{type(selector).__name__} {reason}"
        warn_once(f"{refusal}; the call runs dense")
    blocks = plan.blocks if plan.blocks is not None else dense_index(q, kv, ctx, _DENSE_BLOCK)
    out, lse = ops.block_sparse_attention(*attend_args(q, kv, ctx, plan, blocks))
    return Attended(out, lse, plan, blocks, refusal)


def attend_args(q: Tensor, kv: KVView, ctx: LayerContext, plan: ReadPlan, blocks: BlockIndex) -> tuple:
    """What ``sparse_attention`` passes to ``ops.block_sparse_attention`` for a plan; ``blocks`` are the lists to walk."""
    k, v = kv.fetch(blocks)
    return (q, k, v, blocks.counts, blocks.indices, *blocks.block, ctx.scale, ctx.q_start, ctx.causal, ctx.window, ctx.softcap,
            ctx.first, ctx.last, ctx.sinks, *plan.extras())  # fmt: skip
