"""Part ``check``: every op on every backend of the GPU against its reference in float64.

The inputs are those of the tests (``python_tests/rows.py``) with other numbers in every run, in bfloat16, float16 and float32.
Outputs start as NaN. Each backend has to be right when called plainly, without the host waiting for the GPU, on a stream that is
not the usual one and whose inputs arrive late, and when a CUDA graph is replayed on inputs that it was not captured with.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn.attention import sparse_attention
from sparse_attn.errors import NoBackendError
from sparse_attn.ops import OPS, use_backend
from sparse_attn.ops.registry import Op
from sparse_attn.patterns import XAttention
from sparse_attn.types import LayerContext, ResidentKV

from ..cases import DTYPES, rms_error
from .units import Bench, Unit

_TESTS = Path(__file__).parents[2] / "python_tests"
_FLOOR = 4e-6  # of float32 arithmetic, as in python_tests/oracle.py


def plain_args(op: str, dtype: torch.dtype, seed: int) -> tuple:
    """Arguments that every backend of an op takes, as the tests make them."""
    if str(_TESTS) not in sys.path:
        sys.path.append(str(_TESTS))
    from rows import plain_args

    torch.manual_seed(seed)
    return plain_args(op, dtype, seed)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates inside holds NaN, or the largest integer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        filled, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def outputs(op: Op, args: Sequence, returned) -> list[Tensor]:
    """What a call returned and what it wrote in place."""
    written = op._call._schema.arguments
    found = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return found + [arg for arg, of in zip(args, written) if of.alias_info is not None and of.alias_info.is_write]


@dataclass(frozen=True)
class Example:
    """Arguments of an op on the host, and what must come out.

    Attributes:
        exact: the reference of the same numbers in float64.
        plain: the reference in the dtype at hand: what torch earns.
    """

    args: tuple
    exact: list[Tensor]
    plain: list[Tensor]

    @classmethod
    def of(cls, op: Op, dtype: torch.dtype, seed: int) -> Example:
        """Fresh numbers."""
        args = plain_args(op.name, dtype, seed)

        def reference(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
            mine = [change(arg) if isinstance(arg, Tensor) else arg for arg in args]
            return outputs(op, mine, op.reference(*mine))

        return cls(args, reference(lambda x: x.double() if x.is_floating_point() else x.clone()), reference(Tensor.clone))

    def wrong(self, found: Iterable[Tensor]) -> str | None:
        """None, or what is wrong with the outputs of a backend.

        Twice the error that torch makes is allowed, and where the inputs are in half precision what rounding the probabilities, or
        any other factor, to that precision once may cost.
        """
        eps = torch.finfo(self.args[0].dtype).eps / 2 if self.args[0].element_size() < 4 else 0.0
        for at, (got, exact, plain) in enumerate(zip(found, self.exact, self.plain, strict=True)):
            got = got.cpu()
            if not got.is_floating_point():
                if not torch.equal(got, plain):
                    return f"output {at} differs from the reference in {int((got != plain).sum())} of {got.numel()} places"
                continue
            finite = exact.isfinite()
            if not torch.equal(got[~finite].double(), exact[~finite].double()):
                return f"output {at} is finite where the reference is not"
            error = (got[finite].double() - exact[finite].double()).abs()
            if not len(error):
                continue
            torch_error = float((plain[finite].double() - exact[finite].double()).abs().max())
            allowed = 2 * torch_error + _FLOOR + eps * float(exact[finite].abs().max())
            if not (error <= allowed).all():
                worst = error.nan_to_num(float("inf")).max()
                return (f"output {at} is off by {worst:.2e} where {allowed:.2e} is allowed; {int(error.isnan().sum())} elements "
                        "are NaN")
        return None


class Placed:
    """The arguments of an example on a device, strides and shared memory as they were, to be filled again and again."""

    def __init__(self, args: tuple, device: torch.device):
        self._device, self._stores = device, {}
        self.args = tuple(self._view(arg) if isinstance(arg, Tensor) else arg for arg in args)

    @staticmethod
    def _whole(x: Tensor) -> Tensor:
        """All that the memory of a tensor holds."""
        return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)

    def _view(self, x: Tensor) -> Tensor:
        key = x.untyped_storage().data_ptr()
        if key not in self._stores:
            self._stores[key] = self._whole(x).to(self._device, copy=True)
        return self._stores[key].as_strided(x.shape, x.stride(), x.storage_offset())

    def poison(self) -> None:
        """Every number becomes NaN; indices stay."""
        for store in self._stores.values():
            if store.is_floating_point():
                store.fill_(float("nan"))

    def bringer(self, args: tuple) -> Callable:
        """How to fill with an example of the same layout; calling it waits for nothing."""
        tensors, pairs = [arg for arg in args if isinstance(arg, Tensor)], {}
        for mine, theirs in zip([arg for arg in self.args if isinstance(arg, Tensor)], tensors, strict=True):
            source = self._whole(theirs).to(self._device, copy=True)
            pairs.setdefault(mine.untyped_storage().data_ptr(), (self._whole(mine), source))
        return lambda: [mine.copy_(theirs) for mine, theirs in pairs.values()]


def check(bench: Bench, op: Op, backend: str, dtype: torch.dtype) -> str | None:
    """None, or why the backend refuses; raises AssertionError on the first wrong output."""
    machine, seed = bench.machine, int(torch.seed() % 2**31)
    first, second = (Example.of(op, dtype, seed + i) for i in range(2))
    placed = Placed(first.args, machine.device)
    refusal = op.explain(*placed.args)[backend]
    if refusal is not None:
        return f"refused: {refusal}"
    bring, other = placed.bringer(first.args), placed.bringer(second.args)

    def call() -> list[Tensor]:
        return outputs(op, placed.args, op(*placed.args))

    def brought() -> list[Tensor]:
        bring()
        return call()

    def require(found: list[Tensor], example: Example, how: str) -> None:
        machine.synchronize()
        wrong = example.wrong(found)
        assert wrong is None, f"{how}: {wrong} (seed {seed})"

    with use_backend(backend), torch.inference_mode():
        with poisoned():
            require(brought(), first, "a plain call")
        with machine.quiet():
            found = brought()
        require(found, first, "a call that must not wait")
        with poisoned():
            placed.poison()
            require(machine.late(bring, call), first, "on another stream, inputs late")
            bring()
            found, replay = machine.capture(call)
            for tensor in found:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
            other()
            replay()
            require(found, second, "a replayed graph, other inputs")
    return None


def check_path(bench: Bench, waits: bool) -> str | None:
    """Selection and attention together, as a layer calls them: right against float64, and without waiting for the GPU."""
    machine, shape = bench.machine, bench.shape(512)
    q, k, v = shape.tensors
    context, pattern = LayerContext(layer=0, scale=shape.scale, q_start=0), XAttention(stride=16, block=shape.block)

    def call():
        return sparse_attention(q, ResidentKV(k, v), context, pattern)

    with torch.inference_mode():
        found = call()
        if not waits:
            with machine.quiet():
                call()
        lists = found.blocks.counts, found.blocks.indices, *found.blocks.block
        exact, _ = OPS["block_sparse_attention"].reference(q.double(), k.double(), v.double(), *lists, shape.scale)
        error = rms_error(found.out, exact)
    assert error <= 1e-2, f"sparse_attention is off by {error:.2e} (rms, relative)"
    return None


def units(bench: Bench) -> Iterator[Unit]:
    for op in OPS.values():
        names = bench.machine.backends(op)
        if not names:
            yield Unit(op.name, lambda: "has no GPU backend: torch computes it")
        for backend in names:
            for name, dtype in DTYPES.items():
                run = functools.partial(check, bench, op, backend, dtype)
                yield Unit(f"{op.name} {backend} {name}", run)
    yield Unit("sparse_attention xattention", lambda: check_path(bench, waits=True))
    yield Unit("sparse_attention xattention, no waiting", lambda: check_path(bench, waits=False))


def small(bench: Bench) -> str | None:
    """One plain call of every op on every backend in bfloat16, for compute-sanitizer to watch; a sentence on what was refused."""
    refused = []
    for op in OPS.values():
        for backend in bench.machine.backends(op):
            for dtype in (torch.bfloat16, torch.float32):
                placed = Placed(plain_args(op.name, dtype, 0), bench.machine.device)
                try:
                    with use_backend(backend), torch.inference_mode():
                        op(*placed.args)
                    bench.machine.synchronize()
                except NoBackendError as error:
                    refused.append(str(error))
    return "; ".join(dict.fromkeys(refused)) or None
