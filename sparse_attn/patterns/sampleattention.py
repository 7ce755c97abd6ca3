"""SampleAttention: columns and diagonals of blocks that sampled queries attend to, and a window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require
from ..types import KVView, LayerContext, ReadPlan
from .choose import empty_index
from .probe import covering, observe, packed, rows_alone, slash_tiles, tails


@dataclass(frozen=True)
class SampleAttention:
    """Read the fewest columns of blocks, and the fewest diagonals, that cover their share of the sampled rows' mass.

    The queries are cut into equal segments; the last ``window`` rows of each attend exactly, and their mass is summed by key
    block and by block of distances. Every query also reads the nearest ``recent_share`` of all keys, which counts towards the
    diagonals' threshold.
    Source: SampleAttention, arXiv:2406.15486 (window, sampled share, threshold) and its MLSys 2025 version (segment tails,
    diagonals, two thresholds).

    Differs from the paper: a diagonal of blocks is read as all tiles that its distances ``[t, t + 1) * block`` cross; the
    smallest covering set is found exactly, where the 2024 version looks it up in a list of ratios.

    Attributes:
        vertical_threshold: share of the sampled mass that columns cover, in [0, 1].
        slash_threshold: share that diagonals cover, in [0, 1]. Either at 1 is dense.
        sample_share: share of the queries that probe, in (0, 1]; it sets the number of segments.
        window: queries that probe at the end of each segment, tokens.
        recent_share: share of a row's keys, in (0, 1], that every query reads counted back from its own, rounded up to blocks.
        block: edge of query and key blocks, tokens.
    """

    vertical_threshold: float = 0.95
    slash_threshold: float = 0.95
    sample_share: float = 0.05
    window: int = 64
    recent_share: float = 0.08
    block: int = 128

    def __post_init__(self):
        for name in ("vertical_threshold", "slash_threshold"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} is outside [0, 1]; it is a share of attention mass")
        require(0 < self.sample_share <= 1, f"sample_share={self.sample_share} is outside (0, 1]; it is a share of the queries")
        require(self.window >= 1, f"window={self.window} leaves no query to probe; 64 is usual")
        require(0 < self.recent_share <= 1, f"recent_share={self.recent_share} is outside (0, 1]; it is a share of the keys")
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        alone, block = rows_alone(q, kv, ctx), self.block
        index = empty_index(q, kv, ctx, block)
        rows = [tails(span.n_q, max(1, math.ceil(self.sample_share * span.n_q / self.window)), self.window) for span in alone]
        vertical, slash = observe(q, kv.fetch()[0], packed(rows, q.device), ctx, block)
        near = torch.tensor([math.ceil(self.recent_share * span.n_k) for span in alone], device=q.device)[:, None, None]
        bands = covering(slash, self.slash_threshold, torch.arange(slash.shape[-1], device=q.device) * block < near)
        columns = covering(vertical, self.vertical_threshold, torch.zeros_like(bands))
        tiles = slash_tiles(bands.repeat_interleave(block, -1)[..., : kv.n_tokens], index) | columns[:, :, None]
        return ReadPlan(index.where(tiles & index.reachable()))
