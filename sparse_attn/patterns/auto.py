"""The preset: dense for short texts, the method that needs least for long ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import require
from ..types import KVView, LayerContext, ReadPlan, Selector
from .chorus import Chorus


@dataclass(frozen=True)
class Auto:
    """Read everything of a short text, and what ``far`` chooses of a longer one.

    Choosing costs a share of dense attention that falls as the text grows, while what it saves rises. ``python -m
    benchmarks.methods`` shows where they meet on a model, ``python -m benchmarks.selection`` the share.

    Attributes:
        far: the method for long texts.
        far_from: keys from which it chooses, tokens.
    """

    far: Selector = Chorus()
    far_from: int = 4096

    def __post_init__(self):
        require(isinstance(self.far, Selector), f"far={self.far!r} is no selector; give one, or its name where the config reads it")
        require(self.far_from >= 0, f"far_from={self.far_from} is negative; it counts keys")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        return self.far.select(q, kv, ctx) if kv.n_tokens >= self.far_from else ReadPlan()
