"""Vertical lines and slashes (MInference): single keys that every query reads, and diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require
from ..ops.spans import by_block
from ..types import KVView, LayerContext, ReadPlan
from .choose import empty_index, per_head
from .probe import largest, marked, observe, packed, rows_alone, slash_tiles, tails

PROBES = ("spread", "last")
# equal parts of the queries whose ends probe too, each with window / 8 rows
_SEGMENTS = 8


@dataclass(frozen=True)
class VerticalSlash:
    """Read, per head, the keys and the diagonals that a few probe queries attend to most.

    Keys stay single keys (``ReadPlan.columns``); a diagonal is read as every tile that it crosses.
    Source: MInference, arXiv:2407.02490, section 3.2 and its code; the default sizes are those of its configuration files.

    Differs from the paper: (1) the ends of eight equal segments probe besides the last rows, because a prompt that ends in
    boilerplate says nothing about the rest; ``probe="last"`` is the paper's. (2) Diagonals are aligned outward to tiles, where
    the paper cuts unaligned ranges and merges near ones: more is read, at most one tile per run of diagonals and query block.
    (3) ``recent_tokens`` distances are all read even when ``slash`` is smaller; the code keeps max(slash, 50) of them. (4) A tile with many
    columns is read whole (``promote``).

    Attributes:
        vertical: keys per head, the sink tokens included; a number, or a table ``[layers][heads]``.
        slash: distances per head, the recent ones included; likewise.
        window: last queries that probe, tokens.
        probe: ``spread`` or ``last``.
        sink_tokens: leading keys always read.
        recent_tokens: shortest distances always read, the own key's included.
        promote: share of a tile's keys that are columns from which every query block reads the whole tile; 0 for never. A quarter
            is what the specification of these kernels proposes; where gathering starts to cost more was not measured.
        block: edge of query and key blocks, tokens.
    """

    vertical: int | tuple[tuple[int, ...], ...] = 1000
    slash: int | tuple[tuple[int, ...], ...] = 6096
    window: int = 64
    probe: str = "spread"
    sink_tokens: int = 30
    recent_tokens: int = 100
    promote: float = 0.25
    block: int = 64

    def __post_init__(self):
        for name in ("vertical", "slash"):
            value = getattr(self, name)
            if not isinstance(value, int):
                value = tuple(tuple(int(count) for count in row) for row in value)
                object.__setattr__(self, name, value)
            bad = [count for count in ((value,) if isinstance(value, int) else sum(value, ())) if count < 0]
            require(not bad, f"{name}={bad[0] if bad else ''} is negative; it counts tokens")
        require(self.window >= 1, f"window={self.window} leaves no query to probe; 64 is usual")
        require(self.probe in PROBES, f"probe={self.probe!r} is not known; use {', '.join(PROBES)}")
        require(self.sink_tokens >= 0, f"sink_tokens={self.sink_tokens} is negative; it counts tokens")
        require(self.recent_tokens >= 1, f"recent_tokens={self.recent_tokens} leaves queries without their own key; use 1 or more")
        require(0 <= self.promote <= 1, f"promote={self.promote} is outside [0, 1]; it is a share of a tile's keys")
        require(self.block > 0, f"block={self.block} must be positive; 64 is usual")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        alone, n_k, block = rows_alone(q, kv, ctx), kv.n_tokens, self.block
        index = empty_index(q, kv, ctx, block)
        vertical, slash = observe(q, kv.fetch()[0], self._rows(alone, q.device), ctx)
        token = torch.arange(n_k, device=q.device)

        def top(mass: Tensor, name: str, least: int) -> Tensor:
            count = per_head(getattr(self, name), ctx.layer, q.shape[1], "cpu", name).long().clamp(min(least, n_k), n_k)
            return largest(mass.masked_fill(token < least, float("inf")), int(count.max()), count.to(q.device))

        tiles = slash_tiles(marked(top(slash, "slash", self.recent_tokens), n_k), index)
        real = torch.tensor([span.n_k for span in alone], device=q.device)[:, None, None]
        lines = top(vertical, "vertical", self.sink_tokens)
        lines = lines.masked_fill(lines >= real, n_k)
        if self.promote:
            whole = by_block(marked(lines, n_k).int(), block) >= self.promote * block  # [B, H, Kb]
            tiles |= whole[:, :, None]
            covered = whole.gather(-1, (lines // block).clamp(max=whole.shape[-1] - 1))
            lines = lines.masked_fill(covered, n_k).sort(-1).values
        columns = lines.masked_fill(lines == n_k, -1).int()
        return ReadPlan(index.where(tiles & index.reachable()), columns=columns)

    def _rows(self, alone, device) -> Tensor:
        parts = ((1, self.window),) if self.probe == "last" else ((1, self.window), (_SEGMENTS, -(-self.window // _SEGMENTS)))
        return packed([torch.cat([tails(span.n_q, *part) for part in parts]).unique() for span in alone], device)
