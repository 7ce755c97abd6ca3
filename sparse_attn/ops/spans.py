"""Which rows of a padded batch are real, and which key blocks each query block can reach.

A padded batch means exactly what its rows mean alone. Row ``b`` has real keys ``first[b] <= key < last[b]``; query row ``i``
sits at position ``q_start + i`` and is real when that position is. Blocks are counted from the first real key and from the
first real query, so a plan never depends on how much padding a neighbour needed::

    keys      . . 0 0 0 0 1 1 1 1 2 2     first = 2, block_k = 4; '.' is padding, digits are key blocks
    queries             0 0 0 0 1 1       q_start = 6, block_q = 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One batch row seen alone: slices of its real queries and keys, and the position of its first query."""

    rows: slice
    keys: slice
    n_q: int
    n_k: int
    q_start: int  # position of the first real query, counted from the first real key; 0 without causality


def spans(batch: int, n_q: int, n_k: int, q_start: int, causal: bool, first: Tensor | None, last: Tensor | None) -> list[Span]:
    """The batch rows alone; without causality a query has no position among the keys and every query row is real."""
    firsts = first.tolist() if first is not None else [0] * batch
    lasts = last.tolist() if last is not None else [n_k] * batch
    found = []
    for f, e in zip(firsts, lasts, strict=True):
        f, e = max(f, 0), min(e, n_k)
        r0, r1 = (min(max(f - q_start, 0), n_q), min(max(e - q_start, 0), n_q)) if causal else (0, n_q)
        r1, e = max(r0, r1), max(f, e)
        found.append(Span(slice(r0, r1), slice(f, e), r1 - r0, e - f, q_start + r0 - f if causal else 0))
    return found


def reach(span: Span, block_q: int, block_k: int, causal: bool, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """First, own and last key block of each query block: int64 ``[ceil(span.n_q / block_q)]`` each, last inclusive.

    ``own`` is the block that holds the key of the query block's first row: own..last is its diagonal. Without causality the
    whole key range is reachable and own == last + 1.
    """
    start = torch.arange(0, span.n_q, block_q)
    end = (start + block_q).clamp(max=span.n_q)
    if not causal:
        last = torch.full_like(start, -(-span.n_k // block_k) - 1)
        return torch.zeros_like(start), last + 1, last
    last = (span.q_start + end - 1) // block_k
    own = (span.q_start + start) // block_k
    oldest = (span.q_start + start - window + 1).clamp(min=0) if window else torch.zeros_like(start)
    return oldest // block_k, own, last


def query_bounds(batch: int, n_q: int, n_k: int, q_start: int, causal: bool, first: Tensor | None,
                 last: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """First real query row and one past the last, int32 ``[B]`` each on the bounds' device; None where every row is real."""
    if not causal or (first is None and last is None):
        return None, None
    first = first if first is not None else torch.zeros_like(last)
    last = last if last is not None else torch.full_like(first, n_k)
    return (first - q_start).clamp(0, n_q), (last - q_start).clamp(0, n_q)


def by_block(x: Tensor, block: int) -> Tensor:
    """``[..., ceil(N / block)]``: sums of ``x`` ``[..., N]`` over blocks, the last of which may be short."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)
