"""Pages by the bounds of their keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..digests import MinMax
from ..store import Meter
from .common import Reader


@dataclass(frozen=True)
class Quest(Reader):
    """The pages that could hold the largest products with the queries, by their smallest and largest keys (Quest, arXiv:2406.10774).

    Differs from the paper: one list per KV head, for all query heads that share it, so that a page is read once; several queries
    are each bounded by themselves; the first page and those of the queries' own tokens are always read.

    Attributes:
        budget: tokens per KV head that a step reads; whole pages, as many as fit.
        page: tokens of a page, counted from the first token that the head keeps.
        reduce: how the bounds of the query heads that share keys become one: max, mean or sum.
        dense_layers: indices of layers that read everything; the first ones attend too broadly to be cut.
    """

    budget: int = 2048
    page: int = 16
    reduce: str = "max"
    dense_layers: tuple[int, ...] = (0, 1)

    def __post_init__(self):
        super().__post_init__()
        require(self.budget >= 2 * self.page,
                f"budget={self.budget} holds fewer than two pages of {self.page} tokens, the first and the last; give {2 * self.page} or more")

    @property
    def recent(self) -> int:
        """See ``PageReader``."""
        return self.page

    def digest(self, meter: Meter, layer: int) -> MinMax:
        """See ``PageReader``."""
        return MinMax(meter, self.page)

    def choose(self, q: Tensor, lengths: Tensor, digest: MinMax, first: Tensor | None = None, last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""

        def bound(starts: Tensor, pages: Tensor) -> Tensor:
            return ops.page_score(q, digest.low, digest.high, starts, pages, self.reduce, first, last)

        return self.best(bound, q, lengths, digest, first, last)
