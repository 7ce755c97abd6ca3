"""One attention result from several over disjoint keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from .registry import op


@op
def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of key sets, from the attention over each of them.

    A part weighs ``exp(lse_part - lse)``, so the result is what one call over all keys would give. Parts may differ in how q
    and k were rotated; a learned sink must be in one part only.
    Source: the merge step of Dual Chunk Attention, arXiv:2402.17463 section 2.3, and of every chunked softmax before it.

    Args:
        outs: ``[P, B, H, Nq, Dv]``, one entry per part; 0 where the part's lse is -inf.
        lses: float32 ``[P, B, H, Nq]``, natural log; -inf where a query saw none of the part's keys.

    Returns:
        out: ``[B, H, Nq, Dv]`` in outs' dtype, laid out as ``[B, Nq, H, Dv]``; summed in float32 and rounded once.
        lse: float32 ``[B, H, Nq]``. A query that saw nothing in any part keeps 0 and -inf.

    Raises:
        ContractError: on mismatched shapes or dtypes, or no part at all.
    """
    top = lses.amax(0)
    weights = (lses - top.masked_fill(top.isneginf(), 0.0)).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1.0)
    wide = torch.promote_types(outs.dtype, torch.float32)
    out = torch.zeros_like(outs[0], dtype=wide)
    for part, weight in zip(outs, weights):
        out += part.to(wide) * weight[..., None].to(wide)
    return out.to(outs.dtype).transpose(1, 2).contiguous().transpose(1, 2), top + total.log()


@merge_attention.check
def _(outs, lses):
    require(outs.dim() == 5, f"outs must be [P, B, H, Nq, Dv], got {outs.dim()} dimensions")
    require(lses.dtype == torch.float32, f"lses must be float32, got {lses.dtype}; log-sum-exps do not survive a narrower one")
    shape = list(outs.shape[:4])
    require(list(lses.shape) == shape, f"lses {list(lses.shape)} must have outs' {shape}: parts, batch, heads, queries")
    require(outs.shape[0] > 0, "there is no part to merge; give one or more")


@merge_attention.fake
def _outputs(outs, lses):
    _, batch, heads, n_q, dim = outs.shape
    return outs.new_empty(batch, n_q, heads, dim).transpose(1, 2), lses.new_empty(batch, heads, n_q)
