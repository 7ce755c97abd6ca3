"""The probability that each kept token receives from the last few queries, smoothed along the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .registry import op
from .runs import REDUCE, logits, require_reduce, require_runs, runs
from .triton import frame


def _average(sums: Tensor, kernel: int) -> Tensor:
    return torch.nn.functional.avg_pool1d(sums, kernel, 1, kernel // 2, count_include_pad=False)


def _maximum(sums: Tensor, kernel: int) -> Tensor:
    return torch.nn.functional.max_pool1d(sums, kernel, 1, kernel // 2)


_POOL = {"mean": _average, "max": _maximum}


@op
def window_mass(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: int = 1,
    pool: str = "mean",
    reduce: str = "mean",
    q_first: Tensor | None = None,
    q_last: Tensor | None = None,
) -> Tensor:
    """Attention probability that each row of a flat store receives from the last ``window`` queries of its sequence.

    The softmax is computed here, in float32 and over the whole run, so any attention may have come before. Per query head the
    probabilities are summed over the queries, then pooled along the run, then reduced over the heads of the group. Only rows
    before the window are pooled, and only with each other; the window's own rows stay as they are.
    Source: SnapKV, arXiv:2404.14469, Listing 1; with ``window=1`` and no pooling, TOVA, arXiv:2401.06104, section 3.2.
    Differs from SnapKV: its mean divides by ``kernel`` at both ends too, where it adds zeros for the entries that do not exist;
    ours divides by the entries that do, so the first tokens and those before the window are not ranked lower than they score.

    Args:
        q: ``[B, H, Nq, D]``; bfloat16, float16 or float32, any strides.
        k: ``[S, D]`` rows of the store; see ``ops/runs.py`` for the store, its runs and what a query sees.
        starts: int64 ``[B, Hkv]`` first row of each run.
        lengths: int64 ``[B, Hkv]`` tokens of each run, the queries' own included.
        scale: softmax scale, usually ``D ** -0.5``.
        window: queries that look, at most as many as a sequence has.
        softcap: bound on the logits; 0 for none.
        sinks: float ``[H]`` logit of a learned sink that takes probability; None for none.
        kernel: rows pooled into one, odd; 1 for no pooling.
        pool: ``mean`` or ``max``.
        reduce: ``mean``, ``sum`` or ``max`` over the query heads of a group.
        q_first, q_last: as in ``key_mass``.

    Returns:
        float32 ``[S]``; 0 outside every run. A query with NaN or infinite logits gives nothing.

    Raises:
        ContractError: on mismatched shapes or dtypes, or (on CPU) a run that leaves the store.
    """
    mass = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
    for run in runs(q, starts, lengths, k.shape[0], q_first, q_last):
        sums = k.new_zeros(run.heads.stop - run.heads.start, run.length, dtype=torch.promote_types(q.dtype, mass.dtype))
        for queries, seen in run.last(window):
            found = logits(q[run.b, run.heads, queries], k[run.rows], scale, softcap).masked_fill(~seen.to(k.device), float("-inf"))
            if sinks is not None:
                found = torch.cat([found, sinks[run.heads, None, None].to(found).expand(-1, found.shape[1], 1)], -1)
            sums += found.softmax(-1)[..., : run.length].nan_to_num(0.0).sum(1)
        before = run.length - min(window, len(run.queries))
        if before > 0:
            sums[:, :before] = _POOL[pool](sums[:, :before], kernel)
        mass[run.rows] = REDUCE[reduce](sums).float()
    return mass


@window_mass.check
def _(q, k, starts, lengths, scale, window, softcap, sinks, kernel, pool, reduce, q_first, q_last):
    require_runs(q, k, starts, lengths, softcap, q_first, q_last)
    require_reduce(reduce)
    require(window >= 1, f"window={window} is no query; use 1 or more")
    require(kernel >= 1 and kernel % 2 == 1, f"kernel={kernel} has no middle; use an odd number of rows, 1 for no pooling")
    require(pool in _POOL, f"pool={pool!r} is not known; use one of {', '.join(_POOL)}")
    require(sinks is None or tuple(sinks.shape) == (q.shape[1],),
            f"sinks must be [{q.shape[1]}], one logit per query head, got {sinks is not None and list(sinks.shape)}")


@window_mass.fake
def _mass(q, k, *rest, **named):
    return k.new_empty(k.shape[0], dtype=torch.float32)


native.add(window_mass, _mass, lambda isa, q, *rest: native.needs_dtype(q))
frame.add(window_mass, _mass, frame.needs_width)
