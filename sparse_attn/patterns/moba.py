"""MoBA: every query picks the key blocks with the best mean key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotServed, require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import choose, empty_index, require_gqa
from .pooled import pool_keys, query_rows, shares


@dataclass(frozen=True)
class MoBA:
    """Read what any query of a block picks: its own key block, and the ``top_k - 1`` earlier ones whose mean key suits it best.

    Source: MoBA, arXiv:2502.13189; sizes as in its 1M-token model.
    Differs from the paper: a query also reads what the other ``block_q - 1`` queries of its block picked, a superset of its own
    picks, because lists are per query block; ``block_q=1`` is the paper's form. Mixing heads of a group (``gqa``) is ours.
    Models were trained with it; others lose more. Scores take ``B x H x Nq x Kb`` floats: meant for large key blocks.

    Attributes:
        top_k: key blocks that a query picks, its own included; as many as there are reads everything.
        block_k: edge of key blocks (the paper's chunks), tokens.
        block_q: queries whose picks are read together, tokens.
        gqa: what query heads that share keys do together, see ``choose``.
    """

    top_k: int = 12
    block_k: int = 4096
    block_q: int = 128
    gqa: str = "per_head"

    def __post_init__(self):
        require(self.top_k >= 1, f"top_k={self.top_k} leaves queries without their own block; use 1 or more")
        edges = f"block_q={self.block_q}, block_k={self.block_k}"
        require(min(self.block_q, self.block_k) > 0, f"{edges} must be positive; 128 and 4096 are usual")
        require_gqa(self.gqa)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if not ctx.causal:
            raise NotServed("needs causal attention")
        k, _ = kv.fetch()
        index = empty_index(q, kv, ctx, (self.block_q, self.block_k))
        if self.top_k * self.block_k >= kv.n_tokens:
            return ReadPlan(index.where(index.reachable()))
        single = empty_index(q, kv, ctx, (1, self.block_k))
        pooled, group = pool_keys(k, single), q.shape[1] // k.shape[1]
        # a head at a time: all queries as floats would be twice q
        score = torch.cat([shares(_from_first(q[:, h : h + 1], single).float(), pooled[:, h // group, None], ctx.scale, single)
                           for h in range(q.shape[1])], 1)
        top_k = torch.full((1, 1, 1), self.top_k, dtype=torch.int32, device=q.device)
        picks = choose(score, single, k.shape[1], top_k=top_k, sink=0, recent=1, gqa=self.gqa).to_mask()  # [B, Hp, Nq, Kb]
        filled = torch.nn.functional.pad(picks, (0, 0, 0, -q.shape[2] % self.block_q))
        return ReadPlan(index.where(filled.unflatten(2, (-1, self.block_q)).any(3)))


def _from_first(q: Tensor, index: BlockIndex) -> Tensor:
    """q with each row's real queries moved to the front, as blocks count them; what follows them is arbitrary."""
    begin, _ = query_rows(index, q.shape[0])
    if begin is None:
        return q
    at = (torch.arange(q.shape[2], device=q.device) + begin[:, None]).clamp(max=q.shape[2] - 1)
    return q.gather(2, at[:, None, :, None].expand_as(q))
