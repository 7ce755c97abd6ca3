"""One line to give an op its CUDA backend: kernels of ``csrc/cuda``, compiled ahead of time into ``sparse_attn/_native/cuda.so``.

The library needs nothing of CUDA torch to load; what it lacks on a machine is a sentence. The same kernels run on emulated threads
on CPU tensors, slowly, where ``cuda_emulated.so`` was built: tests force that backend by name, nothing ever chooses it.

Kernels look at nothing that would have to come back to the host. What a CPU backend refuses for what a tensor holds, they survive as
the op says. None of them has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ContractError, NoBackendError
from .native import FOLDER, load, misplaced
from .registry import Op

OLDEST_ARCH = 80
# a stand-in for a GPU's: few, so that tests meet every loop
_EMULATED_PROCESSORS = 4


def _load(name: str) -> str | None:
    return load(name, name, "reinstall with nvcc in PATH and SPARSE_ATTN_BUILD=default,cuda")


@functools.cache
def why_not(device: int = 0) -> str | None:
    """None when the CUDA library runs on a device of this machine, else one sentence."""
    broken = _load("cuda")
    if broken is not None:
        return broken
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < OLDEST_ARCH:
            return f"needs sm_{OLDEST_ARCH} or newer, got sm_{major}{minor}"
    lacks = torch.ops.sparse_attn_cuda.missing(device)
    return f"needs a CUDA GPU, but {lacks}" if lacks else None


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return _EMULATED_PROCESSORS if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _machine(kind: str, args: tuple) -> str | None:
    """What keeps a library from these tensors, whatever the op."""
    wrong = misplaced("cpu" if kind == "cuda_emulated" else "cuda", args)
    if wrong is not None:
        return wrong
    if kind == "cuda_emulated":
        return _load(kind)
    return why_not(next(arg.device.index for arg in args if isinstance(arg, Tensor)))


@functools.cache
def _kernel(kind: str, name: str) -> Callable | None:
    found = getattr(getattr(torch.ops, f"sparse_attn_{kind}"), name, None)
    return found and found.default


def add(op: Op, outputs: Callable, refuses: Callable[..., str | None] = lambda *args: None,
        work: Callable[..., tuple[Tensor, ...]] = lambda processors, *args: (), on_host: tuple[str, ...] = ()) -> None:
    """Give ``op`` the backend "cuda", in front of those added later, and where it was built its emulated twin.

    Args:
        op: its kernels are ``csrc/cuda/<op.name>.cu``, listed in ``library.cpp``; they are told of the current stream.
        outputs: allocates the outputs from the op's arguments, or returns None where the op writes in place; the op's fake
            function does exactly that.
        refuses: None, or what the kernels need of these arguments and did not get.
        work: ``work(processors, *args)`` allocates at most four contiguous tensors that the kernels scribble in: ``stream.work``.
        on_host: arguments, not the first, that may lie elsewhere than the others; ``refuses`` says where.
    """
    here = tuple(name not in on_host for name in op.signature.parameters)
    _add_one(op, "cuda", outputs, refuses, work, here)
    if (FOLDER / "cuda_emulated.so").exists():
        _add_one(op, "cuda_emulated", outputs, refuses, work, here)


def _add_one(op: Op, kind: str, outputs: Callable, refuses: Callable, work: Callable, here: tuple[bool, ...]) -> None:
    def refusal(*args) -> str | None:
        broken = _machine(kind, tuple(itertools.compress(args, here)))
        if broken is None and _kernel(kind, op.name) is None:
            broken = f"the {kind} library is older than this op; rebuild with python setup.py build_ext --inplace"
        return broken or refuses(*args)

    def run(*args, out=None):
        first = next(arg for arg in args if isinstance(arg, Tensor))
        results = outputs(*args) if out is None else out
        flat = (results,) if isinstance(results, Tensor) else tuple(results or ())
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            try:
                _kernel(kind, op.name)(list(work(processors(first.device), *args)), *flat, *args)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError) as error:
                of_machine = str(error).startswith("CUDA: ")
                raise (NoBackendError if of_machine else ContractError)(f"{op.name}: {error}") from None
        return results

    op.backend(kind, why_not=refusal, by_name_only=kind == "cuda_emulated")(run)
