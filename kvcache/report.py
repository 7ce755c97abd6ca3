"""What a cache holds: tokens and bytes, measured and by formula."""

from __future__ import annotations

from dataclasses import dataclass

from .cache import CacheLayer
from .store import Meter


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: index in the model.
        tokens: kept per KV head and sequence, mean.
        fewest, most: tokens of the shortest and of the longest run.
        seen: tokens per sequence so far, mean; padding aside.
        n_bytes: allocated, room to grow included.
    """

    layer: int
    tokens: float
    fewest: int
    most: int
    seen: float
    n_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """All layers that evict.

    Attributes:
        layers: one row each.
        n_bytes: held now.
        peak_bytes: the most that was held at any time since the cache was made.
        token_bytes: per token, all KV heads and layers: keys, values, position and score.
    """

    layers: tuple[LayerReport, ...]
    n_bytes: int
    peak_bytes: int
    token_bytes: int

    @classmethod
    def of(cls, cores: list[CacheLayer], meter: Meter) -> CacheReport:
        """Of these layers, counted by this meter."""
        filled = [core for core in cores if core.store.k is not None]
        rows = tuple(
            LayerReport(core.layer, float(n.double().mean()), int(n.min()), int(n.max()), float(core.n_seen.double().mean()), core.store.n_bytes)
            for core in filled
            for n in [core.store.lengths]
        )
        return cls(rows, meter.now, meter.peak, sum(c.store.row_bytes() * c.store.lengths.shape[1] for c in filled))

    def formula(self, tokens: float, batch: int = 1) -> int:
        """Bytes of ``tokens`` per KV head in every layer: ``budget + chunk`` for the peak of a prefill in chunks."""
        return int(tokens * batch * self.token_bytes)

    @property
    def tokens(self) -> float:
        """Kept per KV head, mean over the layers."""
        return sum(row.tokens for row in self.layers) / len(self.layers) if self.layers else 0.0

    def __str__(self) -> str:
        lines = ["layer     kept  (fewest..most)        seen       MiB"]
        for r in self.layers:
            spread = f"{r.fewest}..{r.most}"
            lines.append(f"{r.layer:>5}  {r.tokens:>7.0f}  {spread:>14}  {r.seen:>10.0f}  {r.n_bytes / 2**20:>8.2f}")
        return "\n".join([*lines, f"now {self.n_bytes / 2**20:.2f} MiB, peak {self.peak_bytes / 2**20:.2f} MiB, {self.token_bytes} bytes per token"])
