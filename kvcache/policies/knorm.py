"""Tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..types import Seen


@dataclass(frozen=True)
class KNorm:
    """Rank by ``-|k|``: keys of small L2 norm draw the most attention, the sinks first of all.

    Source: Devoto et al., arXiv:2406.11430, section 3. Differs from it: all layers evict; the paper leaves the first two alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decoding: ClassVar[bool] = True
    protect: ClassVar[tuple[int, int]] = (4, 32)

    def observe(self, seen: Seen) -> Tensor:
        new = seen.new_rows
        return seen.state.index_copy(0, new, -seen.k[new].float().norm(dim=-1))

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        return state
