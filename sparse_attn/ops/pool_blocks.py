"""One vector per block of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .contract import DTYPES
from .registry import op
from .triton import frame

KINDS = ("mean", "max", "min", "unit_mean")


def _pool(tokens: Tensor, kind: str) -> Tensor:
    """``[..., tokens, D]`` -> ``[..., D]``."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if kind == "unit_mean":  # in double: the squares of float32 can leave its range
        tokens = tokens.to(wide) / tokens.double().norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return {"max": tokens.amax, "min": tokens.amin}[kind](-2) if kind in ("max", "min") else tokens.to(wide).mean(-2)


@op
def pool_blocks(x: Tensor, block: int, kind: str, first: Tensor | None = None, last: Tensor | None = None) -> Tensor:
    """Pool the real tokens of each block, channel by channel; the last block of a row by as many tokens as it has.

    ``unit_mean`` is the mean of the tokens each divided by its norm (a zero token stays zero): its squared norm is the mean
    cosine between all pairs of the block, the self-similarity of SpargeAttn (arXiv:2502.18137).

    Args:
        x: ``[B, H, N, D]``; bfloat16, float16 or float32, any strides.
        block: tokens per block.
        kind: mean, max, min or unit_mean.
        first: int32 ``[B]`` first real token of each row, where its block 0 begins; None means 0.
        last: int32 ``[B]`` one past the last real token; None means N.

    Returns:
        float32 ``[B, H, ceil(N / block), D]``; blocks that hold no real token are 0.

    Raises:
        ContractError: on an unknown kind or bounds of the wrong shape.
    """
    batch, heads, n, dim = x.shape
    pooled = torch.zeros(batch, heads, -(-n // block), dim, dtype=torch.float32, device=x.device)
    for b in range(batch):
        f = min(max(int(first[b]), 0), n) if first is not None else 0
        e = max(min(int(last[b]), n), f) if last is not None else n
        whole = (e - f) // block
        edge = f + whole * block
        pooled[b, :, :whole] = _pool(x[b, :, f:edge].unflatten(1, (whole, block)), kind)
        if edge < e:
            pooled[b, :, whole] = _pool(x[b, :, edge:e], kind)
    return pooled


@pool_blocks.check
def _(x, block, kind, first, last):
    require(x.dim() == 4, f"x needs 4 dimensions [B, H, N, D], got {x.dim()}")
    require(x.dtype in DTYPES, f"dtype {x.dtype} is not supported; use bfloat16, float16 or float32")
    require(block > 0, f"block={block} must be positive; 128 is usual")
    require(kind in KINDS, f"kind={kind!r} is not known; use {', '.join(KINDS)}")
    for name, bound in (("first", first), ("last", last)):
        fits = bound is None or bound.dtype == torch.int32 and tuple(bound.shape) == (x.shape[0],)
        require(fits, f"{name} must be int32 [{x.shape[0]}], one entry per batch row")


@pool_blocks.fake
def _pooled(x, block, kind, first=None, last=None):
    return x.new_empty(*x.shape[:2], (x.shape[2] + block - 1) // block, x.shape[3], dtype=torch.float32)


def _out(x, block, *rest):
    return x.new_empty(*x.shape[:2], -(-x.shape[2] // block), x.shape[3], dtype=torch.float32)


native.add(pool_blocks, _out, lambda isa, x, *rest: native.needs_dtype(x))
frame.add(pool_blocks, _out, frame.needs_width)
