"""From block scores to a plan: what every pattern that scores blocks has in common, the GQA policy included."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..types import BlockIndex, KVView, LayerContext

GQA = ("per_head", "sum", "union", "vote", "shared")


def require_gqa(gqa: str) -> None:
    """A known GQA policy."""
    require(gqa in GQA, f"gqa={gqa!r} is no policy; use {', '.join(GQA)}")


def empty_index(q: Tensor, kv: KVView, ctx: LayerContext, block: int | tuple[int, int], heads: int = 1) -> BlockIndex:
    """The geometry of a call with nothing listed yet, ``block`` one edge or (query, key); ``where(mask)`` lists blocks."""
    require(q.dim() == 4, f"q needs 4 dimensions [B, H, Nq, D], got {q.dim()}")
    edges = block if isinstance(block, tuple) else (block, block)
    return BlockIndex.empty(q.shape[0], heads, q.shape[2], kv.n_tokens, edges, ctx.q_start, ctx.causal, ctx.window,
                            ctx.first, ctx.last, q.device)


def as_table(value, low: float, high: float, name: str = "threshold") -> float | tuple[tuple[float, ...], ...]:
    """One number, or a table ``[layers][heads]`` as tuples (JSON makes lists), every entry within ``low..high``."""
    table = value if isinstance(value, (int, float)) else tuple(tuple(float(x) for x in row) for row in value)
    flat = (table,) if isinstance(table, (int, float)) else sum(table, ())
    bad = [x for x in flat if not low <= x <= high]
    require(not bad, f"{name}={bad[0] if bad else ''} is outside [{low:g}, {high:g}]; use one number or a table [layers][heads]")
    return table


def per_head(value: float | tuple, layer: int, heads: int, device, name: str = "threshold") -> Tensor:
    """float64 ``[heads]`` from one number or a table ``[layers][heads]``."""
    if isinstance(value, (int, float)):
        return torch.full((heads,), float(value), dtype=torch.float64, device=device)
    require(layer < len(value), f"{name} has {len(value)} layers but layer {layer} asked; add rows")
    row = value[layer]
    require(len(row) == heads, f"{name} has {len(row)} heads in layer {layer} but the layer has {heads}; one per head")
    return torch.tensor(row, dtype=torch.float64, device=device)


def choose(score: Tensor, index: BlockIndex, kv_heads: int, *, threshold: Tensor | None = None, top_k: Tensor | None = None,
           sink: int = 1, recent: int = 1, always: Tensor | None = None, inclusive: bool = True, gqa: str = "per_head") -> BlockIndex:
    """Block lists from scores, with a policy for the query heads that share keys.

    Args:
        score: float32 ``[B, H, Qb, Kb]``, not negative.
        index: the geometry, from ``empty_index``.
        kv_heads: Hkv.
        threshold, top_k, sink, always, inclusive: as in ``ops.select_blocks``.
        recent: likewise, but ignored without causality, where no block is recent.
        gqa: ``per_head`` lets every query head choose; ``sum`` chooses once per group by the summed scores; ``union`` and ``vote``
            read what any head, or more than half of the heads, of a group chose; ``shared`` ranks by the summed scores and lets
            each head read as many blocks as it would have chosen itself (ProxyAttn, arXiv:2509.24745, per-head budgets).

    Returns:
        Lists for H heads (per_head, shared) or Hkv heads (sum, union, vote).
    """
    require_gqa(gqa)
    heads = score.shape[1]
    group = heads // kv_heads

    def lists(score: Tensor, threshold: Tensor | None, top_k: Tensor | None, always: Tensor | None) -> BlockIndex:
        counts, indices = ops.select_blocks(
            score, threshold, top_k, *index.block, index.n_q, index.n_k, index.q_start, index.causal, index.window, sink,
            recent if index.causal else 0, index.first, index.last, always, inclusive,
        )  # fmt: skip
        return replace(index, counts=counts, indices=indices)

    if gqa == "per_head" or group == 1:
        return lists(score, threshold, top_k, always)
    summed = score.unflatten(1, (kv_heads, group)).sum(2)

    def of_group(x: Tensor | None, dim: int) -> Tensor | None:
        """The most that any head of a group asks for."""
        return x.unflatten(dim, (kv_heads, group)).amax(dim + 1) if x is not None and x.shape[dim] == heads else x

    if gqa == "sum":
        joined = of_group(always.int(), 1).bool() if always is not None else None
        return lists(summed, of_group(threshold, 0), of_group(top_k, 1), joined)
    own = lists(score, threshold, top_k, always)
    if gqa == "shared":
        return lists(summed.repeat_interleave(group, 1), None, own.counts, always)
    votes = own.to_mask().unflatten(1, (kv_heads, group)).sum(2)
    return index.where(votes > (group // 2 if gqa == "vote" else 0))
