"""What the GPU kernels must reach, and the lines of a run as Markdown: bars beside measured ratios first, every timing below."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..caches import table


@dataclass(frozen=True)
class Bar:
    """A ratio within one run that must be at least ``least`` or at most ``most``."""

    says: str
    least: float | None = None
    most: float | None = None

    def reached(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= self.most

    @property
    def bound(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


# bf16, causal, 32 query heads over 8 key heads of 128 channels
BARS = {
    "dense triton": Bar("density 1, Triton: speed / the fastest SDPA's", least=0.65),
    "dense cuda": Bar("density 1, CUDA: speed / the fastest SDPA's", least=0.85),
    "proportional": Bar("density 0.1 and 0.05: time / (density x own dense time)", most=1.25),
    "select stride 16": Bar("score and select, stride 16: time / dense attention", most=0.04),
    "select stride 8": Bar("score and select, stride 8: time / dense attention", most=0.08),
    "select pooled": Bar("score and select, pooled: time / dense attention", most=0.01),
    "xattention 128K": Bar("XAttention stride 16, 131072 structured tokens: speed / the fastest SDPA's", least=6),
    "xattention": Bar("XAttention stride 16, structured tokens: speed / the fastest SDPA's", least=1),
    "decode bandwidth": Bar("paged_attention, all pages: bytes a second / those of a copy", least=0.85),
    "decode pages": Bar("paged_attention, 1/16 of the pages: speed / the fastest dense decode's", least=8),
    "gather": Bar("gather_pages from pinned memory: bytes a second / those of a copy", least=0.85),
}


def mark(bar: str, value: float) -> dict:
    """The fields of a line that is held to a bar.

    Example:
        >>> mark("gather", 0.9)
        {'bar': 'gather', 'value': 0.9, 'bound': '>= 0.85', 'reached': True}
    """
    return {"bar": bar, "value": round(value, 4), "bound": BARS[bar].bound, "reached": BARS[bar].reached(value)}


def judged(row: dict) -> str:
    """One line of text about a line that is held to a bar."""
    return (f"   {row['bar']}: {what(row)}: {row['value']:.3f}, must be {row['bound']}: "
            f"{'reached' if row['reached'] else 'NOT reached'}")


def what(row: dict) -> str:
    """The case of a line in words."""
    said = [row["op"], str(row.get("backend") or ""), f"{row['N']} tokens" if row.get("N") else ""]
    said += [f"{key} {row[key]}" for key in ("density", "stride", "batch") if row.get(key) is not None]
    said += [row["of"]] if row.get("of") else []
    return " ".join(filter(None, said))


def latest(rows: Iterable[dict]) -> list[dict]:
    """Of several lines about one case the newest, in the order of first appearance."""
    found: dict[tuple, dict] = {}
    for row in rows:
        case = ("device", "op", "backend", "N", "B", "wanted_density", "stride", "batch", "of", "bar", "baseline")
        found[tuple(str(row.get(key)) for key in case)] = row
    return list(found.values())


def read(path: Path) -> list[dict]:
    """The lines of a file that this benchmark wrote."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row for row in rows if row.get("benchmark") == "gpu"]


def _number(value: float | None, form: str = "{:,.4g}") -> str:
    return "" if value is None else form.format(value)


def verdicts(rows: Sequence[dict]) -> list[str]:
    """The table of bars, a line for each case and one for a bar without any."""
    held = []
    for name, bar in BARS.items():
        of = [row for row in rows if row.get("bar") == name]
        held += [(bar.says, what(row), f"{row['value']:.3f}", bar.bound, "yes" if bar.reached(row["value"]) else "no")
                 for row in of] or [(bar.says, "", "not measured", bar.bound, "")]
    return table(("bar", "case", "measured", "must be", "reached"), held)


def markdown(rows: Sequence[dict]) -> str:
    """Both tables, for each device."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in latest(rows) if row["device"] == device]
        made = dict.fromkeys(f"{row['commit']}, torch {row['versions']['torch']}" for row in here)
        lines += [f"## {device}", "", f"Commit {'; '.join(made)}.", ""]
        lines += verdicts(here)
        timed = [(what(row), _number(row["us"][1] / 1e3), _number(row.get("tflops")), _number(row.get("gbps")),
                  row["baseline"] or "", _number(row["baseline_us"] and row["baseline_us"][1] / 1e3), _number(row["ratio"]),
                  _number(row.get("error_ratio")), row.get("remark", "")) for row in here]
        lines += table(("case", "ms p50", "TFLOP/s", "GB/s", "beside", "its ms", "its time / ours", "error / torch's", ""), timed)
    return "\n".join(lines)
