"""SnapKV: tokens that the last queries of the prompt look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..types import Seen


@dataclass(frozen=True)
class SnapKV:
    """Rank by the attention mass from the last ``window`` queries, pooled so that the neighbours of a hit stay with it.

    A prompt in one piece is scored as in the paper. In chunks, each chunk's last queries vote, over what was kept and the chunk.
    Source: SnapKV, arXiv:2404.14469, section 4 and Listing 1. Differs from its code:
    - one set per KV head, the mean over its query heads, instead of keys repeated per query head;
    - pooling divides by the tokens that exist, also next to the ends, see ``ops.window_mass``.

    Attributes:
        window: last queries that vote; their own tokens stay (``protect``).
        kernel: tokens pooled into one, odd; 1 for no pooling.
        pool: "mean" or "max".
        reduce: over the query heads of a group: "mean", "max" or "sum".
        decay: what the votes of earlier chunks still count when a new chunk votes; 0 for nothing.
    """

    window: int = 64
    kernel: int = 5
    pool: str = "mean"
    reduce: str = "mean"
    decay: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"q"})
    decoding: ClassVar[bool] = False

    def __post_init__(self):
        require(self.window >= 1, f"window={self.window} is no query; use 1 or more")
        odd = self.kernel >= 1 and self.kernel % 2 == 1
        require(odd, f"kernel={self.kernel} has no middle; use an odd number of tokens, 1 for no pooling")
        for name, known in (("pool", ("mean", "max")), ("reduce", ("mean", "max", "sum"))):
            require(getattr(self, name) in known, f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(known)}")
        require(0 <= self.decay <= 1, f"decay={self.decay} is outside [0, 1]; it is what older votes still count")

    @property
    def protect(self) -> tuple[int, int]:
        return 0, self.window

    def observe(self, seen: Seen) -> Tensor:
        votes = ops.window_mass(seen.q, seen.k, seen.starts, seen.lengths, seen.scale, self.window, seen.softcap, seen.sinks,
                                self.kernel, self.pool, self.reduce, seen.q_first, seen.q_last)
        # a sequence that got no token with this chunk (padding) has had its last vote
        return torch.where(seen.by_sequence(seen.n_new) > 0, self.decay * seen.state + votes, seen.state)

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        return state
