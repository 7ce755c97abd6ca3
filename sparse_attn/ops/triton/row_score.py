"""row_score: as page_score with one table; soft scores first meet every row once for the sums of their softmax.

Two kernels where they are soft: ``run_sums`` leaves the log-sum-exp of every query and part of a run, ``score`` joins the parts
of a query again for each tile of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .run_sums import joined, parts_of, sums
from .tiles import load_queries, load_rows, overlapping, real_queries, reduced

CONFIGS = {
    80: dict(TILE=64, num_warps=4, num_stages=2),
    90: dict(TILE=64, num_warps=4, num_stages=3),
}


@triton.jit
def score(q, rows, starts, lengths, q_first, q_last, part_lse, out,
          n_rows, n_q, n_parts, blocks, scale, q_b, q_h, q_i, q_d, row_stride,
          KV_HEADS: tl.constexpr, N_RUNS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
          EDGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr, REDUCE: tl.constexpr, TILE: tl.constexpr):
    """One tile of rows: out ``[TILE]``; part_lse is None where the scores are products."""
    begin = tl.program_id(0).to(tl.int64) * TILE
    row = begin + tl.arange(0, TILE)
    tile = load_rows(rows, row, row_stride, row < n_rows, DIM, WIDTH)
    found = tl.zeros([TILE], tl.float32)
    lowest, highest = overlapping(starts, lengths, begin, begin + TILE, N_RUNS, RUNS)
    for run in range(lowest, highest + 1):
        start = tl.load(starts + run)
        mine = (row >= start) & (row < start + tl.load(lengths + run))
        first, last = real_queries(q_first, q_last, run // KV_HEADS, n_q)
        best = tl.full([TILE, HEADS], float("-inf"), tl.float32)
        for at in range(first, last, EDGE):
            x, there = load_queries(q, run // KV_HEADS, run % KV_HEADS, at, last, q_b, q_h, q_i, q_d, GROUP, HEADS, EDGE, DIM,
                                    WIDTH)
            value = tl.dot(tile, tl.trans(x), input_precision="ieee") * scale
            if part_lse is not None:
                to = (tl.cast(run, tl.int64) * blocks + (at - first) // EDGE) * n_parts * (HEADS * EDGE)
                value = tl.exp(value - joined(part_lse + to, n_parts, MOST, HEADS * EDGE)[None, :])
            value = tl.where(there[None, :], value, float("-inf"))
            best = tl.maximum(best, tl.max(tl.reshape(value, [TILE, HEADS, EDGE]), 2))
        found = tl.where(mine & (first < last), reduced(best, GROUP, HEADS, REDUCE), found)
    tl.store(out + row, found, mask=row < n_rows)


def run(out: Tensor, q: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, scale: float, soft: bool, reduce: str,
        q_first: Tensor | None, q_last: Tensor | None) -> None:
    """As ``sparse_attn.ops.row_score``."""
    kv_heads, n_runs, n_q, dim = starts.shape[1], starts.numel(), q.shape[2], q.shape[3]
    heads, edge = frame.edges(q.shape[1] // kv_heads, n_q)
    config, blocks = frame.pinned(CONFIGS, q.device), triton.cdiv(n_q, edge)
    starts, lengths = starts.contiguous(), lengths.contiguous()
    same = dict(KV_HEADS=kv_heads, GROUP=q.shape[1] // kv_heads, HEADS=heads, EDGE=edge, DIM=dim, WIDTH=frame.power(dim)) | config
    part_lse, parts = None, 1
    if soft:
        parts = parts_of(n_runs * blocks, rows.shape[0], config["TILE"], q.device)
        part_lse = torch.empty(n_runs, blocks, parts, heads * edge, dtype=torch.float32, device=q.device)
        frame.launch(sums, (parts, blocks, n_runs), q, rows, starts, lengths, q_first, q_last, part_lse, n_q, parts, float(scale),
                     0.0, *q.stride(), rows.stride(0), CAUSAL=False, CAPPED=False, **same)
    frame.launch(score, (triton.cdiv(rows.shape[0], config["TILE"]),), q, rows, starts, lengths, q_first, q_last, part_lse, out,
                 rows.shape[0], n_q, parts, blocks, float(scale), *q.stride(), rows.stride(0), N_RUNS=n_runs,
                 RUNS=frame.power(n_runs), MOST=frame.power(parts, 1), REDUCE=reduce, **same)
