"""Which tokens of a cache stay when it has to shrink."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda, native
from .registry import op


@op
def keep_top(score: Tensor, starts: Tensor, lengths: Tensor, counts: Tensor, slots: int) -> Tensor:
    """Offsets inside each run of its highest scores, in the order in which the rows stand, so that eviction keeps that order.

    A score of +inf protects its row as long as ``counts`` reaches; -inf comes last, and so does NaN, which only a bug upstream
    makes. Of equal scores the one at the lower offset stays.
    Source: the top-k step of every evicting method, such as H2O (arXiv:2306.14048) and SnapKV (arXiv:2404.14469).

    Args:
        score: float32 ``[S]``, higher is kept longer; rows outside every run are not read.
        starts: int64 ``[B, Hkv]`` first row of each run.
        lengths: int64 ``[B, Hkv]`` rows of each run.
        counts: int32 ``[B, Hkv]`` rows to keep of each run; more than the run has keeps all of it.
        slots: last dimension of the result, at least the most rows that any run keeps.

    Returns:
        int32 ``[B, Hkv, slots]``: offsets counted from the run's start, ascending; -1 behind them.

    Raises:
        ContractError: on mismatched shapes or dtypes, and (on CPU, where looking is free) a run outside the score, a negative
            count, or too few slots. On a GPU such a run keeps nothing, such a count is 0, and the best that fit the slots are kept.
    """
    kept = torch.full((*starts.shape, slots), -1, dtype=torch.int32, device=score.device)
    runs = zip(starts.flatten().tolist(), lengths.flatten().tolist(), counts.flatten().tolist(), strict=True)
    for i, (start, length, count) in enumerate(runs):
        run = list(divmod(i, starts.shape[1]))
        require(start >= 0 and length >= 0 and start + length <= len(score),
                f"run {run} has {length} rows from {start} but the store has {len(score)}; it must lie inside")
        require(count >= 0, f"counts has {count} for run {run}; it is the number of rows to keep")
        rank = score[start : start + length].nan_to_num(float("-inf"), float("inf"), float("-inf"))
        best = rank.sort(descending=True, stable=True).indices[:count].sort().values
        require(len(best) <= slots, f"run {run} keeps {len(best)} rows but there are {slots} slots; give more")
        kept.flatten(0, 1)[i, : len(best)] = best
    return kept


@keep_top.check
def _(score, starts, lengths, counts, slots):
    require(score.dim() == 1 and score.dtype == torch.float32, f"score must be float32 [S], got {score.dtype} {list(score.shape)}")
    require(starts.dim() == 2, f"starts must be int64 [B, Hkv], got {starts.dtype} {list(starts.shape)}")
    for name, t, dtype in (("starts", starts, torch.int64), ("lengths", lengths, torch.int64), ("counts", counts, torch.int32)):
        require(t.dtype == dtype and t.shape == starts.shape,
                f"{name} must be {str(dtype)[6:]} {list(starts.shape)}, one entry per run, got {t.dtype} {list(t.shape)}")
    require(slots >= 0, f"slots={slots} is negative; it is the most rows that a run keeps")


@keep_top.fake
def _kept(score, starts, lengths, counts, slots):
    return score.new_empty((*starts.shape, slots), dtype=torch.int32)


cuda.add(keep_top, _kept)
native.add(keep_top, _kept)
