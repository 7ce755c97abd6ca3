"""pool_blocks: one program per block and head; every token is read once."""

import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .tiles import real_queries

MOST_ROWS = 32  # tokens of a tile
WARPS = dict(num_warps=4)


@triton.jit
def unit(tokens):
    """Tokens divided by their norm, by their largest channel first: the squares of float32 can leave its range."""
    size = tl.max(tl.abs(tokens), 1)
    tokens = tokens / tl.where((size == 0) | (size == float("inf")), 1.0, size)[:, None]
    norm = tl.sqrt(tl.sum(tokens * tokens, 1))
    return tokens / tl.where(norm == 0, 1.0, norm)[:, None]


@triton.jit(do_not_specialize=["n", "heads", "block"])
def pool(x, out, first, last, x_batch, x_head, x_row, x_col, n, heads, block,
         KIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """One block of one head: out ``[B, H, blocks, D]``."""
    j, bh = tl.program_id(0), tl.program_id(1)
    begin, end = real_queries(first, last, bh // heads, n)
    begin += j.to(tl.int64) * block
    end = tl.minimum(begin + block, end)
    x += (bh // heads).to(tl.int64) * x_batch + (bh % heads).to(tl.int64) * x_head
    channel = tl.arange(0, WIDTH)
    NOTHING: tl.constexpr = float("-inf") if KIND == "max" else float("inf") if KIND == "min" else 0.0
    found = tl.full([ROWS, WIDTH], NOTHING, tl.float32)
    for at in range(begin, end, ROWS):
        row = at + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (channel < DIM)[None, :]
        tokens = tl.load(x + row.to(tl.int64)[:, None] * x_row + channel[None, :] * x_col, mask=there, other=NOTHING).to(tl.float32)
        if KIND == "max":
            found = tl.maximum(found, tokens, propagate_nan=tl.PropagateNan.ALL)
        elif KIND == "min":
            found = tl.minimum(found, tokens, propagate_nan=tl.PropagateNan.ALL)
        elif KIND == "mean":
            found += tokens
        else:
            found += unit(tokens)
    if KIND == "max":
        pooled = tl.max(found, 0)
    elif KIND == "min":
        pooled = tl.min(found, 0)
    else:
        pooled = tl.sum(found, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    # a reduction passes over a nan, a sum does not
    pooled = tl.where(tl.sum((found != found).to(tl.int32), 0) > 0, float("nan"), pooled)
    pooled = tl.where(begin < end, pooled, 0.0)
    to = (bh.to(tl.int64) * tl.num_programs(0) + j) * DIM
    tl.store(out + to + channel, pooled, mask=channel < DIM)


def run(out: Tensor, x: Tensor, block: int, kind: str, first: Tensor | None, last: Tensor | None) -> None:
    """As ``sparse_attn.ops.pool_blocks``."""
    batch, heads, n, dim = x.shape
    frame.launch(pool, (out.shape[2], batch * heads), x, out, first, last, *x.stride(), n, heads, block, KIND=kind, DIM=dim,
                 WIDTH=frame.power(dim), ROWS=min(MOST_ROWS, frame.power(block, 1)), **WARPS)
