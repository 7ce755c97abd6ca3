"""js_distance: one program per row, in double, where what two near distributions share cancels."""

import triton
import triton.language as tl
from torch import Tensor

from . import frame

TILES = dict(COLUMNS=512, num_warps=4)


@triton.jit
def against(x, m):
    """``x * log(x / m)``, 0 where x is."""
    return x * tl.log(tl.where(x == 0, 1.0, x / tl.where(m == 0, 1.0, m)))


@triton.jit(do_not_specialize=["n", "heads"])
def distance(p, q, out, p_batch, p_head, p_col, q_batch, q_head, q_col, n, heads, COLUMNS: tl.constexpr):
    """One row of each: out ``[B, H]``."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    p += b * p_batch + h * p_head
    q += b * q_batch + h * q_head
    parts = tl.zeros([COLUMNS], tl.float64)
    for at in range(0, n, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        x = tl.load(p + column.to(tl.int64) * p_col, mask=column < n, other=0.0).to(tl.float64)
        y = tl.load(q + column.to(tl.int64) * q_col, mask=column < n, other=0.0).to(tl.float64)
        m = (x + y) / 2
        parts += against(x, m) + against(y, m)
    half = tl.sum(parts, 0) / 2
    tl.store(out + tl.program_id(0), tl.sqrt(tl.where(half < 0, 0.0, half)).to(tl.float32))


def run(out: Tensor, p: Tensor, q: Tensor) -> None:
    """As ``sparse_attn.ops.js_distance``."""
    frame.launch(distance, (out.numel(),), p, q, out, *p.stride(), *q.stride(), p.shape[2], p.shape[1], **TILES)
