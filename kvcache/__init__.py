"""What a cache keeps, and where: caches for transformers models whose memory is what the budget says."""

import importlib

from sparse_attn.handle import serve_caches

from .budget import BUDGETS
from .config import METHODS, RETRIEVING, CacheConfig
from .policies import POLICIES
from .readers import READERS

# these import transformers, which takes seconds
_LAZY = ("AdaKVCache", "DoubleSparsityCache", "H2OCache", "InfLLMCache", "KVCache", "LRQKCache", "LandmarksCache",
         "LocretCache", "PyramidKVCache", "QuestCache", "QuickLLaMACache", "ShadowKVCache", "SnapKVCache", "StreamingLLMCache",
         "TOVACache", "TokenSelectCache", "load", "make_cache", "prefill")

__all__ = ["BUDGETS", "METHODS", "POLICIES", "READERS", "RETRIEVING", "CacheConfig", *_LAZY]

serve_caches(lambda model, spec: importlib.import_module("kvcache.hf").installer(model, spec))


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module("kvcache.hf"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
