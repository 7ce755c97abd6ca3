"""Every way to read less of what is kept, by name; configuration and tests read this table.

A reader is a frozen dataclass that serves all layers and requests. It sees queries and a digest of the pages, never values.
"""

from .double_sparsity import DoubleSparsity
from .infllm import InfLLM, QuickLLaMA
from .landmarks import Landmarks
from .lrqk import LRQK
from .quest import Quest
from .token_select import TokenSelect

READERS = {
    "quest": Quest,
    "landmarks": Landmarks,
    "double_sparsity": DoubleSparsity,
    "token_select": TokenSelect,
    "infllm": InfLLM,
    "quickllama": QuickLLaMA,
    "lrqk": LRQK,
}

__all__ = ["READERS", *(cls.__name__ for cls in READERS.values())]
