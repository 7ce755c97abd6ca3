"""antidiagonal_score: one pass of matrix products, whose tiles leave no more than a log-sum-exp per group and key block.

The softmax of a group needs all of its logits, so a second kernel joins those sums. Against a buffer of logits they are
``block_k / stride`` times fewer, and ``_MOST_SUMS`` of them at a time; a second pass over the products would cost more than that.
"""

import torch
import triton
import triton.language as tl

from . import frame
from .rows import span
from .tiles import finite

CONFIGS = {
    80: dict(ROWS=128, COLUMNS=64, DEPTH=64, num_warps=8, num_stages=3),
    90: dict(ROWS=128, COLUMNS=128, DEPTH=64, num_warps=8, num_stages=3),
}  # fmt: skip
FLOAT32 = dict(ROWS=32, COLUMNS=32, DEPTH=32, num_warps=4, num_stages=1)
_MOST_SUMS = 2**26
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pairs(u, w, n_q, n_k, STRIDE: tl.constexpr, ALTERNATE: tl.constexpr):
    """Real token pairs on the antidiagonal of query groups u and key groups w, ``[u, w]``: STRIDE but in a last group."""
    q_real = tl.minimum(tl.maximum(n_q - u * STRIDE, 0), STRIDE)[:, None]
    k_real = tl.minimum(tl.maximum(n_k - w * STRIDE, 0), STRIDE)[None, :]
    straight = tl.maximum(q_real + k_real - STRIDE, 0)
    if ALTERNATE:
        # rolled by one: key row STRIDE - 1 meets query row STRIDE - 1, and the rows before it are an antidiagonal of STRIDE - 1
        inner = tl.minimum(k_real, STRIDE - 1) - tl.maximum(STRIDE - 1 - q_real, 0)
        rolled = tl.maximum(inner, 0) + ((q_real == STRIDE) & (k_real == STRIDE)).to(tl.int32)
        return tl.where((u % 2 == 1)[:, None], rolled, straight)
    return straight


@triton.jit(do_not_specialize=["group_from", "n_groups", "n_q", "n_k", "q_start", "window", "heads", "per_key_head", "k_blocks"])
def block_sums(
    q, k, sums, first, last, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    group_from, n_groups, n_q, n_k, q_start, window, heads, per_key_head, k_blocks, scale,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, WIDE_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    ALTERNATE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each query group over each key block, ``[B * H, groups, Kb]``; BLOCK groups make a key block."""
    BLOCKS: tl.constexpr = COLUMNS // WIDE_BLOCK
    PIECES: tl.constexpr = (D + DEPTH - 1) // DEPTH
    h, b = tl.program_id(2) % heads, tl.program_id(2) // heads
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    u = group_from + place
    column = tl.arange(0, COLUMNS)
    w = (tl.program_id(0) * BLOCKS + column // WIDE_BLOCK) * BLOCK + column % WIDE_BLOCK
    within = column % WIDE_BLOCK < BLOCK
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // per_key_head).to(tl.int64) * k_head
    turn = u % 2 if ALTERNATE else u * 0
    depth = tl.arange(0, DEPTH)

    # a tile that no group may see has no products, only -inf to write
    w_low, u_high = tl.program_id(0) * (BLOCKS * BLOCK), group_from + tl.program_id(1) * ROWS + ROWS
    open_ = (w_low * STRIDE < keys) & (u_high * STRIDE - ROWS * STRIDE < rows)
    if CAUSAL:
        open_ = open_ & (w_low * STRIDE <= start + tl.minimum(u_high * STRIDE, rows) - 1)
    if WINDOW:
        w_high = w_low + BLOCKS * BLOCK
        open_ = open_ & (w_high * STRIDE - 1 > start + (u_high - ROWS) * STRIDE - window)
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, tl.where(open_, STRIDE * PIECES, 0)):
        r, d = step // PIECES, (step % PIECES) * DEPTH + depth
        t = u * STRIDE + (2 * STRIDE - 1 - r - turn) % STRIDE
        p = w * STRIDE + r
        queries = tl.load(q + (r0 + t).to(tl.int64)[:, None] * q_row + d[None, :] * q_col,
                          mask=(t < rows)[:, None] & (d < D)[None, :], other=0.0)
        cols = tl.load(k + (k0 + p).to(tl.int64)[:, None] * k_row + d[None, :] * k_col,
                       mask=(within & (p < keys))[:, None] & (d < D)[None, :], other=0.0)
        logits = tl.dot(queries, tl.trans(cols), logits, input_precision="ieee")
    count = pairs(u, w, rows, keys, STRIDE, ALTERNATE)
    seen = (count > 0) & within[None, :]
    if CAUSAL:
        seen = seen & ((w * STRIDE)[None, :] <= (start + tl.minimum(u * STRIDE + STRIDE, rows) - 1)[:, None])
    if WINDOW:
        seen = seen & ((w * STRIDE + STRIDE - 1)[None, :] > (start + u * STRIDE - window)[:, None])
    logits = tl.where(seen, logits * (scale * _LOG2E) / tl.maximum(count, 1).to(tl.float32), float("-inf"))
    logits = tl.reshape(logits, [ROWS, BLOCKS, WIDE_BLOCK])
    top = tl.max(logits, 2)
    total = tl.sum(tl.exp2(logits - finite(top)[:, :, None]), 2)
    # a nan stays one
    found = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    to = (tl.program_id(2).to(tl.int64) * n_groups + place)[:, None] * k_blocks + block[None, :]
    tl.store(sums + to, found, mask=(place < n_groups)[:, None] & (block < k_blocks)[None, :])


@triton.jit(do_not_specialize=["n_groups", "block_from", "q_blocks", "k_blocks"])
def shares(sums, out, n_groups, block_from, q_blocks, k_blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """One query block of BLOCK groups: the softmax of each over its key blocks, added and normalised."""
    column = tl.arange(0, WIDTH)
    there = column < k_blocks
    mass = tl.zeros([WIDTH], tl.float32)
    row = tl.program_id(1).to(tl.int64) * n_groups + tl.program_id(0) * BLOCK
    for u in range(0, BLOCK):
        logs = tl.load(sums + (row + u) * k_blocks + column, mask=there, other=float("-inf"))
        p = tl.exp2(logs - finite(tl.max(logs, 0)))
        total = tl.sum(p, 0)
        mass += tl.where(total > 0, p / tl.where(total > 0, total, 1.0), 0.0)  # 0 for a nan
    total = tl.sum(mass, 0)
    to = (tl.program_id(1).to(tl.int64) * q_blocks + block_from + tl.program_id(0)) * k_blocks + column
    tl.store(out + to, mass / tl.where(total > 0, total, 1.0), mask=there)


def run(out, q, k, block_q, block_k, stride, scale, q_start, causal, window, alternate, first, last) -> None:
    """As ``sparse_attn.ops.antidiagonal_score``."""
    (batch, heads, n_q, dim), n_k = q.shape, k.shape[2]
    q_blocks, k_blocks = out.shape[2:]
    config = dict(FLOAT32 if frame.unrolled(q) else frame.pinned(CONFIGS, q.device))
    per_q, per_k = block_q // stride, block_k // stride
    config["COLUMNS"] = max(config["COLUMNS"], frame.power(per_k))
    wide = frame.power(per_k, 1)
    # a multiple of blocks at a time, so that the sums stay few
    most = max(1, min(q_blocks, _MOST_SUMS // max(1, batch * heads * per_q * k_blocks)))
    sums = torch.empty(batch * heads, most * per_q, k_blocks, dtype=torch.float32, device=q.device)
    for begin in range(0, q_blocks, most):
        blocks = min(most, q_blocks - begin)
        groups = blocks * per_q
        grid = triton.cdiv(k_blocks, config["COLUMNS"] // wide), triton.cdiv(groups, config["ROWS"]), batch * heads
        frame.launch(block_sums, grid, q, k, sums, first, last, *q.stride(), *k.stride(), begin * per_q, groups, n_q, n_k, q_start,
                     window, heads, heads // k.shape[1], k_blocks, float(scale), STRIDE=stride, BLOCK=per_k, WIDE_BLOCK=wide,
                     CAUSAL=causal, WINDOW=window > 0, ALTERNATE=alternate, D=dim, **config)
        frame.launch(shares, (blocks, batch * heads), sums, out, groups, begin, q_blocks, k_blocks, BLOCK=per_q,
                     WIDTH=frame.power(k_blocks), num_warps=4)
