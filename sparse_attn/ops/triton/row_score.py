"""row_score: as page_score with one table; soft scores first meet every row once for the sums of their softmax.

Two kernels where they are soft: ``sums`` cuts each run into parts and leaves the log-sum-exp of every query and part, ``score``
joins the parts of a query again for each tile of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .tiles import load_queries, load_rows, log_sum, overlapping, real_queries, reduced, soften

CONFIGS = {
    80: dict(TILE=64, num_warps=4, num_stages=2),
    90: dict(TILE=64, num_warps=4, num_stages=3),
}
_MOST_PARTS = 64


@triton.jit
def sums(q, rows, starts, lengths, q_first, q_last, part_lse,
         n_q, n_parts, scale, q_b, q_h, q_i, q_d, row_stride,
         KV_HEADS: tl.constexpr, N_RUNS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, EDGE: tl.constexpr,
         DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Log-sum-exp of a tile of queries over one part of one run: part_lse ``[runs, tiles of queries, parts, HEADS * EDGE]``."""
    part, block, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = real_queries(q_first, q_last, run // KV_HEADS, n_q)
    x, there = load_queries(q, run // KV_HEADS, run % KV_HEADS, first + block * EDGE, last, q_b, q_h, q_i, q_d, GROUP, HEADS, EDGE, DIM,
                        WIDTH)
    start, length = tl.load(starts + run), tl.load(lengths + run)
    share = tl.cdiv(tl.cdiv(length, n_parts), TILE) * TILE
    top = tl.full([HEADS * EDGE], float("-inf"), tl.float32)
    total = tl.zeros([HEADS * EDGE], tl.float32)
    for at in range(part * share, tl.minimum(length, (part + 1) * share), TILE):
        row = at + tl.arange(0, TILE)
        tile = load_rows(rows, start + row, row_stride, row < length, DIM, WIDTH)
        logits = tl.dot(x, tl.trans(tile), input_precision="ieee") * scale
        p, top, total, fade = soften(tl.where((row < length)[None, :], logits, float("-inf")), top, total)
    to = ((run.to(tl.int64) * tl.num_programs(1) + block) * n_parts + part) * (HEADS * EDGE) + tl.arange(0, HEADS * EDGE)
    tl.store(part_lse + to, log_sum(top, total))


@triton.jit
def joined(part_lse, n_parts, MOST: tl.constexpr, QUERIES: tl.constexpr):
    """Log-sum-exp ``[QUERIES]`` of the parts of one run and tile of queries."""
    part = tl.arange(0, MOST)
    lses = tl.load(part_lse + part[None, :] * QUERIES + tl.arange(0, QUERIES)[:, None], mask=(part < n_parts)[None, :],
                   other=float("-inf"))
    top = tl.max(lses, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    return log_sum(top, tl.sum(tl.exp(lses - top[:, None]), 1))


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
            x, there = load_queries(q, run // KV_HEADS, run % KV_HEADS, at, last, q_b, q_h, q_i, q_d, GROUP, HEADS, EDGE, DIM, WIDTH)
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
    same = dict(KV_HEADS=kv_heads, N_RUNS=n_runs, GROUP=q.shape[1] // kv_heads, HEADS=heads, EDGE=edge, DIM=dim,
                WIDTH=frame.power(dim)) | config
    part_lse, parts = None, 1
    if soft:
        parts = max(1, min(_MOST_PARTS, 4 * frame.processors(q.device) // max(n_runs * blocks, 1), rows.shape[0] // config["TILE"]))
        part_lse = torch.empty(n_runs, blocks, parts, heads * edge, dtype=torch.float32, device=q.device)
        frame.launch(sums, (parts, blocks, n_runs), q, rows, starts, lengths, q_first, q_last, part_lse, n_q, parts, float(scale),
                     *q.stride(), rows.stride(0), **same)
    frame.launch(score, (triton.cdiv(rows.shape[0], config["TILE"]),), q, rows, starts, lengths, q_first, q_last, part_lse, out,
                 rows.shape[0], n_q, parts, blocks, float(scale), *q.stride(), rows.stride(0), RUNS=frame.power(n_runs),
                 MOST=frame.power(parts, 1), REDUCE=reduce, **same)
