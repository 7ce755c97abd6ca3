"""Work that runs beside what a device computes, the events that order the two, and memory of the host that the device can read."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# of the CUDA runtime: memory that was registered has the same address on the device
_SAME_ADDRESS = 91


@dataclass(frozen=True)
class Pin:
    """How memory of the host is page-locked, so that a device reads it itself.

    Attributes:
        lock: address of a C function ``int (void *, size_t, unsigned flags)``, 0 for success; such as cudaHostRegister.
        unlock: the same, ``int (void *, size_t)``; such as cudaHostUnregister.
    """

    lock: int
    unlock: int


class Event(Protocol):
    """The end of work that runs beside: a fence (``kvcache.tiers.Fence``) that the device waits for, not the host."""

    def wait(self) -> None:
        """What is computed from now on comes behind it."""
        ...

    def done(self) -> bool:
        """Whether it is over."""
        ...

    def finish(self) -> None:
        """Return once it is over."""
        ...


class Streams(Protocol):
    """Where the pages of a device are copied.

    Attributes:
        pin: None where the host's memory cannot be page-locked; pages go over in pieces that are, then.
    """

    pin: Pin | None

    def beside(self, work: Callable[[], None], *uses: Tensor) -> Event:
        """Begin ``work`` behind everything that the device was given to compute so far, and beside what comes now.

        Args:
            work: launches work on the device, and synchronises nothing.
            uses: every tensor that it reads or writes, whose memory nobody else gets before it is over.
        """
        ...


class Same:
    """Everything in its order: a device without streams."""

    pin = None

    def beside(self, work: Callable[[], None], *uses: Tensor) -> Event:
        """See ``Streams``."""
        work()
        return _Over()


class _Over:
    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def finish(self) -> None:
        pass


class CudaStreams:
    """A CUDA device with a stream of its own for copies. Never run on a GPU; a stand-in for ``cuda`` holds its order in the tests.

    Args:
        device: with its number.
        cuda: what has torch.cuda's functions.
        pin: see ``Streams``.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, pin: Pin | None = None):
        self._device, self._cuda, self.pin = device, cuda, pin
        self._copies = cuda.Stream(device)

    def beside(self, work: Callable[[], None], *uses: Tensor) -> Event:
        """See ``Streams``; inside the capture of a graph the copies become a branch of it."""
        self._copies.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._copies):
            work()
        for t in uses:
            if t.is_cuda:
                t.record_stream(self._copies)
        return _CudaEvent(self._copies.record_event(), self._device, self._cuda)


class _CudaEvent:
    def __init__(self, event: Any, device: torch.device, cuda: Any):
        self._event, self._device, self._cuda = event, device, cuda

    def wait(self) -> None:
        self._cuda.current_stream(self._device).wait_event(self._event)

    def done(self) -> bool:
        return self._event.query()

    def finish(self) -> None:
        self._event.synchronize()


@functools.cache
def streams_of(device: torch.device) -> Streams:
    """Those of a device, always the same ones."""
    if device.type != "cuda":
        return Same()
    return CudaStreams(device, pin=_cuda_pin(device))


def _cuda_pin(device: torch.device) -> Pin | None:
    with contextlib.suppress(OSError, AttributeError):
        runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")  # the one that torch has loaded
        found = ctypes.c_int(0)
        if runtime.cudaDeviceGetAttribute(ctypes.byref(found), _SAME_ADDRESS, device.index or 0) == 0 and found.value:
            calls = (runtime.cudaHostRegister, runtime.cudaHostUnregister)
            return Pin(*(ctypes.cast(call, ctypes.c_void_p).value for call in calls))
    return None
