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
