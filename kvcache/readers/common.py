"""What readers share: settings that make sense, and the pages that are read whatever their score."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..digests import PageDigest

_REDUCE = ("max", "mean", "sum")


class Reader:
    """Checks the fields that readers share; chooses by score.

    ``budget``, ``page`` and ``dense_layers`` must be there; ``reduce``, ``sinks`` and ``recent`` may be.

    Attributes:
        one_list: whether all KV heads of a layer read the same pages, so that they must hold the same tokens.
        sinks: first tokens that are always read; at least the first page is.
    """

    one_list: ClassVar[bool] = False
    sinks: int = 0

    def __post_init__(self):
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name, least in (("budget", 1), ("page", 1), ("sinks", 0), ("recent", 0), ("outliers", 0)):
            n = getattr(self, name, least)
            unit = "pages" if name == "outliers" else "tokens"
            require(isinstance(n, int) and not isinstance(n, bool) and n >= least, f"{name}={n!r} must be {least} or more {unit}")
        reduce = getattr(self, "reduce", "max")
        require(reduce in _REDUCE, f"reduce={reduce!r} is not known; use one of {', '.join(_REDUCE)}")
        bad = [i for i in self.dense_layers if not isinstance(i, int) or i < 0]
        require(not bad, f"dense_layers has {bad[0] if bad else ''!r}, which is no index of a layer; they count from 0")

    def require_room(self, besides: int = 0) -> None:
        """The budget is for more than what is read in any case: sinks, ``recent``, a query's own page, and ``besides`` tokens."""
        always = (self._sink_pages + -(-self.recent // self.page) + 1) * self.page + besides
        require(self.budget >= always + self.page,
                f"budget={self.budget} leaves no page to choose, since {always} tokens are read in any case; give "
                f"{always + self.page} or more")

    @property
    def _sink_pages(self) -> int:
        return max(-(-self.sinks // self.page), 1)

    def reads_all(self, layer: int) -> bool:
        """Whether a layer of the model reads everything, and needs no digest."""
        return layer in self.dense_layers

    def exact(self, digest: PageDigest, pages: Tensor) -> Tensor | None:
        """See ``PageReader``."""
        return None

    def best(self, score: Callable[[Tensor, Tensor], Tensor], q: Tensor, lengths: Tensor, digest: PageDigest, first: Tensor | None,
             last: Tensor | None, near: int = 0) -> Tensor | None:
        """What ``choose`` returns: the first pages, the newest ones, and the best of the others, as the budget allows.

        Args:
            score: makes float32 ``[P]`` of first entry and entries of each run, which are where q is, without the newest ones, so
                that a token of a draft has no say in what those before it read; asked only if not all are read.
            near: tokens before the queries' own that are always read too.
        """
        n_q = q.shape[2]
        own = (n_q + near + self.page - 2) // self.page + 1  # pages that so many tokens may touch
        count = max(self.budget // self.page, self._sink_pages + own)
        if int(digest.pages.max()) <= count:
            return None
        starts, pages = digest.starts.to(q.device), digest.pages.to(q.device)
        older = (lengths - near - n_real(q, first, last)[:, None]).clamp(min=0) // self.page
        rank = score(starts, older)
        newest = older[..., None] + torch.arange(own, device=q.device)
        always = torch.cat([torch.arange(self._sink_pages, device=q.device).expand(*pages.shape, -1), newest], -1)
        rank.index_fill_(0, (starts[..., None] + always)[always < pages[..., None]], float("inf"))
        counts = torch.full_like(pages, count, dtype=torch.int32)
        if not self.one_list:
            return ops.keep_top(rank, starts, pages, counts, count)
        votes = of_layer(rank, starts, pages)
        begin = torch.arange(len(votes), device=q.device)[:, None] * votes.shape[1]
        return ops.keep_top(votes.flatten(), begin, pages[:, :1], counts[:, :1], count).repeat(1, pages.shape[1], 1)


def n_real(q: Tensor, first: Tensor | None, last: Tensor | None) -> Tensor:
    """int64 ``[B]``: real queries of each sequence."""
    low, high = (0 if first is None else first.clamp(0, q.shape[2])), (q.shape[2] if last is None else last.clamp(0, q.shape[2]))
    return torch.as_tensor(high - low, device=q.device).clamp(min=0).long().expand(len(q))


def of_layer(rank: Tensor, starts: Tensor, pages: Tensor) -> Tensor:
    """float32 ``[B, N]``: ranks of the entries of a sequence summed over its KV heads, anything behind the last one."""
    at = starts[..., None] + torch.arange(int(pages.max()), device=rank.device)
    return rank[at.clamp(max=len(rank) - 1)].sum(1)
