"""Block top-k: the key blocks whose mean key scores best against the mean query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require
from ..types import KVView, LayerContext, ReadPlan
from .choose import choose, empty_index, require_gqa
from .pooled import pool_keys, pool_queries, shares


@dataclass(frozen=True)
class BlockTopK:
    """Read the ``top_k`` key blocks whose mean key has the largest product with the query block's mean query.

    Source: the block-sparse heads of MInference, arXiv:2407.02490: 100 blocks of 64.
    Differs from the paper: the first block and the query block's own diagonal are forced, because a query that reads none of
    its own block may read no key at all; ``sink=0, recent=0`` is the paper's form. Means are over real tokens, where the
    published code averages in the zeros that fill the last block. Ranks are of softmax shares, which a GQA policy can add up;
    blocks more than about 100 nats below the best tie at 0.
    Cannot see what a block's mean hides: one matching key among many others, or keys told apart by fast rotary channels alone.

    Attributes:
        top_k: key blocks read by each query block, forced ones included; as many as there are reads everything.
        block: edge of query and key blocks, tokens.
        sink: leading blocks always read.
        recent: trailing blocks always read, own diagonal included; ignored without causality.
        gqa: what query heads that share keys do together, see ``choose``.
    """

    top_k: int = 100
    block: int = 64
    sink: int = 1
    recent: int = 1
    gqa: str = "per_head"

    def __post_init__(self):
        require(self.top_k >= 1, f"top_k={self.top_k} reads nothing; it counts blocks, use 1 or more")
        require(self.block > 0, f"block={self.block} must be positive; 64 is usual")
        require(min(self.sink, self.recent) >= 0, f"sink={self.sink} and recent={self.recent} count blocks; use 0 for none")
        require_gqa(self.gqa)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        k, _ = kv.fetch()
        index = empty_index(q, kv, ctx, self.block)
        score = shares(pool_queries(q, index), pool_keys(k, index), ctx.scale, index)
        top_k = torch.full((1, 1, 1), self.top_k, dtype=torch.int32, device=q.device)
        return ReadPlan(choose(score, index, k.shape[1], top_k=top_k, sink=self.sink, recent=self.recent, gqa=self.gqa))
