"""Batch rows on the device: what ``ops.spans`` says of one row, and searches in ascending lists."""

import triton
import triton.language as tl


@triton.jit
def span(first, last, b, n_q, n_k, q_start, CAUSAL: tl.constexpr):
    """``ops.spans`` of row ``b``: first real query row, their number, first real key, their number, position of the first query."""
    low, high = 0, n_k
    if first is not None:
        low = tl.maximum(tl.load(first + b), 0)
    if last is not None:
        high = tl.maximum(tl.minimum(tl.load(last + b), n_k), low)
    row, rows, start = 0, n_q, 0
    if CAUSAL:
        row = tl.minimum(tl.maximum(low - q_start, 0), n_q)
        rows = tl.maximum(tl.minimum(tl.maximum(high - q_start, 0), n_q) - row, 0)
        start = q_start + row - low
    return row, rows, low, tl.maximum(high - low, 0), start


@triton.jit
def lower_bound(table, n, steps, value):
    """How many of the ``n < 2**steps`` ascending entries at ``table`` are below ``value``, a number or a tensor of numbers."""
    low = value * 0
    high = low + n
    for _ in range(steps):
        open_ = low < high
        middle = (low + high) // 2
        below = open_ & (tl.load(table + middle, mask=open_, other=0) < value)
        high = tl.where(open_ & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def contains(table, n, steps, value):
    """Is ``value`` among the ``n`` ascending entries at ``table``?"""
    at = lower_bound(table, n, steps, value)
    return (at < n) & (tl.load(table + at, mask=at < n, other=-1) == value)
