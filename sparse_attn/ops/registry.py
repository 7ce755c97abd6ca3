"""An op is its reference; backends stand in front of it, each with the reason it would refuse.

``@op`` turns a short pure-torch function into the torch operator ``sparse_attn::<name>``: the schema is inferred from the
signature, so the reference is the definition that every backend is tested against. Which backend runs is decided at every
call, in the order of registration, the reference last. Measured on one 2.5 GHz core: see ``python -m benchmarks.kernels
overhead``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..errors import ContractError, NoBackendError, require

LIBRARY = torch.library.Library("sparse_attn", "DEF")
OPS: dict[str, Op] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("sparse_attn_backend", default=None)

# call shapes remembered per op; a generation meets a new one per token
_MOST_SETTLED = 1024


def _wanted() -> str | None:
    """The backend that use_backend or the environment asks for."""
    return _forced.get() or os.environ.get("SPARSE_ATTN_BACKEND") or None


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. ``why_not(*args)`` is None when it would run, else a sentence 'needs X, got Y'.

    The verdict may depend on shapes, dtypes, devices and numbers, never on what a tensor holds: it is remembered per call shape.
    """

    name: str
    run: Callable
    why_not: Callable[..., str | None]
    by_name_only: bool = False  # slow twins for tests: they run when forced, and are never chosen


class Op:
    """A torch operator with a reference, a contract and any number of backends."""

    def __init__(self, reference: Callable, mutates: tuple[str, ...] = ()):
        self.name = reference.__name__
        self.reference = reference
        self.__doc__ = reference.__doc__
        self.signature = inspect.signature(reference)
        self.backends: list[Backend] = []
        self._defaults = tuple(p.default for p in self.signature.parameters.values())
        self._check: Callable = lambda *args: None
        self._warned: set[str] = set()
        self._settled: dict[tuple, Callable] = {}  # call shape -> what runs it, once its contract was checked
        LIBRARY.define(self.name + torch.library.infer_schema(reference, mutates_args=mutates))
        LIBRARY.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        self._call = getattr(getattr(torch.ops.sparse_attn, self.name), "default")
        OPS[self.name] = self

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """Backend names in order of preference; the reference is last."""
        return [b.name for b in self.backends] + ["reference"]

    # -- definition ---------------------------------------------------------------------------------------------------

    def check(self, fn: Callable) -> Callable:
        """Register the contract: ``fn(*args)`` raises ContractError on bad input, before any backend is asked.

        It sees each call shape once, so it must not look at what a tensor holds; that is for the backends, which read it anyway.
        """
        self._check = fn
        return fn

    def fake(self, fn: Callable) -> Callable:
        """Register the shapes of the outputs, for torch.compile."""
        torch.library.register_fake(f"sparse_attn::{self.name}", fn, lib=LIBRARY)
        return fn

    def backend(self, name: str, why_not: Callable[..., str | None], by_name_only: bool = False) -> Callable:
        """Add a backend behind those already there; ``run`` takes the op's arguments, plus ``out=`` if it can fill one."""

        def register(run: Callable) -> Callable:
            require(name not in self.names, f"{self.name} already has a backend named {name}; choose another name")
            self.backends.append(Backend(name, run, why_not, by_name_only))
            self._settled.clear()
            return run

        return register

    # -- choice -------------------------------------------------------------------------------------------------------

    def explain(self, *args, **kwargs) -> dict[str, str | None]:
        """What each backend says to these arguments: None if it would run, else why not. Order of preference."""
        args = self._bind(args, kwargs)
        verdicts = {b.name: b.why_not(*args) for b in self.backends}
        verdicts["reference"] = None
        return verdicts

    def chosen(self, *args, **kwargs) -> str:
        """Name of the backend that a call with these arguments would use."""
        return self._choose(self._bind(args, kwargs))[0]

    def out(self, *args, out: tuple[torch.Tensor, ...], **kwargs):
        """Same as the call, but writes into preallocated outputs; eager only, backends with ``out=`` only."""
        args = self._bind(args, kwargs)
        self._check(*args)
        name, run = self._choose(args)
        require("out" in inspect.signature(run).parameters, f"{self.name} on {name} cannot fill a given output; drop out=")
        return run(*args, out=out)

    def _bind(self, args: tuple, kwargs: dict) -> tuple:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _dispatch(self, *args, **kwargs):
        # torch drops trailing arguments that equal their default; put them back
        args = self._bind(args, kwargs) if kwargs else args + self._defaults[len(args) :]
        grad = torch.is_grad_enabled()
        shape = (_wanted(), *[(a.shape, a.dtype, a.device, grad and a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args])
        run = self._settled.get(shape)
        if run is None:
            if grad and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                raise ContractError(f"{self.name} is inference only and got an input that requires grad; use torch.no_grad()")
            self._check(*args)
            run = self._choose(args)[1]
            if len(self._settled) >= _MOST_SETTLED:
                self._settled.clear()
            self._settled[shape] = run
        return run(*args)

    def _choose(self, args: tuple) -> tuple[str, Callable]:
        wanted = _wanted()
        if wanted is not None:
            return wanted, self._forced_run(wanted, args)
        refusals = []
        for backend in self.backends:
            if backend.by_name_only:
                continue
            refusal = backend.why_not(*args)
            if refusal is None:
                return backend.name, backend.run
            refusals.append(f"{backend.name}: {refusal}")
        if refusals and any(isinstance(a, torch.Tensor) and a.device.type not in ("cpu", "meta") for a in args):
            self._warn_once(f"{self.name} runs its slow reference on an accelerator: " + "; ".join(refusals))
        return "reference", self.reference

    def _forced_run(self, wanted: str, args: tuple) -> Callable:
        if wanted == "reference":
            return self.reference
        for backend in self.backends:
            if backend.name == wanted:
                refusal = backend.why_not(*args)
                if refusal is None:
                    return backend.run
                raise NoBackendError(f"{self.name} cannot run: {wanted}: {refusal}")
        raise NoBackendError(f"{self.name} cannot run: {wanted}: no such backend; this op has {', '.join(self.names)}")

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=4)


def op(reference: Callable | None = None, *, mutates: tuple[str, ...] = ()) -> Op | Callable[[Callable], Op]:
    """Make ``reference`` the definition of an op; its name and signature become the operator's.

    ``@op(mutates=("rows",))`` names the arguments that it writes in place; such an op returns None.
    """
    return functools.partial(Op, mutates=mutates) if reference is None else Op(reference, mutates)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend; a refusal raises NoBackendError and nothing falls back.

    The environment variable ``SPARSE_ATTN_BACKEND`` does the same for a whole process.
    """
    known = {n for o in OPS.values() for n in o.names}
    if name not in known:
        raise NoBackendError(f"{name}: no such backend; there are {', '.join(sorted(known))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
