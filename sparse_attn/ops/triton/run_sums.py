"""Log-sum-exps of queries over their runs, cut into parts that run side by side; who needs one joins its parts again."""

import triton
import triton.language as tl

from . import frame
from .tiles import capped, load_queries, load_rows, log_sum, real_queries, soften

_MOST_PARTS = 64


@triton.jit
def sums(q, rows, starts, lengths, q_first, q_last, part_lse, n_q, n_parts, scale, softcap, q_b, q_h, q_i, q_d, row_stride,
         KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, EDGE: tl.constexpr, DIM: tl.constexpr,
         WIDTH: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, TILE: tl.constexpr):
    """Of a tile of queries over one part of one run: part_lse ``[runs, tiles of queries, parts, HEADS * EDGE]``."""
    part, block, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = run // KV_HEADS, run % KV_HEADS
    first, last = real_queries(q_first, q_last, b, n_q)
    x, there = load_queries(q, b, h, first + block * EDGE, last, q_b, q_h, q_i, q_d, GROUP, HEADS, EDGE, DIM, WIDTH)
    start, length = tl.load(starts + run), tl.load(lengths + run)
    reach = tl.zeros([HEADS * EDGE], tl.int64) + length
    if CAUSAL:
        reach += 1 + first + block * EDGE + tl.arange(0, HEADS * EDGE) % EDGE - last
    share = tl.cdiv(tl.cdiv(length, n_parts), TILE) * TILE
    top = tl.full([HEADS * EDGE], float("-inf"), tl.float32)
    total = tl.zeros([HEADS * EDGE], tl.float32)
    for at in range(part * share, tl.minimum(length, (part + 1) * share), TILE):
        row = at + tl.arange(0, TILE)
        tile = load_rows(rows, start + row, row_stride, row < length, DIM, WIDTH)
        logits = tl.dot(x, tl.trans(tile), input_precision="ieee") * scale
        if CAPPED:
            logits = capped(logits, softcap)
        seen = (row < length)[None, :] & (row[None, :] < reach[:, None])
        p, top, total, fade = soften(tl.where(seen, logits, float("-inf")), top, total)
    to = ((run.to(tl.int64) * tl.num_programs(1) + block) * n_parts + part) * (HEADS * EDGE) + tl.arange(0, HEADS * EDGE)
    tl.store(part_lse + to, log_sum(top, total))


@triton.jit
def joined(part_lse, n_parts, MOST: tl.constexpr, QUERIES: tl.constexpr):
    """Log-sum-exp ``[QUERIES]`` of the parts of one tile of queries; nan where a part is."""
    part = tl.arange(0, MOST)
    lses = tl.load(part_lse + part[None, :] * QUERIES + tl.arange(0, QUERIES)[:, None], mask=(part < n_parts)[None, :],
                   other=float("-inf"))
    top = tl.max(lses, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    return log_sum(top, tl.sum(tl.exp(lses - top[:, None]), 1))


def parts_of(tiles: int, keys: int, tile: int, device) -> int:
    """Into how many parts to cut ``keys``, so that ``tiles`` tiles of queries fill a GPU; a part has a tile of keys at least."""
    return max(1, min(_MOST_PARTS, 4 * frame.processors(device) // max(tiles, 1), keys // tile))
