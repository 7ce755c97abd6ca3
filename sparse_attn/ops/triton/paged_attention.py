"""paged_attention: the listed rows of a key head are cut into parts that run side by side, then joined by log-sum-exp.

Queries and heads of a group are the rows of one tile (``query * GROUP + head``), so that keys are read once for all of them.
A listed position finds its page by bisection in the running sum of ``counts``, which one page, a run, does not need. Nobody on
the host knows how many rows are listed: parts are chosen by how many programs fill the GPU, and each takes its share.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .tiles import capped, finite, load_rows, log_sum, real_queries, soften

# a generated token or a few, and chunks
FEW = {
    80: dict(ROWS=16, TILE=32, num_warps=4, num_stages=2),
    90: dict(ROWS=16, TILE=64, num_warps=4, num_stages=2),
}
CHUNKS = {
    80: dict(ROWS=64, TILE=32, num_warps=4, num_stages=2),
    90: dict(ROWS=64, TILE=64, num_warps=8, num_stages=2),
}
JOINS = {80: dict(num_warps=4)}
_MOST_PARTS = 64


@triton.jit
def listed(starts, ends, position, N_PAGES: tl.constexpr, STEPS: tl.constexpr):
    """Row of the store of each listed position; ends is the running sum of the pages' rows."""
    page = tl.zeros_like(position)
    above = page + N_PAGES - 1
    for _ in range(STEPS):
        middle = (page + above) // 2
        later = tl.load(ends + middle) <= position
        page = tl.where(later & (page < above), middle + 1, page)
        above = tl.where(later, above, middle)
    before = tl.load(ends + page - 1, mask=page > 0, other=0)
    return tl.load(starts + page) + position - before


@triton.jit
def attend(q, k, v, starts, ends, sinks, q_first, q_last, bias, out, lse,
           n_q, n_parts, scale, softcap, q_b, q_h, q_i, q_d, k_row, v_row,
           KV_HEADS: tl.constexpr, GROUP: tl.constexpr, N_PAGES: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
           CAPPED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
           ROWS: tl.constexpr, TILE: tl.constexpr):
    """A tile of queries over one part of the listed rows: out ``[parts, B, Nq, H, Dv]`` and lse ``[parts, B, H, Nq]``."""
    part, run = tl.program_id(0) % n_parts, tl.program_id(1)
    b, h = (run // KV_HEADS).to(tl.int64), run % KV_HEADS
    row = tl.program_id(0) // n_parts * ROWS + tl.arange(0, ROWS)
    i, head = row // GROUP, (h * GROUP + row % GROUP).to(tl.int64)
    first, last = real_queries(q_first, q_last, b, n_q)
    real = (i >= first) & (i < last)
    channel = tl.arange(0, WIDTH)
    x = tl.load(q + b * q_b + (head * q_h + i.to(tl.int64) * q_i)[:, None] + channel[None, :] * q_d,
                mask=real[:, None] & (channel < DIM)[None, :], other=0.0)

    starts += run.to(tl.int64) * N_PAGES
    ends += run.to(tl.int64) * N_PAGES
    length = tl.load(ends + N_PAGES - 1)
    reach = tl.where(real, length - (last - 1 - i if CAUSAL else 0), 0)
    share = tl.cdiv(tl.cdiv(length, n_parts), TILE) * TILE
    end = tl.minimum(tl.minimum(length, (part + 1) * share), tl.max(reach, 0))

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        if part == 0:
            top = tl.load(sinks + head, mask=real, other=float("-inf")).to(tl.float32)
            total = tl.where(top == float("-inf"), 0.0, 1.0)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for at in range(part * share, end, TILE):
        position = at + tl.arange(0, TILE)
        there = position < length
        stored = listed(starts, ends, tl.minimum(position, length - 1), N_PAGES, STEPS)
        keys = load_rows(k, stored, k_row, there, DIM, WIDTH)
        logits = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale
        if CAPPED:
            logits = capped(logits, softcap)
        if bias is not None:
            logits += tl.load(bias + stored, mask=there, other=0.0)[None, :]
        logits = tl.where(position[None, :] < reach[:, None], logits, float("-inf"))
        p, top, total, fade = soften(logits, top, total)
        values = load_rows(v, stored, v_row, there, VALUE_DIM, VALUE_WIDTH)
        sums = tl.dot(p.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")

    n_heads = KV_HEADS * GROUP
    batch = part.to(tl.int64) * (tl.num_programs(1) // KV_HEADS) + b
    tl.store(lse + (batch * n_heads + head) * n_q + i, log_sum(top, total), mask=i < n_q)
    dim = tl.arange(0, VALUE_WIDTH)
    to = ((batch * n_q + i) * n_heads + head) * VALUE_DIM
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + to[:, None] + dim[None, :], sums.to(out.dtype.element_ty), mask=(i < n_q)[:, None] & (dim < VALUE_DIM)[None, :])


@triton.jit
def join(outs, lses, out, lse, n_parts, n_q, n_heads, n_rows,
         PARTS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    """One row of ``[B, Nq, H]``: its parts' outputs, weighed by their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS).to(tl.int64)
    there = part < n_parts
    at = ((row // (n_heads * n_q)) * n_heads + row % n_heads) * n_q + row // n_heads % n_q
    parts = tl.load(lses + part * n_rows + at, mask=there, other=float("-inf"))
    top = finite(tl.max(parts, 0))
    weights = tl.exp(parts - top)
    total = tl.sum(weights, 0)
    dim = tl.arange(0, VALUE_WIDTH)
    found = tl.load(outs + (part[:, None] * n_rows + row) * VALUE_DIM + dim[None, :],
                    mask=there[:, None] & (dim < VALUE_DIM)[None, :], other=0.0)
    found = tl.sum(found * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * VALUE_DIM + dim, found.to(out.dtype.element_ty), mask=dim < VALUE_DIM)
    tl.store(lse + at, log_sum(top, total))


def run(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, counts: Tensor, scale: float, causal: bool,
        softcap: float, sinks: Tensor | None, q_first: Tensor | None, q_last: Tensor | None, bias: Tensor | None) -> None:
    """As ``sparse_attn.ops.paged_attention``."""
    (batch, n_heads, n_q, dim), (_, kv_heads, n_pages), value_dim = q.shape, starts.shape, v.shape[1]
    if n_pages == 0:
        starts, counts, n_pages = starts.new_zeros(batch, kv_heads, 1), counts.new_zeros(batch, kv_heads, 1), 1
    group = n_heads // kv_heads
    config = frame.pinned(FEW if n_q * group <= 16 else CHUNKS, q.device)
    blocks, n_rows = triton.cdiv(n_q * group, config["ROWS"]), batch * n_heads * n_q
    parts = max(1, min(_MOST_PARTS, 2 * frame.processors(q.device) // max(1, blocks * batch * kv_heads),
                       k.shape[0] // config["TILE"]))
    outs, lses = out, lse  # one part is the result; several are joined, in float32
    if parts > 1:
        outs, lses = (lse.new_empty(parts, n_rows, width) for width in (value_dim, 1))
    frame.launch(attend, (blocks * parts, batch * kv_heads), q, k, v, starts.contiguous(), counts.cumsum(2), sinks, q_first, q_last,
                 bias, outs, lses, n_q, parts, float(scale), float(softcap), *q.stride(), k.stride(0), v.stride(0),
                 KV_HEADS=kv_heads, GROUP=group, N_PAGES=n_pages, STEPS=(n_pages - 1).bit_length(), CAUSAL=causal,
                 CAPPED=softcap > 0, DIM=dim, WIDTH=frame.power(dim), VALUE_DIM=value_dim,
                 VALUE_WIDTH=frame.power(value_dim), **config)
    if parts > 1:
        frame.launch(join, (n_rows,), outs, lses, out, lse, parts, n_q, n_heads, n_rows, PARTS=frame.power(parts, 1),
                     VALUE_DIM=value_dim, VALUE_WIDTH=frame.power(value_dim), **frame.pinned(JOINS, q.device))
