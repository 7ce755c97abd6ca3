"""Every pattern by name; the command lines, the JSON form and the tests read this table."""

from .block_topk import BlockTopK
from .critiprefill import CritiPrefill
from .dense import Dense
from .moba import MoBA
from .pbs import PBS
from .prism import Prism
from .spargeattn import SpargeAttn
from .vmoba import VMoBA
from .xattention import XAttention

PATTERNS = {
    "dense": Dense,
    # closed forms
    # block scores
    "block_topk": BlockTopK,
    "critiprefill": CritiPrefill,
    "moba": MoBA,
    "pbs": PBS,
    "prism": Prism,
    "spargeattn": SpargeAttn,
    "vmoba": VMoBA,
    "xattention": XAttention,
    # probes
    # mixtures
}

__all__ = ["PATTERNS", *(cls.__name__ for cls in PATTERNS.values())]
