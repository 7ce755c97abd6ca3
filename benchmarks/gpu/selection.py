"""Part ``selection``: what choosing blocks costs, beside dense attention of the same length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sparse_attn import ops
from sparse_attn.ops import OPS
from sparse_attn.patterns import BlockTopK, XAttention
from sparse_attn.types import LayerContext, ResidentKV, Selector

from .. import measure
from ..cases import Shape, top_k_for
from .bars import judged, mark
from .ceilings import dense_calls, fastest
from .units import Bench, Unit

_DENSITY = 0.1


def chosen(shape: Shape, stride: int = 0) -> str:
    """The backends that score, by antidiagonals or where there is no stride by pooled blocks, and that select."""
    q, k, _ = shape.tensors
    few = q[:, :, : 4 * shape.block], k[:, :, : 4 * shape.block]
    edges, n = (shape.block, shape.block), few[0].shape[2]
    if stride:
        scorer, args = "antidiagonal_score", (*few, *edges, stride, shape.scale)
    else:
        scale = torch.full((1, shape.heads), shape.scale, device=q.device)
        scorer, args = "pooled_score", (*(ops.pool_blocks(x, shape.block, "mean") for x in few), scale, *edges, n, n)
    score = OPS[scorer](*args)
    share = torch.full((shape.heads,), 0.9, dtype=torch.float64, device=score.device)
    names = [OPS[scorer].chosen(*args), OPS["select_blocks"].chosen(score, share, None, *edges, n, n)]
    return ", ".join([*([] if stride else [OPS["pool_blocks"].chosen(few[0], shape.block, "mean")]), *names])


def selection(bench: Bench) -> str | None:
    """Lists from scores, everything that a layer does before it attends, beside dense attention of the same length."""
    shape = bench.shape(bench.sizes.long)
    q, k, v = shape.tensors
    view, context, top_k = ResidentKV(k, v), LayerContext(layer=0, scale=shape.scale, q_start=0), top_k_for(shape, _DENSITY)
    ways: dict[str, Selector] = {
        "select stride 16": XAttention(stride=16, block=shape.block), "select stride 8": XAttention(stride=8, block=shape.block),
        "select pooled": BlockTopK(block=shape.block, top_k=top_k),
    }  # fmt: skip
    calls: dict[str, Callable] = dense_calls(shape, ("flash", "cudnn"))
    calls |= {name: lambda way=way: way.select(q, view, context) for name, way in ways.items()}
    us, broken = bench.rounds(calls)
    best = fastest(us, "sdpa")
    for name in [name for name in ways if name in us]:
        bar = mark(name, 1 / measure.pairwise(us[best], us[name])) if best else {}
        row = bench.record(us[name], best or None, us.get(best), op="select", of=name.removeprefix("select "), **shape.fields(),
                           backend=chosen(shape, getattr(ways[name], "stride", 0)), **bar)
        if bar:
            bench.say(judged(row))
    return "; ".join(broken) or None


def units(bench: Bench) -> Iterator[Unit]:
    yield Unit(f"{bench.sizes.long} tokens", lambda: selection(bench))
