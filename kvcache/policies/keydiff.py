"""Tokens whose keys are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..types import Seen


@dataclass(frozen=True)
class KeyDiff:
    """Rank by the negative cosine between a key and the mean direction of all keys that its head still holds.

    Source: KeyDiff, arXiv:2504.15364, section 3. When a prompt comes in chunks, the mean is over what was kept and the chunk.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decoding: ClassVar[bool] = True
    protect: ClassVar[tuple[int, int]] = (4, 32)

    def observe(self, seen: Seen) -> Tensor:
        return seen.state

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        rank = torch.zeros_like(state)
        for start, length in zip(seen.starts.flatten().tolist(), seen.lengths.flatten().tolist(), strict=True):
            rows = slice(start, start + length)  # one run at a time: float32 copies of all keys would double the cache
            unit = normalize(seen.k[rows].float(), dim=-1)
            rank[rows] = -(unit @ normalize(unit.sum(0), dim=0))
        return rank
