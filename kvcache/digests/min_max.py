"""Smallest and largest value of every channel."""

from __future__ import annotations

from torch import Tensor

from .pages import PageDigest


class MinMax(PageDigest):
    """Bounds of the keys of each page (Quest, arXiv:2406.10774, section 3.3).

    Attributes:
        low, high: ``[P, D]`` in the dtype of the keys.
    """

    names = ("low", "high")

    def blank(self, k: Tensor) -> dict[str, Tensor]:
        return {name: k.new_empty(0, k.shape[1]) for name in self.names}

    def describe(self, keys: Tensor, run: Tensor) -> dict[str, Tensor]:
        return {"low": keys.amin(1), "high": keys.amax(1)}
