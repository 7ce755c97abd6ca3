"""Keys rebuilt from low-rank factors, and rotated to where their tokens stand."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda, native
from .contract import DTYPES
from .registry import op
from .triton import frame


def turned(x: Tensor, turns: Tensor, interleaved: bool) -> Tensor:
    """``x`` ``[..., D]`` with its first ``2 R`` channels rotated, pair i by the angle of ``turns[..., :, i]``.

    Args:
        turns: ``[..., 2, R]``, cosines and then sines, in x's dtype.
        interleaved: pair i is the channels ``2 i`` and ``2 i + 1``; else ``i`` and ``i + R``.
    """
    pairs = turns.shape[-1]
    plane, still, (cos, sin) = x[..., : 2 * pairs], x[..., 2 * pairs :], turns.unbind(-2)
    one, other = plane.unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(-1 if interleaved else -2)
    both = torch.stack([one * cos - other * sin, other * cos + one * sin], -1 if interleaved else -2)
    return torch.cat([both.flatten(-2), still], -1)


def turns_at(positions: Tensor, far: Tensor, near: Tensor) -> Tensor:
    """``[..., 2, R]``: cosines and sines at ``positions``, ``far`` and ``near`` as ``lowrank_keys`` takes them."""
    (cos, sin), (cos_near, sin_near) = (t.unbind(-2) for t in (far[positions // len(near)], near[positions % len(near)]))
    return torch.stack([cos * cos_near - sin * sin_near, sin * cos_near + cos * sin_near], -2)


@op(mutates=("rows",))
def lowrank_keys(
    rows: Tensor,
    factors: Tensor,
    basis: Tensor,
    starts: Tensor,
    counts: Tensor,
    targets: Tensor,
    positions: Tensor,
    far: Tensor,
    near: Tensor,
    interleaved: bool = False,
) -> None:
    """Write ``factors[t] @ basis[b, h]``, rotated to ``positions[t]``, for the tokens t of chosen pages, into ``rows``.

    Keys before rotation are close to few directions, those after are not; so they are kept as factors that all KV heads of a token
    share, and rotated when they are read. The angles of a position are those of ``far``, where the nearest multiple of N at or
    below it is looked up, plus those of ``near``: two tables of a few hundred rows that stay in a core's cache, in place of a row
    per position.
    Source: ShadowKV, arXiv:2410.21465, section 4, algorithm 2, whose kernel also rotates what it has just multiplied.

    Args:
        rows: ``[S, D]``, contiguous; written. Rows that are no target keep what they hold.
        factors: ``[T, r]`` in rows' dtype: bfloat16, float16 or float32; contiguous in the last dimension.
        basis: ``[B, Hkv, r, D]`` in rows' dtype, any strides.
        starts: int64 ``[B, Hkv, P]`` first factor row of each page.
        counts: int32 ``[B, Hkv, P]`` tokens of each page, 0 for none.
        targets: int64 ``[B, Hkv, P]`` where the first key of each page goes; the others follow. No row may be the target of two.
        positions: int32 ``[T]``.
        far: float32 ``[F, 2, R]`` cosines and sines of the rotation by ``0, N, 2 N, ...`` positions; R = 0 for none.
        near: float32 ``[N, 2, R]`` those of ``0 .. N - 1`` positions.
        interleaved: pair i is the channels ``2 i`` and ``2 i + 1``; else ``i`` and ``i + R``. Channels from ``2 R`` on stay.

    Raises:
        ContractError: on mismatched shapes or dtypes, or (on CPU) a page outside ``factors`` or ``rows``, or a position outside the
            tables. Nothing was written then. The backend cuda leaves out such pages and such tokens.
    """
    wide = torch.promote_types(factors.dtype, torch.float32)
    token = torch.arange(int(counts.max()) if counts.numel() else 0, device=counts.device)
    real = token < counts[..., None]  # [B, Hkv, P, tokens of the longest page]
    if factors.device.type == "cpu":  # where looking is free
        for what, first, size in (("factors", starts, len(factors)), ("rows", targets, len(rows))):
            inside = (counts == 0) | (counts > 0) & (first >= 0) & (first + counts <= size)
            require(bool(inside.all()), f"a page lies outside the {size} {what}")
    sources = (starts[..., None] + token).masked_fill(~real, 0)
    at = positions[sources[real]].long()
    if factors.device.type == "cpu" and far.shape[2]:
        known = len(far) * len(near)
        require(bool(((at >= 0) & (at < known)).all()), f"a position lies outside the {known} that far and near tell of")
    keys = (factors[sources.flatten(2)].to(wide) @ basis.to(wide)).unflatten(2, sources.shape[2:])[real]
    rows[(targets[..., None] + token)[real]] = turned(keys, turns_at(at, far, near).to(wide), interleaved).to(rows.dtype)


@lowrank_keys.check
def _(rows, factors, basis, starts, counts, targets, positions, far, near, interleaved):
    for name, t, dims in (("rows", rows, "[S, D]"), ("factors", factors, "[T, r]"), ("basis", basis, "[B, Hkv, r, D]")):
        require(t.dim() == dims.count(",") + 1, f"{name} needs {dims.count(',') + 1} dimensions {dims}, got {t.dim()}")
        require(t.dtype == rows.dtype and t.dtype in DTYPES,
                f"{name} is {t.dtype} and rows {rows.dtype}; both must be bfloat16, float16 or float32, the same one")
        require(t.device == rows.device, f"{name} is on {t.device} but rows on {rows.device}; move one of them")
    require(rows.is_contiguous(), "rows must be contiguous; pass the tensor that owns the memory")
    require(factors.shape[1] == 1 or factors.stride(1) == 1,
            f"factors must be contiguous in its last dimension, got stride {factors.stride(1)}; call contiguous()")
    require(basis.shape[2:] == (factors.shape[1], rows.shape[1]),
            f"basis must be [B, Hkv, {factors.shape[1]}, {rows.shape[1]}], as wide as factors and rows, got {list(basis.shape)}")
    for name, t, dtype in (("starts", starts, torch.int64), ("counts", counts, torch.int32), ("targets", targets, torch.int64)):
        require(t.dtype == dtype and t.dim() == 3 and t.shape[:2] == basis.shape[:2] and t.shape == starts.shape,
                f"{name} must be {str(dtype).removeprefix('torch.')} [{basis.shape[0]}, {basis.shape[1]}, P], like the others, "
                f"got {t.dtype} {list(t.shape)}")
    require(positions.dtype == torch.int32 and tuple(positions.shape) == (len(factors),),
            f"positions must be int32 [{len(factors)}], one per row of factors, got {positions.dtype} {list(positions.shape)}")
    for name, t in (("far", far), ("near", near)):
        require(t.dtype == torch.float32 and t.dim() == 3 and len(t) > 0 and t.shape[1:] == (2, near.shape[-1]),
                f"{name} must be float32 [rows, 2, R], cosines and sines, R alike in far and near, got {t.dtype} {list(t.shape)}")
    require(2 * near.shape[2] <= rows.shape[1],
            f"{near.shape[2]} pairs of channels do not fit into keys of {rows.shape[1]} channels")


@lowrank_keys.fake
def _nothing(*args):
    return None


def _cuda_needs(rows, *rest):
    return native.needs_dtype(rows) or frame.needs_width(rows)


def _ends(processors, rows, factors, basis, starts, *rest):
    """Room for where the pages of a list end in it."""
    return (torch.empty_like(starts, memory_format=torch.contiguous_format),)


cuda.add(lowrank_keys, _nothing, _cuda_needs, _ends)
native.add(lowrank_keys, _nothing, lambda isa, rows, *rest: native.needs_dtype(rows))
