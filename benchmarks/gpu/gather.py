"""Part ``gather``: pages that the GPU reads out of pinned host memory itself, beside one copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from sparse_attn.ops import OPS, use_backend

from .. import measure
from ..cases import DTYPES
from ..decode import PAGE
from ..entries import GateError
from .bars import judged, mark
from .units import Bench, Unit, forced

_SPREAD = 2  # pages on the host for each that is read


def gather(bench: Bench) -> str | None:
    """Pages of one head's keys, in random order."""
    op = OPS.get("gather_pages")
    if op is None:
        return "this version has no gather_pages"
    s, device = bench.sizes, bench.machine.device
    dtype, width = DTYPES[s.dtype], PAGE * s.head_dim
    count = max(1, s.copied // 8 // (width * dtype.itemsize))
    pages = bench.machine.pinned(torch.empty(_SPREAD * count, width).normal_().to(dtype))
    sources = torch.randperm(len(pages))[:count].to(device)
    rows, targets = torch.empty(count, width, dtype=dtype, device=device), torch.arange(count, device=device).flip(0)
    whole = bench.machine.pinned(pages[:count].clone())
    target = torch.empty_like(rows)
    names = bench.check_backend(op, rows, pages, sources, targets) or (["reference"] if bench.machine.rehearsal else [])
    exact = pages[sources.cpu()]
    calls = {"copy": lambda: target.copy_(whole, non_blocking=True)}
    for name in names:
        rows.zero_()
        with use_backend(name):
            op(rows, pages, sources, targets)
        if not torch.equal(rows[targets].cpu(), exact):
            raise GateError(f"gather_pages on {name} brings other pages than were asked for; fix the kernel before timing it")
        calls[name] = forced(name, functools.partial(op, rows, pages, sources, targets))
    us, broken = bench.rounds(calls)
    for name in [name for name in names if name in us]:
        bar = mark("gather", measure.pairwise(us["copy"], us[name]))
        of = f"{count} pages of {width * dtype.itemsize} bytes"
        row = bench.record(us[name], "copy", us["copy"], op="gather_pages", backend=name, of=of, dtype=s.dtype,
                           bytes=float(rows.nbytes), **bar)
        bench.say(judged(row))
    return "; ".join([*([] if names else ["gather_pages has no backend that reads pinned memory here"]), *broken]) or None


def units(bench: Bench) -> Iterator[Unit]:
    yield Unit("pages from pinned memory", lambda: gather(bench))
