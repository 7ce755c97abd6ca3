"""One line to give an op its Triton backend, and how its kernels are launched.

The kernels of an op are in the module here that has its name: ``run(*outputs, *args)`` fills the outputs. Nothing imports
triton before a backend was asked about tensors that it could serve. Under ``TRITON_INTERPRET=1`` (set before anything runs)
CPU tensors are served too, slowly, by Triton's interpreter; it computes bfloat16 on raw bit patterns, so bfloat16 is refused.

Kernels are compiled for sm_80, sm_90 and sm_100 by the tests. None of them has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..native import misplaced, needs_dtype
from ..registry import Op

OLDEST = (3, 6)
OLDEST_ARCH = 80
WIDEST = 256  # channels of a row
# few queries against tiles of keys, both of more than 128 channels
WIDE_PROBES = {
    80: dict(ROWS=32, KEYS=32, num_warps=4, num_stages=2),
    90: dict(ROWS=64, KEYS=64, num_warps=8, num_stages=2),
    120: dict(ROWS=32, KEYS=32, num_warps=4, num_stages=2),
}  # fmt: skip
# the default differs between 3.6 and 3.9
OPTIONS = dict(enable_fp_fusion=True)
# a stand-in for a GPU's: few, so that tests meet every loop
_INTERPRETED_PROCESSORS = 8


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """None where triton can be used, else one sentence."""
    try:
        import triton
    except ImportError as error:
        return f"needs triton {'.'.join(map(str, OLDEST))} or newer, which does not import ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"needs triton {'.'.join(map(str, OLDEST))} or newer, got {triton.__version__}"
    return None


@functools.cache
def arch(device: torch.device) -> int:
    """90 for sm_90; the oldest that we serve for the interpreter."""
    if device.type == "cpu":
        return OLDEST_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Programs that run side by side, roughly."""
    return _INTERPRETED_PROCESSORS if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def why_not(*args) -> str | None:
    """What keeps Triton from any op with these arguments; the first of them has the dtype of the products."""
    kind, needs = ("cpu", "CPU tensors under TRITON_INTERPRET=1") if interpreted() else ("cuda", None)
    refusal = misplaced(kind, args, needs) or missing()
    if refusal is not None:
        return refusal
    if interpreted():
        if args[0].dtype == torch.bfloat16:
            return "needs float16 or float32 under TRITON_INTERPRET=1, got bfloat16, which the interpreter gets wrong"
        return None
    if torch.version.hip:
        return f"needs an NVIDIA GPU, got ROCm {torch.version.hip}"
    found = arch(args[0].device)
    return f"needs sm_{OLDEST_ARCH} or newer, got sm_{found}" if found < OLDEST_ARCH else None


def add(op: Op, outputs: Callable, refuses: Callable[..., str | None] = lambda *args: None) -> None:
    """Give ``op`` the backend "triton".

    Args:
        op: ``ops/triton/<op.name>.py`` has its ``run(*outputs, *args)``.
        outputs: allocates the outputs from the op's arguments; the op's fake function does exactly that.
        refuses: None, or what the kernels need of these arguments and did not get.
    """

    def refusal(*args) -> str | None:
        return why_not(*args) or needs_dtype(args[0]) or refuses(*args)

    def run(*args):
        results = outputs(*args)
        with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
            _kernels(op.name).run(*([results] if isinstance(results, Tensor) else results), *args)
        return results

    op.backend("triton", why_not=refusal)(run)


@functools.cache
def _kernels(name: str):
    return importlib.import_module(f"{__package__}.{name}")


def needs_width(*tensors) -> str | None:
    """None, or 'needs at most 256 channels, got 576': what a tile holds."""
    widest = max(tensor.shape[-1] for tensor in tensors[:3] if isinstance(tensor, Tensor) and tensor.is_floating_point())
    return f"needs at most {WIDEST} channels, got {widest}" if widest > WIDEST else None


def unrolled(tensor: Tensor) -> bool:
    """Whether products take no matrix instruction: they are unrolled over the channels and spill where tiles are large."""
    return tensor.dtype == torch.float32 and not interpreted()


def pinned(table: dict[int, dict[str, int]], device: torch.device) -> dict[str, int]:
    """The configuration for a device: that of the newest architecture in the table that is not newer than the device."""
    return table[max(known for known in table if known <= arch(device))]


def launch(kernel: Any, grid: tuple[int, ...], *args, **named) -> None:
    """Run a kernel on the current stream, unless there is nothing to do."""
    if all(grid):
        kernel[grid](*args, **named, **OPTIONS)


def power(n: int, least: int = 16) -> int:
    """The next power of two, not below ``least``: what a tile edge is."""
    return max(least, 1 << max(0, n - 1).bit_length())


def edges(group: int, n_q: int, most: int = 16) -> tuple[int, int]:
    """Heads and queries of one tile of queries: 16 rows at least, and no more than ``most`` unless there are more heads."""
    heads = power(group, 1)
    return heads, max(min(power(n_q, 1), most // heads), 16 // heads, 1)
