"""window_mass: the sums of the last queries' softmax, then key_mass with them; pooled through sums per head where rows are pooled.

Up to four kernels: ``run_sums`` in parts, ``join`` with the sinks, key_mass' ``mass``, and ``pooled`` where ``kernel`` is not 1.
The queries that look are packed first, so that what is kept of them does not grow with the prompt.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import frame, key_mass
from .run_sums import joined, parts_of, sums
from .tiles import overlapping, real_queries, reduced

CONFIGS = {
    80: dict(MOST=64, TILE=64, num_warps=4, num_stages=2),
    90: dict(MOST=64, TILE=64, num_warps=4, num_stages=3),
}
POOLING = dict(TILE=128, num_warps=4)


@triton.jit(do_not_specialize=["n_q", "n_parts"])
def join(part_lse, sinks, q_first, q_last, lse, n_q, n_parts, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
         EDGE: tl.constexpr, MOST: tl.constexpr):
    """One tile of queries: lse ``[B, H, Nq]``, sinks included."""
    block, run = tl.program_id(0), tl.program_id(1)
    b = run // KV_HEADS
    first, last = real_queries(q_first, q_last, b, n_q)
    head = run % KV_HEADS * GROUP + tl.arange(0, HEADS * EDGE) // EDGE
    i = first + block * EDGE + tl.arange(0, HEADS * EDGE) % EDGE
    there = (tl.arange(0, HEADS * EDGE) // EDGE < GROUP) & (i < last)
    tile = (run.to(tl.int64) * tl.num_programs(0) + block) * n_parts * (HEADS * EDGE)
    found = joined(part_lse + tile, n_parts, MOST, HEADS * EDGE)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=there, other=0.0).to(tl.float32)
        top = tl.maximum(found, sink)
        # of a nan, the sum; the larger of two passes over it
        found = tl.where((found == found) & (top > float("-inf")), top + tl.log(tl.exp(found - top) + tl.exp(sink - top)), found)
    tl.store(lse + (b.to(tl.int64) * (KV_HEADS * GROUP) + head) * n_q + i, found, mask=there)


@triton.jit(do_not_specialize=["n_rows", "n_q", "reach"])
def pooled(sums, starts, lengths, q_first, q_last, out, n_rows, n_q, reach, KV_HEADS: tl.constexpr, N_RUNS: tl.constexpr,
           RUNS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, POOL: tl.constexpr, REDUCE: tl.constexpr,
           TILE: tl.constexpr):
    """One tile of rows: sums ``[S, GROUP]`` of the ``reach`` rows on either side, then of the heads: out ``[TILE]``."""
    begin = tl.program_id(0).to(tl.int64) * TILE
    row, head = begin + tl.arange(0, TILE), tl.arange(0, HEADS)
    found = tl.zeros([TILE], tl.float32)
    lowest, highest = overlapping(starts, lengths, begin, begin + TILE, N_RUNS, RUNS)
    for run in range(lowest, highest + 1):
        start, length = tl.load(starts + run), tl.load(lengths + run)
        mine = (row >= start) & (row < start + length)
        first, last = real_queries(q_first, q_last, run // KV_HEADS, n_q)
        before = start + length - (last - first)  # rows from here on are the window's own and stand alone
        together = tl.zeros([TILE, HEADS], tl.float32)
        for back in range(-reach, reach + 1):
            other = row + back
            counts = mine & tl.where(row < before, (other >= start) & (other < before), back == 0)
            sum_ = tl.load(sums + other[:, None] * GROUP + head[None, :], mask=counts[:, None] & (head < GROUP)[None, :], other=0.0)
            together = together + sum_ if POOL == "mean" else tl.maximum(together, sum_)
        if POOL == "mean":
            near = tl.minimum(row + reach + 1, before) - tl.maximum(row - reach, start)
            together = together / tl.where(row < before, tl.maximum(near, 1), 1).to(tl.float32)[:, None]
        found = tl.where(mine, reduced(together, GROUP, HEADS, REDUCE), found)
    tl.store(out + row, found, mask=row < n_rows)


def last_queries(q: Tensor, window: int, first: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The last ``window`` real queries of each sequence, at the end of ``[B, H, window, D]``, and the first that is real."""
    n_q = q.shape[2]
    if last is None:
        x, first = q[:, :, n_q - window :], None if first is None else first - (n_q - window)
    else:
        begin = last.clamp(0, n_q) - window
        rows = (begin[:, None] + torch.arange(window, device=q.device)).clamp(min=0)
        x = q.gather(2, rows.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        first = (first.clamp(0, n_q) if first is not None else torch.zeros_like(last)) - begin
    return x, None if first is None else first.int()


def run(out: Tensor, q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, scale: float, window: int, softcap: float,
        sinks: Tensor | None, kernel: int, pool: str, reduce: str, q_first: Tensor | None, q_last: Tensor | None) -> None:
    """As ``sparse_attn.ops.window_mass``."""
    q, q_first = last_queries(q, min(window, q.shape[2]), q_first, q_last)
    (batch, n_heads, n_q, dim), kv_heads = q.shape, starts.shape[1]
    group, n_runs = n_heads // kv_heads, starts.numel()
    starts, lengths, config = starts.contiguous(), lengths.contiguous(), dict(frame.pinned(CONFIGS, q.device))
    heads, edge = frame.edges(group, n_q, config.pop("MOST"))
    blocks = triton.cdiv(n_q, edge)
    parts = parts_of(n_runs * blocks, k.shape[0], config["TILE"], q.device)
    part_lse = torch.empty(n_runs, blocks, parts, heads * edge, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, n_heads, n_q, dtype=torch.float32, device=q.device)
    same = dict(KV_HEADS=kv_heads, GROUP=group, HEADS=heads, EDGE=edge)
    frame.launch(sums, (parts, blocks, n_runs), q, k, starts, lengths, q_first, None, part_lse, n_q, parts, float(scale),
                 float(softcap), *q.stride(), k.stride(0), CAUSAL=True, CAPPED=softcap > 0, DIM=dim, WIDTH=frame.power(dim), **same,
                 **config)
    frame.launch(join, (blocks, n_runs), part_lse, sinks, q_first, None, lse, n_q, parts, MOST=frame.power(parts, 1), **same,
                 num_warps=4)
    if kernel == 1:
        key_mass.run(out, q, k, lse, starts, lengths, scale, softcap, 0, reduce, q_first, None)
        return
    per_head = torch.empty(k.shape[0], group, dtype=torch.float32, device=q.device)
    key_mass.run(per_head, q, k, lse, starts, lengths, scale, softcap, 0, "none", q_first, None)
    frame.launch(pooled, (triton.cdiv(k.shape[0], POOLING["TILE"]),), per_head, starts, lengths, q_first, None, out, k.shape[0],
                 n_q, kernel // 2, KV_HEADS=kv_heads, N_RUNS=n_runs, RUNS=frame.power(n_runs), GROUP=group, HEADS=heads, POOL=pool,
                 REDUCE=reduce, **POOLING)
