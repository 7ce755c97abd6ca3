"""Rows of a cache to other places of the same cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda, native
from .registry import op


@op(mutates=("rows",))
def move_rows(rows: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy ``rows[sources[i]]`` to ``rows[targets[i]]`` in place, as if all were read before any is written.

    One op for everything a cache does with its rows: closing the gaps behind evicted tokens (sources rise, targets at or before
    them), overwriting a victim by its run's last row, and opening room for new tokens (sources fall, targets at or behind them).
    Moving in one direction is what makes it possible without a second copy of the cache.

    Args:
        rows: ``[S, ...]`` of any dtype, contiguous; written. Rows that are no target keep what they hold.
        sources: int64 ``[N]``.
        targets: int64 ``[N]``. Either both rise from entry to entry and no target lies past its source, or both fall and no target
            lies before its source.

    Raises:
        ContractError: on rows that are not contiguous, mismatched lengths or dtypes, and (on CPU, where looking is free) a row that
            does not exist, or entries in any other order. Nothing was written then. On a GPU an entry that names no row is left
            out, and what entries in another order leave in their targets is not defined.
    """
    require(rows.is_contiguous(), "rows must be contiguous, they are moved whole; pass the tensor that owns the memory")
    if rows.device.type == "cpu":  # where looking is free
        ends = [(int(t.min()), int(t.max())) for t in (sources, targets) if len(t)]
        inside = all(low >= 0 and high < len(rows) for low, high in ends)
        require(inside, f"an entry names a row that does not exist; there are {len(rows)}")
        back, steps = sources - targets, torch.cat([sources.diff(), targets.diff()])
        ordered = any(bool((sign * back >= 0).all() & (sign * steps > 0).all()) for sign in (1, -1))
        require(ordered, "sources and targets must rise with no target past its source, or fall with no target before it")
    rows[targets] = rows[sources]


@move_rows.check
def _(rows, sources, targets):
    require(rows.dim() >= 1, "rows needs 1 dimension [S, ...] or more, got 0")
    for name, t in (("sources", sources), ("targets", targets)):
        require(t.dim() == 1 and t.dtype == torch.int64, f"{name} must be int64 [N], row numbers, got {t.dtype} {list(t.shape)}")
    require(len(sources) == len(targets), f"there are {len(sources)} sources but {len(targets)} targets; they go in pairs")


@move_rows.fake
def _nothing(rows, sources, targets):
    return None


# of buffer for each multiprocessor: together less than an L2 cache holds
_BUFFER_BYTES = 1 << 18


def _buffer(processors, rows, sources, targets):
    row_bytes = max(1, rows[:1].numel() * rows.element_size())
    at_once = min(len(sources), max(1, processors * _BUFFER_BYTES // row_bytes))
    return (torch.empty(at_once * row_bytes, dtype=torch.uint8, device=rows.device),)


cuda.add(move_rows, _nothing, work=_buffer)
native.add(move_rows, _nothing)
