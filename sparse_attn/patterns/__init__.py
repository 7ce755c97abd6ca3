"""Every pattern by name; the command lines, the JSON form and the tests read this table."""

from .dense import Dense
from .flexprefill import FlexPrefill
from .minference import MInference
from .sampleattention import SampleAttention
from .vertical_slash import VerticalSlash
from .xattention import XAttention

PATTERNS = {
    "dense": Dense,
    # closed forms
    # block scores
    "xattention": XAttention,
    # probes
    "flexprefill": FlexPrefill,
    "sampleattention": SampleAttention,
    "vertical_slash": VerticalSlash,
    # mixtures
    "minference": MInference,
}

__all__ = ["PATTERNS", *(cls.__name__ for cls in PATTERNS.values())]
