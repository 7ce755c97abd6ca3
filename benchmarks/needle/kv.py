"""What a cache held while a prompt was read and answered, beside what its budget says it should."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcache.hf import KVCache, KVPolicyLayer

# what the most that is held at any time is made of
CHUNKED, ONE_PIECE, ALL = "budget + chunk", "budget, one layer whole", "everything"


def figures(cache: Cache, batch: int, turns: list[int], chunk: int | None) -> dict[str, object]:
    """What a cache holds once the answer is written, and has held at the most.

    Args:
        turns: tokens of each turn that was read.
        chunk: tokens read at once; None for a turn in one piece.

    Returns:
        kept_tokens (per KV head, mean over the layers that evict, or all where none does), kv_bytes and kv_peak_bytes (all layers;
        a cache of transformers only grows), kv_formula_bytes (what the most should be) and kv_formula: budget + chunk in every
        layer; budget in every layer but the whole text in one, where that was read in one piece; or everything.
    """
    plain = [t for layer in cache.layers if not isinstance(layer, KVPolicyLayer) for t in _tensors(layer)]
    beside = sum(t.nbytes for t in plain)
    if not isinstance(cache, KVCache):
        kept = sum(t.shape[2] for t in plain) / max(len(plain), 1)
        read = sum(t.nbytes // t.shape[2] * min(t.shape[2], sum(turns)) for t in plain)
        return dict(kept_tokens=kept, kv_bytes=beside, kv_peak_bytes=beside, kv_formula_bytes=read, kv_formula=ALL)
    report = cache.report()
    formula, tokens = most(cache, turns[0], chunk)
    found = dict(kept_tokens=report.tokens, kv_bytes=report.n_bytes + beside, kv_peak_bytes=report.peak_bytes + beside,
                 kv_formula_bytes=report.formula(tokens / len(report.layers), batch) + beside, kv_formula=formula)
    if cache.kept.decode is not None:
        found |= dict(step_bytes=report.step_bytes, dense_step_bytes=report.dense_step_bytes)
    if report.tiers:
        found |= dict(tier_bytes=report.tiers, moved_bytes=report.moved_bytes, hit_rate=report.hit_rate)
    return found


def most(cache: KVCache, text: int, chunk: int | None) -> tuple[str, int]:
    """How the most that an evicting cache holds of a text is counted, and how many tokens per KV head that makes in all layers."""
    config, layers, seen = cache.kept, [row.layer for row in cache.report().layers], torch.tensor([text])
    if config.budget is None:
        return ALL, len(layers) * text
    budgets = [min(text, int(config.budget.layer_tokens(layer, len(cache.layers), seen))) for layer in layers]
    piece = min(chunk or text, text)
    if piece == text:
        return ONE_PIECE, sum(budgets[:-1]) + text
    if config.evict == "prompt":
        return ALL, len(layers) * text
    return CHUNKED, sum(min(text, tokens + piece) for tokens in budgets)


def _tensors(layer: object) -> list[Tensor]:
    pair = [getattr(layer, name, None) for name in ("keys", "values")]
    return [t for t in pair if isinstance(t, Tensor) and t.numel()]
