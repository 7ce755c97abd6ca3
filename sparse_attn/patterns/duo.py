"""DuoAttention: heads that retrieve read everything, heads that stream read the first and the last tokens."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import NotServed, require
from ..types import KVView, LayerContext, ReadPlan
from .a_shape import near_plan, require_near

Row = tuple[float, ...] | tuple[bool, ...]


@dataclass(frozen=True)
class Duo:
    """Read everything in retrieval heads, and only sink and recent tokens in the others, as a table per key head says.

    Source: DuoAttention, arXiv:2410.10819, sections 2.2 and 2.3; sink 64 and recent 256 as its examples deploy. ``python -m
    sparse_attn.calibrate`` writes a table; the published gate files (one row of numbers per layer) are one as they stand.
    Differs from its code:
    - There the first forward is dense in every head and a streaming head sees its whole current chunk, so outputs depend on how
      a prompt is cut and a prompt in one piece gains nothing. Here every query reads its own sink and recent tokens, which is
      the mask the gates were trained under, in one piece or in many.
    - Equal gates are told apart by index (the lower one retrieves), not by random noise, and no weight is reordered.
    Cannot serve attention without causality.

    Attributes:
        retrieval: table ``[layers][kv heads]``: True where a head retrieves, or its gate, higher for more retrieval. A row of one
            entry holds for all heads of its layer. Without a table no call is served.
        sparsity: with gates, the share of all heads that stream: those at or below this quantile; 0 for none, 1 for all.
        sink_tokens, recent_tokens, block: of streaming heads, as in AShape.
    """

    retrieval: tuple[Row, ...] = ()
    sparsity: float | None = None
    sink_tokens: int = 64
    recent_tokens: int = 256
    block: int = 128

    def __post_init__(self):
        rows = self.retrieval if isinstance(self.retrieval, (tuple, list)) else [None]
        require(all(isinstance(row, (tuple, list)) and len(row) for row in rows),
                "retrieval must be a table [layers][kv heads], one or more entries per row")
        object.__setattr__(self, "retrieval", tuple(tuple(row) for row in self.retrieval))
        entries = [entry for row in self.retrieval for entry in row]
        flags = all(isinstance(entry, bool) for entry in entries)
        gates = all(isinstance(e, (int, float)) and not isinstance(e, bool) and math.isfinite(e) for e in entries)
        require(flags or gates, "retrieval must hold only True and False, or only finite numbers")
        require(flags or self.sparsity is not None, "retrieval holds numbers; give sparsity, the share of heads that stream")
        require(gates or self.sparsity is None, "retrieval says which heads stream; sparsity would have no effect, leave it out")
        require(self.sparsity is None or 0 <= self.sparsity <= 1, f"sparsity={self.sparsity} is outside [0, 1]; it is a share")
        require_near(self.sink_tokens, self.recent_tokens, self.block)

    def retrieves(self) -> tuple[tuple[bool, ...], ...]:
        """The table with its gates decided: True where a head retrieves."""
        return self.retrieval if self.sparsity is None else _split(self.retrieval, self.sparsity)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if not self.retrieval:
            raise NotServed("needs a table of retrieval heads; calibrate one, or give retrieval")
        layers = len(self.retrieval)
        require(ctx.layer < layers, f"retrieval has {layers} layers but layer {ctx.layer} asked; add rows")
        row, kv_heads = self.retrieves()[ctx.layer], kv.fetch()[0].shape[1]
        require(len(row) in (1, kv_heads), f"retrieval has {len(row)} heads in layer {ctx.layer} but the layer has {kv_heads} key "
                "heads; one entry for each, or one for all")
        near = [(0, kv.n_tokens) if whole else (self.sink_tokens, self.recent_tokens) for whole in row]
        return near_plan(q, kv, ctx, [pair for pair in near for _ in range(q.shape[1] // len(row))], self.block)


@functools.lru_cache(maxsize=16)
def _split(gates: tuple[Row, ...], sparsity: float) -> tuple[Row, ...]:
    """True for the heads above the quantile; of equal gates the lower index ranks higher."""
    flat = [gate for row in gates for gate in row]
    rising = sorted(range(len(flat)), key=lambda i: (flat[i], -i))
    streams = math.floor(sparsity * (len(flat) - 1)) + 1 if 0 < sparsity < 1 else round(sparsity) * len(flat)
    whole = set(rising[streams:])
    heads = iter(range(len(flat)))
    return tuple(tuple(next(heads) in whole for _ in row) for row in gates)
