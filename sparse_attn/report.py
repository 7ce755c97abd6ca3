"""What a patched model did: calls, density and reasons, per layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerLog:
    """Counters of one attention module; densities stay on the device until a report is asked for."""

    name: str
    layer: int
    calls: Counter = field(default_factory=Counter)  # (what ran, how it was computed) -> calls
    reasons: Counter = field(default_factory=Counter)  # why a call ran dense -> calls
    refusals: set[str] = field(default_factory=set)  # why a faster backend, or the method itself, had no part in a sparse call
    heads: int = 0
    read: Tensor | None = None  # float64 [H], sum over sparse calls of weight * density
    whole: float = 0.0  # sum over dense calls of weight
    weight: float = 0.0  # sum over all of them

    def dense(self, backend: str, reason: str, n_q: int, heads: int, n_k: int) -> None:
        """Note a call that read everything; decoding is counted but has no share in the density."""
        self.calls["decode" if n_q == 1 else "dense", backend] += 1
        self.reasons[reason] += 1
        if n_q > 1:
            self.whole += self._weigh(heads, n_q, n_k)

    def sparse(self, backend: str, refusals: list[str], density: Tensor, n_q: int, n_k: int) -> None:
        """Note a call whose heads read ``density`` (float64 ``[H]``) of what they could reach."""
        self.calls["sparse", backend] += 1
        self.refusals.update(refusals)
        read = density.nan_to_num(1.0) * self._weigh(len(density), n_q, n_k)
        self.read = read if self.read is None else self.read + read

    def _weigh(self, heads: int, n_q: int, n_k: int) -> float:
        weight = n_q * (n_k - (n_q - 1) / 2)  # query-key pairs that causality allows, padding and window aside
        self.heads, self.weight = heads, self.weight + weight
        return weight

    def clear(self) -> None:
        """Forget every call."""
        self.__init__(self.name, self.layer)

    def row(self) -> LayerReport:
        """The counters as they stand; copies one density per head to the host."""
        read = self.read.tolist() if self.read is not None else [0.0] * self.heads
        heads = tuple((r + self.whole) / self.weight for r in read)
        of = {kind: {b: n for (k, b), n in self.calls.items() if k == kind} for kind in ("sparse", "dense", "decode")}
        backend = "+".join(of["sparse"] or of["dense"] or of["decode"])
        return LayerReport(
            self.layer, self.name, backend, sum(heads) / len(heads) if heads else 1.0, heads, sum(of["sparse"].values()),
            sum(of["dense"].values()), sum(of["decode"].values()), dict(self.reasons), tuple(sorted(self.refusals)),
        )  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        layer: index in the model.
        name: module path.
        backend: what computed the sparse calls; the dense ones if there were none.
        density: read over causally reachable during prefill, mean over heads; 1.0 for dense calls. Calls count by the number
            of query-key pairs that causality allows, so the chunks of a prompt add up to the prompt.
        head_density: the same, per query head; empty before the first prefill.
        sparse_calls, dense_calls, decode_calls: prefill calls that read part, that read everything, and single-token calls.
        reasons: why calls ran dense -> how many.
        refusals: why faster backends, or the method itself where the model chooses its own keys, had no part in sparse calls.
    """

    layer: int
    name: str
    backend: str
    density: float
    head_density: tuple[float, ...]
    sparse_calls: int
    dense_calls: int
    decode_calls: int
    reasons: dict[str, int]
    refusals: tuple[str, ...]


class Report:
    """Rows per layer since the patch or the last ``reset()``; ``str()`` is a table."""

    def __init__(self, logs: list[LayerLog]):
        self._logs = logs
        self.layers = tuple(log.row() for log in logs)

    @property
    def density(self) -> float:
        """Mean over the layers that saw a prefill; 1.0 before that."""
        seen = [row.density for row in self.layers if row.head_density]
        return sum(seen) / len(seen) if seen else 1.0

    def reset(self) -> None:
        """Start counting anew; this report keeps its numbers."""
        for log in self._logs:
            log.clear()

    def __str__(self) -> str:
        lines = ["layer  backend         density  heads (min..max)  sparse  dense  decode  why dense"]
        for r in self.layers:
            heads = f"{min(r.head_density):.3f}..{max(r.head_density):.3f}" if r.head_density else "-"
            why = "; ".join(f"{reason} ({n})" for reason, n in r.reasons.items())
            lines.append(f"{r.layer:>5}  {r.backend:<14}  {r.density:>7.3f}  {heads:>16}  {r.sparse_calls:>6}  {r.dense_calls:>5}"
                         f"  {r.decode_calls:>6}  {why}".rstrip())
        lines.append(f"density {self.density:.3f}")
        return "\n".join(lines + sorted({"refused: " + s for row in self.layers for s in row.refusals}))

    def __repr__(self) -> str:
        return f"Report(layers={len(self.layers)}, density={self.density:.3f})"
