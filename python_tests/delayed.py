"""Stand-ins for a GPU's streams: copies that come as late as their events allow, and a machine that runs two streams in any order."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

from torch import Tensor

from kvcache.tiers import Pin

_LIBC = ctypes.CDLL(None)
_REFUSING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)(lambda base, size, flags: 2)


def _address(function) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


# what the system itself has for it; the driver would also tell a GPU
LOCKED = Pin(_address(_LIBC.mlock), _address(_LIBC.munlock))
REFUSED = Pin(_address(_REFUSING), _address(_LIBC.munlock))


class Delayed:
    """``kvcache.tiers.Streams`` whose copies are made when somebody waits for them, and not before: a wait that is missing shows."""

    def __init__(self, pin: Pin | None = LOCKED):
        self.pin, self.waiting, self.copies = pin, [], 0

    def __call__(self, device) -> Delayed:
        return self

    def beside(self, work: Callable[[], None], *uses: Tensor) -> _Late:
        """See ``Streams``."""
        self.waiting.append(work)
        self.copies += 1
        return _Late(self, work)


class _Late:
    def __init__(self, streams: Delayed, work: Callable[[], None]):
        self._streams, self._work = streams, work

    def done(self) -> bool:
        return self._work not in self._streams.waiting

    def wait(self) -> None:
        while not self.done():
            self._streams.waiting.pop(0)()

    finish = wait


class Machine:
    """What ``CudaStreams`` asks of torch.cuda, as queues: ``run`` takes from them in any order that the events allow."""

    def __init__(self):
        self.main = self._current = _Stream(self)

    def Stream(self, device) -> _Stream:
        return _Stream(self)

    def current_stream(self, device=None) -> _Stream:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        """Work goes there."""
        before, self._current = self._current, stream
        yield
        self._current = before

    def launch(self, work: Callable[[], None]) -> None:
        """Work for the current stream."""
        self._current.queue.append(work)

    @staticmethod
    def run(first: _Stream, then: _Stream) -> None:
        """Everything; ``first`` as far as it gets before ``then`` may do one step."""
        while first.queue or then.queue:
            if not (first.step() or then.step()):
                raise AssertionError("both streams wait for each other")


class _Stream:
    def __init__(self, machine: Machine):
        self.machine, self.queue = machine, []

    def record_event(self) -> _Event:
        event = _Event(self)
        self.queue.append(event.happen)
        return event

    def wait_event(self, event: _Event) -> None:
        self.queue.append(event)

    def wait_stream(self, stream: _Stream) -> None:
        self.wait_event(stream.record_event())

    def step(self) -> bool:
        """Do the next thing; False if there is none, or it has to wait."""
        if not self.queue or isinstance(self.queue[0], _Event) and not self.queue[0].happened:
            return False
        work = self.queue.pop(0)
        if not isinstance(work, _Event):
            work()
        return True


class _Event:
    def __init__(self, stream: _Stream):
        self.stream, self.happened = stream, False

    def happen(self) -> None:
        self.happened = True

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        while not self.happened:
            assert self.stream.step() or self.stream.machine.main.step()
