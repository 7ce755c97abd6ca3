"""Part ``build``: compiles what the GPU needs, where it lies, and says what is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sparse_attn.ops import OPS

from .units import Bench, Unit

_ROOT = Path(__file__).parents[2]


def compile_libraries(bench: Bench) -> str | None:
    """The CUDA library and the generic CPU library; None, or what setup.py said beside what it compiled."""
    words = ["--name"] if bench.machine.rehearsal else ["--quiet", "build_ext", "--inplace"]
    environment = {"SPARSE_ATTN_BUILD": "generic,cuda"} | os.environ
    done = subprocess.run([sys.executable, "setup.py", *words], cwd=_ROOT, env=environment, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("sparse_attn:") and ": compiled " not in line]
    if done.returncode:
        raise RuntimeError(f"setup.py failed: {' '.join(done.stderr.split())[-300:]}")
    return "; ".join(said) or None


def describe(bench: Bench) -> str | None:
    """Device, versions, commit, and which backends of the GPU each op has."""
    bench.say(json.dumps(bench.lines.stamp()))
    for op in OPS.values():
        bench.say(f"   {op.name}: {', '.join(bench.machine.backends(op)) or 'torch alone'}")
    return None


def units(bench: Bench) -> Iterator[Unit]:
    yield Unit("libraries", lambda: compile_libraries(bench))
    yield Unit("what is here", lambda: describe(bench))
