"""Tokens by the vote of all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..digests import Votes
from ..store import Meter
from .common import Reader, n_real


@dataclass(frozen=True)
class TokenSelect(Reader):
    """The tokens that get most of the attention of all heads together, one list per layer (TokenSelect, arXiv:2411.02886).

    Every key is scored exactly: each head's softmax over the candidates, the tokens between ``sinks`` and ``recent``, is its vote.
    While the query is much like the one that last chose, that choice stands and no key is scored.
    Differs from its code: keys stay at their true positions, where it numbers the tokens of a list anew; votes are softmax with the
    scale of attention, which it leaves out; sinks and recent count towards the budget; prompts read everything; several
    queries have the largest of their votes.

    Attributes:
        budget: tokens that a step reads.
        sinks, recent: first and last tokens that are always read, besides the queries' own.
        similar: least cosine similarity, over all heads, of a query to the one that chose, for the choice to stand; above 1 for
            never.
        dense_layers: indices of layers that read everything; the first ones attend too broadly to be cut.
    """

    budget: int = 2048
    sinks: int = 128
    recent: int = 512
    similar: float = 0.9
    dense_layers: tuple[int, ...] = (0, 1)

    page: ClassVar[int] = 1
    one_list: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.require_room()
        number = isinstance(self.similar, int | float) and not isinstance(self.similar, bool)
        require(number, f"similar={self.similar!r} must be a number")

    def digest(self, meter: Meter, layer: int) -> Votes:
        """See ``PageReader``."""
        return Votes(meter, 1)

    def choose(self, q: Tensor, lengths: Tensor, digest: Votes, first: Tensor | None = None,
               last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""
        real = n_real(q, first, last)
        at = torch.arange(q.shape[2], device=q.device) - (0 if first is None else first[:, None])
        counted = ((at >= 0) & (at < real[:, None])).expand(len(q), -1)[:, None, :, None]
        asked = q.float().masked_fill(~counted, 0.0).sum(2).flatten(1)
        stands = digest.stands(asked, self.similar)

        def votes(starts: Tensor, older: Tensor) -> Tensor:
            among = (older - self.sinks).clamp(min=0).masked_fill(stands[:, None], 0)
            begin = torch.where(among > 0, starts + self.sinks, 0)
            digest.scanned = int(among.sum())
            found = ops.row_score(q, digest.k, begin, among, q.shape[3] ** -0.5, True, "sum", first, last)
            if digest.chosen is not None:
                rows = starts[:, :1] + digest.chosen
                found[rows[(digest.chosen >= 0) & stands[:, None]]] = 1.0
            return found

        digest.scanned = 0
        chosen = self.best(votes, q, lengths, digest, first, last, self.recent)
        if chosen is not None:
            digest.choose(asked, chosen[:, 0], stands)
        return chosen
