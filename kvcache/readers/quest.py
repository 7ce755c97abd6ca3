"""Pages by the bounds of their keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..digests import MinMax
from ..store import Meter

_REDUCE = ("max", "mean", "sum")


@dataclass(frozen=True)
class Quest:
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
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("budget", "page"):
            tokens = getattr(self, name)
            require(isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1, f"{name}={tokens!r} must be 1 or more tokens")
        require(self.budget >= 2 * self.page,
                f"budget={self.budget} holds fewer than two pages of {self.page} tokens, the first and the last; give {2 * self.page} or more")
        require(self.reduce in _REDUCE, f"reduce={self.reduce!r} is not known; use one of {', '.join(_REDUCE)}")
        bad = [i for i in self.dense_layers if not isinstance(i, int) or i < 0]
        require(not bad, f"dense_layers has {bad[0] if bad else ''!r}, which is no index of a layer; they count from 0")

    @property
    def recent(self) -> int:
        """See ``PageReader``."""
        return self.page

    def reads_all(self, layer: int) -> bool:
        """Whether a layer of the model reads everything, and needs no digest."""
        return layer in self.dense_layers

    def digest(self, meter: Meter, layer: int) -> MinMax:
        """See ``PageReader``."""
        return MinMax(meter, self.page)

    def choose(self, q: Tensor, lengths: Tensor, digest: MinMax, first: Tensor | None = None, last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""
        n_q = q.shape[2]
        own = (n_q + self.page - 2) // self.page + 1  # pages that so many tokens may touch
        count, most = max(self.budget // self.page, 1 + own), int(digest.pages.max())
        if most <= count:
            return None
        starts, pages = digest.starts.to(q.device), digest.pages.to(q.device)
        score = ops.page_score(q, digest.low, digest.high, starts, pages, self.reduce, first, last)
        low, high = (0 if first is None else first.clamp(0, n_q)), (n_q if last is None else last.clamp(0, n_q))
        real = torch.as_tensor(high - low, device=q.device).clamp(min=0).expand(len(q))
        oldest = ((lengths - real[:, None]).clamp(min=0) // self.page).minimum(pages - 1).clamp(min=0)
        newest = torch.maximum((pages - 1)[..., None] - torch.arange(own, device=q.device), oldest[..., None])
        score.index_fill_(0, torch.cat([starts[..., None], starts[..., None] + newest], -1).flatten(), float("inf"))
        return ops.keep_top(score, starts, pages, torch.full_like(pages, count, dtype=torch.int32), count)
