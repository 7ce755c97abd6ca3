"""Tokens drawn by lot: what any other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.errors import require

from ..types import Seen

_LOW = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """Every bit of a 32-bit number held in an int64 depends on every other (an xorshift-multiply round, twice)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Random:
    """A rank hashed from seed, layer, KV head and position: the same tokens stay however a prompt is cut or batched.

    Attributes:
        seed: another seed is another draw.
    """

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    decoding: ClassVar[bool] = True
    protect: ClassVar[tuple[int, int]] = (4, 32)

    def __post_init__(self):
        require(isinstance(self.seed, int) and not isinstance(self.seed, bool), f"seed={self.seed!r} must be a whole number")

    def observe(self, seen: Seen) -> Tensor:
        return seen.state

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        salt = torch.tensor([self.seed & _LOW, seen.layer], device=seen.positions.device)
        mixed = _mixed(_mixed(salt[0]) + salt[1] & _LOW)
        for part in (seen.owner % seen.starts.shape[1], seen.positions.long()):
            mixed = _mixed(mixed + part & _LOW)
        return (mixed >> 8).float() / 2**24  # 24 bits: exact in float32
