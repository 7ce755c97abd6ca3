"""What patching leaves on a model, and how it is taken off again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import SparseAttnConfig
from .report import LayerLog, Report
from .rotary import Rotation

# the implementation that a patched model's config names; never written to disk
PATCHED = "sparse_attn"


@dataclass(eq=False)
class Patched:
    """The one attribute, ``_sparse_attn``, of each attention module of a patched model."""

    config: SparseAttnConfig
    log: LayerLog
    rotation: Rotation | None = None  # None where dual chunk attention is off or has no use


def layer_of(module: torch.nn.Module) -> int:
    """Index of an attention module's layer."""
    return getattr(module, "layer_idx", None) or 0


class Handle:
    """A patched model, until ``undo()``; also a context manager."""

    def __init__(self, modules: dict[str, torch.nn.Module], configs: list, config: SparseAttnConfig,
                 rotations: dict[str, Rotation]):
        self.config = config
        self._modules = modules
        self._configs = [(c, c._attn_implementation) for c in configs]
        for name, module in modules.items():
            module._sparse_attn = Patched(config, LayerLog(name, layer_of(module)), rotations.get(name))
        for c in configs:
            c._attn_implementation_internal = PATCHED

    def report(self) -> Report:
        """Per layer: backend, density, calls and why they ran dense, since the patch or the last ``report().reset()``.

        Calls inside a torch.compile graph are not counted.
        """
        return Report([m._sparse_attn.log for m in self._modules.values() if "_sparse_attn" in m.__dict__])

    def undo(self) -> None:
        """Put the model back exactly as it was; doing so twice is harmless."""
        for module in self._modules.values():
            module.__dict__.pop("_sparse_attn", None)
        for config, before in self._configs:
            config._attn_implementation_internal = before
        self._configs = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc) -> None:
        self.undo()
