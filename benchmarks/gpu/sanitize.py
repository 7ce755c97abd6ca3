"""Part ``sanitize``: every op on every backend of the GPU once, watched by compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .units import Bench, Unit

_ROOT = Path(__file__).parents[2]
_FOUND = 9  # exit status that asks for attention
_TOOLS = {"memcheck": ["--padding", "64"], "racecheck": []}


def sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or beside the nvcc that is there."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent if nvcc else None
    return shutil.which("compute-sanitizer") or (shutil.which("compute-sanitizer", path=str(beside)) if beside else None)


def watch(bench: Bench, tool: str) -> str | None:
    """None when nothing was found, a sentence when there is no such tool; raises with what was found."""
    program = sanitizer()
    if program is None:
        return "compute-sanitizer is neither on the PATH nor beside nvcc"
    code = "from benchmarks.gpu.checks import small; from benchmarks.gpu.__main__ import bench; " \
           f"print('refused:', small(bench(rehearse={bench.machine.rehearsal})))"
    # torch asks for things that a driver may not have and copes; what a kernel does is what counts
    command = [program, "--tool", tool, *_TOOLS[tool], "--report-api-errors", "no", "--error-exitcode", str(_FOUND),
               sys.executable, "-c", code]
    # torch's own pool of memory would hide a read beyond the end of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=_seconds(bench, tool))
    except subprocess.TimeoutExpired:
        return f"{tool} was not over when the time of its part was"
    said = done.stdout + done.stderr
    if done.returncode:
        found = [line for line in said.splitlines() if line.startswith("=========") and len(line) > 10] or said.splitlines()[-8:]
        raise RuntimeError(f"{tool} found something (status {done.returncode}): {' | '.join(found[:12])}")
    refused = next((line for line in said.splitlines() if line.startswith("refused: ")), "refused: None")
    return None if refused == "refused: None" else refused


def _seconds(bench: Bench, tool: str) -> float:
    """What is left, shared with the tools that come behind."""
    behind = list(_TOOLS)[list(_TOOLS).index(tool) :]
    return min(max(bench.left() / len(behind), 1), 10_000)


def units(bench: Bench) -> Iterator[Unit]:
    for tool in _TOOLS:
        yield Unit(tool, lambda tool=tool: watch(bench, tool))
