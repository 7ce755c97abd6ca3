"""Part ``decode``: one generated token over a long store: paged_attention beside dense decoding and a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_attn.ops import OPS, use_backend

from .. import measure
from ..decode import PAGE, SHARE, Store, paged_errors
from ..entries import GateError
from .bars import judged, mark
from .ceilings import copy_call, dense_calls, fastest
from .units import Bench, Unit, forced, sentence

_OP = OPS["paged_attention"]
_PART = f"1/{SHARE} of the pages"


def lists(store: Store, batch: int) -> dict[str, tuple[Tensor, Tensor]]:
    """starts and counts ``[1, batch * Hkv, P]`` of each case."""
    starts, counts = store.lists(page=PAGE)
    few = max(1, starts.shape[2] // SHARE)
    return {"one run": store.lists(), f"pages of {PAGE}": (starts, counts), _PART: (starts[..., :few], counts[..., :few])}


def paged(bench: Bench, batch: int) -> str | None:
    """All cases of one batch, in the same rounds as what they are compared with."""
    n, device, wrong = bench.sizes.long, bench.machine.device, []
    shape = bench.shape(n, batch)
    store = Store(shape)
    k, v = store.tensors
    kv_heads, q = bench.sizes.kv_heads, store.q(1)
    mine = q.view(batch, -1, 1, shape.head_dim)
    rows = tuple(x.view(batch, kv_heads, n, shape.head_dim) for x in (k, v))
    folded = mine.view(batch, kv_heads, -1, shape.head_dim)
    calls: dict[str, Callable] = dense_calls(shape, ("flash", "cudnn"), (mine, *rows))
    calls["sdpa folded"] = functools.partial(torch.nn.functional.scaled_dot_product_attention, folded, *rows, scale=shape.scale)
    calls["copy"] = copy_call(bench, k.nbytes + v.nbytes)
    cases = {}
    for of, (starts, counts) in lists(store, batch).items():
        starts, counts = starts.to(device), counts.to(device)
        args = (mine, k, v, *(x.view(batch, kv_heads, -1).contiguous() for x in (starts, counts)), shape.scale)
        read = float(counts.sum()) * 2 * shape.head_dim * k.element_size()
        for backend in bench.check_backend(_OP, *args):
            try:
                with use_backend(backend):
                    errors = paged_errors(store, q, starts, counts)
            except GateError as error:
                wrong.append(f"{backend}, {of}, is not timed: {sentence(error)}")
                continue
            calls[f"{backend}, {of}"] = forced(backend, functools.partial(_OP, *args))
            cases[f"{backend}, {of}"] = backend, of, {"batch": batch, "bytes": read, **errors}
    us, broken = bench.rounds(calls)
    dense = fastest(us, "sdpa")
    for name in [name for name in us if name.startswith("sdpa")]:
        bench.record(us[name], op="sdpa decode", backend=name.split()[1], **base(bench), batch=batch,
                     bytes=float(k.nbytes + v.nbytes))
    for name, (backend, of, fields) in cases.items():
        if name not in us:
            continue
        ours_whole = f"{backend}, one run"
        best = fastest({name: us[name] for name in (dense, ours_whole) if name in us}, "")
        beside = best if of == _PART else "copy"
        kind = "decode pages" if of == _PART else "decode bandwidth"
        bar = mark(kind, measure.pairwise(us[beside], us[name])) if beside in us else {}
        row = bench.record(us[name], beside if beside in us else None, us.get(beside), op="paged_attention", backend=backend, of=of,
                           **base(bench), **fields, **bar)
        if bar:
            bench.say(judged(row))
    if wrong:
        raise GateError("; ".join(wrong))
    return "; ".join(broken) or None


def base(bench: Bench) -> dict:
    """Fields of the shape of one sequence."""
    return {key: value for key, value in bench.shape(bench.sizes.long).fields().items() if key not in ("B", "block")}


def units(bench: Bench) -> Iterator[Unit]:
    for batch in bench.sizes.batches:
        yield Unit(f"{bench.sizes.long} tokens, batch {batch}", lambda batch=batch: paged(bench, batch))
