"""The keys themselves, and what was chosen last."""

from __future__ import annotations

import torch
from torch import Tensor

from ..store import empty_rows
from .keys import Keys
from .pages import PageDigest


class Votes(Keys):
    """Keys, and the last query that chose among them with what it chose (TokenSelect, arXiv:2411.02886).

    Attributes:
        asked: float32 ``[B, H * D]``, the query; None before.
        chosen: int32 ``[B, slots]``, the tokens; -1 behind them.
        scanned: keys that the last choice read, of all runs.
    """

    learned = ("asked", "chosen")
    scanned = 0

    def clear(self) -> None:
        super().clear()
        self._forget_choice()

    def update(self, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        if self.pages is not None and bool((lengths < self.pages).any()):
            self._forget_choice()
        super().update(k, starts, lengths)

    def copy_from(self, other: PageDigest) -> None:
        self._remember(other.asked, other.chosen)

    def select(self, sequences: Tensor) -> None:
        if self.asked is not None:
            self._remember(self.asked[sequences.to(self.asked.device)], self.chosen[sequences.to(self.chosen.device)])
        self.pages = None  # of other sequences

    def stands(self, asked: Tensor, similar: float) -> Tensor:
        """bool ``[B]``: for which sequences the last choice serves a query (as ``asked``) too."""
        if self.asked is None:
            return torch.zeros(len(asked), dtype=torch.bool, device=asked.device)
        return torch.cosine_similarity(asked, self.asked, -1) >= similar

    def choose(self, asked: Tensor, chosen: Tensor, stands: Tensor) -> None:
        """Remember a choice, but for sequences whose last one stands."""
        if self.asked is not None:
            width = max(self.chosen.shape[1], chosen.shape[1])
            old, chosen = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in (self.chosen, chosen))
            asked, chosen = torch.where(stands[:, None], self.asked, asked), torch.where(stands[:, None], old, chosen)
        self._remember(asked, chosen)

    def scan_bytes(self) -> int:
        return self.scanned * self.k.shape[1] * self.k.element_size()

    def _remember(self, asked: Tensor | None, chosen: Tensor | None) -> None:
        for name, t in (("asked", asked), ("chosen", chosen)):
            self._hold(name, None if t is None else empty_rows(t, len(t)).copy_(t))

    def _forget_choice(self) -> None:
        self._remember(None, None)
        self.scanned = 0
