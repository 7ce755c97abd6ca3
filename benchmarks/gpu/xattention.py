"""Part ``xattention``: choosing and attending on inputs whose attention is concentrated, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_attn.attention import sparse_attention
from sparse_attn.patterns import XAttention
from sparse_attn.types import LayerContext, ResidentKV

from .. import measure
from ..cases import DTYPES, Shape
from .bars import judged, mark
from .ceilings import dense_calls, fastest
from .selection import chosen
from .units import Bench, Unit

_STRIDE = 16
_LIKES = (10.0, 10.0, 8.0)  # least logit of the nearest key, of the first keys, of a passage
_VARY = 4.0
_NOISE_OF_KEYS = 0.25  # against queries that like what is near


def structured(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose attention is where that of language models is: near by, on the first tokens, on a few passages, and a rest.

    A logit is the sum of four terms. Near: positions turn vectors, as rotary embeddings do, so products fall with the distance.
    First: every query likes the direction of the first 16 keys. Passages: so with 32 neighbours in every 2048 keys. The rest is
    noise of about one. How much a query likes each differs from head to head.
    """
    n, dim, device = shape.n, shape.head_dim, shape.device
    g = torch.Generator(device).manual_seed(seed)
    q, k, v = (x.float() for x in shape.random(seed + 1, *[(1, h, n, dim) for h in (shape.heads, shape.kv_heads, shape.kv_heads)]))
    half, unit = dim // 2 - 2, dim**0.25  # unit * unit * dim**-0.5 is a logit of 1
    likes = torch.tensor(_LIKES, device=device) + _VARY * torch.rand(shape.heads, 3, generator=g, device=device)
    angles = torch.arange(n, device=device)[:, None] * torch.logspace(-1.5, -3, half, device=device)
    turned = torch.cat([angles.cos(), angles.sin()], -1) * (unit / half**0.5)
    passages = (torch.rand(-(-n // 2048), generator=g, device=device) * (n - 32)).long()[:, None] + torch.arange(32, device=device)
    k *= _NOISE_OF_KEYS
    k[..., -2:] = 0
    q[..., : 2 * half] += turned * likes[:, None, :1]
    k[..., : 2 * half] += turned
    q[..., -2:] = likes[:, None, 1:] * unit
    k[:, :, :16, -2] = unit
    k[:, :, passages.flatten(), -1] = unit
    return tuple(x.to(DTYPES[shape.dtype]) for x in (q, k, v))


def xattention(bench: Bench, n: int) -> str | None:
    """XAttention with its threshold, choosing included, beside dense attention."""
    shape = bench.shape(n)
    q, k, v = tensors = structured(shape)
    context, pattern = LayerContext(layer=0, scale=shape.scale, q_start=0), XAttention(stride=_STRIDE, block=shape.block)
    density = sparse_attention(q, ResidentKV(k, v), context, pattern).blocks.density()
    calls: dict[str, Callable] = dense_calls(shape, ("flash", "cudnn"), tensors)
    calls["ours"] = lambda: sparse_attention(q, ResidentKV(k, v), context, pattern)
    us, broken = bench.rounds(calls)
    best = fastest(us, "sdpa")
    if "ours" in us:
        faster = measure.pairwise(us[best], us["ours"]) if best else 0.0
        bar = mark("xattention 128K" if n == bench.sizes.structured[-1] else "xattention", faster) if best else {}
        row = bench.record(us["ours"], best or None, us.get(best), op="xattention", backend=chosen(shape, _STRIDE),
                           **shape.fields(), stride=_STRIDE, density=round(density, 4), **bar)
        if bar:
            bench.say(judged(row))
    return "; ".join(broken) or None


def units(bench: Bench) -> Iterator[Unit]:
    for n in bench.sizes.structured:
        yield Unit(f"{n} structured tokens", lambda n=n: xattention(bench, n))
