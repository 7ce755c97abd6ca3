"""ProxyAttn: a few mean heads rank the blocks, every head says how many it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..types import KVView, LayerContext, ReadPlan
from .choose import choose, empty_index
from .probe import observe, packed, probed_blocks, rows_alone, tails


@dataclass(frozen=True)
class ProxyAttn:
    """Rank key blocks once per group of heads by the group's mean query and key; read as many as each head's last rows need.

    Heads agree on which blocks matter and differ in how many. The ranking takes the largest probability of any sampled pair in
    a tile. A head's budget is the share of blocks that covers ``threshold`` of what its last ``block`` rows attend to, applied
    to every query block. The first block and the query block's own are always read and count.
    Source: ProxyAttn, arXiv:2509.24745; proxies=1 is its setting for Llama-3.1-8B, 4 for Qwen2.5-7B-1M.

    Differs from the paper, which states neither: the forced blocks, and the last rows being real rows rather than those of the
    last block, which may hold a single one. Budgets are whole blocks, ``ceil(k * reachable / n)`` in integers.

    It cannot see a pair whose distance is no multiple of ``stride``, such as most exact copies, nor without ``rotate`` a key that
    the stride skips; and a mean of heads whose norms differ follows the largest.

    Attributes:
        threshold: share of mass that sets a head's budget, in [0, 1]. 1 is dense.
        proxies: groups of heads per layer; must divide the number of key heads.
        stride: every how many tokens a query and a key are sampled; must divide ``block``.
        rotate: sample other tokens in every query block, so that each key is sampled by some; the paper always skips the same.
        min_budget: least tokens that a query block reads.
        block: edge of query and key blocks, and the last queries that probe, tokens.
    """

    threshold: float = 0.95
    proxies: int = 1
    stride: int = 4
    rotate: bool = False
    min_budget: int = 2048
    block: int = 128

    def __post_init__(self):
        require(0 <= self.threshold <= 1, f"threshold={self.threshold} is outside [0, 1]; it is a share of attention mass")
        require(self.proxies >= 1, f"proxies={self.proxies} leaves no head to rank blocks; 1 is usual")
        require(self.min_budget >= 0, f"min_budget={self.min_budget} is negative; it counts tokens")
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")
        require(self.stride > 0, f"stride={self.stride} must be positive; 4 is usual")
        require(self.block % self.stride == 0, f"block={self.block} is not a multiple of stride={self.stride}; use 4")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        alone, block, (k, _) = rows_alone(q, kv, ctx), self.block, kv.fetch()
        heads, kv_heads = q.shape[1], k.shape[1]
        require(kv_heads % self.proxies == 0, f"proxies={self.proxies} does not divide the {kv_heads} key heads; use 1 or a divisor")
        index = empty_index(q, kv, ctx, block)
        q_mean, k_mean = (_mean_heads(x, self.proxies) for x in (q, k))
        score = ops.strided_score(q_mean, k_mean, block, block, self.stride, ctx.scale, q_start=ctx.q_start, causal=ctx.causal,
                                  window=ctx.window, rotate=self.rotate, first=ctx.first, last=ctx.last)
        mass, _ = observe(q, k, packed([tails(span.n_q, 1, block) for span in alone], q.device), ctx, block)
        covered = mass.double().sort(-1, descending=True).values.cumsum(-1)
        # blocks before the threshold is reached, and the one that reaches it
        needed = (covered < self.threshold * covered[..., -1:]).sum(-1) + 1
        seen = torch.tensor([[max(1, len(probed_blocks(span, block, block, ctx.window)))] for span in alone], device=q.device)
        needed = seen.expand_as(needed) if self.threshold >= 1 else needed
        reachable = index.reachable().sum(-1)  # [B, 1, Qb]
        top_k = (needed[..., None] * reachable + seen[..., None] - 1) // seen[..., None]
        return ReadPlan(choose(score.repeat_interleave(heads // self.proxies, 1), index, kv_heads,
                               top_k=top_k.clamp(min=-(-self.min_budget // block)).int()))


def _mean_heads(x: Tensor, groups: int) -> Tensor:
    """``[B, groups, N, D]``: mean over the heads of each group; head by head, whose sum fits a cache."""
    x = x.unflatten(1, (groups, -1))
    total = x[:, :, 0].to(torch.promote_types(x.dtype, torch.float32), copy=True)
    for head in range(1, x.shape[2]):
        total += x[:, :, head]
    return (total / x.shape[2]).to(x.dtype)
