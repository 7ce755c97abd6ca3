"""Registers our attention functions with transformers as soon as both are imported, in either order, without importing it.

Importing transformers' model base class takes seconds; ``import sparse_attn`` should not.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

_TARGET = "transformers.modeling_utils"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the target be imported as usual and registers right afterwards."""

    def find_spec(self, name, path, target=None):
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module):
                run(module)
                try:
                    importlib.import_module("sparse_attn.hf")
                except ImportError as error:
                    # whoever only imports transformers beside us must not be stopped by it
                    warnings.warn(f"sparse_attn is not registered with transformers: {error}; it needs 5.17 or newer", stacklevel=2)

            spec.loader.exec_module = run_then_register
        return spec


def register_when_imported() -> None:
    """Register now if transformers' models are already imported, else right after they are."""
    if _TARGET in sys.modules:
        importlib.import_module("sparse_attn.hf")
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
