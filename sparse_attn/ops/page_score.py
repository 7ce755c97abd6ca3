"""How well any token of a page could fit a few queries, from the page's smallest and largest keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .registry import op
from .runs import REDUCE, require_reduce, require_runs, runs
from .triton import frame


@op
def page_score(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    starts: Tensor,
    pages: Tensor,
    reduce: str = "max",
    q_first: Tensor | None = None,
    q_last: Tensor | None = None,
) -> Tensor:
    """Upper bound on the dot products of a few queries with the keys of each page.

    Channel c of no key of page p lies outside ``low[p, c] .. high[p, c]``, so no key has a larger product with q than
    ``sum_c max(q_c low_c, q_c high_c)``. Per query head that is the largest over the real queries, then reduced over the heads of
    the group, so that one list of pages serves them all. The softmax scale is left out: it ranks nothing.
    Source: Quest, arXiv:2406.10774, algorithm 1, which takes one query and chooses per query head.

    Args:
        q: ``[B, H, Nq, D]``; bfloat16, float16 or float32, any strides. Made for few queries, right for any number.
        low, high: ``[P, D]`` in q's dtype, smallest and largest value of each channel over the keys of a page; contiguous in the
            last dimension.
        starts: int64 ``[B, Hkv]`` first page of each run; Hkv divides H. See ``ops/runs.py``: pages are the rows here.
        pages: int64 ``[B, Hkv]`` pages of each run.
        reduce: ``max``, ``mean`` or ``sum`` over the query heads of a group.
        q_first: int32 ``[B]`` first real query of each sequence; None means 0.
        q_last: int32 ``[B]`` one past the last real query; None means Nq.

    Returns:
        float32 ``[P]``; 0 for pages outside every run, and for those of sequences without a real query.

    Raises:
        ContractError: on mismatched shapes or dtypes, low or high strided in the last dimension, or (on CPU) a run outside them.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    score = torch.zeros(low.shape[0], dtype=torch.float32, device=q.device)
    for run in runs(q, starts, pages, low.shape[0], q_first, q_last):
        if len(run.queries):
            real = q[run.b, run.heads, run.queries.start : run.queries.stop].to(wide)
            bound = real.clamp(min=0) @ high[run.rows].to(wide).mT + real.clamp(max=0) @ low[run.rows].to(wide).mT
            score[run.rows] = REDUCE[reduce](bound.amax(1)).float()
    return score


@page_score.check
def _(q, low, high, starts, pages, reduce, q_first, q_last):
    require(low.shape == high.shape and low.dtype == high.dtype,
            f"low is {low.dtype} {list(low.shape)} but high {high.dtype} {list(high.shape)}; they must agree")
    require_runs(q, low, starts, pages, 0.0, q_first, q_last)
    require_reduce(reduce)
    for name, t in (("low", low), ("high", high)):
        require(t.shape[1] == 1 or t.stride(1) == 1,
                f"{name} must be contiguous in its last dimension, got stride {t.stride(1)}; call contiguous()")


@page_score.fake
def _score(q, low, *rest, **named):
    return low.new_empty(low.shape[0], dtype=torch.float32)


def _needs(isa, q, low, *rest):
    return native.needs_dtype(q) or (f"needs pages of 16 channels or more, got {low.shape[1]}" if low.shape[1] < 16 else None)


native.add(page_score, _score, _needs)
frame.add(page_score, _score, frame.needs_width)
