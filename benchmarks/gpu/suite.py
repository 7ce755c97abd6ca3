"""Part ``suite``: the tests of the ops, run on the GPU; and the pytest plugin that makes them.

The tests give CPU tensors to backends by name. The plugin gives every op, for each of its GPU backends B, one more backend
``B_on_gpu`` that copies its arguments to the GPU, runs B there, and copies the results back. Tests that ask every backend of an op
then ask these too, with all the cases and the tolerances that they have.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from sparse_attn.ops import OPS
from sparse_attn.ops.registry import Op

from .checks import Placed, outputs
from .machine import Gpu, StandIn
from .units import Bench, Unit

_ROOT = Path(__file__).parents[2]
_TESTS = _ROOT / "python_tests"
_REPORT, _REHEARSE = "SPARSE_ATTN_SUITE_REPORT", "SPARSE_ATTN_SUITE_REHEARSE"
SUFFIX = "_on_gpu"
_WORKERS = 8
_ENOUGH = 25  # failures; a GPU that is lost fails all that come behind
_REHEARSED = "cpu_generic"


def add(op: Op, name: str, machine: StandIn) -> None:
    """One more backend of an op, on CPU tensors: ``name`` on the machine."""
    backend = next(b for b in op.backends if b.name == name)

    def why_not(*args) -> str | None:
        return backend.why_not(*Placed(args, machine.device).args)

    def run(*args):
        placed = Placed(args, machine.device).args
        returned = backend.run(*placed)
        machine.synchronize()
        for mine, there in zip(outputs(op, args, None), outputs(op, placed, None)):
            mine.copy_(there)
        return returned.cpu() if isinstance(returned, Tensor) else returned and tuple(x.cpu() for x in returned)

    op.backend(name + SUFFIX, why_not=why_not)(run)


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):  # under xdist the workers hear of a report too
        config.pluginmanager.register(_Listener(os.environ[_REPORT]))
    machine = StandIn() if os.environ.get(_REHEARSE) else Gpu()
    for op in OPS.values():
        for name in machine.backends(op):
            with contextlib.suppress(StopIteration):
                add(op, name, machine)


def pytest_collection_modifyitems(items) -> None:
    """A GPU kernel is not asked to refuse what a tensor holds: looking would cost a synchronisation."""
    blind = pytest.mark.skip(reason="a GPU kernel does not look at what tensors hold; test_cuda.py has what it does instead")
    for item in items:
        if SUFFIX in item.name and "ContractError" in inspect.getsource(inspect.unwrap(item.function)):
            item.add_marker(blind)


class _Listener:
    """Writes a line per test."""

    def __init__(self, file: str):
        self.file = file

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            with open(self.file, "a") as lines:
                said = str(report.longrepr or "")[-600:]
                lines.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "said": said}) + "\n")


def files() -> list[Path]:
    """Test files that ask every backend of an op."""
    return [path for path in sorted(_TESTS.glob("test_*.py")) if "@op_backends" in path.read_text()]


def run(bench: Bench, paths: Sequence[Path]) -> str | None:
    """The tests of these files on the GPU; None, or how many could not run; raises with the first failures."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(bench, paths, Path(folder) / "tests.jsonl")


def _run(bench: Bench, paths: Sequence[Path], report: Path) -> str | None:
    chosen = f"{_REHEARSED}{SUFFIX}" if bench.machine.rehearsal else SUFFIX
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.suite", "-k", chosen,
               "--maxfail", str(_ENOUGH), *map(str, paths)]
    if importlib.util.find_spec("xdist") and not bench.machine.rehearsal:
        command += ["-n", str(_WORKERS)]  # most of the time goes to compiling
    environment = os.environ | {_REPORT: str(report)} | ({_REHEARSE: "1"} if bench.machine.rehearsal else {})
    child = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             process_group=0)
    try:
        said, _ = child.communicate(timeout=min(max(bench.left(), 1), 10_000))
        over = False
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        said, over = child.communicate()[0], True
    found = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return judged(bench, found, over, child.returncode, said)


def judged(bench: Bench, found: list[dict], over: bool, status: int, said: str) -> str | None:
    """What ``run`` returns or raises about these reports of tests and the end of pytest."""
    count = {outcome: sum(r["outcome"] == outcome for r in found) for outcome in ("passed", "failed", "skipped")}
    bench.say(f"   {', '.join(f'{n} {outcome}' for outcome, n in count.items())}")
    failed = [r for r in found if r["outcome"] == "failed"]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(found)} tests fail: " + " | ".join(
            f"{r['test'].partition('::')[2]}: {' '.join(r['said'].split())[-200:]}" for r in failed[:3]))
    if over:
        return f"the time was over after {len(found)} tests"
    if status not in (0, 5):  # 5: nothing was chosen
        raise RuntimeError(f"pytest ended with status {status}: {' '.join(said.split())[-300:]}")
    return f"{count['skipped']} tests skipped" if count["skipped"] else None


def units(bench: Bench) -> Iterator[Unit]:
    yield Unit("tests of the ops", lambda: run(bench, files()))
