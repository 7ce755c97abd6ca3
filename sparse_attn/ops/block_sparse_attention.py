"""Prefill attention over block lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .contract import require_blocks, require_heads, require_span
from .registry import op
from .spans import spans


def _visible(q_pos: Tensor, k_pos: Tensor, causal: bool, window: int) -> Tensor:
    """bool ``[rows, keys]``: may the query at q_pos see the key at k_pos?"""
    seen = torch.ones(len(q_pos), len(k_pos), dtype=torch.bool, device=q_pos.device)
    if causal:
        seen &= k_pos <= q_pos[:, None]
    if window:
        seen &= k_pos > q_pos[:, None] - window
    return seen


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None):
    """Softmax attention of a few rows: q ``[H, rows, D]``, k and v ``[H, keys, D]``, seen ``[H, rows, keys]``."""
    logits = q @ k.mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1).to(logits.dtype)], -1)
    lse = logits.logsumexp(-1)
    p = (logits - lse[..., None]).exp().masked_fill(lse[..., None].isneginf(), 0.0)
    return p[..., : k.shape[1]] @ v, lse


def _require_listed(counts: Tensor, indices: Tensor, n_k: int, block_k: int) -> None:
    """On a CPU, where looking is free: every list names blocks that exist."""
    slots, blocks = indices.shape[3], -(-n_k // block_k)
    used = torch.arange(slots, device=indices.device) < counts[..., None]
    if counts.device.type == "cpu" and counts.numel():
        low, high = counts.aminmax()
        require(low >= 0 and high <= slots, f"counts reach from {low} to {high} but there are {slots} slots; counts must be 0..slots")
        bad = indices[used & ((indices < 0) | (indices >= blocks))]
        require(not len(bad), f"indices name block {bad[:1].tolist()} but {n_k} keys make {blocks} blocks of {block_k}")


@op
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    q_start: int = 0,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    first: Tensor | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the key blocks listed for its query block, and its log-sum-exp.

    Inside a listed block every key is tested by position: causality, sliding window and padding hold by token whatever the
    list says. Logits are ``softcap * tanh(scale * q.k / softcap)`` when a softcap is given.

    Args:
        q: ``[B, H, Nq, D]``; bfloat16, float16 or float32, any strides.
        k: ``[B, Hkv, Nk, D]``, heads not repeated.
        v: ``[B, Hkv, Nk, Dv]``; Dv may differ from D.
        counts: int32 ``[B, Hp, Qb]`` blocks read by each query block; Hp divides H, one list serves H / Hp heads.
        indices: int32 ``[B, Hp, Qb, S]`` block numbers, ascending and unique (the C++ kernels refuse others);
            slots past ``counts`` are not read.
        block_q: tokens per query block; Qb is ``ceil(Nq / block_q)``.
        block_k: tokens per key block.
        scale: softmax scale, usually ``D ** -0.5``.
        q_start: position of query 0 among the keys, ``Nk - Nq`` for a chunk at the end.
        causal: query at position t sees keys up to and including t.
        window: sliding window in tokens, own token included; 0 for none.
        softcap: bound on the logits; 0 for none.
        first: int32 ``[B]`` first real key of each row (left padding); None means 0.
        last: int32 ``[B]`` one past the last real key of each row (right padding); None means Nk.
        sinks: float ``[H]`` logit of a learned sink that takes probability and gives no value; None for none.

    Returns:
        out: ``[B, H, Nq, Dv]`` in q's dtype, laid out as ``[B, Nq, H, Dv]``. Rows that are padding or see no key are 0.
        lse: float32 ``[B, H, Nq]``, natural log of the sum of exponentials of the logits, sink included, so that
            ``exp(logit - lse)`` is the probability; -inf for padding rows, and without a sink for rows that see nothing.
            A backend that rounds probabilities to q's dtype sums them rounded: exact against out, within eps / 4 of the truth.

    Raises:
        ContractError: on mismatched shapes or dtypes, or (on CPU) a count or block number out of range.
    """
    batch, heads, n_q, _ = q.shape
    n_k, group, per_list = k.shape[2], heads // k.shape[1], heads // counts.shape[1]
    _require_listed(counts, indices, n_k, block_k)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(batch, n_q, heads, v.shape[3]).transpose(1, 2)
    lse = torch.full((batch, heads, n_q), float("-inf"), device=q.device, dtype=torch.float32)
    slot = torch.arange(indices.shape[3], device=q.device)
    for b, span in enumerate(spans(batch, n_q, n_k, q_start, causal, first, last)):
        keys, values = (x[b, :, span.keys].to(wide).repeat_interleave(group, dim=0) for x in (k, v))
        k_pos = torch.arange(span.n_k, device=q.device)
        for i in range(-(-span.n_q // block_q)):
            rows = torch.arange(i * block_q, min((i + 1) * block_q, span.n_q), device=q.device)
            listed = indices[b, :, i].masked_fill(slot >= counts[b, :, i, None], -1)
            read = (k_pos[:, None] // block_k == listed[:, None, :]).any(-1).repeat_interleave(per_list, dim=0)
            seen = _visible(rows + span.q_start, k_pos, causal, window) & read[:, None, :]
            at = rows + span.rows.start
            o, l = _attend(q[b, :, at].to(wide), keys, values, seen, scale, softcap, sinks)
            out[b, :, at], lse[b, :, at] = o.to(out.dtype), l.float()
    return out, lse


@block_sparse_attention.check
def _(q, k, v, counts, indices, block_q, block_k, scale, q_start, causal, window, softcap, first, last, sinks):
    require_heads(q, k)
    require(
        v.dim() == 4 and v.shape[:3] == k.shape[:3],
        f"v must be [B, Hkv, Nk, Dv] with k's {list(k.shape[:3])}, got {list(v.shape)}",
    )
    require(v.dtype == k.dtype, f"v is {v.dtype} but k is {k.dtype}; cast one of them")
    require_blocks(block_q, block_k)
    require_span(q.shape[0], q.shape[2], k.shape[2], q_start, causal, window, first, last)
    require(softcap >= 0, f"softcap={softcap} is negative; use 0 for none")
    for name, t, dims in (("counts", counts, 3), ("indices", indices, 4)):
        require(t.dim() == dims, f"{name} needs {dims} dimensions, got {t.dim()}")
        require(t.dtype == torch.int32, f"{name} must be int32, got {t.dtype}; block numbers are whole")
    lists = (q.shape[0], counts.shape[1], -(-q.shape[2] // block_q))
    require(
        tuple(counts.shape) == lists and tuple(indices.shape[:3]) == lists,
        f"counts {list(counts.shape)} and indices {list(indices.shape)} must begin with {list(lists)}: batch, lists, query blocks",
    )
    require(
        counts.shape[1] > 0 and q.shape[1] % counts.shape[1] == 0,
        f"{counts.shape[1]} block lists cannot be shared evenly by {q.shape[1]} query heads; use H, Hkv or 1",
    )
    if sinks is not None:
        require(tuple(sinks.shape) == (q.shape[1],), f"sinks must be [{q.shape[1]}], one logit per head, got {list(sinks.shape)}")


@block_sparse_attention.fake
def _outputs(q, k, v, counts, indices, block_q, block_k, scale, q_start=0, causal=True, window=0, softcap=0.0, first=None,
             last=None, sinks=None):
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


native.add(block_sparse_attention, _outputs, lambda isa, q, *rest: native.needs_dtype(q))
