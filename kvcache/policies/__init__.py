"""Every policy by name; configuration and tests read this table."""

from .chunkkv import ChunkKV
from .heavy_hitter import HeavyHitter
from .keydiff import KeyDiff
from .knorm import KNorm
from .locret import Locret
from .random import Random
from .snapkv import SnapKV
from .streaming import Streaming
from .tova import Tova

POLICIES = {
    "chunkkv": ChunkKV,
    "heavy_hitter": HeavyHitter,
    "keydiff": KeyDiff,
    "knorm": KNorm,
    "locret": Locret,
    "random": Random,
    "snapkv": SnapKV,
    "streaming": Streaming,
    "tova": Tova,
}

__all__ = ["POLICIES", *(cls.__name__ for cls in POLICIES.values())]
