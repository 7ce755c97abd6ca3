"""Every pattern by name; the command lines, the JSON form and the tests read this table."""

from .a_shape import AShape
from .bigbird import BigBird
from .block_rank import BlockRank
from .block_topk import BlockTopK
from .critiprefill import CritiPrefill
from .dense import Dense
from .duo import Duo
from .flexprefill import FlexPrefill
from .minference import MInference
from .moba import MoBA
from .neighborhood import Neighborhood
from .pbs import PBS
from .prism import Prism
from .proxyattn import ProxyAttn
from .sampleattention import SampleAttention
from .spargeattn import SpargeAttn
from .tri_shape import TriangleMix, TriShape
from .vertical_slash import VerticalSlash
from .vmoba import VMoBA
from .xattention import XAttention

PATTERNS = {
    "dense": Dense,
    # closed forms
    "a_shape": AShape,
    "bigbird": BigBird,
    "block_rank": BlockRank,
    "duo": Duo,
    "neighborhood": Neighborhood,
    "tri_shape": TriShape,
    "triangle_mix": TriangleMix,
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
    "flexprefill": FlexPrefill,
    "proxyattn": ProxyAttn,
    "sampleattention": SampleAttention,
    "vertical_slash": VerticalSlash,
    # mixtures
    "minference": MInference,
}

__all__ = ["PATTERNS", *(cls.__name__ for cls in PATTERNS.values())]
