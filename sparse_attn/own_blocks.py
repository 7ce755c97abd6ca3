"""Key blocks that a model's own indexer chose, as a plan for our kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .types import BlockIndex, KVView, LayerContext, ReadPlan


@dataclass(frozen=True, eq=False)
class OwnBlocks:
    """Read what each query's list names: a query block is one token, a key block what the model's indexer calls a block.

    MiniMax-M3 passes such lists to the attention function of every implementation but eager and sdpa. Its blocks are counted
    from key 0, so a batch with left padding, whose rows would count theirs from the first real key, has no such plan.

    Attributes:
        indices: int ``[B, Hi, Nq, S]`` distinct key blocks in any order, -1 for none; Hi divides the query heads.
        block: keys in a block.
    """

    indices: Tensor
    block: int

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        n_k = kv.n_tokens
        k_blocks = -(-n_k // self.block)
        rising = self.indices.masked_fill(self.indices < 0, k_blocks).sort(-1).values
        unused = rising == k_blocks
        return ReadPlan(BlockIndex((~unused).sum(-1).int(), rising.masked_fill(unused, -1).int(), (1, self.block), q.shape[2], n_k,
                                   ctx.q_start, ctx.causal, ctx.window, ctx.first, ctx.last))
