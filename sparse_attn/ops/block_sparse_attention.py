"""Prefill attention over block lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .attend import attend, empty_outputs
from .contract import require_blocks, require_heads, require_span
from .registry import op
from .spans import Span, spans
from .triton import frame


def _visible(q_pos: Tensor, k_pos: Tensor, causal: bool, window: int) -> Tensor:
    """bool ``[rows, keys]``: may the query at q_pos see the key at k_pos?"""
    seen = torch.ones(len(q_pos), len(k_pos), dtype=torch.bool, device=q_pos.device)
    if causal:
        seen &= k_pos <= q_pos[:, None]
    if window:
        seen &= k_pos > q_pos[:, None] - window
    return seen


def _block_of_key(order: Tensor, block_k: int) -> Tensor:
    """int64 ``[Hkv, keys]``: block of the slot that holds each key."""
    slot = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(slot).scatter_(1, order.long(), slot // block_k)


def _column_keys(columns: Tensor, n_k: int) -> Tensor:
    """bool ``[Hc, n_k]``: is the key a column?"""
    found = torch.zeros(columns.shape[0], n_k + 1, dtype=torch.bool, device=columns.device)
    return found.scatter_(1, columns.long().masked_fill((columns < 0) | (columns >= n_k), n_k), True)[:, :n_k]


def _require_listed(counts: Tensor, indices: Tensor, n_k: int, block_k: int) -> None:
    """On a CPU, where looking is free: every list names blocks that exist."""
    slots, blocks = indices.shape[3], -(-n_k // block_k)
    used = torch.arange(slots, device=indices.device) < counts[..., None]
    if counts.device.type == "cpu" and counts.numel():
        low, high = counts.aminmax()
        require(low >= 0 and high <= slots, f"counts reach from {low} to {high} but there are {slots} slots; counts must be 0..slots")
        bad = indices[used & ((indices < 0) | (indices >= blocks))]
        require(not len(bad), f"indices name block {bad[:1].tolist()} but {n_k} keys make {blocks} blocks of {block_k}")


def _require_columns(columns: Tensor | None, rows_alone: list[Span]) -> None:
    """On a CPU, where looking is free: columns name real keys in rising order, then -1."""
    if columns is not None and columns.device.type == "cpu":
        for b, span in enumerate(rows_alone):
            before = torch.nn.functional.pad(columns[b], (1, 0), value=-1)[:, :-1]
            ended = (columns[b] == -1).cumsum(-1) > 0
            bad = torch.where(ended, columns[b] != -1, (columns[b] <= before) | (columns[b] >= span.n_k)).nonzero()
            for h, i in bad[:1].tolist():
                require(False, f"columns[{b}, {h}, {i}] is {columns[b, h, i]}; columns must ascend below the {span.n_k} real keys "
                               f"of batch row {b} and be -1 after the last")


def _require_permutation(order: Tensor | None, rows_alone: list[Span]) -> None:
    """On a CPU, where looking is free: every real key stands in exactly one slot."""
    if order is not None and order.device.type == "cpu":
        for b, span in enumerate(rows_alone):
            found = order[b, :, : span.n_k].sort(-1).values
            require(bool((found == torch.arange(span.n_k)).all()),
                    f"order is not a permutation of the {span.n_k} real keys of batch row {b}; each must stand in one slot")


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
    columns: Tensor | None = None,
    near: Tensor | None = None,
    dense_rows: int = 0,
    order: Tensor | None = None,
    pv_threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the keys that a plan names, and its log-sum-exp.

    A query reads a key when the key's block is listed for its query block, or the key is one of ``columns``, or ``near`` reaches
    it, or the query is one of the last ``dense_rows``. Every key is then tested by position: causality, sliding window and
    padding hold by token whatever the plan says. Logits are ``softcap * tanh(scale * q.k / softcap)`` when a softcap is given.

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
        columns: int32 ``[B, Hc, C]`` single keys that every query of a head reads (vertical lines), ascending and unique, counted
            from the first real key, -1 after the last; Hc divides H. None for none.
        near: int32 ``[H, 2]``, per head ``(sink, local)`` tokens: the first ``sink`` keys and the query's last ``local`` ones, its
            own included, are read. ``(0, 0)`` adds nothing, a ``local`` of at least Nk makes the head dense. None for none.
        dense_rows: the last so many real queries of each row read everything they may see.
        order: int32 ``[B, Hkv, Nk]`` permutation of the keys before they are blocked: slot ``s`` of the blocked axis holds key
            ``order[s]``, both counted from the first real key; entries past the real keys are not read. Positions stay those of
            the keys. Excludes ``columns`` and ``near``. None leaves keys where they are.
        pv_threshold: nats; a backend may leave out a tile of keys whose every logit lies more than this below the running maximum
            of its query, which changes a row by less than ``Nk * exp(-pv_threshold)`` of its value range. 0 for never.

    Returns:
        out: ``[B, H, Nq, Dv]`` in q's dtype, laid out as ``[B, Nq, H, Dv]``. Rows that are padding or see no key are 0.
        lse: float32 ``[B, H, Nq]``, natural log of the sum of exponentials of the logits, sink included, so that
            ``exp(logit - lse)`` is the probability; -inf for padding rows, and without a sink for rows that see nothing.
            A backend that rounds probabilities to q's dtype sums them rounded: exact against out, within eps / 4 of the truth.

    Raises:
        ContractError: on mismatched shapes or dtypes, or (on CPU) a count or block number out of range, columns that do not
            ascend below the row's real keys, or an order that is no permutation of them.
    """
    batch, heads, n_q, _ = q.shape
    n_k, group, per_list = k.shape[2], heads // k.shape[1], heads // counts.shape[1]
    _require_listed(counts, indices, n_k, block_k)
    rows_alone = spans(batch, n_q, n_k, q_start, causal, first, last)
    _require_columns(columns, rows_alone)
    _require_permutation(order, rows_alone)
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = empty_outputs(q, v)
    out.zero_()
    lse.fill_(float("-inf"))
    slot = torch.arange(indices.shape[3], device=q.device)
    for b, span in enumerate(rows_alone):
        keys, values = (x[b, :, span.keys].to(wide).repeat_interleave(group, dim=0) for x in (k, v))
        k_pos = torch.arange(span.n_k, device=q.device)
        block_of = (k_pos // block_k)[None].expand(k.shape[1], -1) if order is None else _block_of_key(order[b, :, : span.n_k], block_k)
        block_of = block_of.repeat_interleave(group, dim=0)
        line = _column_keys(columns[b], span.n_k).repeat_interleave(heads // columns.shape[1], dim=0) if columns is not None else None
        for i in range(-(-span.n_q // block_q)):
            rows = torch.arange(i * block_q, min((i + 1) * block_q, span.n_q), device=q.device)
            listed = indices[b, :, i].masked_fill(slot >= counts[b, :, i, None], -1).repeat_interleave(per_list, dim=0)
            read = (block_of[:, :, None] == listed[:, None, :]).any(-1)
            read = (read if line is None else read | line)[:, None, :] | (rows >= span.n_q - dense_rows)[:, None]
            if near is not None:
                back = rows[:, None] + span.q_start - k_pos
                read = read | (k_pos < near[:, :1, None]) | (back < near[:, 1:, None])
            seen = _visible(rows + span.q_start, k_pos, causal, window) & read
            at = rows + span.rows.start
            o, l = attend(q[b, :, at].to(wide), keys, values, seen, scale, softcap, sinks)
            out[b, :, at], lse[b, :, at] = o.to(out.dtype), l.float()
    return out, lse


@block_sparse_attention.check
def _(q, k, v, counts, indices, block_q, block_k, scale, q_start, causal, window, softcap, first, last, sinks, columns, near,
      dense_rows, order, pv_threshold):
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
    _check_plan(q, k, causal, columns, near, dense_rows, order, pv_threshold)


def _check_plan(q, k, causal, columns, near, dense_rows, order, pv_threshold):
    batch, heads, n_k = q.shape[0], q.shape[1], k.shape[2]
    for name, t in (("columns", columns), ("near", near), ("order", order)):
        require(t is None or t.dtype == torch.int32, f"{name} must be int32, got {t.dtype if t is not None else None}; it counts tokens")
    if columns is not None:
        require(
            columns.dim() == 3 and columns.shape[0] == batch and columns.shape[1] > 0 and heads % columns.shape[1] == 0,
            f"columns must be [{batch}, Hc, C] with Hc dividing {heads} query heads, got {list(columns.shape)}",
        )
    if near is not None:
        require(tuple(near.shape) == (heads, 2), f"near must be [{heads}, 2], sink and local tokens per head, got {list(near.shape)}")
        require(causal, "near needs causal=True; without positions no key is local")
    require(dense_rows >= 0, f"dense_rows={dense_rows} is negative; it counts queries")
    if order is not None:
        want = [batch, k.shape[1], n_k]
        require(list(order.shape) == want, f"order must be {want}, one permutation per key head, got {list(order.shape)}")
        require(columns is None and near is None, "order cannot be combined with columns or near; list those keys' blocks instead")
    require(pv_threshold >= 0, f"pv_threshold={pv_threshold} is negative; use 0 for none")


@block_sparse_attention.fake
def _outputs(q, k, v, *rest, **named):
    return empty_outputs(q, v)


native.add(block_sparse_attention, _outputs, lambda isa, q, *rest: native.needs_dtype(q))
frame.add(block_sparse_attention, _outputs, frame.needs_width)
