"""What the kernel benchmark times and compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

GATE = 2.0  # times torch's own error


class BenchError(Exception):
    """Bad input: one sentence, exit status 2."""


class GateError(Exception):
    """A kernel is wrong, so its speed is not measured: exit status 1."""


@dataclass(frozen=True)
class Baseline:
    """Something to compare with. Entries that share a ``key`` share its measurements; ``flop`` set: rates are compared."""

    key: str
    make: Callable[[], Callable]
    flop: float | None = None


@dataclass
class Entry:
    """One call to time, and the fields of its lines.

    Attributes:
        flop: operations that the call has to do; 0 where counting them says nothing.
        repeats: how often one timing runs the op, its baselines alike.
    """

    op: str
    call: Callable
    fields: dict
    flop: float = 0.0
    against: dict[str, Baseline] = field(default_factory=dict)
    repeats: int = 1

    @property
    def name(self) -> str:
        marks = [f"{key}={self.fields[key]}" for key in ("of", "density", "stride", "rule", "out") if self.fields.get(key)]
        return " ".join([self.op, *marks])
