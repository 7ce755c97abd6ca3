"""From block scores to block lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda, native
from .contract import require_blocks, require_span
from .registry import op
from .spans import reach, spans


def _keep(mass: Tensor, forced: Tensor, allowed: Tensor, threshold: Tensor | None, top_k: Tensor | None, inclusive: bool) -> Tensor:
    """Which blocks of each row stay: mass ``[H, qb, kb]``, forced and allowed ``[qb, kb]``, threshold ``[H]``, top_k ``[H or 1, qb or 1]``."""
    mass = mass.double().masked_fill(~allowed, 0.0)
    rank = mass.masked_fill(forced, float("inf")).masked_fill(~allowed, float("-inf"))
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices  # forced first, then by mass, ties to the lower index
    place = order.argsort(-1)
    if threshold is None:
        keep = place < torch.maximum(forced.sum(-1, keepdim=True), top_k[..., None])
    else:
        cumulative = mass.gather(-1, order).cumsum(-1).roll(1, -1)
        before = cumulative.index_fill(-1, torch.tensor([0], device=mass.device), 0.0).gather(-1, place)
        p = threshold[:, None, None]
        target = p * mass.cumsum(-1)[..., -1:]
        keep = (before < target if inclusive else before + mass <= target) & (mass > 0) | (p >= 1)
    return (keep | forced) & allowed


@op
def select_blocks(
    score: Tensor,
    threshold: Tensor | None,
    top_k: Tensor | None,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    sink: int = 1,
    recent: int = 1,
    first: Tensor | None = None,
    last: Tensor | None = None,
    always: Tensor | None = None,
    inclusive: bool = True,
) -> tuple[Tensor, Tensor]:
    """The key blocks each query block reads: the smallest set that covers a share of its mass, or the top_k best.

    Forced blocks (the first ``sink``, and the last ``recent`` up to and including the query block's own diagonal) come first
    and count towards the share; then blocks join by falling score, ties to the lower index, each kept while the mass before
    it is strictly below ``threshold * total`` (inclusive top-p), or while the mass with it is at most that
    (``inclusive=False``). threshold 1 keeps every reachable block, threshold 0 only the forced ones; a block of score 0 never
    joins below threshold 1.
    Source: XAttention, arXiv:2503.16428, section 2.2 and its ``find_blocks`` (worked examples: python_tests/test_ops.py).

    Args:
        score: float32 ``[B, H, Qb, Kb]``, not negative, comparable within a row.
        threshold: float64 ``[H]`` share of mass to cover per head, in [0, 1]; None to use ``top_k``.
        top_k: int32, broadcastable to ``[B, H, Qb]``: blocks to keep per row, forced ones included; None with ``threshold``.
        block_q: tokens per query block.
        block_k: tokens per key block.
        n_q: query tokens, padding included; Qb is ``ceil(n_q / block_q)``.
        n_k: key tokens, padding included; Kb is ``ceil(n_k / block_k)``.
        q_start: position of query 0 among the keys.
        causal: only blocks that hold a key at or before some query of the block are reachable.
        window: sliding window in tokens, own token included; 0 for none. Blocks wholly before it are not reachable.
        sink: leading blocks always kept, where reachable.
        recent: trailing blocks always kept; 1 is the query block's own diagonal. Must be 0 without causality.
        first: int32 ``[B]`` first real key of each row; None means 0.
        last: int32 ``[B]`` one past the last real key; None means n_k.
        always: bool, broadcastable to ``[B, H, Qb, Kb]``: blocks kept, where reachable, whatever the rule says and without
            counting towards it.
        inclusive: whether the block that crosses the threshold is kept.

    Returns:
        counts: int32 ``[B, H, Qb]``, 0 for query blocks that are padding.
        indices: int32 ``[B, H, Qb, Kb]``, ascending; slots past ``counts`` hold -1.

    Raises:
        ContractError: on mismatched shapes, both or neither rule, and (on CPU, where looking is free) a NaN, infinite or negative
            score or a threshold outside [0, 1]. The CUDA backend keeps every reachable block of such a row or head instead.
    """
    batch, heads, q_blocks, k_blocks = score.shape
    looked = score.device.type != "cpu" or bool(((score >= 0) & (score < float("inf"))).all())
    share = threshold is None or score.device.type != "cpu" or bool(((threshold >= 0) & (threshold <= 1)).all())
    require(share, "threshold has an entry outside [0, 1]; it is a share of attention mass")
    require(looked, "score has a NaN, infinite or negative entry; mass is finite and not negative")
    kept = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.bool, device=score.device)
    column = torch.arange(k_blocks, device=score.device)
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        low, own, high = (edge[:, None].to(score.device) for edge in reach(span, block_q, block_k, causal, window))
        allowed = (column >= low) & (column <= high)
        forced = allowed & ((column < sink) | ((column >= own - (recent - 1)) if recent else False))
        rows = len(low)
        most = top_k.expand(batch, heads, q_blocks)[b, :, :rows] if top_k is not None else None
        kept[b, :, :rows] = _keep(score[b, :, :rows], forced, allowed, threshold, most, inclusive)
        if always is not None:
            kept[b, :, :rows] |= always.expand(batch, heads, q_blocks, k_blocks)[b, :, :rows] & allowed
    counts = kept.sum(-1, dtype=torch.int32)
    indices = torch.where(kept, column, k_blocks).sort(-1).values
    return counts, indices.masked_fill(indices == k_blocks, -1).int()


@select_blocks.check
def _(score, threshold, top_k, block_q, block_k, n_q, n_k, q_start, causal, window, sink, recent, first, last, always, inclusive):
    require(score.dim() == 4, f"score needs 4 dimensions [B, H, Qb, Kb], got {score.dim()}")
    require(score.dtype == torch.float32, f"score must be float32, got {score.dtype}; keep estimates in float32")
    require_blocks(block_q, block_k)
    want = (-(-n_q // block_q), -(-n_k // block_k))
    require(tuple(score.shape[2:]) == want, f"score covers {tuple(score.shape[2:])} blocks but {n_q} x {n_k} tokens make {want}")
    require((threshold is None) != (top_k is None), "give either threshold or top_k, not both and not neither")
    for name, t, dtype, size in (("top_k", top_k, torch.int32, score.shape[:3]), ("always", always, torch.bool, score.shape)):
        fits = t is None or t.dtype == dtype and t.dim() == len(size) and all(a in (1, b) for a, b in zip(t.shape, size))
        got = "" if t is None else f"{t.dtype} {list(t.shape)}"
        require(fits, f"{name} must be {str(dtype)[6:]} and broadcast to {list(size)}, got {got}")
    if threshold is not None:
        require(
            threshold.dtype == torch.float64 and tuple(threshold.shape) == (score.shape[1],),
            f"threshold must be float64 [{score.shape[1]}], one share per head, got {threshold.dtype} {list(threshold.shape)}",
        )
    require(sink >= 0 and recent >= 0, f"sink={sink} and recent={recent} count blocks and cannot be negative")
    require(causal or recent == 0, f"recent={recent} needs causal=True; without positions no block is recent, use 0")
    require_span(score.shape[0], n_q, n_k, q_start, causal, window, first, last)


@select_blocks.fake
def _(score, threshold, top_k, block_q, block_k, n_q, n_k, q_start=0, causal=True, window=0, sink=1, recent=1, first=None,
      last=None, always=None, inclusive=True):
    return score.new_empty(score.shape[:3], dtype=torch.int32), score.new_empty(score.shape, dtype=torch.int32)


def _lists(score, *rest):
    return score.new_empty(score.shape[:3], dtype=torch.int32), score.new_empty(score.shape, dtype=torch.int32)


# their keys are what a thread block's shared memory holds, 96 of 99 KiB
_MOST_BLOCKS = 24576


def _needs_room(score, *rest):
    return None if score.shape[3] <= _MOST_BLOCKS else f"needs at most {_MOST_BLOCKS} key blocks, got {score.shape[3]}"


cuda.add(select_blocks, _lists, _needs_room)
native.add(select_blocks, _lists)
