"""Keys as they are."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_attn.rotary import Rotation

from ..store import Meter


@dataclass(frozen=True)
class Plain:
    """Keys leave the device as they are, page by page."""

    unrotates = False

    def layer(self, meter: Meter, rotation: Rotation | None) -> None:
        """See ``Codec``."""
        return None
