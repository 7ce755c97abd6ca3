"""Neighborhood attention in one dimension: a window that looks back, with gaps when it is dilated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotServed, require
from ..types import KVView, LayerContext, ReadPlan
from .a_shape import near_plan, require_near
from .choose import empty_index


@dataclass(frozen=True)
class Neighborhood:
    """Read ``window`` keys up to the query itself, or with ``dilation`` d every d-th block back from its own.

    Without dilation exact to the token: key p is read when 0 <= t - p < window. Dilated, a query block reads the key blocks at
    distance 0, d, 2d ... from each block of its own diagonal, ``ceil(window / block)`` of them, so that the same number of keys
    spans d times as far.
    Source: Neighborhood Attention, arXiv:2204.07143, and Dilated Neighborhood Attention, arXiv:2209.15001, in one dimension.
    Differs from the papers: looks back only, as a language model must, where theirs is centred; the first tokens read what there
    is instead of a window shifted ahead; dilation steps over blocks, not tokens, because single strided keys cost a whole tile.
    Cannot retrieve outside its window, and cannot serve attention without causality.

    Attributes:
        window: keys per query, own included, tokens.
        dilation: distance of one step, blocks; 1 for a plain window.
        block: edge of query and key blocks, tokens.
    """

    window: int = 4096
    dilation: int = 1
    block: int = 128

    def __post_init__(self):
        require(self.window >= 1, f"window={self.window} leaves queries without themselves; use 1 or more tokens")
        require_near(0, self.window, self.block)
        require(self.dilation >= 1, f"dilation={self.dilation} must be 1 or more blocks; 1 is a plain window")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if self.dilation == 1:
            return near_plan(q, kv, ctx, [(0, self.window)] * q.shape[1], self.block)
        if not ctx.causal:
            raise NotServed("needs causal attention")
        index = empty_index(q, kv, ctx, self.block)
        start, real = index.rows()
        reachable = index.reachable()
        keep = reachable.new_zeros(reachable.shape)
        column = torch.arange(reachable.shape[3], device=keep.device)
        own = (start // self.block)[:, None, :, None].to(keep.device)
        last = ((start + real.clamp(min=1) - 1) // self.block)[:, None, :, None].to(keep.device)
        for diagonal in (own, last):  # a query block that is not aligned to the key blocks has two
            back = diagonal - column
            keep |= (back >= 0) & (back % self.dilation == 0) & (back // self.dilation < -(-self.window // self.block))
        return ReadPlan(index.where(keep & reachable))
