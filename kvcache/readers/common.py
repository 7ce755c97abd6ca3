"""What readers share: settings that make sense, and the pages that are read whatever their score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..digests import PageDigest

_REDUCE = ("max", "mean", "sum")


class Reader:
    """Checks the fields that a reader has of ``budget``, ``page``, ``reduce`` and ``dense_layers``; chooses by score."""

    def __post_init__(self):
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("budget", "page"):
            tokens = getattr(self, name)
            require(isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1, f"{name}={tokens!r} must be 1 or more tokens")
        reduce = getattr(self, "reduce", "max")
        require(reduce in _REDUCE, f"reduce={reduce!r} is not known; use one of {', '.join(_REDUCE)}")
        bad = [i for i in self.dense_layers if not isinstance(i, int) or i < 0]
        require(not bad, f"dense_layers has {bad[0] if bad else ''!r}, which is no index of a layer; they count from 0")

    def reads_all(self, layer: int) -> bool:
        """Whether a layer of the model reads everything, and needs no digest."""
        return layer in self.dense_layers

    def best(self, score: Callable[[Tensor, Tensor], Tensor], q: Tensor, lengths: Tensor, digest: PageDigest, first: Tensor | None,
             last: Tensor | None, near: int = 0) -> Tensor | None:
        """What ``choose`` returns: the first page, those of the queries' own tokens, and the best of the others, as the budget allows.

        Args:
            score: makes float32 ``[P]`` of first entry and entries of each run, which are where q is; asked only if not all are read.
            near: tokens before the queries' own that are always read too.
        """
        n_q = q.shape[2]
        own = (n_q + near + self.page - 2) // self.page + 1  # pages that so many tokens may touch
        count = max(self.budget // self.page, 1 + own)
        if int(digest.pages.max()) <= count:
            return None
        starts, pages = digest.starts.to(q.device), digest.pages.to(q.device)
        rank = score(starts, pages)
        low, high = (0 if first is None else first.clamp(0, n_q)), (n_q if last is None else last.clamp(0, n_q))
        real = torch.as_tensor(high - low, device=q.device).clamp(min=0).expand(len(q))
        oldest = ((lengths - near - real[:, None]).clamp(min=0) // self.page).minimum(pages - 1).clamp(min=0)
        newest = torch.maximum((pages - 1)[..., None] - torch.arange(own, device=q.device), oldest[..., None])
        rank.index_fill_(0, torch.cat([starts[..., None], starts[..., None] + newest], -1).flatten(), float("inf"))
        return ops.keep_top(rank, starts, pages, torch.full_like(pages, count, dtype=torch.int32), count)
