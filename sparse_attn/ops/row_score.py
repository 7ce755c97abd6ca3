"""How well each row that stands for some keys fits a few queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .registry import op
from .runs import REDUCE, require_reduce, require_runs, runs
from .triton import frame


@op
def row_score(
    q: Tensor,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float = 1.0,
    soft: bool = False,
    reduce: str = "max",
    q_first: Tensor | None = None,
    q_last: Tensor | None = None,
) -> Tensor:
    """Dot products of a few queries with one vector per unit: a key, a page's mean key, a few channels of a key, a low-rank row.

    Per query head a row's score is its largest over the real queries, then reduced over the heads of the group, so that one list
    serves them all. Products of different heads have different sizes; ``soft`` makes each query's a softmax over its run first,
    so that every head has the same say.
    Source: landmarks of ShadowKV (arXiv:2410.21465), which are soft and reduced by max; the soft vote of TokenSelect
    (arXiv:2411.02886), reduced by sum; the labels of Double Sparsity (arXiv:2408.07092).

    Args:
        q: ``[B, H, Nq, D]``; bfloat16, float16 or float32, any strides. Made for few queries, right for any number.
        rows: ``[P, D]`` in q's dtype, contiguous in the last dimension; any D.
        starts: int64 ``[B, Hkv]`` first row of each run; Hkv divides H. See ``ops/runs.py``, but every query meets all rows.
        lengths: int64 ``[B, Hkv]`` rows of each run.
        scale: products are multiplied with it, which matters only where they are soft.
        soft: whether a query's products become its softmax over the run.
        reduce: ``max``, ``mean`` or ``sum`` over the query heads of a group.
        q_first: int32 ``[B]`` first real query of each sequence; None means 0.
        q_last: int32 ``[B]`` one past the last real query; None means Nq.

    Returns:
        float32 ``[P]``; 0 for rows outside every run, and for those of sequences without a real query.

    Raises:
        ContractError: on mismatched shapes or dtypes, rows strided in the last dimension, or (on CPU) a run outside them.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    score = torch.zeros(rows.shape[0], dtype=torch.float32, device=q.device)
    for run in runs(q, starts, lengths, rows.shape[0], q_first, q_last):
        if len(run.queries):
            real = q[run.b, run.heads, run.queries.start : run.queries.stop].to(wide)
            products = real @ rows[run.rows].to(wide).mT * scale
            score[run.rows] = REDUCE[reduce]((products.softmax(-1) if soft else products).amax(1)).float()
    return score


@row_score.check
def _(q, rows, starts, lengths, scale, soft, reduce, q_first, q_last):
    require_runs(q, rows, starts, lengths, 0.0, q_first, q_last)
    require_reduce(reduce)
    require(rows.shape[1] == 1 or rows.stride(1) == 1,
            f"rows must be contiguous in its last dimension, got stride {rows.stride(1)}; call contiguous()")


@row_score.fake
def _score(q, rows, *rest, **named):
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


native.add(row_score, _score, lambda isa, q, *rest: native.needs_dtype(q))
frame.add(row_score, _score, frame.needs_width)
