"""What a part is made of, and what its units share: the machine, the sizes, the file of lines and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from sparse_attn.errors import NoBackendError
from sparse_attn.ops import use_backend
from sparse_attn.ops.registry import Op

from .. import measure
from ..cases import Shape
from ..entries import GateError
from .machine import StandIn


@dataclass(frozen=True)
class Unit:
    """A step of a part. ``run()`` returns None, or a sentence about what it had to leave out; what is wrong it raises."""

    name: str
    run: Callable[[], str | None]


@dataclass(frozen=True)
class Sizes:
    """What is timed on a GPU; ``TINY`` rehearses it.

    Attributes:
        lengths: tokens of dense attention, of attention at a density, and of the model.
        flex: the length at which FlexAttention is compared; it compiles for a while.
        structured: tokens of XAttention on structured inputs.
        long: tokens of selection and of decoding.
        batches: sequences that are decoded together.
        copied: bytes of a copy that reaches the full rate.
        square: edge of a matrix product that reaches the full rate.
        model: keyword arguments of LlamaConfig.
        decoded: tokens that the model generates.
        reps: rounds at most.
        round_s: what the rounds of one case may take; at least three are made.
    """

    lengths: tuple[int, ...] = (32768, 65536, 131072)
    flex: int = 32768
    structured: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    long: int = 131072
    batches: tuple[int, ...] = (1, 8)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 128
    dtype: str = "bf16"
    copied: int = 2 << 30
    square: int = 8192
    model: Mapping = field(default_factory=lambda: {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})
    decoded: int = 16
    reps: int = 20
    round_s: float = 3.0


TINY = Sizes(lengths=(256,), flex=0, structured=(256, 512), long=512, batches=(1, 2), heads=4, kv_heads=2, head_dim=64, block=32,
             dtype="fp32", copied=1 << 16, square=64, reps=2, round_s=0.0, decoded=2,
             model={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64})


@dataclass
class Bench:
    """One run of one part.

    Attributes:
        until: ``time.monotonic()`` at which the part has to be over.
        say: prints a line for whoever waits.
    """

    machine: StandIn
    sizes: Sizes
    lines: measure.Lines
    until: float = float("inf")
    say: Callable[[str], None] = print

    def shape(self, n: int, batch: int = 1) -> Shape:
        """A call of ``n`` tokens; the heads of a batch stand side by side."""
        s = self.sizes
        return Shape(n, s.heads * batch, s.kv_heads * batch, s.head_dim, s.block, s.dtype, str(self.machine.device))

    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self.until - time.monotonic()

    def rounds(self, calls: dict[str, Callable]) -> tuple[dict[str, list[float]], list[str]]:
        """Microseconds of every call that runs here, and a sentence for every one that does not."""
        working, broken, once = {}, [], 0.0
        for name, call in calls.items():
            try:
                call()  # compiles, allocates
                self.machine.synchronize()
                once += self.machine.seconds(call)
                working[name] = call
            except Exception as error:  # a compiler that gives up raises whatever it likes
                if self.machine.lost(error):
                    raise
                broken.append(f"{name} does not run here: {sentence(error)}")
        reps = max(3 if self.sizes.reps > 2 else 1, min(self.sizes.reps, int(self.sizes.round_s / max(once, 1e-6))))
        return self.machine.rounds(working, reps), broken

    def record(self, us: list[float], baseline: str | None = None, theirs: list[float] | None = None, **row) -> dict:
        """Write one line: our microseconds, and beside them a baseline's from the same rounds."""
        found = {"benchmark": "gpu", **row, "us": measure.percentiles(us), "reps": len(us), "baseline": baseline,
                 "baseline_us": theirs and measure.percentiles(theirs), "ratio": theirs and round(measure.pairwise(theirs, us), 4)}
        for amount, rate, unit in (("flop", "tflops", 1e6), ("bytes", "gbps", 1e3)):
            if amount in row:
                found[rate] = round(row[amount] / found["us"][1] / unit, 4)
        self.lines.write(found)
        return found

    def check_backend(self, op: Op, *args) -> list[str]:
        """The backends of an op that take these arguments."""
        said = op.explain(*args)
        return [name for name in self.machine.backends(op) if said[name] is None]


def forced(backend: str, call: Callable) -> Callable:
    """The call with every op on one backend."""
    def run():
        with use_backend(backend):
            return call()

    return run


def sentence(error: BaseException) -> str:
    """Kind and first words of an error, on one line."""
    said = " ".join(str(error).split())[:300]
    known = isinstance(error, (GateError, NoBackendError, AssertionError))
    return said if known and said else f"{type(error).__name__}: {said}"


def inference(call: Callable) -> Callable:
    """The call as a forward of a model makes it."""
    return torch.inference_mode()(call)
