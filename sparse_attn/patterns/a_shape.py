"""A-shape: the first tokens and a window that slides along, whatever the content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotServed, require
from ..types import KVView, LayerContext, ReadPlan
from .choose import empty_index

_MOST = 2**31 - 1  # token counts travel as int32


@dataclass(frozen=True)
class AShape:
    """Read the first ``sink_tokens`` keys and each query's last ``recent_tokens``, exact to the token.

    Key p is read by the query at position t when p <= t and (t - p < recent_tokens or p < sink_tokens). Nothing in between is
    read, so it cannot retrieve; use it for heads known to be local. Also called streaming or Lambda-shape.
    Source: MInference, arXiv:2407.02490, section 3.1; default sizes as in its published code. Differs from that code: one pass
    instead of two merged ones, keys are not repeated per query head, rows are independent of their batch, chunks are served.
    Cannot serve attention without causality.

    Attributes:
        sink_tokens: leading tokens every query reads.
        recent_tokens: last tokens each query reads, its own included.
        block: edge of the tiles that are walked, tokens; changes the counted density, not what is read.
    """

    sink_tokens: int = 128
    recent_tokens: int = 3968
    block: int = 128

    def __post_init__(self):
        require_near(self.sink_tokens, self.recent_tokens, self.block)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        return near_plan(q, kv, ctx, [(self.sink_tokens, self.recent_tokens)] * q.shape[1], self.block)


def require_near(sink_tokens: int, recent_tokens: int, block: int) -> None:
    """Sizes that every pattern of sink and recent tokens shares."""
    require(0 <= sink_tokens <= _MOST, f"sink_tokens={sink_tokens} is outside [0, {_MOST}]; it counts leading tokens")
    require(1 <= recent_tokens <= _MOST, f"recent_tokens={recent_tokens} leaves queries without themselves; use 1 or more")
    require(block > 0, f"block={block} must be positive; 128 is usual")


def near_plan(q: Tensor, kv: KVView, ctx: LayerContext, near: list[tuple[int, int]], block: int, dense_rows: int = 0) -> ReadPlan:
    """Reads by distance alone: ``near`` is one ``(sink, recent)`` pair of tokens per query head."""
    if not ctx.causal:
        raise NotServed("needs causal attention")
    index = empty_index(q, kv, ctx, block)
    return ReadPlan(index, near=torch.tensor(near, dtype=torch.int32, device=q.device), dense_rows=dense_rows)
