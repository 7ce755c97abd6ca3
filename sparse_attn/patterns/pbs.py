"""PBS: keys sorted by importance inside segments, so that the important ones share blocks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import NotServed, require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import as_table, choose, empty_index, per_head, require_gqa
from .pooled import pool_keys, pool_queries, shares


@dataclass(frozen=True)
class PBS:
    """Sort the keys of each complete segment by importance, then read the blocks of sorted keys that cover ``threshold``.

    Important keys gather in few blocks, which raises what one block covers. A key's importance is the attention it gets from the
    last ``window`` queries. Segments are counted in key positions, so a chunk or a later turn sees the segments of its history;
    keys after the last complete segment stay where they are. A query block always reads all of its own segment (two, if it
    straddles an edge), by the keys' original positions; the threshold covers earlier segments only, scored by pooled means.
    Source: PBS-Attn, arXiv:2510.21270; defaults as in its published code, which permutes keys and values only.
    Differs from that code: query heads that share keys share one permutation, by the group's mean importance, so that keys are
    gathered once per key head; the probe sees neither the future nor past a sliding window, and its rows count all keys that
    they see, not only those in complete segments; queries with a history are served; threshold 1 reads everything, where the
    published rule can read nothing.
    Cannot tell what matters to early queries only: the probe is the end of the prompt.

    Attributes:
        threshold: share of the mass in earlier segments to cover, in [0, 1]; one number, or a table ``[layers][heads]``.
        block: edge of query and key blocks, tokens.
        segment: tokens inside which keys may change places; a multiple of ``block``.
        window: last queries of the call that say which keys matter, tokens.
        sink: 1 to always read the block that the first key sits in after sorting, 0 not to.
        gqa: what query heads that share keys do together, see ``choose``; the permutation is shared in any case.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.9
    block: int = 128
    segment: int = 256
    window: int = 128
    sink: int = 1
    gqa: str = "per_head"

    def __post_init__(self):
        object.__setattr__(self, "threshold", as_table(self.threshold, 0, 1))
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")
        fits = self.segment > 0 and self.segment % self.block == 0
        require(fits, f"segment={self.segment} is not a multiple of block={self.block}; 256 with blocks of 128 is usual")
        require(self.window >= 1, f"window={self.window} leaves no query to say which keys matter; use 1 or more")
        require(self.sink in (0, 1), f"sink={self.sink} must be 0 or 1; only the first key's block can be forced")
        require_gqa(self.gqa)

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if not ctx.causal:
            raise NotServed("needs causal attention")
        k, _ = kv.fetch()
        kv_heads, n_k = k.shape[1], k.shape[2]
        index = empty_index(q, kv, ctx, self.block)
        begin = ctx.first.long().clamp(min=0) if ctx.first is not None else torch.zeros(len(q), device=q.device).long()
        n_real = (ctx.last.clamp(max=n_k) if ctx.last is not None else n_k) - begin  # [B]
        order = self._order(q, k, ctx, index, n_real)
        candidate, forced = self._roles(order, index, n_real)
        slot = (torch.arange(n_k, device=q.device) - begin[:, None]).clamp(min=0)[:, None].expand_as(order)
        at = (order.gather(2, slot) + begin[:, None, None]).clamp(max=n_k - 1)  # sorted keys, still behind the row's padding
        pooled = pool_keys(_sorted(k, at), index)
        # slots are not positions: a block before the window's edge may hold keys behind it, if both are of one segment
        reach = replace(index, window=index.window + self.segment if index.window else 0)
        score = shares(pool_queries(q, index), pooled, ctx.scale, reach) * candidate.repeat_interleave(q.shape[1] // kv_heads, 1)
        anywhere = replace(index, causal=False, window=0, q_start=0)  # what is reachable is in candidate
        threshold = per_head(self.threshold, ctx.layer, q.shape[1], q.device)
        chosen = choose(score, anywhere, kv_heads, threshold=threshold, sink=0, recent=0, gqa=self.gqa).to_mask()
        candidate, forced = (x.repeat_interleave(chosen.shape[1] // kv_heads, 1) for x in (candidate, forced))
        return ReadPlan(index.where(chosen & candidate | forced), order=order.int())

    def _order(self, q: Tensor, k: Tensor, ctx: LayerContext, index: BlockIndex, n_real: Tensor) -> Tensor:
        """int64 ``[B, Hkv, Nk]``: the key in each slot, by falling importance within complete segments."""
        queries = index.rows()[1].sum(-1, keepdim=True).to(q.device)  # [B, 1]
        rows = queries - min(self.window, q.shape[2]) + torch.arange(min(self.window, q.shape[2]), device=q.device)
        received, _ = ops.window_score(q, k, rows.clamp(min=-1).int(), ctx.scale, ctx.q_start, True, ctx.window, ctx.softcap,
                                       ctx.first, ctx.last)  # fmt: skip
        importance = received.unflatten(1, (k.shape[1], -1)).mean(2)
        slot = torch.arange(k.shape[2], device=q.device)
        filled = torch.nn.functional.pad(importance, (0, -k.shape[2] % self.segment)).unflatten(2, (-1, self.segment))
        local = torch.sort(filled, dim=-1, descending=True, stable=True).indices.flatten(2)[..., : k.shape[2]]
        order = local + slot // self.segment * self.segment
        return torch.where(slot < (n_real // self.segment * self.segment)[:, None, None], order, slot)

    def _roles(self, order: Tensor, index: BlockIndex, n_real: Tensor) -> tuple[Tensor, Tensor]:
        """bool ``[B, Hkv, Qb, Kb]`` twice: blocks of earlier segments to choose from, and blocks always read."""
        n_k = order.shape[2]
        start, real = (x.to(order.device)[:, None, :, None] for x in index.rows())
        slot = torch.arange(n_k, device=order.device)
        places = torch.nn.functional.pad(order.masked_fill(slot >= n_real[:, None, None], n_k), (0, -n_k % self.block), value=n_k)
        earliest = places.unflatten(2, (-1, self.block)).amin(-1)[:, :, None]  # [B, Hkv, 1, Kb], position
        segment = torch.arange(earliest.shape[3], device=order.device) * self.block // self.segment
        seen = (earliest < start + real) & (real > 0)
        if index.window:
            seen &= segment >= (start - index.window + 1).clamp(min=0) // self.segment
        own = segment >= start // self.segment
        return seen & ~own, seen & (own | (earliest == 0) if self.sink else own)


def _sorted(k: Tensor, at: Tensor) -> Tensor:
    """Keys ``at`` int64 ``[B, Hkv, Nk]``; whole rows, where ``gather`` would need an index per channel."""
    keys = torch.empty_like(k, memory_format=torch.contiguous_format)
    for b, h in itertools.product(range(k.shape[0]), range(k.shape[1])):
        torch.index_select(k[b, h], 0, at[b, h], out=keys[b, h])
    return keys
