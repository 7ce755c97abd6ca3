"""The flat store: every token a cache keeps is a row of one tensor, the tokens of one sequence and key head consecutive rows.

Sequence ``b`` and key head ``h`` have the rows ``starts[b, h] <= row < starts[b, h] + lengths[b, h]``, a *run*. Lengths differ,
nothing is padded, and runs never overlap; what lies between them is read by nobody.

Of a padded chunk of queries the rows ``q_first[b] <= i < q_last[b]`` are real, and the last rows of each run are these queries'
own tokens, in order. A run of 7 rows and three real queries::

    query 0       1 1 1 1 1 . .
    query 1       1 1 1 1 1 1 .
    query 2       1 1 1 1 1 1 1

Older rows were kept from earlier chunks and may stand in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require
from .contract import DTYPES

# query rows whose logits a reference holds at a time
_TOGETHER = 1024


@dataclass(frozen=True)
class Run:
    """One sequence and key head.

    Attributes:
        heads: of q, those that read this key head.
        rows: of the store.
        queries: real rows of q.
    """

    b: int
    heads: slice
    rows: slice
    queries: range

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start

    def last(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """The last ``count`` real queries, a few at a time, and what they see of the run: bool ``[queries, length]``."""
        real = self.queries[max(0, len(self.queries) - count) :]
        for start in range(real.start, real.stop, _TOGETHER):
            part = range(start, min(start + _TOGETHER, real.stop))
            reach = self.length + 1 + torch.arange(part.start, part.stop) - self.queries.stop
            yield slice(part.start, part.stop), torch.arange(self.length) < reach[:, None]


def runs(q: Tensor, starts: Tensor, lengths: Tensor, n_rows: int, q_first: Tensor | None, q_last: Tensor | None) -> Iterator[Run]:
    """Every run of a store of ``n_rows`` rows, which it must lie inside."""
    (batch, heads, n_q, _), kv_heads = q.shape, starts.shape[1]
    group = heads // kv_heads
    firsts = q_first.clamp(0, n_q).tolist() if q_first is not None else [0] * batch
    lasts = q_last.clamp(0, n_q).tolist() if q_last is not None else [n_q] * batch
    for i, (start, length) in enumerate(zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True)):
        b, h = divmod(i, kv_heads)
        require(start >= 0 and length >= 0 and start + length <= n_rows,
                f"run {[b, h]} has {length} rows from {start} but the store has {n_rows}; it must lie inside")
        real = range(firsts[b], max(firsts[b], lasts[b]))
        yield Run(b, slice(h * group, (h + 1) * group), slice(start, start + length), real)


def logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """float32 or wider ``[heads, queries, keys]`` of one run: q ``[heads, queries, D]``, k ``[keys, D]``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = q.to(wide) @ k.to(wide).mT * scale
    return softcap * torch.tanh(found / softcap) if softcap else found


REDUCE = {"mean": lambda sums: sums.mean(0), "sum": lambda sums: sums.sum(0), "max": lambda sums: sums.amax(0)}


def require_runs(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, softcap: float, q_first: Tensor | None,
                 q_last: Tensor | None) -> None:
    """Queries ``[B, H, Nq, D]`` and the runs of a store ``[S, D]`` belong together."""
    require(q.dim() == 4 and k.dim() == 2, f"q needs 4 dimensions [B, H, Nq, D] and k 2 [S, D], got {q.dim()} and {k.dim()}")
    require(q.dtype == k.dtype, f"q is {q.dtype} but k is {k.dtype}; cast one of them")
    require(q.dtype in DTYPES, f"dtype {q.dtype} is not supported; use bfloat16, float16 or float32")
    require(q.device == k.device, f"q is on {q.device} but k on {k.device}; move one of them")
    require(q.shape[3] == k.shape[1], f"q has head_dim {q.shape[3]} but k has {k.shape[1]}; they must agree")
    for name, table in (("starts", starts), ("lengths", lengths)):
        require(table.dtype == torch.int64 and table.dim() == 2 and table.shape[0] == q.shape[0],
                f"{name} must be int64 [{q.shape[0]}, Hkv], a run per sequence and key head, got {table.dtype} {list(table.shape)}")
    require(starts.shape == lengths.shape, f"starts is {list(starts.shape)} but lengths {list(lengths.shape)}; they must agree")
    kv_heads = starts.shape[1]
    require(kv_heads > 0 and q.shape[1] % kv_heads == 0,
            f"{q.shape[1]} query heads are not a multiple of the {kv_heads} key heads that have runs")
    require(softcap >= 0, f"softcap={softcap} is negative; use 0 for none")
    for name, bound in (("q_first", q_first), ("q_last", q_last)):
        if bound is not None:
            require(bound.dtype == torch.int32 and tuple(bound.shape) == (q.shape[0],),
                    f"{name} must be int32 [{q.shape[0]}], one entry per sequence, got {bound.dtype} {list(bound.shape)}")


def require_reduce(reduce: str) -> None:
    """How the heads of a group become one."""
    require(reduce in REDUCE, f"reduce={reduce!r} is not known; use one of {', '.join(REDUCE)}")
