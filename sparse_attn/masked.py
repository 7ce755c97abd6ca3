"""Attention under an explicit mask, in plain torch: for the few calls that neither SDPA nor our op can express."""

from __future__ import annotations

import torch
from torch import Tensor

# queries whose logits are held at once; bounds memory to H x 512 x Nk
_ROWS = 512


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float = 0.0,
                     sinks: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention with softcap and sinks; ``[B, Nq, H, Dv]``.

    Args:
        q: ``[B, H, Nq, D]``.
        k, v: ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``, heads not repeated.
        mask: bool (True is read) or additive float, broadcastable to ``[B, H, Nq, Nk]``; None reads everything.
        scale: softmax scale.
        softcap: bound on the logits; 0 for none.
        sinks: ``[H]``, or one logit per query ``[B, H, Nq, 1]``.
        dropout: share of probabilities to drop.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is not None:
        mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    if sinks is not None:
        sinks = (sinks[None, :, None, None] if sinks.dim() == 1 else sinks).expand(q.shape[0], -1, q.shape[2], 1)
    outs = []
    for row in range(0, q.shape[2], _ROWS):
        rows = slice(row, row + _ROWS)
        logits = q[:, :, rows] @ k.mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            part = mask[:, :, rows]
            low = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~part, low) if part.dtype == torch.bool else logits + part
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, :, rows].to(logits.dtype)], -1)
        p = logits.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype)
        outs.append(torch.nn.functional.dropout(p, dropout, training=dropout > 0) @ v)
    return torch.cat(outs, 2).transpose(1, 2).contiguous()


def only_listed(mask: Tensor, indices: Tensor, n_k: int) -> Tensor:
    """``mask`` ``[B, 1, Nq, Nk]``, bool or additive, narrowed to the keys that ``indices`` ``[B, Nq, S]`` lists; -1 lists none."""
    listed = indices.long().masked_fill(indices < 0, n_k)
    keep = mask.new_zeros(*listed.shape[:2], n_k + 1, dtype=torch.bool).scatter_(-1, listed, True)[:, None, :, :n_k]
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
