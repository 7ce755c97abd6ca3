"""key_mass: a program owns one tile of rows and adds up what every query that sees them gave, so that nothing is shared.

Queries come in tiles of ``head * EDGE + query``, from the first that sees any row of the tile; keys are read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import frame
from .tiles import capped, load_queries, load_rows, overlapping, real_queries, reduced

# MOST: query rows of a tile, more only where a group has more heads
CONFIGS = {
    80: dict(MOST=64, TILE=64, num_warps=4, num_stages=2),
    90: dict(MOST=64, TILE=64, num_warps=4, num_stages=3),
}


@triton.jit
def mass(q, k, lse, starts, lengths, q_first, q_last, out,
         n_rows, n_q, rows, scale, softcap, q_b, q_h, q_i, q_d, k_row, lse_b, lse_h, lse_i,
         KV_HEADS: tl.constexpr, N_RUNS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
         EDGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, REDUCE: tl.constexpr,
         TILE: tl.constexpr):
    """One tile of rows: out ``[TILE]``, or ``[TILE, GROUP]`` where the heads stay apart."""
    begin = tl.program_id(0).to(tl.int64) * TILE
    row = begin + tl.arange(0, TILE)
    keys = load_rows(k, row, k_row, row < n_rows, DIM, WIDTH)
    head = tl.arange(0, HEADS * EDGE) // EDGE
    found = tl.zeros([TILE] if REDUCE != "none" else [TILE, HEADS], tl.float32)
    lowest, highest = overlapping(starts, lengths, begin, begin + TILE, N_RUNS, RUNS)
    for run in range(lowest, highest + 1):
        start, length = tl.load(starts + run), tl.load(lengths + run)
        mine = (row >= start) & (row < start + length)
        b, h = run // KV_HEADS, run % KV_HEADS
        first, last = real_queries(q_first, q_last, b, n_q)
        if rows > 0:
            first = tl.maximum(first, last - rows)
        # a query sees the rows up to its own, which is so far from the end of the run as the query from the last one
        earliest = tl.maximum(first, tl.maximum(begin - start, 0) - length + last).to(tl.int32)
        sums = tl.zeros([TILE, HEADS], tl.float32)
        for at in range(earliest, last, EDGE):
            x, there = load_queries(q, b, h, at, last, q_b, q_h, q_i, q_d, GROUP, HEADS, EDGE, DIM, WIDTH)
            i = at + tl.arange(0, HEADS * EDGE) % EDGE
            given = tl.load(lse + tl.cast(b, tl.int64) * lse_b + (h * GROUP + head).to(tl.int64) * lse_h + i.to(tl.int64) * lse_i,
                            mask=there, other=float("inf"))
            gives = tl.abs(given) < float("inf")
            logits = tl.dot(keys, tl.trans(x), input_precision="ieee") * scale
            if CAPPED:
                logits = capped(logits, softcap)
            seen = (row - start)[:, None] < (length - last + 1 + i)[None, :]
            p = tl.exp(logits - tl.where(gives, given, 0.0)[None, :])
            p = tl.where(seen & gives[None, :], p, 0.0)
            sums += tl.sum(tl.reshape(p, [TILE, HEADS, EDGE]), 2)
        if REDUCE == "none":
            found = tl.where(mine[:, None], sums, found)
        else:
            found = tl.where(mine, reduced(sums, GROUP, HEADS, REDUCE), found)
    if REDUCE == "none":
        member = tl.arange(0, HEADS)
        tl.store(out + row[:, None] * GROUP + member[None, :], found, mask=(row < n_rows)[:, None] & (member < GROUP)[None, :])
    else:
        tl.store(out + row, found, mask=row < n_rows)


def run(out: Tensor, q: Tensor, k: Tensor, lse: Tensor, starts: Tensor, lengths: Tensor, scale: float, softcap: float, rows: int,
        reduce: str, q_first: Tensor | None, q_last: Tensor | None) -> None:
    """As ``sparse_attn.ops.key_mass``; ``none`` for reduce leaves the heads apart, out ``[S, H / Hkv]``."""
    kv_heads, n_runs, n_q, dim = starts.shape[1], starts.numel(), q.shape[2], q.shape[3]
    config = dict(frame.pinned(CONFIGS, q.device))
    heads, edge = frame.edges(q.shape[1] // kv_heads, n_q, config.pop("MOST"))
    frame.launch(mass, (triton.cdiv(k.shape[0], config["TILE"]),), q, k, lse, starts.contiguous(), lengths.contiguous(), q_first,
                 q_last, out, k.shape[0], n_q, rows, float(scale), float(softcap), *q.stride(), k.stride(0), *lse.stride(),
                 KV_HEADS=kv_heads, N_RUNS=n_runs, RUNS=frame.power(n_runs), GROUP=q.shape[1] // kv_heads, HEADS=heads, EDGE=edge,
                 DIM=dim, WIDTH=frame.power(dim), CAPPED=softcap > 0, REDUCE=reduce, **config)
