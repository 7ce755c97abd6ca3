"""Block lists from one budget that all query blocks share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda, native
from .contract import require_blocks, require_span
from .registry import op
from .spans import reach, spans

SCOPES = ("head", "all")


@op
def select_global(
    score: Tensor,
    threshold: Tensor,
    scope: str,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    first: Tensor | None = None,
    last: Tensor | None = None,
    always: Tensor | None = None,
    inclusive: bool = True,
) -> tuple[Tensor, Tensor]:
    """The (query block, key block) pairs that cover a share of the whole score, taken by falling score over all query blocks.

    Ties go to the lower head (scope all), then the lower query block, then the lower key block. A pair is kept while the sum
    before it is strictly below ``threshold * total``, or while the sum with it is at most that (``inclusive=False``); a pair of
    score 0 never joins below threshold 1, which keeps every reachable pair.
    Source: the query-aware heads of FlexPrefill (arXiv:2502.20766, section 3.2) and the global scopes of VMoBA (arXiv:2506.23858).

    Args:
        score: float32 ``[B, H, Qb, Kb]``, not negative, comparable within the scope.
        threshold: float64 ``[H]`` share to cover, in [0, 1]; scope all uses the largest.
        scope: ``head`` or ``all`` heads of a batch row together.
        block_q, block_k, n_q, n_k, q_start, causal, window, first, last: as in ``select_blocks``.
        always: bool, broadcastable to ``[B, H, Qb, Kb]``: pairs kept besides, where reachable, without counting.
        inclusive: whether the pair that crosses the threshold is kept.

    Returns:
        counts: int32 ``[B, H, Qb]``, 0 for query blocks that are padding.
        indices: int32 ``[B, H, Qb, Kb]``, ascending; slots past ``counts`` hold -1.

    Raises:
        ContractError: on mismatched shapes, an unknown scope, and (on CPU, where looking is free) a NaN, infinite or negative score
            or a threshold outside [0, 1]. The CUDA backend keeps every reachable pair under such a budget instead.
    """
    batch, heads, q_blocks, k_blocks = score.shape
    if score.device.type == "cpu":
        require(bool(((threshold >= 0) & (threshold <= 1)).all()), "threshold has an entry outside [0, 1]; it is a share of the score")
        require(bool(((score >= 0) & (score < float("inf"))).all()), "score has a NaN, infinite or negative entry")
    kept = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.bool, device=score.device)
    column = torch.arange(k_blocks, device=score.device)
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        low, _, high = (edge[:, None].to(score.device) for edge in reach(span, block_q, block_k, causal, window))
        allowed = ((column >= low) & (column <= high)).expand(heads, -1, -1)
        mass = score[b, :, : len(low)].double().masked_fill(~allowed, 0.0)
        pools = mass.reshape(1, -1) if scope == "all" else mass.flatten(1)
        p = threshold.amax()[None] if scope == "all" else threshold
        order = torch.sort(pools, dim=-1, descending=True, stable=True).indices
        ranked = pools.gather(-1, order)
        after, total = ranked.cumsum(-1), pools.cumsum(-1)[:, -1:]
        before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], -1)
        target = p[:, None] * total
        keep = (before < target if inclusive else after <= target) & (ranked > 0) | (p[:, None] >= 1)
        chosen = torch.zeros_like(keep).scatter_(-1, order, keep).view_as(mass)
        if always is not None:
            chosen = chosen | always.expand_as(score)[b, :, : len(low)]
        kept[b, :, : len(low)] = chosen & allowed
    indices = torch.where(kept, column, k_blocks).sort(-1).values
    return kept.sum(-1, dtype=torch.int32), indices.masked_fill(indices == k_blocks, -1).int()


@select_global.check
def _(score, threshold, scope, block_q, block_k, n_q, n_k, q_start, causal, window, first, last, always, inclusive):
    require(score.dim() == 4, f"score needs 4 dimensions [B, H, Qb, Kb], got {score.dim()}")
    require(score.dtype == torch.float32, f"score must be float32, got {score.dtype}; keep estimates in float32")
    require(scope in SCOPES, f"scope={scope!r} is not known; use {', '.join(SCOPES)}")
    require_blocks(block_q, block_k)
    want = (-(-n_q // block_q), -(-n_k // block_k))
    require(tuple(score.shape[2:]) == want, f"score covers {tuple(score.shape[2:])} blocks but {n_q} x {n_k} tokens make {want}")
    require(threshold.dtype == torch.float64 and tuple(threshold.shape) == (score.shape[1],),
            f"threshold must be float64 [{score.shape[1]}], one share per head, got {threshold.dtype} {list(threshold.shape)}")
    fits = always is None or always.dtype == torch.bool and always.dim() == 4 and all(a in (1, b) for a, b in zip(always.shape, score.shape))
    require(fits, f"always must be bool and broadcast to {list(score.shape)}")
    require_span(score.shape[0], n_q, n_k, q_start, causal, window, first, last)


@select_global.fake
def _lists(score, *rest, **named):
    return score.new_empty(score.shape[:3], dtype=torch.int32), score.new_empty(score.shape, dtype=torch.int32)


def _refuses(isa, score, threshold, scope, *rest):
    pairs = score.shape[2] * score.shape[3] * (score.shape[1] if scope == "all" else 1)
    return None if pairs < 2**32 else f"needs fewer than 2^32 pairs of blocks under one budget, got {pairs}"


_STATE_BYTES = 32
_BLOCKS = 8  # of threads, that a multiprocessor holds


def _few_pools(score, *rest):
    pools = score.shape[0] * score.shape[1]
    return None if pools < 2**16 else f"needs fewer than 2^16 heads of all batch rows together, got {pools}"


def _notes(processors, score, threshold, scope, *rest):
    """Partial sums of mass and partial maxima, what is known of each pool, and ties of each row."""
    batch, heads, q_blocks, _ = score.shape
    pools, rows = (batch, heads * q_blocks) if scope == "all" else (batch * heads, q_blocks)
    parts = max(1, min(rows, -(-_BLOCKS * processors // max(1, pools))))
    sizes = (((2, pools, parts), torch.float64), ((pools, parts), torch.int32), ((2 * pools * _STATE_BYTES,), torch.uint8),
             ((pools * rows,), torch.int32))
    return tuple(score.new_empty(size, dtype=dtype) for size, dtype in sizes)


cuda.add(select_global, _lists, _few_pools, _notes)
native.add(select_global, _lists, _refuses)
