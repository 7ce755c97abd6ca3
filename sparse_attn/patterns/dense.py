"""Reads everything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..types import KVView, LayerContext, ReadPlan


@dataclass(frozen=True)
class Dense:
    """Read every key: the baseline, and what every other pattern falls back to."""

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        return ReadPlan()
