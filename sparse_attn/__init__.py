"""What attention reads, and how it is computed: block-sparse attention for transformers models."""

from .config import SparseAttnConfig
from .dual_chunk import DualChunk
from .errors import ContractError, NoBackendError
from .hook import register_when_imported
from .ops import use_backend
from .patterns import PATTERNS, Auto, Chorus, Dense, XAttention

__version__ = "0.1.0"
__all__ = ["PATTERNS", "Auto", "Chorus", "ContractError", "Dense", "DualChunk", "NoBackendError", "SparseAttnConfig", "XAttention",
           "patch", "use_backend"]

register_when_imported()


def __getattr__(name: str):
    # importing transformers takes seconds, so only whoever patches a model waits for it
    if name == "patch":
        from .hf import patch

        return patch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
