"""Runs the parts one after the other, each in a process of its own, and says what failed, what was left out and what did not fit.

A process reports every unit before and after it ran. When one dies, the unit it died in has failed, and a new process goes on
behind it. The time that is left is shared among the parts that are left, by weight.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .units import Bench, Unit, sentence

LIMIT_S = 520.0  # everything; a command on a lent GPU has ten minutes
STALL_S = 150.0  # a unit that takes longer hangs
LEAST_S = 25.0  # of a part: torch alone takes a while to import
GRACE_S = 5.0  # a part may be late by so much
_ROOT = Path(__file__).parents[2]
LOST = 3  # exit status of a process that cannot go on


@dataclass(frozen=True)
class Part:
    """A subject of the benchmark: ``units(bench)`` of the module of that name, what it does, and its share of the time.

    Attributes:
        workers: processes side by side at most, for units that mostly compile.
    """

    name: str
    module: str
    says: str
    weight: float
    workers: int = 1

    def units(self, bench: Bench) -> list[Unit]:
        return list(importlib.import_module(f"{__package__}.{self.module}").units(bench))


PARTS = (
    Part("build", "build", "compiles the CUDA library and the generic CPU library", 20),
    Part("check", "checks", "every op and GPU backend against float64: poisoned, without waiting, on another stream, in a graph",
         14, workers=8),
    Part("ceilings", "ceilings", "torch.mm, copies on the device and from pinned host memory", 3),
    Part("attention", "attention", "block_sparse_attention at densities 1, 0.1, 0.05 beside every SDPA and FlexAttention", 16),
    Part("decode", "decode", "paged_attention over all and 1/16 of the pages, batch 1 and 8, beside a copy and SDPA", 6),
    Part("selection", "selection", "choosing blocks (stride 16, stride 8, pooled) as a share of dense attention", 6),
    Part("xattention", "xattention", "choosing and attending on structured inputs beside dense SDPA", 8),
    Part("gather", "gather", "gather_pages from pinned host memory beside cudaMemcpy", 3),
    Part("model", "model", "a model shaped like Llama-3.1-8B: time to first token, ms per token, the Amdahl bound", 14),
    Part("sanitize", "sanitize", "compute-sanitizer memcheck and racecheck over every op and GPU backend on small shapes", 12),
    Part("suite", "suite", "the tests of the ops, on the GPU", 10),
)


@dataclass
class Outcome:
    """What came of the units of the parts: 'part: unit: sentence', and what units left out by sentence."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        found = [f"left out: {sentence} ({', '.join(names)})" for sentence, names in self.noted.items()]
        found += [f"did not fit into the time: {entry}" for entry in self.unfinished]
        found += [f"FAILED: {entry}" for entry in self.failed]
        left_out = sum(map(len, self.noted.values()))
        return [*found, f"{self.done} units done, {len(self.failed)} failed, {left_out} left something out, "
                        f"{len(self.unfinished)} entries did not fit"]


def run_units(part: Part, bench: Bench, start: int, report: Callable[[dict], None], step: int = 1) -> int:
    """Every ``step``-th unit of a part from number ``start``; 0, or LOST when the process cannot go on."""
    units = part.units(bench)
    for at in range(start, len(units), step):
        unit = units[at]
        report({"at": at, "of": len(units), "unit": unit.name})
        if bench.left() <= 0:
            report({"at": at, "unfinished": [u.name for u in units[at::step]]})
            return 0
        bench.say(f"{part.name}: {unit.name}")
        try:
            report({"at": at, "note": unit.run()})
        except Exception as error:
            traceback.print_exc()
            report({"at": at, "failed": sentence(error)})
            if bench.machine.lost(error):
                return LOST
        bench.machine.free()
    report({"at": len(units), "end": True})
    return 0


def run_part(part: Part, seconds: float, command: Sequence[str], folder: Path, outcome: Outcome, start: int = 0,
             step: int = 1) -> None:
    """A part, or every ``step``-th unit of it from ``start``, for so many seconds at most.

    ``command`` makes a child process; when one dies, the next goes on behind the unit that it died in.
    """
    until = time.monotonic() + seconds
    environment = {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // step))} if step > 1 else {})
    while True:
        file = folder / f"{part.name}.{start}.jsonl"
        file.touch()
        left = until - time.monotonic()
        words = ["--part", part.name, "--start", str(start), "--step", str(step), "--seconds", f"{left:.1f}", "--report", str(file)]
        child = subprocess.Popen([*command, *words], cwd=_ROOT, env=os.environ | environment, process_group=0)
        said = watched(child, file, until)
        reports = [json.loads(line) for line in file.read_text().splitlines()]
        last = settle(part, reports, outcome)
        if any("end" in r or "unfinished" in r for r in reports):
            return
        if last is None:  # between two units, or before the first
            if child.returncode != LOST or not reports:
                how = said or f"ended with status {child.returncode}"
                late = said and time.monotonic() > until
                (outcome.unfinished if late else outcome.failed).append(f"{part.name}: its process {how} before a unit began")
                return
            start = reports[-1]["at"] + step
        else:
            over = time.monotonic() > until
            how = said or f"ended its process with status {child.returncode}"
            entry = f"{part.name}: {last['unit']}: {how}"
            (outcome.unfinished if over else outcome.failed).append(entry)
            start = last["at"] + step
            if over:
                more = len(range(start, last["of"], step))
                outcome.unfinished += [f"{part.name}: {more} more units"] * (more > 0)
                return
        if time.monotonic() > until:
            outcome.unfinished.append(f"{part.name}: from unit {start} on")
            return


def watched(child: subprocess.Popen, file: Path, until: float) -> str:
    """Wait for a child, with all that it starts; '' or why it was killed."""
    try:
        while child.poll() is None:
            time.sleep(0.2)
            quiet = time.time() - file.stat().st_mtime
            if quiet > STALL_S:
                return f"was killed after {quiet:.0f} s"
            if time.monotonic() > until + GRACE_S:
                return "was killed when the time of its part was over"
        return ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def settle(part: Part, reports: list[dict], outcome: Outcome) -> dict | None:
    """Count what a process reported; the unit that it began and did not end, or None."""
    open_unit = None
    for report in reports:
        if "unit" in report:
            open_unit = report
        elif "unfinished" in report:
            outcome.unfinished += [f"{part.name}: {name}" for name in report["unfinished"]]
            open_unit = None
        elif "end" not in report:
            name = f"{part.name}: {open_unit['unit']}"
            if "failed" in report:
                outcome.failed.append(f"{name}: {report['failed']}")
            else:
                outcome.done += 1
                if report["note"]:
                    outcome.noted.setdefault(report["note"], []).append(name)
            open_unit = None
    return open_unit


def run(names: Sequence[str], limit: float, command: Sequence[str], folder: Path) -> Outcome:
    """The named parts within ``limit`` seconds; ``command`` makes a child."""
    until, outcome = time.monotonic() + limit, Outcome()
    todo = [part for part in PARTS if part.name in names]
    for at, part in enumerate(todo):
        left = until - time.monotonic()
        if left < 5:
            outcome.unfinished.append(f"{part.name}: the whole part")
            continue
        share = min(left, max(LEAST_S, left * part.weight / sum(other.weight for other in todo[at:])))
        print(f"== {part.name}: {part.says} (at most {share:.0f} s)", flush=True)
        workers = max(1, min(part.workers, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda start: run_part(part, share, command, folder, outcome, start, workers), range(workers)))
    return outcome

