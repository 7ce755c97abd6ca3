"""What a cache holds: tokens and bytes, measured and by formula."""

from __future__ import annotations

from dataclasses import dataclass

from .cache import CacheLayer
from .store import Meter
from .tiers import Pools


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: index in the model.
        tokens: kept per KV head and sequence, mean.
        fewest, most: tokens of the shortest and of the longest run.
        seen: tokens per sequence so far, mean; padding aside.
        n_bytes: allocated, room to grow included.
        step_bytes: keys, values and digests of pages that the last call of few queries (``sparse_attn.kept.FEW_QUERIES``) read, all
            sequences; 0 before the first.
        dense_step_bytes: the same if it had read everything that is kept.
        moved_bytes: of these, what came from another tier.
        wanted, missed: pages behind the device that steps asked for since the cache was made, and those that were not in its slots.
    """

    layer: int
    tokens: float
    fewest: int
    most: int
    seen: float
    n_bytes: int
    step_bytes: int = 0
    dense_step_bytes: int = 0
    moved_bytes: int = 0
    wanted: int = 0
    missed: int = 0

    @classmethod
    def of(cls, core: CacheLayer) -> LayerReport:
        """Of this layer, which is not empty."""
        store, digest, archive, lengths = core.store, core.digest, core.archive, core.lengths
        row = sum(t.shape[1] * t.element_size() for t in (store.k, store.v))
        read = 0 if core.read is None else int(core.read.sum()) * row
        if digest is not None and core.read is not None and core.read.shape[2] > 1:
            read += digest.scan_bytes()
        held = store.n_bytes + sum(x.n_bytes for x in (digest, archive) if x is not None)
        moves = (0, 0, 0) if archive is None else (archive.moved, archive.wanted, archive.missed)
        return cls(core.layer, float(lengths.double().mean()), int(lengths.min()), int(lengths.max()), float(core.n_seen.double().mean()),
                   held, read, 0 if core.read is None else int(lengths.sum()) * row, *moves)


@dataclass(frozen=True)
class CacheReport:
    """All layers with attention over the whole text.

    Attributes:
        layers: one row each.
        n_bytes: held now, on the device.
        peak_bytes: the most that was held there at any time since the cache was made.
        token_bytes: per token, all KV heads and layers: keys, values, position and score, and its share of the digest of its page; for
            tokens that are on the device.
        tiers: bytes of pages that other tiers hold, by name.
    """

    layers: tuple[LayerReport, ...]
    n_bytes: int
    peak_bytes: int
    token_bytes: int
    tiers: dict[str, int]

    @classmethod
    def of(cls, cores: list[CacheLayer], meter: Meter, pools: Pools | None = None) -> CacheReport:
        """Of these layers, counted by this meter; ``pools`` are the other tiers."""
        filled = [core for core in cores if core.store.k is not None]
        a_row = (c.store.row_bytes() + (0 if c.digest is None else c.digest.page_bytes() // c.digest.page) for c in filled)
        counts = {} if pools is None else pools.counts()
        tiers = {name: counts[name]["bytes"] for name in ("host", "disk") if name in counts}
        token = sum(n * c.store.lengths.shape[1] for n, c in zip(a_row, filled))
        return cls(tuple(LayerReport.of(core) for core in filled), meter.now, meter.peak, token, tiers)

    def formula(self, tokens: float, batch: int = 1) -> int:
        """Bytes of ``tokens`` per KV head in every layer: ``budget + chunk`` for the peak of a prefill in chunks."""
        return int(tokens * batch * self.token_bytes)

    @property
    def tokens(self) -> float:
        """Kept per KV head, mean over the layers."""
        return sum(row.tokens for row in self.layers) / len(self.layers) if self.layers else 0.0

    @property
    def step_bytes(self) -> int:
        """Read by the last step of few queries, all layers; see ``LayerReport``."""
        return sum(row.step_bytes for row in self.layers)

    @property
    def dense_step_bytes(self) -> int:
        """The same if it had read everything that is kept."""
        return sum(row.dense_step_bytes for row in self.layers)

    @property
    def moved_bytes(self) -> int:
        """What the last step brought to the device, all layers."""
        return sum(row.moved_bytes for row in self.layers)

    @property
    def hit_rate(self) -> float | None:
        """Share of the pages behind the device that steps found in its slots; None where none was asked for."""
        wanted = sum(row.wanted for row in self.layers)
        return 1 - sum(row.missed for row in self.layers) / wanted if wanted else None

    def __str__(self) -> str:
        lines = ["layer     kept  (fewest..most)        seen       MiB   step MiB"]
        for r in self.layers:
            spread = f"{r.fewest}..{r.most}"
            lines.append(f"{r.layer:>5}  {r.tokens:>7.0f}  {spread:>14}  {r.seen:>10.0f}  {r.n_bytes / 2**20:>8.2f}  {r.step_bytes / 2**20:>9.3f}")
        held = f"now {self.n_bytes / 2**20:.2f} MiB, peak {self.peak_bytes / 2**20:.2f} MiB, {self.token_bytes} bytes per token"
        step = f"; the last step read {self.step_bytes / 2**20:.3f} of {self.dense_step_bytes / 2**20:.3f} MiB"
        below = "".join(f", {name} {n / 2**20:.2f} MiB" for name, n in self.tiers.items() if n)
        hits = "" if self.hit_rate is None else f", {self.moved_bytes / 2**20:.3f} MiB of it from there; {self.hit_rate:.0%} of pages were here already"
        return "\n".join([*lines, held + below + (step + hits if self.dense_step_bytes else "")])
