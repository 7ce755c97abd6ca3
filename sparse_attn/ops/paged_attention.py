"""Attention of a few queries over pages of a flat store."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda, native
from .attend import attend, empty_outputs
from .contract import DTYPES
from .registry import op
from .triton import frame


def _listed(starts: Tensor, counts: Tensor) -> Tensor:
    """int64: the rows of all pages, in list order; starts and counts ``[P]``."""
    pages = [torch.arange(start, start + count) for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *pages]).to(starts.device)


def _require_stored(starts: Tensor, counts: Tensor, rows: int) -> None:
    """On a CPU, where looking is free: pages with rows lie inside the store."""
    if starts.device.type == "cpu":
        bad = ((counts < 0) | (counts > 0) & ((starts < 0) | (starts > rows - counts))).nonzero()
        for b, h, p in bad[:1].tolist():
            require(False, f"page [{b}, {h}, {p}] holds {counts[b, h, p]} rows from row {starts[b, h, p]} on, but the store has "
                           f"{rows} rows; starts and counts must name stored rows")


@op
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    counts: Tensor,
    scale: float,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    q_first: Tensor | None = None,
    q_last: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the pages that are listed for its sequence and key head, and its log-sum-exp.

    A page is a number of consecutive rows of the store: one page of thousands is a run of a cache whose heads keep different
    numbers of tokens, thousands of small ones are what a page selector chose. Rows that no page names are never read.
    Source: the page tables of vLLM (arXiv:2309.06180, section 4), per key head; parts joined as in Flash-Decoding.

    Args:
        q: ``[B, H, Nq, D]``; bfloat16, float16 or float32, any strides. Made for few queries, right for any number.
        k: ``[S, D]``, the keys of all sequences and heads; contiguous in its last dimension.
        v: ``[S, Dv]``, likewise; Dv may differ from D.
        starts: int64 ``[B, Hkv, P]`` first row of each page; Hkv divides H, pages are read by the H / Hkv heads of the group.
        counts: int32 ``[B, Hkv, P]`` rows of each page; 0 for none, its start is then not looked at.
        scale: softmax scale, usually ``D ** -0.5``.
        causal: the last listed rows are the tokens of the real queries, in order, and a query sees the listed rows up to and
            including its own. Otherwise it sees every listed row.
        softcap: bound on the logits; 0 for none.
        sinks: float ``[H]`` logit of a learned sink that takes probability and gives no value; None for none.
        q_first: int32 ``[B]`` first real query of each sequence; None means 0.
        q_last: int32 ``[B]`` one past the last real query; None means Nq.
        bias: float32 ``[S]`` added to the logit of each row, behind the softcap; -inf hides a row. None for none.

    Returns:
        out: ``[B, H, Nq, Dv]`` in q's dtype, laid out as ``[B, Nq, H, Dv]``. Rows that are padding or see nothing are 0.
        lse: float32 ``[B, H, Nq]``, as in ``block_sparse_attention``: natural log of the sum of exponentials of the logits, sink
            included; -inf for padding rows, and without a sink for rows that see nothing.

    Raises:
        ContractError: on mismatched shapes or dtypes, k or v strided in the last dimension, or (on CPU) a page outside the store,
            which the backend cuda leaves out.
    """
    (batch, heads, n_q, _), kv_heads = q.shape, starts.shape[1]
    _require_stored(starts, counts, k.shape[0])
    wide, group = torch.promote_types(q.dtype, torch.float32), heads // kv_heads
    out, lse = empty_outputs(q, v)
    out.zero_()
    lse.fill_(float("-inf"))
    firsts = q_first.clamp(0, n_q).tolist() if q_first is not None else [0] * batch
    lasts = q_last.clamp(0, n_q).tolist() if q_last is not None else [n_q] * batch
    for b, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        n_real = max(last - first, 0)
        for h in range(kv_heads):
            rows = _listed(starts[b, h], counts[b, h])
            later = torch.arange(n_real - 1, -1, -1, device=q.device) if causal else torch.zeros(n_real, device=q.device)
            seen = torch.arange(len(rows), device=q.device) < len(rows) - later[:, None]
            at = b, slice(h * group, (h + 1) * group), slice(first, first + n_real)
            o, l = attend(q[at].to(wide), k[None, rows].to(wide), v[None, rows].to(wide), seen, scale, softcap,
                          sinks[at[1]] if sinks is not None else None, bias[rows] if bias is not None else None)
            out[at], lse[at] = o.to(out.dtype), l.float()
    return out, lse


@paged_attention.check
def _(q, k, v, starts, counts, scale, causal, softcap, sinks, q_first, q_last, bias):
    require(q.dim() == 4, f"q must be [B, H, Nq, D], got {q.dim()} dimensions")
    require(q.dtype in DTYPES, f"dtype {q.dtype} is not supported; use bfloat16, float16 or float32")
    for name, t in (("k", k), ("v", v)):
        require(t.dim() == 2, f"{name} must be the rows of a store, [S, D], got {list(t.shape)}")
        require(t.dtype == q.dtype, f"q is {q.dtype} but {name} is {t.dtype}; cast one of them")
        require(t.device == q.device, f"q is on {q.device} but {name} on {t.device}; move one of them")
        require(t.shape[1] == 1 or t.stride(1) == 1,
                f"{name} must be contiguous in its last dimension, got stride {t.stride(1)}; call contiguous()")
    require(k.shape[0] == v.shape[0], f"k has {k.shape[0]} rows but v has {v.shape[0]}; they must agree")
    require(q.shape[3] == k.shape[1], f"q has head_dim {q.shape[3]} but k has {k.shape[1]}; they must agree")
    for name, t, dtype in (("starts", starts, torch.int64), ("counts", counts, torch.int32)):
        require(t.dim() == 3 and t.shape[0] == q.shape[0] and t.dtype == dtype,
                f"{name} must be {dtype} [{q.shape[0]}, Hkv, P], pages per sequence and key head, got {t.dtype} {list(t.shape)}")
    require(starts.shape == counts.shape, f"starts {list(starts.shape)} and counts {list(counts.shape)} must agree")
    require(starts.shape[1] > 0 and q.shape[1] % starts.shape[1] == 0,
            f"{q.shape[1]} query heads are not a multiple of the {starts.shape[1]} key heads that have pages")
    require(softcap >= 0, f"softcap={softcap} is negative; use 0 for none")
    if sinks is not None:
        require(tuple(sinks.shape) == (q.shape[1],), f"sinks must be [{q.shape[1]}], one logit per head, got {list(sinks.shape)}")
    if bias is not None:
        require(bias.dtype == torch.float32 and tuple(bias.shape) == (k.shape[0],),
                f"bias must be float32 [{k.shape[0]}], one entry per row of the store, got {bias.dtype} {list(bias.shape)}")
    for name, bound in (("q_first", q_first), ("q_last", q_last)):
        if bound is not None:
            require(bound.dtype == torch.int32 and tuple(bound.shape) == (q.shape[0],),
                    f"{name} must be int32 [{q.shape[0]}], one entry per sequence, got {bound.dtype} {list(bound.shape)}")


@paged_attention.fake
def _outputs(q, k, v, *rest, **named):
    return empty_outputs(q, v)


def _needs(isa, q, k, v, *rest):
    narrow = min(k.shape[1], v.shape[1])
    return native.needs_dtype(q) or (f"needs rows of 16 channels or more, got {narrow}" if narrow < 16 else None)


_CUDA_QUERIES, _CUDA_ROWS = 8, 128  # csrc/cuda/paged_attention.cu: what it keeps up with, and the shortest part


def _cuda_needs(q, k, v, starts, *rest):
    queries = q.shape[1] // starts.shape[1] * q.shape[2]
    if queries > _CUDA_QUERIES:
        return f"needs at most {_CUDA_QUERIES} queries times heads of a group, got {queries}"
    return native.needs_dtype(q) or frame.needs_width(q, k, v)


def _cuda_work(processors, q, k, v, starts, counts, *rest):
    """Room for where pages end, and for what each part finds: as many parts as fill every multiprocessor with 2 or 3 blocks."""
    queries, rows, lists = q.shape[1] // starts.shape[1] * q.shape[2], q.shape[:3].numel(), starts.shape[:2].numel()
    blocks = processors * (3 if queries <= _CUDA_QUERIES // 2 else 2)
    parts = max(1, min(blocks // max(1, lists), -(-k.shape[0] // _CUDA_ROWS)))
    ends = torch.empty_like(starts, memory_format=torch.contiguous_format)
    return ends, *(q.new_empty(parts, rows, width, dtype=torch.float32) for width in (v.shape[1], 2))


cuda.add(paged_attention, _outputs, _cuda_needs, _cuda_work)
native.add(paged_attention, _outputs, _needs)
frame.add(paged_attention, _outputs, frame.needs_width)
