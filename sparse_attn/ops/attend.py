"""Softmax attention of a few rows, as the references compute it."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None,
           bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q ``[H, rows, D]``, k and v ``[H, keys, D]``, seen ``[H, rows, keys]``, sinks ``[H]``, bias ``[keys]``: out and lse."""
    logits = q @ k.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1).to(logits.dtype)], -1)
    lse = logits.logsumexp(-1)
    p = (logits - lse[..., None]).exp().masked_fill(lse[..., None].isneginf(), 0.0)
    return p[..., : k.shape[1]] @ v, lse


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out ``[B, H, Nq, Dv]``, laid out as ``[B, Nq, H, Dv]``, and for float32 lse ``[B, H, Nq]``."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
