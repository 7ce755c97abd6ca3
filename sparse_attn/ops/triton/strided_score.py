"""strided_score: the softmax sums of the sampled queries, then the largest probability of every block pair, from new products.

Query blocks that sample the same residue are a *class*: all of them, or each ``stride``-th one where residues rotate. Its sampled
queries are counted through, so that tiles of ``sums`` are full whatever the blocks hold; ``largest`` owns whole block pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .rows import span
from .tiles import log_sum, soften

CONFIGS = {
    80: dict(ROWS=64, KEYS=64, num_warps=4, num_stages=2),
    90: dict(ROWS=128, KEYS=64, num_warps=8, num_stages=2),
    120: dict(ROWS=64, KEYS=64, num_warps=4, num_stages=2),  # shared memory as sm_86
}  # fmt: skip
FLOAT32 = dict(ROWS=32, KEYS=32, num_warps=4, num_stages=1)
_NUMBERS = ["n_q", "n_k", "q_start", "window", "heads", "group", "n_sums", "k_blocks", "q_blocks"]


@triton.jit
def sampled_queries(q, block, within, there, residue, first_row, rows, start, q_row, q_col, BLOCK_Q: tl.constexpr,
                    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The ``within``-th sampled queries of blocks, ``[ROWS, WIDTH]``, their positions, and which exist."""
    # a block that ends before the residue samples its last token
    row = block * BLOCK_Q + tl.minimum(residue, tl.minimum(rows - block * BLOCK_Q, BLOCK_Q) - 1) + within * STRIDE
    real = there & (block * BLOCK_Q < rows) & (row < tl.minimum(block * BLOCK_Q + BLOCK_Q, rows))
    d = tl.arange(0, WIDTH)
    x = tl.load(q + (first_row + row).to(tl.int64)[:, None] * q_row + d[None, :] * q_col, mask=real[:, None] & (d < D)[None, :],
                other=0.0)
    return x, start + row, real


@triton.jit
def seen_logits(x, position, real, k, key, there, k_row, k_col, scale, window, D: tl.constexpr, CAUSAL: tl.constexpr,
                WINDOW: tl.constexpr):
    """``[ROWS, KEYS]``, -inf where a query does not see a key."""
    d = tl.arange(0, x.shape[1])
    keys = tl.load(k + key.to(tl.int64)[:, None] * k_row + d[None, :] * k_col, mask=there[:, None] & (d < D)[None, :], other=0.0)
    logits = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale
    seen = real[:, None] & there[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    if WINDOW:
        seen = seen & (key[None, :] > position[:, None] - window)
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=_NUMBERS)
def sums(
    q, k, lse, first, last, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    n_q, n_k, q_start, window, heads, group, n_sums, scale,
    BLOCK_Q: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of the sampled queries of a class: lse ``[B * H, STEP, n_sums]``."""
    PER_Q: tl.constexpr = BLOCK_Q // STRIDE
    turn, bh = tl.program_id(1), tl.program_id(2)  # class, which is its residue
    b, h = bh // heads, bh % heads
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head + (k0 + n_k * 0).to(tl.int64) * k_row
    # the longest sums, at the end, start first
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    x, position, real = sampled_queries(q, turn + STEP * (at // PER_Q), at % PER_Q, at < n_sums, turn, r0, rows, start, q_row,
                                        q_col, BLOCK_Q, STRIDE, D, WIDTH)
    low, high = n_k * 0, keys
    if CAUSAL:
        high = tl.minimum(keys, tl.max(tl.where(real, position, -1), 0) + 1)
    if WINDOW:
        low = tl.maximum(tl.min(tl.where(real, position, n_k), 0) - window + 1, 0)
    base = tl.maximum(tl.minimum(turn, keys - 1), 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for w in range(tl.maximum(low - base, 0) // STRIDE, tl.cdiv(tl.maximum(high - base, 0), STRIDE), KEYS):
        key = base + (w + tl.arange(0, KEYS)) * STRIDE
        logits = seen_logits(x, position, real, k, key, key < keys, k_row, k_col, scale, window, D, CAUSAL, WINDOW)
        _, top, total, _ = soften(logits, top, total)
    tl.store(lse + (bh.to(tl.int64) * STEP + turn) * n_sums + at, log_sum(top, total), mask=at < n_sums)


@triton.jit(do_not_specialize=_NUMBERS)
def largest(
    q, k, lse, first, last, out, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    n_q, n_k, q_start, window, heads, group, n_sums, scale, q_blocks, k_blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Q_BLOCKS blocks of a class against K_BLOCKS key blocks: out ``[B, H, Qb, Kb]``."""
    PER_Q: tl.constexpr = BLOCK_Q // STRIDE
    PER_K: tl.constexpr = BLOCK_K // STRIDE
    WIDE_Q: tl.constexpr = ROWS // Q_BLOCKS
    WIDE_K: tl.constexpr = KEYS // K_BLOCKS
    tiles = tl.cdiv(tl.cdiv(q_blocks, STEP), Q_BLOCKS)
    turn, tile, bh = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    b, h = bh // heads, bh % heads
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head + (k0 + n_k * 0).to(tl.int64) * k_row
    lse += (bh.to(tl.int64) * STEP + turn) * n_sums
    member = tile * Q_BLOCKS + tl.arange(0, ROWS) // WIDE_Q  # of the class
    column = tl.program_id(0) * K_BLOCKS + tl.arange(0, KEYS) // WIDE_K
    base = tl.maximum(tl.minimum(turn, keys - 1), 0)
    best = tl.zeros([Q_BLOCKS, K_BLOCKS], tl.float32)

    # a tile that no query may see has no products, only zeros to write
    newest = start + tl.minimum((turn + STEP * (tile * Q_BLOCKS + Q_BLOCKS - 1)) * BLOCK_Q + BLOCK_Q, rows) - 1
    oldest = start + (turn + STEP * tile * Q_BLOCKS) * BLOCK_Q
    k_low = tl.program_id(0) * K_BLOCKS * BLOCK_K
    open_ = (k_low < keys) & ((turn + STEP * tile * Q_BLOCKS) * BLOCK_Q < rows)
    if CAUSAL:
        open_ = open_ & (k_low <= newest)
    if WINDOW:
        open_ = open_ & (k_low + K_BLOCKS * BLOCK_K > oldest - window)
    for at in range(0, tl.where(open_, PER_Q, 0), WIDE_Q):
        within = at + tl.arange(0, ROWS) % WIDE_Q
        x, position, real = sampled_queries(q, turn + STEP * member, within, within < PER_Q, turn, r0, rows, start, q_row, q_col,
                                            BLOCK_Q, STRIDE, D, WIDTH)
        known = tl.load(lse + member * PER_Q + within, mask=real, other=float("inf"))
        gives = tl.abs(known) < float("inf")
        for w in range(0, PER_K, WIDE_K):
            place = w + tl.arange(0, KEYS) % WIDE_K
            key = base + (column * PER_K + place) * STRIDE
            logits = seen_logits(x, position, real, k, key, (place < PER_K) & (key < keys), k_row, k_col, scale, window, D, CAUSAL,
                                 WINDOW)
            p = tl.where(gives[:, None], tl.exp(logits - tl.where(gives, known, 0.0)[:, None]), 0.0)
            p = tl.max(tl.reshape(p, [Q_BLOCKS, WIDE_Q, KEYS]), 1)
            best = tl.maximum(best, tl.max(tl.reshape(p, [Q_BLOCKS, K_BLOCKS, WIDE_K]), 2))
    block = turn + STEP * (tile * Q_BLOCKS + tl.arange(0, Q_BLOCKS))
    blocks = tl.program_id(0) * K_BLOCKS + tl.arange(0, K_BLOCKS)
    to = (bh.to(tl.int64) * q_blocks + block)[:, None] * k_blocks + blocks[None, :]
    tl.store(out + to, best, mask=(block < q_blocks)[:, None] & (blocks < k_blocks)[None, :])


def run(out: Tensor, q: Tensor, k: Tensor, block_q: int, block_k: int, stride: int, scale: float, q_start: int, causal: bool,
        window: int, rotate: bool, first: Tensor | None, last: Tensor | None) -> None:
    """As ``sparse_attn.ops.strided_score``."""
    (batch, heads, n_q, dim), n_k, (q_blocks, k_blocks) = q.shape, k.shape[2], out.shape[2:]
    width, step, per_q, per_k = frame.power(dim), stride if rotate else 1, block_q // stride, block_k // stride
    config = FLOAT32 if frame.unrolled(q) else frame.pinned(CONFIGS if width <= 128 else frame.WIDE_PROBES, q.device)
    in_class = triton.cdiv(q_blocks, step)
    n_sums = in_class * per_q
    lse = torch.empty(batch * heads, step, n_sums, dtype=torch.float32, device=q.device)
    inputs, strides = (q, k, lse, first, last), (*q.stride(), *k.stride())
    numbers = n_q, n_k, q_start, window, heads, heads // k.shape[1], n_sums, float(scale)
    same = dict(BLOCK_Q=block_q, STRIDE=stride, STEP=step, D=dim, WIDTH=width, CAUSAL=causal, WINDOW=window > 0) | config
    frame.launch(sums, (triton.cdiv(n_sums, config["ROWS"]), step, batch * heads), *inputs, *strides, *numbers, **same)
    side = max(1, config["ROWS"] // frame.power(per_q, 1)), max(1, config["KEYS"] // frame.power(per_k, 1))
    grid = triton.cdiv(k_blocks, side[1]), step * triton.cdiv(in_class, side[0]), batch * heads
    frame.launch(largest, grid, *inputs, out, *strides, *numbers, q_blocks, k_blocks, BLOCK_K=block_k, Q_BLOCKS=side[0],
                 K_BLOCKS=side[1], **same)
