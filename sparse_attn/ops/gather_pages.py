"""Pages from elsewhere, the host's memory first of all, to rows on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda
from .registry import op


@op(mutates=("rows",))
def gather_pages(rows: Tensor, pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy ``pages[sources[i]]`` to ``rows[targets[i]]``, for every i whose source is not negative.

    The pages that a step misses are known on the device only. Asking the host to copy them costs a synchronisation; here the device
    reads them itself, across the bus, in one launch, and what was not missed costs one comparison.
    Source: kvcache.md 26 (K13); ShadowKV, arXiv:2410.21465, section 4.2, gathers the same way.

    Args:
        rows: ``[S, W]`` of any dtype, contiguous; written. Rows that are no target keep what they hold.
        pages: ``[N, W]`` in rows' dtype, contiguous; on rows' device, or in page-locked memory of the host that the device maps.
        sources: int64, any shape, on rows' device; negative for none.
        targets: int64 of the same shape and device; of those with a source, no two alike.

    Raises:
        ContractError: on mismatched shapes, dtypes or devices; (on CPU) on a row that does not exist or is the target of two, and (on
            CUDA) if pages are in memory of the host that is not page-locked. Nothing was written then. On CUDA an entry that names no
            row moves nothing.
    """
    there = sources >= 0
    source, target = sources[there], targets[there]
    if rows.device.type == "cpu":  # where looking is free
        for what, at, size in (("pages", source, len(pages)), ("rows", target, len(rows))):
            require(not len(at) or int(at.min()) >= 0 and int(at.max()) < size, f"an entry lies outside the {size} {what}")
        require(len(target.unique()) == len(target), "two pages would go to one row; give each its own")
    rows[target] = pages[source.to(pages.device)].to(rows.device)


@gather_pages.check
def _(rows, pages, sources, targets):
    for name, t in (("rows", rows), ("pages", pages)):
        require(t.dim() == 2 and t.is_contiguous(),
                f"{name} must be contiguous, one page per row [n, W], got {list(t.shape)} with strides {list(t.stride())}; pass a view of "
                "the tensor that owns the memory")
    require(pages.dtype == rows.dtype and pages.shape[1] == rows.shape[1],
            f"pages are {pages.dtype} {list(pages.shape)} and rows {rows.dtype} {list(rows.shape)}; dtype and width must be the same")
    require(pages.device in (rows.device, torch.device("cpu")),
            f"pages are on {pages.device} but rows on {rows.device}; pages must be there too, or on the host")
    for name, t in (("sources", sources), ("targets", targets)):
        require(t.dtype == torch.int64 and t.device == rows.device and t.shape == sources.shape,
                f"{name} must be int64 {list(sources.shape)} on {rows.device}, row numbers, got {t.dtype} {list(t.shape)} on {t.device}")


@gather_pages.fake
def _nothing(rows, pages, sources, targets):
    return None


def _page_locked(rows, pages, sources, targets) -> str | None:
    # whether host memory is locked is no part of a call's shape: the kernel asks the driver
    return None if rows.is_cuda or pages.device == rows.device else f"needs pages on {rows.device}, got {pages.device}"


cuda.add(gather_pages, _nothing, _page_locked, on_host=("pages",))
