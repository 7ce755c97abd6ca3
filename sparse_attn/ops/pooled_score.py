"""Attention between pooled blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .contract import require_blocks, require_span
from .registry import op
from .spans import reach, spans
from .triton import frame


@op
def pooled_score(
    q_pooled: Tensor,
    k_pooled: Tensor,
    scale: Tensor,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Softmax over the reachable key blocks of ``scale * q_pooled . k_pooled``.

    With mean-pooled blocks and the softmax scale this is the estimate of MInference's block-sparse heads (arXiv:2407.02490) and of
    permuted blocks (arXiv:2510.21270); with some channels and a temperature, one band of Prism (arXiv:2602.08426).

    Args:
        q_pooled: float32 ``[B, H, Qb, D]``, from ``pool_blocks`` over the real queries.
        k_pooled: float32 ``[B, Hkv, Kb, D]``, from ``pool_blocks`` over the real keys; heads not repeated.
        scale: float32 ``[B, H]`` factor of the dot products.
        block_q, block_k, n_q, n_k, q_start, causal, window, first, last: as in ``select_blocks``.

    Returns:
        float32 ``[B, H, Qb, Kb]``; each row sums to 1, or to 0 where a query block is padding or reaches nothing.

    Raises:
        ContractError: on mismatched shapes or dtypes.
    """
    batch, heads, q_blocks, _ = q_pooled.shape
    k_blocks, group = k_pooled.shape[2], heads // k_pooled.shape[1]
    shares = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=q_pooled.device)
    column = torch.arange(k_blocks, device=q_pooled.device)
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        low, _, high = (edge[:, None].to(q_pooled.device) for edge in reach(span, block_q, block_k, causal, window))
        logits = q_pooled[b, :, : len(low)] @ k_pooled[b].repeat_interleave(group, dim=0).mT * scale[b][:, None, None]
        hidden = (column < low) | (column > high)
        shares[b, :, : len(low)] = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return shares


@pooled_score.check
def _(q_pooled, k_pooled, scale, block_q, block_k, n_q, n_k, q_start, causal, window, first, last):
    for name, t, dims in (("q_pooled", q_pooled, 4), ("k_pooled", k_pooled, 4), ("scale", scale, 2)):
        require(t.dim() == dims and t.dtype == torch.float32, f"{name} must be float32 with {dims} dimensions, got {t.dtype} {list(t.shape)}")
    require_blocks(block_q, block_k)
    want_q, want_k = -(-n_q // block_q), -(-n_k // block_k)
    require(q_pooled.shape[2] == want_q, f"q_pooled has {q_pooled.shape[2]} blocks but {n_q} queries make {want_q}")
    require(k_pooled.shape[2] == want_k, f"k_pooled has {k_pooled.shape[2]} blocks but {n_k} keys make {want_k}")
    require(q_pooled.shape[0] == k_pooled.shape[0] and q_pooled.shape[3] == k_pooled.shape[3],
            f"q_pooled {list(q_pooled.shape)} and k_pooled {list(k_pooled.shape)} must agree in batch and channels")
    require(k_pooled.shape[1] > 0 and q_pooled.shape[1] % k_pooled.shape[1] == 0,
            f"{q_pooled.shape[1]} query heads are not a multiple of {k_pooled.shape[1]} key heads; pass key heads un-repeated")
    require(scale.shape == q_pooled.shape[:2], f"scale must be {list(q_pooled.shape[:2])}, one factor per row and head, got {list(scale.shape)}")
    require_span(q_pooled.shape[0], n_q, n_k, q_start, causal, window, first, last)


@pooled_score.fake
def _shares(q_pooled, k_pooled, scale, *rest, **named):
    return q_pooled.new_empty(*q_pooled.shape[:3], k_pooled.shape[2])


native.add(pooled_score, _shares)
frame.add(pooled_score, _shares, frame.needs_width)
