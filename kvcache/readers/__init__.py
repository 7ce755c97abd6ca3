"""Every way to read less of what is kept, by name; configuration and tests read this table.

A reader is a frozen dataclass that serves all layers and requests. It sees queries and a digest of the pages, never values.
"""

from .lrqk import LRQK
from .quest import Quest

READERS = {
    "quest": Quest,
    "lrqk": LRQK,
}

__all__ = ["READERS", *(cls.__name__ for cls in READERS.values())]
