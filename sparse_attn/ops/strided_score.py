"""ProxyAttn block scores: the largest probability between sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .contract import require_blocks, require_heads, require_span
from .registry import op
from .spans import Span, spans
from .triton import frame


def _one_block(q: Tensor, k: Tensor, start: int, span: Span, residue: int, block_k: int, stride: int, scale: float, causal: bool,
               window: int) -> Tensor:
    """Scores of one query block: q ``[H, n, D]`` its tokens, k ``[H, n_k, D]`` -> ``[H, kb]``."""
    t = torch.arange(min(residue, q.shape[1] - 1), q.shape[1], stride, device=q.device)
    p = torch.arange(min(residue, span.n_k - 1), span.n_k, stride, device=q.device)
    back = (t + start + span.q_start)[:, None] - p
    hidden = (back < 0) & causal | ((back >= window) if window else False)
    logits = (q[:, t] @ k[:, p].mT * scale).masked_fill(hidden, float("-inf"))
    largest = logits.softmax(-1).nan_to_num(0.0).amax(1)
    run = block_k // stride
    return torch.nn.functional.pad(largest, (0, -largest.shape[-1] % run)).unflatten(-1, (-1, run)).amax(-1)


@op
def strided_score(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    stride: int,
    scale: float,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    rotate: bool = False,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Largest attention probability between the sampled tokens of each block pair.

    One token in ``stride`` is kept on both sides, so 1 / stride^2 of the dot products remain. Each sampled query takes a softmax
    over the sampled keys that it sees; a block pair scores the largest probability in it. ProxyAttn passes heads averaged over a
    group, so that one score serves the group; the averages are the caller's.

    Differs from the paper: tokens are sampled from the first real query and the first real key of a row, so padding moves nothing;
    ``rotate=True`` lets query block i sample residue i modulo ``stride`` on both sides, because a fixed residue never looks at the
    other keys, and what stands only there is not found. Where a query block or all keys end before the residue, their last
    token is sampled.
    Source: ProxyAttn, arXiv:2509.24745, section 3.

    Args:
        q: ``[B, H, Nq, D]`` queries after RoPE; bfloat16, float16 or float32, any strides.
        k: ``[B, Hkv, Nk, D]`` keys after RoPE, heads not repeated.
        block_q: tokens per query block, a multiple of ``stride``.
        block_k: tokens per key block, a multiple of ``stride``.
        stride: tokens per sampled token; 4 in the paper.
        scale: softmax scale, usually ``D ** -0.5``.
        rotate: sample another residue in every query block.
        q_start, causal, window, first, last: as in ``antidiagonal_score``.

    Returns:
        float32 ``[B, H, ceil(Nq / block_q), ceil(Nk / block_k)]`` in [0, 1]; 0 where a block is padding or nothing sampled is seen.
        Blocks are counted from the first real key and the first real query of a row.

    Raises:
        ContractError: on mismatched heads, lengths, dtypes, or a stride that does not divide a block.
    """
    batch, heads, n_q, _ = q.shape
    n_k, group = k.shape[2], heads // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    score = torch.zeros(batch, heads, -(-n_q // block_q), -(-n_k // block_k), dtype=torch.float32, device=q.device)
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        rows, cols = q[b, :, span.rows].to(wide), k[b, :, span.keys].to(wide).repeat_interleave(group, dim=0)
        for start in range(0, span.n_q if span.n_k else 0, block_q):
            residue = start // block_q % stride if rotate else 0
            found = _one_block(rows[:, start : start + block_q], cols, start, span, residue, block_k, stride, scale, causal, window)
            score[b, :, start // block_q, : found.shape[1]] = found
    return score


@strided_score.check
def _(q, k, block_q, block_k, stride, scale, q_start, causal, window, rotate, first, last):
    require_heads(q, k)
    require_blocks(block_q, block_k)
    require(stride > 0, f"stride={stride} must be positive; 4 is usual")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        require(block % stride == 0, f"{name}={block} is not a multiple of stride={stride}; choose a stride that divides it")
    require_span(q.shape[0], q.shape[2], k.shape[2], q_start, causal, window, first, last)


@strided_score.fake
def _scores(q, k, block_q, block_k, *rest, **named):
    blocks = (q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k
    return q.new_empty(q.shape[0], q.shape[1], *blocks, dtype=torch.float32)


native.add(strided_score, _scores, lambda isa, q, *rest: native.needs_dtype(q))
frame.add(strided_score, _scores, frame.needs_width)
