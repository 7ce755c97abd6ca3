"""ChunkKV: whole pieces of text instead of single tokens."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor

from sparse_attn.errors import require

from ..types import Budget, Seen


@dataclass(frozen=True)
class ChunkKV:
    """Rank every token by the mean rank of its chunk, ``chunk`` consecutive positions, so that chunks stay or go whole.

    Only the last chunk that fits the budget may be cut; its earlier tokens stay then. Chunks are counted from each sequence's
    first token; of a chunk that lost tokens before, those left are averaged.
    Source: ChunkKV, arXiv:2502.00299, section 3 (chunks of 10 to 20 tokens).

    Attributes:
        inner: name of the policy that ranks tokens, with its usual settings.
        chunk: tokens.
    """

    inner: str = "snapkv"
    chunk: int = 20

    def __post_init__(self):
        from . import POLICIES

        known = [name for name, cls in POLICIES.items() if cls is not ChunkKV and all(f.default is not MISSING for f in fields(cls))]
        require(self.inner in known, f"inner={self.inner!r}: no such policy; there are {', '.join(known)}")
        require(self.chunk >= 1, f"chunk={self.chunk} must be 1 or more tokens")
        object.__setattr__(self, "_inner", POLICIES[self.inner]())

    @property
    def needs(self) -> frozenset[str]:
        return self._inner.needs

    @property
    def decoding(self) -> bool:
        return self._inner.decoding

    @property
    def protect(self) -> tuple[int, int]:
        return self._inner.protect

    @property
    def window(self) -> int:
        return getattr(self._inner, "window", 0)

    def require_budget(self, budget: Budget) -> None:
        """Raise ContractError where ``inner`` does."""
        if hasattr(self._inner, "require_budget"):
            self._inner.require_budget(budget)

    def observe(self, seen: Seen) -> Tensor:
        return self._inner.observe(seen)

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        rank = self._inner.rank(seen, state)
        mine = seen.owner >= 0
        per_run = int(seen.n_seen.max()) // self.chunk + 1 if seen.n_seen.numel() else 1
        number = (seen.owner * per_run + seen.positions // self.chunk)[mine]
        total = torch.zeros(seen.starts.numel() * per_run, dtype=torch.float64, device=rank.device)
        mean = total.index_add(0, number, rank[mine].double()) / total.index_add(0, number, torch.ones_like(rank[mine]).double())
        return rank.masked_scatter(mine, mean[number].float())
