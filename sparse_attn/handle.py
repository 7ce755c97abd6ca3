"""What patching leaves on a model, and how it is taken off again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kept
from .config import SparseAttnConfig
from .errors import require
from .report import LayerLog, Report
from .rotary import Rotation

# the implementation that a patched model's config names; never written to disk
PATCHED = "sparse_attn"


# (model, what patch(kv_cache=) was given) -> what gives each forward its cache; kvcache leaves it here when it is imported
_CACHES: list[Callable[[torch.nn.Module, object], Callable]] = []


def serve_caches(make: Callable[[torch.nn.Module, object], Callable]) -> None:
    """Let ``make`` answer ``patch(kv_cache=...)``."""
    _CACHES[:] = [make]


def cache_installer(model: torch.nn.Module, spec: object) -> Callable | None:
    """What turns the cache of a forward (or None) into one that ``spec`` describes; None where there is no spec."""
    if spec is None:
        return None
    require(bool(_CACHES), "kv_cache needs the other half of this package; import kvcache first")
    return _CACHES[0](model, spec)


class Forward:
    """What the layers of one forward share. Every thread that runs the model has its own; a torch.compile graph has none."""

    def __init__(self):
        self._carry: dict[int, dict] = {}
        self._segments: dict[int, Tensor] = {}

    @property
    def carry(self) -> dict | None:
        """As in LayerContext; a new dict for each forward."""
        return None if torch.compiler.is_compiling() else self._carry.get(threading.get_ident())

    @property
    def segments(self) -> Tensor | None:
        """What ``Handle.segments`` was given."""
        return None if torch.compiler.is_compiling() else self._segments.get(threading.get_ident())

    def begin(self, *args) -> None:
        """Forward pre-hook of the model around all layers."""
        if not torch.compiler.is_compiling():
            self._carry[threading.get_ident()] = {}
            kept.clear()

    def end(self, *args) -> None:
        """Forward hook, called after a failure too: what layers left for each other must not outlive the forward."""
        if not torch.compiler.is_compiling():
            self._carry.pop(threading.get_ident(), None)
            kept.clear()

    @contextlib.contextmanager
    def told(self, ids: Tensor) -> Iterator[None]:
        """``segments`` is ``ids`` inside the block, and what it was before afterwards."""
        thread = threading.get_ident()
        before = self._segments.get(thread)
        self._segments[thread] = ids
        try:
            yield
        finally:
            self._segments.pop(thread)
            if before is not None:
                self._segments[thread] = before


@dataclass(eq=False)
class Patched:
    """The one attribute, ``_sparse_attn``, of each attention module of a patched model."""

    config: SparseAttnConfig
    log: LayerLog
    n_layers: int
    forward: Forward
    rotation: Rotation | None = None  # None where dual chunk attention is off or has no use


def layer_of(module: torch.nn.Module) -> int:
    """Index of an attention module's layer."""
    return getattr(module, "layer_idx", None) or 0


class Handle:
    """A patched model, until ``undo()``; also a context manager."""

    def __init__(self, around: torch.nn.Module, modules: dict[str, torch.nn.Module], configs: list, config: SparseAttnConfig,
                 rotations: dict[str, Rotation], install: Callable | None = None):
        self.config = config
        self._modules = modules
        self._configs = [(c, c._attn_implementation) for c in configs]
        self._forward = Forward()
        self._hooks = [around.register_forward_pre_hook(self._forward.begin),
                       around.register_forward_hook(self._forward.end, always_call=True)]
        if install is not None:
            self._hooks.append(around.register_forward_pre_hook(_cached(install), with_kwargs=True))
        n_layers = 1 + max(layer_of(m) for m in modules.values())
        for name, module in modules.items():
            module._sparse_attn = Patched(config, LayerLog(name, layer_of(module)), n_layers, self._forward, rotations.get(name))
        for c in configs:
            c._attn_implementation_internal = PATCHED

    def report(self) -> Report:
        """Per layer: backend, density, calls and why they ran dense, since the patch or the last ``report().reset()``.

        Calls inside a torch.compile graph are not counted.
        """
        return Report([m._sparse_attn.log for m in self._modules.values() if "_sparse_attn" in m.__dict__])

    @contextlib.contextmanager
    def segments(self, ids: Tensor) -> Iterator[None]:
        """Tell which document each token belongs to, for every forward of this thread inside the block.

        The same as passing ``segment_ids=ids`` to the model, which ``generate`` would not let through.

        Args:
            ids: whole numbers ``[B, N]``, one per token of the longest prompt, padding included; beams are rows of their own.
                They rise from 0 along a row; -1 stands for padding and tokens of no document.

        Raises:
            ContractError: if they do not; when the model runs, also if they do not fit its prompt.
        """
        whole = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() and ids.dtype != torch.bool
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        require(whole, f"segment ids must be whole numbers [B, N], one per token, got {got}")
        highest = ids.cummax(1).values
        require(bool(((ids == highest) | (ids == -1)).all()), "segment ids must rise along each row from 0, with -1 for no document")
        with self._forward.told(ids.int()):
            yield

    def undo(self) -> None:
        """Put the model back exactly as it was; doing so twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        for module in self._modules.values():
            module.__dict__.pop("_sparse_attn", None)
        for config, before in self._configs:
            config._attn_implementation_internal = before
        self._configs = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc) -> None:
        self.undo()


def _cached(install: Callable) -> Callable:
    """Forward pre-hook of the model around all layers: ``install`` decides on the cache, unless the call wants none."""

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        wanted = kwargs.get("use_cache")
        wanted = getattr(module.config, "use_cache", True) if wanted is None else wanted
        given = kwargs.get("past_key_values")
        if wanted or given is not None:
            kwargs["past_key_values"] = install(given)
        return args, kwargs

    return hook
