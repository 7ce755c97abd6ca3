"""block_sparse_attention: one program per tile of query rows walks its list, then what columns, near and dense rows add.

Where queries are few and the heads of a group share their lists, a tile holds all of them (``query * PACK + head``) and keys are
read once per group. Whole tiles of keys come through tensor descriptors (TMA) where the GPU has them and the layout allows it, all
else through plain pointers, which read any strides and only what is there.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import frame
from .rows import contains, lower_bound, span

NARROW_CONFIGS = {  # at most 64 channels
    80: dict(ROWS=128, KEYS=64, num_warps=8, num_stages=3),
}  # fmt: skip
CONFIGS = {
    80: dict(ROWS=128, KEYS=32, num_warps=8, num_stages=3),  # 64 keys spill
    90: dict(ROWS=128, KEYS=64, num_warps=8, num_stages=3),
    120: dict(ROWS=128, KEYS=32, num_warps=8, num_stages=3),  # shared memory as sm_86
}  # fmt: skip
WIDE_CONFIGS = {  # more than 128 channels
    80: dict(ROWS=64, KEYS=32, num_warps=8, num_stages=2),
    90: dict(ROWS=64, KEYS=64, num_warps=8, num_stages=2),
    120: dict(ROWS=64, KEYS=32, num_warps=8, num_stages=2),
}  # fmt: skip
FEW_CONFIGS = {  # at most _FEW rows of at most 128 channels
    80: dict(KEYS=64, num_warps=4, num_stages=2),
    120: dict(KEYS=32, num_warps=4, num_stages=2),
}  # fmt: skip
_FEW = 32
FLOAT32 = {
    80: dict(ROWS=16, KEYS=32, num_warps=4, num_stages=1),
    90: dict(ROWS=32, KEYS=16, num_warps=8, num_stages=1),
}  # fmt: skip
WIDE_FLOAT32 = {
    80: dict(ROWS=16, KEYS=16, num_warps=8, num_stages=1),
    90: dict(ROWS=32, KEYS=16, num_warps=8, num_stages=1),
}  # fmt: skip
LOG2E = tl.constexpr(1.4426950408889634)
_TMA_ARCH = 90
_TMA_BYTES = 16  # what addresses and strides of a described tensor are multiples of


@triton.jit
def _step(m, l, acc, q, k, v, key, there, seen, k_row, k_col, v_row, v_col, scale, softcap, D: tl.constexpr, DV: tl.constexpr,
          SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys, by pointers; ``there`` may be read, ``seen`` counts."""
    d, dv = tl.arange(0, q.shape[1]), tl.arange(0, acc.shape[1])
    at = key.to(tl.int64)[:, None]
    k_at, v_at = k + at * k_row + d[None, :] * k_col, v + at * v_row + dv[None, :] * v_col
    if MASKED:
        keys = tl.load(k_at, mask=there[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(v_at, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
    else:
        keys = tl.load(k_at) if q.shape[1] == D else tl.load(k_at, mask=(d < D)[None, :], other=0.0)
        values = tl.load(v_at) if acc.shape[1] == DV else tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
    return _soften(m, l, acc, q, keys, values, seen, scale, softcap, SOFTCAP, MASKED)


@triton.jit
def _soften(m, l, acc, q, keys, values, seen, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys into the running maximum (base 2), sum and values."""
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if SOFTCAP:
        # tanh by sigmoid: the interpreter has no tanh
        logits = softcap * (2 * tl.sigmoid(2 * (logits * (scale / softcap))) - 1) * LOG2E
    else:
        logits = logits * (scale * LOG2E)
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    new = tl.maximum(m, tl.max(logits, 1))
    level = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(logits - level[:, None]).to(values.dtype)
    shrink = tl.exp2(m - level)
    l = l * shrink + tl.sum(p.to(tl.float32), 1)
    acc = tl.dot(p, values, acc * shrink[:, None], input_precision="ieee")
    return new, l, acc


@triton.jit
def _visible(q_pos, key, there, takes, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """bool ``[rows, keys]``: which query sees which key by position; ``takes`` are the rows that ask."""
    seen = there[None, :] & takes[:, None]
    if CAUSAL:
        seen = seen & (key[None, :] <= q_pos[:, None])
    if WINDOW:
        seen = seen & (key[None, :] > q_pos[:, None] - window)
    return seen


_NUMBERS = ["n_q", "n_k", "q_start", "window", "dense_rows", "heads", "group", "per_list", "per_column", "n_columns", "steps"]


@triton.jit(do_not_specialize=_NUMBERS)
def attend_lists(
    q, k, v, k_tiles, v_tiles, out, lse, counts, indices, first, last, sinks, columns, near, order,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    counts_batch, counts_list, counts_block, indices_batch, indices_list, indices_block,
    n_q, n_k, q_start, window, dense_rows, heads, group, per_list, per_column, n_columns, steps, scale, softcap,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDE_D: tl.constexpr, WIDE_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DENSE: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # heads run fastest, so that those that share keys run together; the longest lists, at the end, start first
    TILES: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    EDGE: tl.constexpr = ROWS // PACK  # queries of a tile
    b, tile = tl.program_id(0) // (heads // PACK), tl.num_programs(1) - 1 - tl.program_id(1)
    h = tl.program_id(0) % (heads // PACK) * PACK  # the first of this program's
    block, part = tile // SPLIT, (tile % SPLIT) * EDGE
    r0, rows, k0, keys, start = span(first, last, b, n_q, n_k, q_start, CAUSAL)
    place, head = tl.arange(0, ROWS) // PACK, h + tl.arange(0, ROWS) % PACK
    row = block * BLOCK_Q + part + place
    mine = (place < EDGE) & (part + place < BLOCK_Q) & (row < rows)
    q_pos = start + row
    top = block * BLOCK_Q + part  # rows of this tile: top <= row < end
    end = tl.minimum(block * BLOCK_Q + tl.minimum(part + EDGE, BLOCK_Q), rows)
    if top >= rows:
        return
    kv_head = (h // group).to(tl.int64)
    b64 = b.to(tl.int64)
    k += b64 * k_batch + kv_head * k_head + (k0 + n_k * 0).to(tl.int64) * k_row
    v += b64 * v_batch + kv_head * v_head + (k0 + n_k * 0).to(tl.int64) * v_row
    d, dv = tl.arange(0, WIDE_D), tl.arange(0, WIDE_DV)
    q_at = q + b64 * q_batch + (head.to(tl.int64) * q_head + (r0 + row).to(tl.int64) * q_row)[:, None] + d[None, :] * q_col
    queries = tl.load(q_at, mask=mine[:, None] & (d < D)[None, :], other=0.0)
    head_list = (h // per_list).to(tl.int64)
    count = tl.load(counts + b64 * counts_batch + head_list * counts_list + block * counts_block)
    listed = indices + b64 * indices_batch + head_list * indices_list + block.to(tl.int64) * indices_block

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        m = tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32) * LOG2E
        l += 1.0
    acc = tl.zeros([ROWS, WIDE_DV], tl.float32)
    lane = tl.arange(0, KEYS)
    limit = tl.minimum(keys, start + end) if CAUSAL else keys  # keys that some row of this tile may see
    oldest = tl.maximum(start + top - window + 1, 0) if WINDOW else 0
    plain, dense_tile = mine, False
    if DENSE:
        plain, dense_tile = mine & (row < rows - dense_rows), end > rows - dense_rows

    lowest, highest = 0, count
    if order is None:
        highest = lower_bound(listed, count, steps, (limit + BLOCK_K - 1) // BLOCK_K)
        if WINDOW:
            lowest = lower_bound(listed, count, steps, oldest // BLOCK_K)
        if not WINDOW and BLOCK_K % KEYS == 0:
            whole = lower_bound(listed, count, steps, (tl.minimum(keys, start + top + 1) if CAUSAL else keys) // BLOCK_K)
            if DENSE:
                whole = tl.where(dense_tile, 0, whole)
            for t in range(0, whole * TILES):
                key0 = tl.load(listed + t // TILES) * BLOCK_K + (t % TILES) * KEYS
                if k_tiles is not None:
                    rows_k = k_tiles.load([b, h // group, k0 + key0, 0]).reshape(KEYS, WIDE_D)
                    rows_v = v_tiles.load([b, h // group, k0 + key0, 0]).reshape(KEYS, WIDE_DV)
                    m, l, acc = _soften(m, l, acc, queries, rows_k, rows_v, None, scale, softcap, SOFTCAP, False)
                else:
                    m, l, acc = _step(m, l, acc, queries, k, v, key0 + lane, None, None, k_row, k_col, v_row, v_col, scale, softcap,
                                      D, DV, SOFTCAP, False)
            lowest = whole
    for t in range(lowest * TILES, highest * TILES):
        within = (t % TILES) * KEYS + lane
        key = tl.load(listed + t // TILES) * BLOCK_K + within
        there = (within < BLOCK_K) & (key < keys)
        if order is not None:
            key = tl.load(order + (b64 * (heads // group) + kv_head) * n_k + key, mask=there, other=0)
        seen = _visible(q_pos, key, there, plain, window, CAUSAL, WINDOW)
        m, l, acc = _step(m, l, acc, queries, k, v, key, there, seen, k_row, k_col, v_row, v_col, scale, softcap, D, DV, SOFTCAP,
                          True)

    if near is not None:
        sink, local = tl.load(near + head * 2), tl.load(near + head * 2 + 1)
        blocks, furthest = (limit + BLOCK_K - 1) // BLOCK_K, tl.max(local, 0)
        sink_blocks = (tl.minimum(tl.maximum(tl.max(sink, 0), 0), limit) + BLOCK_K - 1) // BLOCK_K
        local_from = tl.where(furthest > 0, tl.maximum(start + top - furthest + 1, 0) // BLOCK_K, blocks)
        local_from = tl.maximum(local_from, sink_blocks)
        for n in range(0, sink_blocks + tl.maximum(blocks - local_from, 0)):
            j = tl.where(n < sink_blocks, n, local_from + n - sink_blocks)
            for t in range(0, tl.where(contains(listed, count, steps, j), 0, TILES)):
                within = t * KEYS + lane
                key = j * BLOCK_K + within
                there = (within < BLOCK_K) & (key < keys)
                seen = _visible(q_pos, key, there, plain, window, CAUSAL, WINDOW)
                seen = seen & ((key[None, :] < sink[:, None]) | (q_pos[:, None] - key[None, :] < local[:, None]))
                m, l, acc = _step(m, l, acc, queries, k, v, key, there, seen, k_row, k_col, v_row, v_col, scale, softcap, D, DV,
                                  SOFTCAP, True)

    if columns is not None:
        line = columns + (b64 * (heads // per_column) + h // per_column) * n_columns
        for c in range(0, n_columns, KEYS):
            key = tl.load(line + c + lane, mask=c + lane < n_columns, other=-1)
            there = (key >= 0) & (key < limit)
            if tl.max(there.to(tl.int32), 0) > 0:
                # what a listed block holds was read with it
                there = there & (contains(listed, count, steps, key // BLOCK_K) == 0)
                seen = _visible(q_pos, key, there, plain, window, CAUSAL, WINDOW)
                if near is not None:
                    seen = seen & (key[None, :] >= sink[:, None]) & (q_pos[:, None] - key[None, :] >= local[:, None])
                m, l, acc = _step(m, l, acc, queries, k, v, key, there, seen, k_row, k_col, v_row, v_col, scale, softcap, D, DV,
                                  SOFTCAP, True)

    if DENSE:
        for t in range(oldest // KEYS, tl.where(dense_tile, (limit + KEYS - 1) // KEYS, 0)):
            key = t * KEYS + lane
            seen = _visible(q_pos, key, key < limit, row >= rows - dense_rows, window, CAUSAL, WINDOW)
            m, l, acc = _step(m, l, acc, queries, k, v, key, key < limit, seen, k_row, k_col, v_row, v_col, scale, softcap, D, DV,
                              SOFTCAP, True)

    nothing = l == 0
    result = acc / tl.where(nothing, 1.0, l)[:, None]
    total = tl.where(nothing, float("-inf"), (m + tl.log2(tl.where(nothing, 1.0, l))) / LOG2E)
    out_row = (b64 * n_q + r0 + row) * heads + head  # out is laid out as [B, Nq, H, Dv]
    tl.store(out + out_row[:, None] * DV + dv[None, :], result.to(out.dtype.element_ty), mask=mine[:, None] & (dv < DV)[None, :])
    tl.store(lse + (b64 * heads + head) * n_q + r0 + row, total, mask=mine)


def tiles(q: torch.Tensor, wide: int, queries: int, group: int, block_k: int) -> dict[str, int]:
    """Rows and keys of a tile, heads packed into it, warps and stages, for channels padded to ``wide``.

    ``queries`` are those of a block, ``group`` the heads that may be packed: all of them where they fit, else one.
    """
    if frame.unrolled(q):
        configs = FLOAT32 if wide <= 128 else WIDE_FLOAT32
    else:
        configs = NARROW_CONFIGS if wide <= 64 else CONFIGS if wide <= 128 else WIDE_CONFIGS
    known = frame.pinned(configs, q.device)
    pack = group if queries * group <= known["ROWS"] else 1
    rows = min(known["ROWS"], frame.power(queries * pack))
    if rows < known["ROWS"] and not frame.unrolled(q):
        few = frame.pinned(FEW_CONFIGS, q.device)
        fits = rows <= _FEW and wide <= 128 and block_k >= few["KEYS"]
        known = known | {"num_warps": max(4, rows // 16)} | (few if fits else {})
    return known | {"ROWS": rows, "KEYS": min(known["KEYS"], frame.power(block_k)), "PACK": pack}


def described(x: torch.Tensor, keys: int, wide: int) -> TensorDescriptor | None:
    """Tiles of ``keys`` rows of k or v, channels past the last read as 0; None where the GPU or the strides have none."""
    if frame.arch(x.device) < _TMA_ARCH or x.stride(3) != 1 or x.data_ptr() % _TMA_BYTES or 0 in x.shape:
        return None
    if any(stride <= 0 or stride * x.element_size() % _TMA_BYTES for stride in x.stride()[:3]):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, keys, wide])


def run(out, lse, q, k, v, counts, indices, block_q, block_k, scale, q_start, causal, window, softcap, first, last, sinks, columns,
        near, dense_rows, order, pv_threshold) -> None:
    """As ``sparse_attn.ops.block_sparse_attention``; ``pv_threshold`` leaves nothing out."""
    (batch, heads, n_q, dim), n_k, value_dim = q.shape, k.shape[2], v.shape[3]
    if causal and (first is not None or last is not None):
        out.zero_()
        lse.fill_(float("-inf"))
    wide_d, wide_dv, group = frame.power(dim), frame.power(value_dim), heads // k.shape[1]
    shared = all(lists is None or heads // lists.shape[1] % group == 0 for lists in (counts, columns))
    shape = tiles(q, max(wide_d, wide_dv), min(n_q, block_q), group if shared else 1, block_k)
    columns, near, order, sinks = (t.contiguous() if t is not None else None for t in (columns, near, order, sinks))
    indices = indices if indices.stride(3) == 1 else indices.contiguous()
    k_tiles = v_tiles = None
    # where whole tiles are read; unrolled products spill when described
    if order is None and not window and block_k % shape["KEYS"] == 0 and not frame.unrolled(q):
        k_tiles, v_tiles = described(k, shape["KEYS"], wide_d), described(v, shape["KEYS"], wide_dv)
    if k_tiles is None or v_tiles is None:
        k_tiles = v_tiles = None
    edge = shape["ROWS"] // shape["PACK"]
    split = 1 if n_q <= edge else triton.cdiv(block_q, edge)
    programs = heads // shape["PACK"] * batch, triton.cdiv(n_q, block_q) * split
    frame.launch(
        attend_lists, programs, q, k, v, k_tiles, v_tiles, out, lse, counts, indices, first, last, sinks, columns, near, order,
        *q.stride(), *k.stride(), *v.stride(), *counts.stride(), *indices.stride()[:3],
        n_q, n_k, q_start, window, dense_rows, heads, group, heads // counts.shape[1],
        heads // columns.shape[1] if columns is not None else 1, columns.shape[2] if columns is not None else 0,
        indices.shape[3].bit_length(), float(scale), float(softcap),
        BLOCK_Q=block_q, BLOCK_K=block_k, D=dim, DV=value_dim, WIDE_D=wide_d, WIDE_DV=wide_dv, CAUSAL=causal, WINDOW=window > 0,
        SOFTCAP=softcap > 0, DENSE=dense_rows > 0, SPLIT=split, **shape,
    )  # fmt: skip
