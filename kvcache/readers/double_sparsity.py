"""Tokens by a few channels of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..channels import read_channels
from ..digests import Labels
from ..store import Meter
from .common import Reader


@dataclass(frozen=True)
class DoubleSparsity(Reader):
    """The tokens whose keys fit the query best in the few channels that matter (Double Sparsity, arXiv:2408.07092).

    Which channels those are comes from a file that ``kvcache.channels`` made, as in the paper, or from the prompt itself; see
    ``digests.Labels``.
    Differs from the paper: channels and tokens are chosen per KV head, for all query heads that share it; the first tokens and the
    newest ones are always read and count towards the budget; several queries are each scored by themselves.

    Attributes:
        budget: tokens per KV head that a step reads.
        width: channels of a label; those of the file, where one is given. The paper's share would be 8 of 128.
        path: JSON file of channels; empty to choose them by the prompt.
        sinks, recent: first and last tokens that are always read, besides the queries' own.
        reduce: how the products of the heads that share keys become one: max, mean or sum.
        dense_layers: indices of layers that read everything; the first ones attend too broadly to be cut.

    Raises:
        ContractError: if the file holds no channels; when the model runs, if they are not made for it.
    """

    budget: int = 2048
    width: int = 16
    path: str = ""
    sinks: int = 4
    recent: int = 64
    reduce: str = "max"
    dense_layers: tuple[int, ...] = (0, 1)

    page: ClassVar[int] = 1

    def __post_init__(self):
        super().__post_init__()
        self.require_room()
        require(isinstance(self.width, int) and not isinstance(self.width, bool) and self.width >= 1,
                f"width={self.width!r} must be 1 or more channels")
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "channels", read_channels(self.path) if self.path else None)

    def digest(self, meter: Meter, layer: int) -> Labels:
        """See ``PageReader``."""
        if self.channels is None:
            return Labels(meter, self.width, self.budget)
        require(layer in self.channels, f"channels {self.path} have none of layer {layer}; measure this model")
        given = torch.tensor(self.channels[layer])
        return Labels(meter, given.shape[1], self.budget, given)

    def choose(self, q: Tensor, lengths: Tensor, digest: Labels, first: Tensor | None = None,
               last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""

        def product(starts: Tensor, pages: Tensor) -> Tensor:
            return ops.row_score(digest.of(q), digest.label, starts, pages, 1.0, False, self.reduce, first, last)

        return self.best(product, q, lengths, digest, first, last, self.recent)
