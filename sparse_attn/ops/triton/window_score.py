"""window_score: what the probes give to each key and to each distance, from three passes over the keys and no buffer of theirs.

``sums`` leaves the log-sum-exp of every probe over a part of the keys. ``columns`` owns keys and adds up the probes in order.
``diagonals`` owns distances: the keys that stand so far behind consecutive probes are about two tiles, whose probabilities are
shifted row by row. Nothing is added by two programs, so two runs agree to the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spans import by_block
from . import frame
from .rows import span
from .run_sums import joined, parts_of
from .tiles import capped, log_sum, soften

# ROWS: probes of a tile, fewer where there are fewer
CONFIGS = {
    80: dict(ROWS=64, KEYS=64, num_warps=4, num_stages=2),
    90: dict(ROWS=64, KEYS=128, num_warps=8, num_stages=2),
    120: dict(ROWS=64, KEYS=64, num_warps=4, num_stages=2),  # shared memory as sm_86
}  # fmt: skip
FLOAT32 = dict(ROWS=16, KEYS=32, num_warps=4, num_stages=1)
_NUMBERS = ["n_q", "n_k", "q_start", "window", "heads", "group", "n_probes", "n_parts", "tiles"]


@triton.jit
def probes(q, table, tile, n_probes, first_row, rows, q_row, q_col, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Queries of one tile of probes, ``[ROWS, WIDTH]``, where each stands among the real queries, and which probe at all."""
    at, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    entry = tl.load(table + at, mask=at < n_probes, other=-1)
    real = (entry >= 0) & (entry < rows)
    x = tl.load(q + (first_row + entry).to(tl.int64)[:, None] * q_row + d[None, :] * q_col, mask=real[:, None] & (d < D)[None, :],
                other=0.0)
    return x, entry, real


@triton.jit
def load_keys(k, key, keys, k_row, k_col, D: tl.constexpr, WIDTH: tl.constexpr):
    """``[KEYS, WIDTH]``; 0 where there is no such key."""
    d = tl.arange(0, WIDTH)
    mask = (key < keys)[:, None] & (d < D)[None, :]
    return tl.load(k + key.to(tl.int64)[:, None] * k_row + d[None, :] * k_col, mask=mask, other=0.0)


@triton.jit
def seen_logits(x, position, real, tile, key, keys, scale, softcap, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                CAPPED: tl.constexpr):
    """``[ROWS, KEYS]``, -inf where a probe does not see a key."""
    logits = tl.dot(x, tl.trans(tile), input_precision="ieee") * scale
    if CAPPED:
        logits = capped(logits, softcap)
    seen = real[:, None] & (key < keys)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    if WINDOW:
        seen = seen & (key[None, :] > position[:, None] - window)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def given(logits, lse):
    """Probabilities; a probe whose sum is nan or infinite gives nothing."""
    gives = tl.abs(lse) < float("inf")
    return tl.where(gives[:, None], tl.exp(logits - tl.where(gives, lse, 0.0)[:, None]), 0.0)


@triton.jit(do_not_specialize=_NUMBERS)
def sums(
    q, k, table, first, last, part_lse, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    n_q, n_k, q_start, window, heads, group, n_probes, n_parts, tiles, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one tile of probes over one part of what they see: part_lse ``[B * H, tiles, parts, ROWS]``."""
    part, tile, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = bh // heads, bh % heads
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head + (k0 + n_k * 0).to(tl.int64) * k_row
    x, entry, real = probes(q, table + b.to(tl.int64) * n_probes, tile, n_probes, r0, rows, q_row, q_col, D, WIDTH, ROWS)
    position = start + entry
    low, high = n_k * 0, keys
    if CAUSAL:
        high = tl.minimum(keys, tl.max(tl.where(real, position, -1), 0) + 1)
    if WINDOW:
        low = tl.minimum(tl.maximum(tl.min(tl.where(real, position, n_k), 0) - window + 1, 0), high)
    share = tl.cdiv(tl.cdiv(high - low, n_parts), KEYS) * KEYS
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(low + part * share, tl.minimum(high, low + (part + 1) * share), KEYS):
        key = at + tl.arange(0, KEYS)
        logits = seen_logits(x, position, real, load_keys(k, key, keys, k_row, k_col, D, WIDTH), key, keys, scale, softcap, window,
                             CAUSAL, WINDOW, CAPPED)
        _, top, total, _ = soften(logits, top, total)
    tl.store(part_lse + ((bh.to(tl.int64) * tiles + tile) * n_parts + part) * ROWS + tl.arange(0, ROWS), log_sum(top, total))


@triton.jit(do_not_specialize=_NUMBERS)
def columns(
    q, k, table, first, last, part_lse, out, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    n_q, n_k, q_start, window, heads, group, n_probes, n_parts, tiles, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One tile of keys: out ``[B, H, Nk]``."""
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head + (k0 + n_k * 0).to(tl.int64) * k_row
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    loaded = load_keys(k, key, keys, k_row, k_col, D, WIDTH)
    found = tl.zeros([KEYS], tl.float32)
    for tile in range(0, tiles):
        x, entry, real = probes(q, table + b.to(tl.int64) * n_probes, tile, n_probes, r0, rows, q_row, q_col, D, WIDTH, ROWS)
        logits = seen_logits(x, start + entry, real, loaded, key, keys, scale, softcap, window, CAUSAL, WINDOW, CAPPED)
        found += tl.sum(given(logits, joined(part_lse + (bh.to(tl.int64) * tiles + tile) * n_parts * ROWS, n_parts, MOST, ROWS)), 0)
    tl.store(out + bh.to(tl.int64) * n_k + key, found, mask=key < n_k)


@triton.jit(do_not_specialize=_NUMBERS)
def diagonals(
    q, k, table, first, last, part_lse, out, q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    n_q, n_k, q_start, window, heads, group, n_probes, n_parts, tiles, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One tile of distances: out ``[B, H, Nk]``."""
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    q += b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    k += b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head + (k0 + n_k * 0).to(tl.int64) * k_row
    nearest = tl.program_id(0) * KEYS
    found = tl.zeros([KEYS], tl.float32)
    for tile in range(0, tiles):
        x, entry, real = probes(q, table + b.to(tl.int64) * n_probes, tile, n_probes, r0, rows, q_row, q_col, D, WIDTH, ROWS)
        lse = joined(part_lse + (bh.to(tl.int64) * tiles + tile) * n_parts * ROWS, n_parts, MOST, ROWS)
        position = start + entry
        ahead = position - nearest  # the key at the nearest distance; the others stand before it
        low = tl.maximum(tl.min(tl.where(real, ahead, n_k), 0) - KEYS + 1, 0)
        high = tl.minimum(tl.max(tl.where(real, ahead, -1), 0) + 1, keys)
        for at in range(low, high, KEYS):
            meets = real & (ahead >= at) & (ahead - KEYS + 1 < at + KEYS)
            if tl.max(meets.to(tl.int32), 0) > 0:
                key = at + tl.arange(0, KEYS)
                logits = seen_logits(x, position, real, load_keys(k, key, keys, k_row, k_col, D, WIDTH), key, keys, scale, softcap,
                                     window, CAUSAL, WINDOW, CAPPED)
                place = (ahead - at)[:, None] - tl.arange(0, KEYS)[None, :]
                within = (place >= 0) & (place < KEYS)
                shifted = tl.gather(given(logits, lse), tl.where(within, place, 0), 1)
                found += tl.sum(tl.where(within, shifted, 0.0), 0)
    distance = nearest + tl.arange(0, KEYS)
    tl.store(out + bh.to(tl.int64) * n_k + distance, found, mask=distance < n_k)


def run(by_key: Tensor, by_distance: Tensor, q: Tensor, k: Tensor, rows: Tensor, scale: float, q_start: int, causal: bool,
        window: int, softcap: float, first: Tensor | None, last: Tensor | None, block: int) -> None:
    """As ``sparse_attn.ops.window_score``; blocks are summed behind the kernels."""
    (batch, heads, n_q, dim), n_k, n_probes = q.shape, k.shape[2], rows.shape[1]
    width = frame.power(dim)
    config = dict(FLOAT32 if frame.unrolled(q) else frame.pinned(CONFIGS if width <= 128 else frame.WIDE_PROBES, q.device))
    config["ROWS"] = min(config["ROWS"], frame.power(n_probes))
    tiles = triton.cdiv(n_probes, config["ROWS"])
    parts = parts_of(tiles * batch * heads, n_k, config["KEYS"], q.device)
    part_lse = torch.empty(batch * heads, tiles, parts, config["ROWS"], dtype=torch.float32, device=q.device)
    inputs = q, k, rows.contiguous(), first, last, part_lse
    numbers = (*q.stride(), *k.stride(), n_q, n_k, q_start, window, heads, heads // k.shape[1], n_probes, parts, tiles,
               float(scale), float(softcap))
    same = dict(D=dim, WIDTH=width, CAUSAL=causal, WINDOW=window > 0, CAPPED=softcap > 0) | config
    frame.launch(sums, (parts, tiles, batch * heads), *inputs, *numbers, **same)
    for kernel, wanted in ((columns, by_key), (diagonals, by_distance)):
        out = wanted if block == 1 else torch.empty(batch, heads, n_k, dtype=torch.float32, device=q.device)
        frame.launch(kernel, (triton.cdiv(n_k, config["KEYS"]), batch * heads), *inputs, out, *numbers, MOST=frame.power(parts, 1),
                     **same)
        if block > 1:
            wanted.copy_(by_block(out, block))
