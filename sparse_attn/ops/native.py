"""The compiled CPU libraries: which are here, which this machine can run, and one line to give an op its CPU backends.

``setup.py`` compiles ``csrc/cpu`` once per instruction set into ``sparse_attn/_native/cpu_<isa>.so``. Each library registers
the ops under ``torch.ops.sparse_attn_cpu_<isa>``; nothing is loaded before a backend is first asked whether it would run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ContractError
from .registry import Op

FOLDER = Path(__file__).parent.parent / "_native"
ISAS = ("amx", "avx512", "avx2", "generic")  # order of preference
TEST_ISAS = ("amx_emulated",)  # the AMX kernels on emulated tiles: right but slow, so only ever forced by name


@functools.cache
def load(file: str, name: str, remedy: str) -> str | None:
    """Load ``_native/<file>.so`` once; None, or why the library ``name`` cannot be used."""
    path = FOLDER / f"{file}.so"
    if not path.exists():
        return f"the {name} library was not built; {remedy}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the {name} library does not load ({error}); reinstall against torch {torch.__version__}"
    return None


def _load(isa: str) -> str | None:
    return load(f"cpu_{isa}", isa, "reinstall with a C++ compiler and SPARSE_ATTN_BUILD unset")


@functools.cache
def why_not(isa: str) -> str | None:
    """None when this machine can run the library for an instruction set, else one sentence."""
    broken = _load("generic")
    if broken is None and isa != "generic":
        # ask before loading: a library may only be entered on a CPU that has its instructions
        lacks = torch.ops.sparse_attn_cpu_generic.missing(isa)
        broken = f"this CPU lacks {lacks}" if lacks else _load(isa)
    return broken


def available() -> list[str]:
    """Instruction sets whose libraries run here, best first."""
    return [isa for isa in ISAS if why_not(isa) is None]


@functools.cache
def _lacks(isa: str, name: str) -> str | None:
    """A library built before an op was added."""
    if hasattr(getattr(torch.ops, f"sparse_attn_cpu_{isa}"), name):
        return None
    return f"the {isa} library is older than this op; rebuild with python setup.py build_ext --inplace"


@functools.cache
def _kernel(isa: str, name: str) -> Callable:
    return getattr(getattr(torch.ops, f"sparse_attn_cpu_{isa}"), name).default


def add(op: Op, outputs: Callable, refuses: Callable[..., str | None] = lambda isa, *args: None) -> None:
    """Give ``op`` one backend per instruction set, best first.

    Args:
        op: its kernel is ``csrc/cpu/<op.name>.cpp``, listed in ``library.cpp`` with the op's arguments behind its outputs.
        outputs: allocates the outputs from the op's arguments, or returns None where the op writes in place; the op's fake
            function does exactly that.
        refuses: ``refuses(isa, *args)`` is None, or what the kernels need and did not get.
    """
    for isa in ISAS + TEST_ISAS:
        if isa in ISAS or (FOLDER / f"cpu_{isa}.so").exists():
            _add_one(op, isa, outputs, refuses)


def _add_one(op: Op, isa: str, outputs: Callable, refuses: Callable[..., str | None]) -> None:
    def refusal(*args) -> str | None:
        broken = why_not(isa) or _lacks(isa, op.name)
        if broken is not None:
            return broken
        return misplaced("cpu", args) or refuses(isa, *args)

    def run(*args, out=None):
        results = outputs(*args) if out is None else out
        flat = (results,) if isinstance(results, Tensor) else tuple(results or ())
        try:
            _kernel(isa, op.name)(*flat, *args)
        except (ValueError, RuntimeError) as error:
            raise ContractError(f"{op.name}: {error}") from None
        return results

    op.backend(f"cpu_{isa}", why_not=refusal, by_name_only=isa in TEST_ISAS)(run)


def misplaced(kind: str, args: tuple, needs: str | None = None) -> str | None:
    """None, or what tensors that do not all lie on one device of a kind need: 'needs CUDA tensors, got cpu'."""
    places = dict.fromkeys(arg.device for arg in args if isinstance(arg, Tensor))
    for device in places:
        if device.type != kind:
            return f"needs {needs or kind.upper() + ' tensors'}, got {device}"
    return f"needs all tensors on one device, got {' and '.join(map(str, places))}" if len(places) > 1 else None


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def needs_dtype(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """None, or 'needs bfloat16, float16 or float32, got float64'."""
    if tensor.dtype in dtypes:
        return None
    names = [str(d).removeprefix("torch.") for d in dtypes]
    wanted = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"needs {wanted}, got {str(tensor.dtype).removeprefix('torch.')}"
