"""BigBird: a window, the first blocks, and blocks drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotServed, require
from ..types import KVView, LayerContext, ReadPlan
from .choose import choose, empty_index


@dataclass(frozen=True)
class BigBird:
    """Read the first ``sink`` blocks, the last ``recent`` and ``random`` others, drawn once and for all per seed.

    A draw is a hash of seed, layer, key head, query block and key block, the blocks counted from the row's first real key. So it
    is the same for every batch row, beside any padding, in one piece or in chunks of whole blocks, and on every machine.
    Source: BigBird, arXiv:2007.14062, section 2 and appendix D; 64-token blocks, 3 random ones and a window of 3 as there.
    Differs from the paper: causal, so the window looks back only and the global blocks are read but need not read ahead; query
    heads that share keys share their draw, which the paper's models have no occasion to.
    Finds a single needle only by luck, and cannot serve attention without causality.

    Attributes:
        sink: leading blocks always read (the paper's global blocks).
        recent: trailing blocks always read, own diagonal included (the paper's window).
        random: further blocks per query block, fewer where fewer are reachable.
        seed: another seed, another draw.
        block: edge of query and key blocks, tokens.
    """

    sink: int = 2
    recent: int = 3
    random: int = 3
    seed: int = 0
    block: int = 64

    def __post_init__(self):
        require(self.sink >= 0, f"sink={self.sink} is negative; it counts blocks")
        require(self.recent >= 1, f"recent={self.recent} leaves queries without their own block; use 1 or more")
        require(0 <= self.random < 2**30, f"random={self.random} is not a number of blocks; use 0 or more")
        require(0 <= self.seed < 2**62, f"seed={self.seed} must be a whole number, 0 or more")
        require(self.block > 0, f"block={self.block} must be positive; 64 is usual")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if not ctx.causal:
            raise NotServed("needs causal attention")
        kv_heads = kv.fetch()[0].shape[1]
        index = empty_index(q, kv, ctx, self.block)
        start, _ = index.rows()
        own = (start // self.block).to(q.device)[:, None, :, None]
        head = torch.arange(kv_heads, device=q.device)[:, None, None]
        column = torch.arange(-(-kv.n_tokens // self.block), device=q.device)
        forced = index.reachable(sink=self.sink, recent=self.recent).sum(-1, dtype=torch.int32)
        return ReadPlan(choose(_draw(self.seed, ctx.layer, head, own, column), index, kv_heads, top_k=forced + self.random,
                               sink=self.sink, recent=self.recent))


def _draw(*parts: int | Tensor) -> Tensor:
    """float32 in [0, 1) from whole numbers: a splitmix64 step per part; int64 products wrap alike on every device."""
    x = torch.zeros((), dtype=torch.int64, device=next(p.device for p in parts if isinstance(p, Tensor)))
    for part in parts:
        x = (x ^ part) - 0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
        x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 40 & 0xFFFFFF).float() / 2**24
