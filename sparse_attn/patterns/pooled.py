"""Pooled blocks in the geometry of a call: what the patterns that score blocks by one vector each have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.spans import query_bounds
from ..types import BlockIndex


def query_rows(index: BlockIndex, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """First real query row and one past the last, as in ``query_bounds``."""
    return query_bounds(batch, index.n_q, index.n_k, index.q_start, index.causal, index.first, index.last)


def pool_queries(q: Tensor, index: BlockIndex, kind: str = "mean") -> Tensor:
    """float32 ``[B, H, Qb, D]``: ``pool_blocks`` over the real queries of each query block."""
    return ops.pool_blocks(q, index.block[0], kind, *query_rows(index, q.shape[0]))


def pool_keys(k: Tensor, index: BlockIndex, kind: str = "mean") -> Tensor:
    """float32 ``[B, Hkv, Kb, D]``: ``pool_blocks`` over the real keys of each key block."""
    return ops.pool_blocks(k, index.block[1], kind, index.first, index.last)


def shares(q_pooled: Tensor, k_pooled: Tensor, scale: float | Tensor, index: BlockIndex) -> Tensor:
    """float32 ``[B, H, Qb, Kb]``: ``pooled_score`` over the reachable blocks; ``scale`` is one number or ``[B, H]``."""
    if not isinstance(scale, Tensor):
        scale = torch.full(q_pooled.shape[:2], scale, dtype=torch.float32, device=q_pooled.device)
    return ops.pooled_score(q_pooled, k_pooled, scale, *index.block, index.n_q, index.n_k, index.q_start, index.causal,
                            index.window, index.first, index.last)  # fmt: skip
