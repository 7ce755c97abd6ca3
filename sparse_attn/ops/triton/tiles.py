"""What the kernels share: tiles of rows, logits, and the softmax that meets its keys a tile at a time."""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, stride, keep, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """``[rows, WIDTH]`` of a tensor that is contiguous in its DIM channels; 0 in rows not to keep and past DIM.

    ``rows`` is int64, so that no offset overflows.
    """
    channel = tl.arange(0, WIDTH)
    mask = keep[:, None] & (channel < DIM)[None, :]
    return tl.load(base + rows[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def capped(logits, softcap):
    """``softcap * tanh(logits / softcap)``, from an exponential that both the compiler and the interpreter have."""
    return softcap - 2.0 * softcap / (tl.exp(2.0 * logits / softcap) + 1.0)


@triton.jit
def finite(x):
    """0 for -inf: what may be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def soften(logits, top, total):
    """One step of the online softmax: probabilities against the new maximum, that maximum, the new sum, and what to multiply
    earlier sums with. logits ``[queries, keys]``, -inf where not seen; top starts at -inf and total at 0."""
    higher = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp(logits - finite(higher)[:, None])
    fade = tl.exp(top - finite(higher))
    return p, higher, total * fade + tl.sum(p, 1), fade


@triton.jit
def log_sum(top, total):
    """Natural log-sum-exp; -inf where nothing was seen."""
    return tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def overlapping(starts, lengths, low, high, N_RUNS: tl.constexpr, RUNS: tl.constexpr):
    """First and last number of the runs that have rows in ``low <= row < high``; (N_RUNS, -1) for none."""
    run = tl.arange(0, RUNS)
    start = tl.load(starts + run, mask=run < N_RUNS, other=0)
    length = tl.load(lengths + run, mask=run < N_RUNS, other=0)
    meets = (tl.maximum(start, low) < tl.minimum(start + length, high)) & (run < N_RUNS)
    return tl.min(tl.where(meets, run, N_RUNS), 0), tl.max(tl.where(meets, run, -1), 0)


@triton.jit
def real_queries(q_first, q_last, b, n_q):
    """First real query of a sequence and one past the last; the tables may be None."""
    first = 0 * n_q
    last = n_q
    if q_first is not None:
        first = tl.minimum(tl.maximum(tl.load(q_first + b), 0), n_q)
    if q_last is not None:
        last = tl.minimum(tl.maximum(tl.load(q_last + b), 0), n_q)
    return first, tl.maximum(first, last)


@triton.jit
def load_queries(q, b, h, at, last, q_b, q_h, q_i, q_d,
                 GROUP: tl.constexpr, HEADS: tl.constexpr, EDGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Queries ``at .. at + EDGE`` of a group's heads, ``[HEADS * EDGE, WIDTH]``, and which of them exist."""
    head = tl.arange(0, HEADS * EDGE) // EDGE
    i = at + tl.arange(0, HEADS * EDGE) % EDGE
    channel = tl.arange(0, WIDTH)
    there = (i < last) & (head < GROUP)
    rows = q + tl.cast(b, tl.int64) * q_b + (h * GROUP + head).to(tl.int64) * q_h + i.to(tl.int64) * q_i
    return tl.load(rows[:, None] + channel[None, :] * q_d, mask=there[:, None] & (channel < DIM)[None, :], other=0.0), there


@triton.jit
def reduced(best, GROUP: tl.constexpr, HEADS: tl.constexpr, REDUCE: tl.constexpr):
    """``[TILE]`` from ``[TILE, HEADS]``, of whose heads the first GROUP exist."""
    there = (tl.arange(0, HEADS) < GROUP)[None, :]
    if REDUCE == "max":
        return tl.max(tl.where(there, best, float("-inf")), 1)
    sums = tl.sum(tl.where(there, best, 0.0), 1)
    return sums / GROUP if REDUCE == "mean" else sums
