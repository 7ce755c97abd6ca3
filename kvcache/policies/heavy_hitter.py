"""H2O: tokens that drew the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..types import Seen


@dataclass(frozen=True)
class HeavyHitter:
    """Rank by the attention mass that a token received from all queries since it came, its own included.

    Source: H2O, arXiv:2306.14048, section 4. Differs from it:
    - masses come from the log-sum-exp of attention, not from n x n probabilities, and are summed over the heads of a group;
    - the cache protects sinks and a fixed recent part (by default 4 and 32 tokens), not half of the budget: give ``recent``;
    - ``normalize`` can take away the head start of old tokens, which more queries could see.

    Attributes:
        normalize: "sum" ranks by the plain sum, as the paper does; "visible" divides by the number of queries that could see
            the token; "ema" forgets: before a chunk of n tokens is added, older mass counts ``decay ** n``.
        decay: of "ema", per token; within one chunk nothing decays, so that results depend on how a prompt is cut.
    """

    normalize: str = "sum"
    decay: float = 0.999

    needs: ClassVar[frozenset[str]] = frozenset({"q", "lse"})
    decoding: ClassVar[bool] = True
    protect: ClassVar[tuple[int, int]] = (4, 32)

    def __post_init__(self):
        known = ("sum", "visible", "ema")
        require(self.normalize in known, f"normalize={self.normalize!r} is not known; use one of {', '.join(known)}")
        require(0 < self.decay <= 1, f"decay={self.decay} is outside (0, 1]; 1 forgets nothing")

    def observe(self, seen: Seen) -> Tensor:
        mass = ops.key_mass(seen.q, seen.k, seen.lse, seen.starts, seen.lengths, seen.scale, seen.softcap, reduce="sum",
                            q_first=seen.q_first, q_last=seen.q_last)
        if self.normalize != "ema":
            return seen.state + mass
        return seen.by_sequence(torch.tensor(self.decay) ** seen.n_new) * seen.state + mass

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        if self.normalize != "visible":
            return state
        return state / (seen.by_sequence(seen.n_seen) - seen.positions).clamp(min=1)
