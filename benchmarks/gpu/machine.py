"""All that the benchmark asks of a GPU, and a stand-in on the CPU that does the same without one."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import measure

# the GPU is kept busy for so long before each timed call that the launches of the call are all waiting when it starts
_AHEAD_US = 400
_FLUSHED_BYTES = 256 << 20  # several times the L2 of any GPU so far
_LATE_CYCLES = 20_000_000  # about 10 ms


class StandIn:
    """The CPU in the place of a GPU: every part can be rehearsed, and tested, without one."""

    device = torch.device("cpu")
    rehearsal = True

    @property
    def name(self) -> str:
        return f"rehearsal on {measure.device()}"

    @property
    def file(self) -> str:
        """Name of the file of results."""
        return re.sub(r"\W+", "_", self.name.lower()).strip("_") + ".jsonl"

    def stamp(self, commit: str | None = None) -> dict:
        """Where and with what a measurement was made, as ``measure.stamp``."""
        return measure.stamp() | {"device": self.name} | ({"commit": commit} if commit else {})

    def backends(self, op) -> list[str]:
        """The backends of an op that compute here."""
        return [name for name in op.names if name != "reference"]

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""

    def lost(self, error: BaseException) -> bool:
        """Whether nothing can run in this process any more."""
        return False

    def quiet(self) -> contextlib.AbstractContextManager:
        """Inside, waiting for the GPU is an error."""
        return contextlib.nullcontext()

    def late(self, bring: Callable, call: Callable) -> Any:
        """``call()`` behind ``bring()`` on another stream than usual, where ``bring`` comes long after it was asked for."""
        bring()
        return call()

    def capture(self, call: Callable) -> tuple[Any, Callable]:
        """What ``call()`` returned while it was recorded, and how to have it all happen again, into the same tensors."""
        first = call()
        kept = [first] if isinstance(first, Tensor) else list(first or ())

        def replay() -> None:
            again = call()
            for old, new in zip(kept, [again] if isinstance(again, Tensor) else again or (), strict=True):
                old.copy_(new)

        return first, replay

    def pinned(self, tensor: Tensor) -> Tensor:
        """The same in host memory that the GPU can read."""
        return tensor

    def free(self) -> None:
        """Give back the memory that nobody uses."""

    def rounds(self, calls: Mapping[str, Callable], reps: int) -> dict[str, list[float]]:
        """Microseconds of every call, in rounds A B C A B C; nothing of its operands is in a cache when a call starts."""
        return measure.interleave(calls, reps)

    def seconds(self, call: Callable) -> float:
        """Wall time of one call, until the GPU is done."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


class Gpu(StandIn):
    """The current CUDA device."""

    rehearsal = False

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())

    @functools.cached_property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def stamp(self, commit: str | None = None) -> dict:
        major, minor = torch.cuda.get_device_capability(self.device)
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(), "driver": driver()}
        for name in ("triton", "transformers"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return {"device": self.name, "features": [f"sm_{major}{minor}"], "threads": torch.get_num_threads(), "versions": versions,
                "commit": commit or measure.commit()}

    def backends(self, op) -> list[str]:
        return [name for name in op.names if name != "reference" and not name.startswith("cpu_") and not name.endswith("_emulated")]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def lost(self, error: BaseException) -> bool:
        try:
            torch.cuda.synchronize(self.device)
            return False
        except RuntimeError:
            return True

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def late(self, bring: Callable, call: Callable) -> Any:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_LATE_CYCLES)
            bring()
            result = call()
        stream.synchronize()
        return result

    def capture(self, call: Callable) -> tuple[Any, Callable]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return result, graph.replay

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def free(self) -> None:
        torch.cuda.empty_cache()

    def rounds(self, calls: Mapping[str, Callable], reps: int) -> dict[str, list[float]]:
        scrap = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=self.device)
        cycles = int(_AHEAD_US * 1e-6 * self._cycles_per_second)
        spans: dict[str, list[tuple]] = {name: [] for name in calls}
        for _ in range(reps):
            for name, call in calls.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                scrap.zero_()
                torch.cuda._sleep(cycles)
                begin.record()
                result = call()
                end.record()
                del result
                spans[name].append((begin, end))
            self.synchronize()
        return {name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs] for name, pairs in spans.items()}

    @functools.cached_property
    def _cycles_per_second(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_LATE_CYCLES)  # the clock rises first
        begin.record()
        torch.cuda._sleep(_LATE_CYCLES)
        end.record()
        self.synchronize()
        return _LATE_CYCLES / (begin.elapsed_time(end) * 1e-3)


@functools.cache
def driver() -> str:
    """Version of the NVIDIA driver; 'unknown' where nvidia-smi does not say."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def no_gpu() -> str | None:
    """None where a GPU of NVIDIA can be used, else one sentence."""
    if torch.version.cuda is None:
        return f"needs a CUDA build of torch, got {torch.__version__}; name an interpreter that has one: make bench-gpu PYTHON=..."
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and its driver, and torch sees none; run it where nvidia-smi shows one"
    return None
