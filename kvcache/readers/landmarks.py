"""Pages by their mean key, and always those that a mean describes badly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import ops

from ..digests import Landmarks as Digest
from ..store import Meter
from .common import Reader


@dataclass(frozen=True)
class Landmarks(Reader):
    """Small pages by the softmax of the products with their mean keys (ShadowKV, arXiv:2410.21465).

    The pages whose keys are least alike are read whatever the query: a mean says nothing of them. This is the reader alone; the
    method ``shadowkv`` also keeps keys as low-rank factors and values in host memory.
    Differs from its code: outliers and the newest pages count towards the budget; outliers are looked for among all pages but the
    newest, generated ones included, and are in the softmax; generated tokens are described and may go unread like any other;
    several queries are each scored by themselves.

    Attributes:
        budget: tokens per KV head that a step reads; whole pages, as many as fit.
        page: tokens of a page, counted from the first token that the head keeps.
        outliers: pages of each KV head that are always read because their keys are least alike; those of the prompt keep their
            keys as they are where a codec makes factors of the others.
        recent: last tokens that are always read, besides the queries' own.
        reduce: how the heads that share keys become one: max, mean or sum of their softmax.
        dense_layers: indices of layers that read everything; the first ones attend too broadly to be cut.
    """

    budget: int = 2048
    page: int = 8
    outliers: int = 48
    recent: int = 32
    reduce: str = "max"
    dense_layers: tuple[int, ...] = (0, 1)

    def __post_init__(self):
        super().__post_init__()
        self.require_room(self.outliers * self.page)

    def digest(self, meter: Meter, layer: int) -> Digest:
        """See ``PageReader``."""
        return Digest(meter, self.page)

    def choose(self, q: Tensor, lengths: Tensor, digest: Digest, first: Tensor | None = None,
               last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""

        def soft(starts: Tensor, pages: Tensor) -> Tensor:
            rank = ops.row_score(q, digest.landmark, starts, pages, q.shape[3] ** -0.5, True, self.reduce, first, last)
            odd = self._odd(digest, starts, pages)
            # above every share, below what is read in any case
            return rank.index_fill_(0, (starts[..., None] + odd)[odd >= 0], torch.finfo(rank.dtype).max)

        return self.best(soft, q, lengths, digest, first, last, self.recent)

    def exact(self, digest: Digest, pages: Tensor) -> Tensor | None:
        """The outliers, which a codec keeps as they are."""
        device = digest.likeness.device
        return self._odd(digest, digest.starts.to(device), pages.to(device)) if self.outliers else None

    def _odd(self, digest: Digest, starts: Tensor, pages: Tensor) -> Tensor:
        """The least alike of the first ``pages`` of each run, as numbers."""
        most = torch.full_like(pages, self.outliers, dtype=torch.int32)
        return ops.keep_top(-digest.likeness[:, 0], starts, pages, most, self.outliers)
