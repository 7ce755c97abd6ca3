"""StreamingLLM: the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..types import Seen


@dataclass(frozen=True)
class Streaming:
    """Keep the newest tokens beside the sinks that the cache protects; what lies between is gone for good.

    Source: StreamingLLM, arXiv:2309.17453, section 3.2; four sinks. Differs from it: keys stay at the positions they had, unless
    the cache rolls them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decoding: ClassVar[bool] = True
    protect: ClassVar[tuple[int, int]] = (4, 0)

    def observe(self, seen: Seen) -> Tensor:
        return seen.state

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        return seen.positions.float()
