"""pooled_score: a program meets its key blocks twice, for the sum of the softmax and then for the shares."""

import triton
import triton.language as tl

from . import frame
from .rows import span
from .tiles import finite, soften

# float32 products take no matrix instruction: unrolled over more channels, they spill
TILES = dict(ROWS=16, COLUMNS=64, DEPTH=16, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "n_q", "n_k", "q_start", "window", "heads", "per_key_head"])
def pooled_shares(
    q, k, scale, out, first, last, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, scale_batch, scale_head,
    q_blocks, k_blocks, n_q, n_k, q_start, window, heads, per_key_head,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1) % heads, tl.program_id(1) // heads
    row, rows, key, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    i, d, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    # ops.spans.reach; a row of padding reaches nothing
    if CAUSAL:
        high = (start + tl.minimum((i + 1) * BLOCK_Q, rows) - 1) // BLOCK_K
    else:
        high = i * 0 + (keys + BLOCK_K - 1) // BLOCK_K - 1
    high = tl.where(i * BLOCK_Q < rows, high, -1)
    low = i * 0
    if WINDOW:
        low = tl.maximum(start + i * BLOCK_Q - window + 1, 0) // BLOCK_K
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // per_key_head).to(tl.int64) * k_head
    q_at = q + i.to(tl.int64)[:, None] * q_row
    factor = tl.load(scale + b * scale_batch + h * scale_head)
    out += ((tl.program_id(1).to(tl.int64) * q_blocks + i) * k_blocks)[:, None]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for write in tl.static_range(2):
        for at in range(0, k_blocks, COLUMNS):
            j = at + lane
            k_at = k + j.to(tl.int64)[:, None] * k_row
            logits = tl.zeros([ROWS, COLUMNS], tl.float32)
            for depth in range(0, D, DEPTH):
                there = (depth + d < D)[None, :]
                rows_piece = tl.load(q_at + (depth + d)[None, :] * q_col, mask=(i < q_blocks)[:, None] & there, other=0.0)
                cols_piece = tl.load(k_at + (depth + d)[None, :] * k_col, mask=(j < k_blocks)[:, None] & there, other=0.0)
                logits = tl.dot(rows_piece, tl.trans(cols_piece), logits, input_precision="ieee")
            logits = logits * factor
            seen = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            if write:
                share = tl.exp(logits - finite(top)[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
                # a row whose sum is nan or infinite is 0, as in the reference
                share = tl.where(((total > 0) & (total < float("inf")))[:, None], share, 0.0)
                tl.store(out + j[None, :], share, mask=(i < q_blocks)[:, None] & (j < k_blocks)[None, :])
            else:
                _, top, total, _ = soften(logits, top, total)


def run(out, q_pooled, k_pooled, scale, block_q, block_k, n_q, n_k, q_start, causal, window, first, last) -> None:
    """As ``sparse_attn.ops.pooled_score``."""
    (batch, heads, q_blocks, dim), k_blocks = q_pooled.shape, k_pooled.shape[2]
    frame.launch(pooled_shares, (triton.cdiv(q_blocks, TILES["ROWS"]), batch * heads), q_pooled, k_pooled, scale, out, first, last,
                 *q_pooled.stride(), *k_pooled.stride(), *scale.stride(), q_blocks, k_blocks, n_q, n_k, q_start, window, heads,
                 heads // k_pooled.shape[1], BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=causal, WINDOW=window > 0, D=dim,
                 **TILES)
