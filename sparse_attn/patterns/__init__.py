"""Every pattern by name; the command lines, the JSON form and the tests read this table."""

from .dense import Dense
from .xattention import XAttention

PATTERNS = {
    "dense": Dense,
    # closed forms
    # block scores
    "xattention": XAttention,
    # probes
    # mixtures
}

__all__ = ["PATTERNS", *(cls.__name__ for cls in PATTERNS.values())]
