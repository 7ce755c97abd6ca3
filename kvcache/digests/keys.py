"""No digest at all: the keys themselves, for methods that score every token exactly."""

from __future__ import annotations

from torch import Tensor

from .pages import PageDigest


class Keys(PageDigest):
    """The rows of the layer as entries of pages of one token; nothing is copied, so keys may not leave the device.

    Attributes:
        k: ``[S, D]``, the layer's.
    """

    outlives_rows = False

    def clear(self) -> None:
        self.k = self.starts = self.pages = None

    def page_bytes(self) -> int:
        return 0

    def scan_bytes(self) -> int:
        return int(self.pages.sum()) * self.k.shape[1] * self.k.element_size()

    def update(self, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        self.k, self.starts, self.pages = k, starts, lengths

    def copy_from(self, other: PageDigest) -> None:
        """The rows are another's; the next update shows them."""

    def select(self, sequences: Tensor) -> None:
        """The next update shows the rows."""
