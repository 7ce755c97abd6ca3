"""page_score: a program bounds the products of one tile of pages with all queries of the runs that it meets.

Rows of the queries' tile are ``head * EDGE + query``, so that the largest over the queries and then the reduction over the heads
are two sums along axes. Pages are read once; one tile rarely meets more than one run.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .tiles import load_queries, load_rows, overlapping, real_queries, reduced

CONFIGS = {
    80: dict(TILE=64, num_warps=4, num_stages=2),
    90: dict(TILE=64, num_warps=4, num_stages=3),
}


@triton.jit
def bound(q, low, high, starts, pages, q_first, q_last, score,
          n_pages, n_q, q_b, q_h, q_i, q_d, low_row, high_row,
          KV_HEADS: tl.constexpr, N_RUNS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
          EDGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, REDUCE: tl.constexpr, TILE: tl.constexpr):
    """One tile of pages: score ``[TILE]``."""
    begin = tl.program_id(0).to(tl.int64) * TILE
    page = begin + tl.arange(0, TILE)
    smallest = load_rows(low, page, low_row, page < n_pages, DIM, WIDTH)
    largest = load_rows(high, page, high_row, page < n_pages, DIM, WIDTH)
    found = tl.zeros([TILE], tl.float32)
    lowest, highest = overlapping(starts, pages, begin, begin + TILE, N_RUNS, RUNS)
    for run in range(lowest, highest + 1):
        start = tl.load(starts + run)
        mine = (page >= start) & (page < start + tl.load(pages + run))
        first, last = real_queries(q_first, q_last, run // KV_HEADS, n_q)
        best = tl.full([TILE, HEADS], float("-inf"), tl.float32)
        for at in range(first, last, EDGE):
            x, there = load_queries(q, run // KV_HEADS, run % KV_HEADS, at, last, q_b, q_h, q_i, q_d, GROUP, HEADS, EDGE, DIM,
                                    WIDTH)
            upper = tl.dot(largest, tl.trans(tl.maximum(x, 0.0).to(x.dtype)), input_precision="ieee")
            upper = tl.dot(smallest, tl.trans(tl.minimum(x, 0.0).to(x.dtype)), upper, input_precision="ieee")
            upper = tl.where(there[None, :], upper, float("-inf"))
            best = tl.maximum(best, tl.max(tl.reshape(upper, [TILE, HEADS, EDGE]), 2))
        value = reduced(best, GROUP, HEADS, REDUCE)
        found = tl.where(mine & (first < last), value, found)
    tl.store(score + page, found, mask=page < n_pages)


def run(score: Tensor, q: Tensor, low: Tensor, high: Tensor, starts: Tensor, pages: Tensor, reduce: str, q_first: Tensor | None,
        q_last: Tensor | None) -> None:
    """As ``sparse_attn.ops.page_score``."""
    kv_heads, n_runs, dim = starts.shape[1], starts.numel(), q.shape[3]
    group = q.shape[1] // kv_heads
    heads, edge = frame.edges(group, q.shape[2])
    config = frame.pinned(CONFIGS, q.device)
    frame.launch(bound, (triton.cdiv(low.shape[0], config["TILE"]),), q, low, high, starts.contiguous(), pages.contiguous(),
                 q_first, q_last, score, low.shape[0], q.shape[2], *q.stride(), low.stride(0), high.stride(0), KV_HEADS=kv_heads,
                 N_RUNS=n_runs, RUNS=frame.power(n_runs), GROUP=group, HEADS=heads, EDGE=edge, DIM=dim, WIDTH=frame.power(dim),
                 REDUCE=reduce, **config)
