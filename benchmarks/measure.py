"""Clocks, interleaving, peak memory, and one JSON line per measurement stamped with device, versions and commit."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds(call: Callable) -> float:
    """Wall time of one call; the result is freed outside the clock."""
    start = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - start


def interleave(calls: Mapping[str, Callable], reps: int, tick: Callable[[str], None] = lambda name: None) -> dict[str, list[float]]:
    """Microseconds of every call, in rounds A B C A B C: what disturbs the machine disturbs all of them alike.

    Sample i of every call comes from round i, so that ratios are taken within a round.

    Example:
        >>> times = interleave({"a": int, "b": str}, reps=3)
        >>> [(name, len(us)) for name, us in times.items()]
        [('a', 3), ('b', 3)]
    """
    us: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(reps):
        for name, call in calls.items():
            us[name].append(seconds(call) * 1e6)
            tick(name)
    return us


def percentiles(us: list[float]) -> list[float]:
    """p20, p50 and p80, interpolated.

    Example:
        >>> percentiles([4.0, 1.0, 2.0, 3.0, 5.0])
        [1.8, 3.0, 4.2]
    """
    if len(us) == 1:
        return [round(us[0], 2)] * 3
    tenths = statistics.quantiles(us, n=10, method="inclusive")
    return [round(tenths[i], 2) for i in (1, 4, 7)]


def pairwise(baseline: list[float], ours: list[float]) -> float:
    """Median over the rounds of baseline / ours.

    Example:
        >>> pairwise([10.0, 40.0, 12.0], [5.0, 10.0, 4.0])
        3.0
    """
    return statistics.median(b / o for b, o in zip(baseline, ours, strict=True))


def peak_mib(call: Callable) -> float | None:
    """Largest resident memory of this process while ``call`` runs, MiB; None where the kernel cannot forget older peaks."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        call()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return round(int(peak.split()[1]) / 1024, 1)


@functools.cache
def device() -> str:
    """CPU model and cores."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


@functools.cache
def commit() -> str:
    """Short hash of the checkout, '+' behind it when files were changed; 'unknown' outside a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stamp() -> dict:
    """Where and with what a measurement was made."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["python"] = platform.python_version()
    features = [f for f in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(f)]
    return {"device": device(), "features": features, "threads": torch.get_num_threads(), "versions": versions, "commit": commit()}


class Lines:
    """Appends measurements to a JSON lines file (None keeps them in memory only) and remembers them for the table."""

    def __init__(self, path: Path | None, stamp: Callable[[], dict] = stamp):
        """Raises OSError now, not after an hour of measuring, when the file cannot be written."""
        self.rows: list[dict] = []
        self.stamp = stamp
        self.path = path
        if path is not None:
            path.open("a").close()

    def write(self, row: dict) -> None:
        row = {**row, **self.stamp()}
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
