"""XAttention block scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .contract import require_blocks, require_heads, require_span
from .registry import op
from .spans import Span, by_block, spans
from .triton import frame


def _fold(x: Tensor, stride: int) -> Tensor:
    """``[heads, N, D]`` -> ``[heads, groups, stride, D]``, zeros past the end."""
    pad = -x.shape[1] % stride
    return torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, stride))


def _query_order(groups: int, stride: int, alternate: bool) -> Tensor:
    """Which row of its group each query group pairs with key row r: ``[groups, stride]``."""
    order = torch.arange(stride).flip(0).expand(groups, stride)
    if alternate:
        order = (order - torch.arange(groups)[:, None] % 2) % stride
    return order


def _row_alone(q: Tensor, k: Tensor, span: Span, block_q: int, block_k: int, stride: int, scale: float, causal: bool,
               window: int, alternate: bool) -> Tensor:
    """Block shares of one unpadded sequence: q ``[H, n_q, D]``, k ``[H, n_k, D]`` -> ``[H, qb, kb]``."""
    rows, cols = _fold(q, stride), _fold(k, stride)
    order = _query_order(rows.shape[1], stride, alternate).to(q.device)
    rows = rows.gather(2, order[None, :, :, None].expand_as(rows))
    real_q = _fold(torch.ones_like(q[:1, :, :1]), stride)[0, :, :, 0].gather(1, order)
    real_k = _fold(torch.ones_like(k[:1, :, :1]), stride)[0, :, :, 0]
    pairs = real_q @ real_k.T  # real token pairs on each antidiagonal, stride except in the last group
    logits = rows.flatten(2) @ cols.flatten(2).mT * scale / pairs.clamp(min=1)
    first_q = torch.arange(0, span.n_q, stride, device=q.device) + span.q_start
    last_q = (first_q + stride).clamp(max=span.q_start + span.n_q) - 1
    first_k = torch.arange(0, span.n_k, stride, device=q.device)
    hidden = pairs == 0
    if causal:
        hidden = hidden | (first_k > last_q[:, None])
    if window:
        hidden = hidden | (first_k + stride - 1 <= first_q[:, None] - window)
    mass = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    mass = by_block(by_block(mass, block_k // stride).mT, block_q // stride).mT
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


@op
def antidiagonal_score(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    stride: int,
    scale: float,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    alternate: bool = False,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Share of attention mass that each key block is estimated to receive from each query block.

    Tokens are taken in groups of ``stride``; the logit of a query group and a key group is the mean of q.k along one
    antidiagonal of their stride x stride tile, so every query and every key is used once at 1/stride of the cost of q @ k.mT.
    A softmax over key groups, summed over the groups of a block pair, gives the share.

    Differs from the paper (and its code): computed in float32 throughout; the logit of a partial group is the mean over its
    real pairs, so padding never takes mass; shares are normalised per query block; ``alternate=True`` rolls the antidiagonal
    of every odd query group by one, because for an even stride the paper's antidiagonal only ever evaluates odd token
    distances ``t - p`` and an exact copy at an even distance is invisible to it.
    Source: XAttention, arXiv:2503.16428, section 2.1.

    Args:
        q: ``[B, H, Nq, D]`` queries after RoPE; bfloat16, float16 or float32, any strides.
        k: ``[B, Hkv, Nk, D]`` keys after RoPE, heads not repeated.
        block_q: tokens per query block, a multiple of ``stride``.
        block_k: tokens per key block, a multiple of ``stride``.
        stride: tile edge in tokens; 4, 8 or 16 in the paper.
        scale: softmax scale, usually ``D ** -0.5``.
        q_start: position of query 0 among the keys, ``Nk - Nq`` for a chunk at the end.
        causal: hide key groups that lie entirely in the future.
        window: sliding window in tokens, own token included; 0 for none.
        alternate: also evaluate even token distances (every odd query group).
        first: int32 ``[B]`` first real key of each row (left padding); None means 0.
        last: int32 ``[B]`` one past the last real key of each row (right padding); None means Nk.

    Returns:
        float32 ``[B, H, ceil(Nq / block_q), ceil(Nk / block_k)]``; each row sums to 1, or to 0 where a query block is padding.
        Blocks are counted from the first real key and the first real query of a row.

    Raises:
        ContractError: on mismatched heads, lengths, dtypes, or a stride that does not divide a block.
    """
    batch, heads, n_q, _ = q.shape
    n_k, groups = k.shape[2], heads // k.shape[1]
    shares = torch.zeros(batch, heads, -(-n_q // block_q), -(-n_k // block_k), device=q.device, dtype=torch.float32)
    wide = torch.promote_types(q.dtype, torch.float32)
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        if span.n_q and span.n_k:
            rows, cols = q[b, :, span.rows].to(wide), k[b, :, span.keys].to(wide).repeat_interleave(groups, dim=0)
            alone = _row_alone(rows, cols, span, block_q, block_k, stride, scale, causal, window, alternate)
            shares[b, :, : alone.shape[1], : alone.shape[2]] = alone
    return shares


@antidiagonal_score.check
def _(q, k, block_q, block_k, stride, scale, q_start, causal, window, alternate, first, last):
    require_heads(q, k)
    require_blocks(block_q, block_k)
    require(stride > 0, f"stride={stride} must be positive; 4, 8 or 16 are usual")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        require(block % stride == 0, f"{name}={block} is not a multiple of stride={stride}; choose a stride that divides it")
    require_span(q.shape[0], q.shape[2], k.shape[2], q_start, causal, window, first, last)


@antidiagonal_score.fake
def _(q, k, block_q, block_k, stride, scale, q_start=0, causal=True, window=0, alternate=False, first=None, last=None):
    blocks = (q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k
    return q.new_empty(q.shape[0], q.shape[1], *blocks, dtype=torch.float32)


def _shares(q, k, block_q, block_k, *rest):
    return q.new_empty(*q.shape[:2], -(-q.shape[2] // block_q), -(-k.shape[2] // block_k), dtype=torch.float32)


def _tiles_lack(q, k, block_q, block_k, stride, *rest):
    groups, blocks = block_k // stride, -(-k.shape[2] // block_k)
    if groups > 128:
        return f"needs at most 128 groups of stride={stride} per key block, got {groups}"
    return f"needs at most 8192 key blocks, got {blocks}" if blocks > 8192 else frame.needs_width(q, k)


native.add(antidiagonal_score, _shares, lambda isa, q, *rest: native.needs_dtype(q))
frame.add(antidiagonal_score, _shares, _tiles_lack)
