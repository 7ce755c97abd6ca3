"""The probability that each kept token received, from the log-sum-exp that attention left behind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import native
from .registry import op
from .runs import REDUCE, logits, require_reduce, require_runs, runs
from .triton import frame


@op
def key_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    rows: int = 0,
    reduce: str = "mean",
    q_first: Tensor | None = None,
    q_last: Tensor | None = None,
) -> Tensor:
    """Attention probability that each row of a flat store received, summed over the queries that see it.

    ``exp(logit - lse)`` is a probability on its own, so a column of the attention matrix is summed without the rest of the matrix:
    one product of the two that attention needs, and memory that grows with the tokens only. Sinks of the attention are in its
    lse. Summed over a run, the masses of one head are the number of its queries.
    Source: the accumulated score of H2O (arXiv:2306.14048, section 4), which sums whole n x n probabilities.

    Args:
        q: ``[B, H, Nq, D]`` as attention saw it; bfloat16, float16 or float32, any strides.
        k: ``[S, D]`` rows of the store; see ``ops/runs.py`` for the store, its runs and what a query sees.
        lse: float32 ``[B, H, Nq]`` natural log-sum-exp of the logits; a query gives nothing where it is not finite.
        starts: int64 ``[B, Hkv]`` first row of each run.
        lengths: int64 ``[B, Hkv]`` tokens of each run, the queries' own included.
        scale: softmax scale, usually ``D ** -0.5``.
        softcap: bound on the logits; 0 for none.
        rows: the last so many real queries of each sequence give; 0 for all.
        reduce: ``mean``, ``sum`` or ``max`` over the query heads of a group, each summed over its queries first.
        q_first: int32 ``[B]`` first real row of q; None means 0.
        q_last: int32 ``[B]`` one past the last real row of q; None means Nq.

    Returns:
        float32 ``[S]``; 0 outside every run.

    Raises:
        ContractError: on mismatched shapes or dtypes, or (on CPU) a run that leaves the store.
    """
    mass = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
    for run in runs(q, starts, lengths, k.shape[0], q_first, q_last):
        sums = k.new_zeros(run.heads.stop - run.heads.start, run.length, dtype=torch.promote_types(q.dtype, mass.dtype))
        for queries, seen in run.last(rows or len(run.queries)):
            given = lse[run.b, run.heads, queries, None]
            p = (logits(q[run.b, run.heads, queries], k[run.rows], scale, softcap) - given).exp()
            sums += p.masked_fill(~(seen.to(k.device) & given.isfinite()), 0.0).sum(1)
        mass[run.rows] = REDUCE[reduce](sums).float()
    return mass


@key_mass.check
def _(q, k, lse, starts, lengths, scale, softcap, rows, reduce, q_first, q_last):
    require_runs(q, k, starts, lengths, softcap, q_first, q_last)
    require_reduce(reduce)
    require(lse.dtype == torch.float32 and lse.shape == q.shape[:3],
            f"lse must be float32 {list(q.shape[:3])}, one entry per query, got {lse.dtype} {list(lse.shape)}")
    require(rows >= 0, f"rows={rows} is negative; use 0 for every query")


@key_mass.fake
def _mass(q, k, *rest, **named):
    return k.new_empty(k.shape[0], dtype=torch.float32)


native.add(key_mass, _mass, lambda isa, q, *rest: native.needs_dtype(q))


def _unserved(q, k, *rest):
    strided = k.shape[1] > 1 and k.stride(1) != 1
    return f"needs k contiguous in its last dimension, got stride {k.stride(1)}" if strided else frame.needs_width(q, k)


frame.add(key_mass, _mass, _unserved)
