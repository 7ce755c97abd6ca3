"""Part ``ceilings``: the rates that nothing exceeds here; and the dense attention and the copy that other parts compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..cases import DTYPES, Shape
from .units import Bench, Unit

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
_OF_A_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def dense_calls(shape: Shape, names: tuple[str, ...] = tuple(SDPA),
                tensors: tuple[Tensor, ...] | None = None) -> dict[str, Callable]:
    """Causal attention by each backend of torch SDPA; the memory-efficient one gets the keys of every query head."""
    known, (q, k, v) = (SDPA if shape.device != "cpu" else _OF_A_CPU), tensors or shape.tensors
    found = {}
    for name in [name for name in known if name in names or shape.device == "cpu"]:
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if name == "efficient" else x for x in (k, v))

        def call(backend=known[name], keys=keys, values=values) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1, scale=shape.scale,
                                                    enable_gqa=keys.shape[1] < q.shape[1])

        found[f"sdpa {name}"] = call
    return found


def fastest(us: dict[str, list[float]], start: str) -> str:
    """The call of the smallest median among those whose name starts so; '' where none ran.

    Example:
        >>> fastest({"sdpa a": [3.0, 1.0, 2.0], "sdpa b": [9.0, 0.5, 9.0], "ours": [0.1]}, "sdpa")
        'sdpa a'
    """
    return min((name for name in us if name.startswith(start)), key=lambda name: sorted(us[name])[len(us[name]) // 2], default="")


def copy_call(bench: Bench, n_bytes: int) -> Callable:
    """Reads and writes half of so many bytes each."""
    source = torch.empty(n_bytes // 2, dtype=torch.uint8, device=bench.machine.device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matrix_product(bench: Bench) -> str | None:
    """A large torch.mm."""
    edge = bench.sizes.square
    a, b = (torch.randn(edge, edge, device=bench.machine.device).to(DTYPES[bench.sizes.dtype]) for _ in range(2))
    us, broken = bench.rounds({"mm": lambda: torch.mm(a, b)})
    if "mm" in us:
        bench.record(us["mm"], op="mm", backend="torch", of=f"{edge} x {edge}", dtype=bench.sizes.dtype, flop=2.0 * edge**3)
    return "; ".join(broken) or None


def copies(bench: Bench) -> str | None:
    """From device to device, and from pinned host memory to the device."""
    size = bench.sizes.copied
    host = bench.machine.pinned(torch.empty(size // 4, dtype=torch.uint8).random_())
    target = torch.empty_like(host, device=bench.machine.device)
    calls = {"copy": copy_call(bench, size), "copy from pinned": lambda: target.copy_(host, non_blocking=True)}
    us, broken = bench.rounds(calls)
    for name, n_bytes in zip(calls, (size, size // 4)):
        if name in us:
            bench.record(us[name], op=name, backend="torch", of=f"{n_bytes} bytes", bytes=float(n_bytes))
    return "; ".join(broken) or None


def units(bench: Bench) -> Iterator[Unit]:
    yield Unit("torch.mm", lambda: matrix_product(bench))
    yield Unit("copies", lambda: copies(bench))
