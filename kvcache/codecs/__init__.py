"""Every form that keys may take when they leave the device, by name; configuration and tests read this table."""

from .lowrank_keys import LowRankKeys
from .plain import Plain

CODECS = {
    "lowrank": LowRankKeys,
    "plain": Plain,
}

__all__ = ["CODECS", *(cls.__name__ for cls in CODECS.values())]
