"""What a few probe queries attend to, summed by key and by distance, or by blocks of those."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .contract import require_heads, require_span
from .registry import op
from .spans import by_block, spans
from .triton import frame


@op
def window_score(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    scale: float,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    first: Tensor | None = None,
    last: Tensor | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """Exact attention probabilities of the probe rows, summed over the rows per key and per distance.

    Source: the last-rows probe of MInference (arXiv:2407.02490, section 3.2) and the observation window of SnapKV; any rows may
    probe here, such as the tails of segments (SampleAttention, MLSys 2025).

    Args:
        q: ``[B, H, Nq, D]``; bfloat16, float16 or float32, any strides.
        k: ``[B, Hkv, Nk, D]``, heads not repeated.
        rows: int32 ``[B, R]`` probe queries, ascending, counted from each row's first real query; entries outside the real
            queries (-1) probe nothing.
        scale: softmax scale.
        q_start, causal, window, softcap, first, last: as in ``block_sparse_attention``.
        block: how many consecutive keys, and distances, make one sum; 1 keeps them apart. Causal blocks of 16, 32, 64, 128 or
            a multiple of 256 need less memory, and time, on CPUs; elsewhere they are summed afterwards.

    Returns:
        columns: float32 ``[B, H, ceil(Nk / block)]``, mass that each block of keys received, keys counted from the first real
            key; sums to the number of rows that probed.
        diagonals: float32 ``[B, H, ceil(Nk / block)]``, mass at each block of distances from a query back to a key; without
            causality, pairs whose key lies ahead are left out.

    Raises:
        ContractError: on mismatched heads, lengths, dtypes or rows.
    """
    batch, heads, n_q, _ = q.shape
    n_k, group = k.shape[2], heads // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    columns, diagonals = (torch.zeros(batch, heads, n_k, dtype=torch.float32, device=q.device) for _ in range(2))
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        probe = rows[b].long()
        probe = probe[(probe >= 0) & (probe < span.n_q)]
        logits = q[b, :, probe + span.rows.start].to(wide) @ k[b, :, span.keys].to(wide).repeat_interleave(group, dim=0).mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        back = (probe + span.q_start)[:, None] - torch.arange(span.n_k, device=q.device)
        hidden = (back < 0) & causal | ((back >= window) if window else False)
        p = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
        columns[b, :, : span.n_k] = p.sum(1)
        ahead = (back < 0) | (back >= n_k)
        flat = back.masked_fill(ahead, 0).flatten().expand(heads, -1)
        diagonals[b] = torch.zeros_like(diagonals[b], dtype=wide).scatter_add_(1, flat, p.masked_fill(ahead, 0.0).flatten(1))
    return by_block(columns, block), by_block(diagonals, block)


@window_score.check
def _(q, k, rows, scale, q_start, causal, window, softcap, first, last, block):
    require_heads(q, k)
    require(rows.dim() == 2 and rows.shape[0] == q.shape[0] and rows.dtype == torch.int32,
            f"rows must be int32 [{q.shape[0]}, R], probe queries per batch row, got {rows.dtype} {list(rows.shape)}")
    require(softcap >= 0, f"softcap={softcap} is negative; use 0 for none")
    require(block >= 1, f"block={block} must be 1 or more keys; 128 is usual")
    require_span(q.shape[0], q.shape[2], k.shape[2], q_start, causal, window, first, last)


@window_score.fake
def _masses(q, k, rows, scale, q_start=0, causal=True, window=0, softcap=0.0, first=None, last=None, block=1):
    return tuple(q.new_empty(q.shape[0], q.shape[1], -(-k.shape[2] // block), dtype=torch.float32) for _ in range(2))


native.add(window_score, _masses, lambda isa, q, *rest: native.needs_dtype(q))
frame.add(window_score, _masses, frame.needs_width)
