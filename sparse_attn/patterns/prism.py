"""Prism: pooled scores of the fast and the slow rotary channels apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..errors import NotServed, require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan
from .choose import as_table, choose, empty_index, per_head, require_gqa
from .pooled import pool_keys, pool_queries, shares


@dataclass(frozen=True)
class Prism:
    """Read the blocks that cover ``threshold`` of the pooled mass of the fast rotary channels, and those of the slow ones.

    The mean over a block nearly cancels channels that turn quickly, so in one common score they are lost. Each band is
    scored alone, with a temperature that undoes the cancelling: its logits are multiplied by ``D / d`` over the product of the
    band's RMS relative to all channels, of queries and of keys, per batch row and head.
    Source: Prism, arXiv:2602.08426; defaults as in its published code (threshold .95 for Llama, .93 for Qwen).
    The logits carry the softmax scale of the call, which is the paper's ``D ** -0.5`` wherever a model has no other.
    Differs from that code: means are over real tokens, not over a block filled with zeros.
    Expects rotate-half channels: channel c turns with c + D / 2, fastest first. With interleaved pairs the bands mean nothing.

    Attributes:
        threshold: share of each band's mass to cover, in [0, 1]; one number, or a table ``[layers][heads]``. 1 is dense.
        block: edge of query and key blocks, tokens.
        high: share of each rotary half, from its fast end, in the fast band, in (0, 1].
        low: share of each rotary half, from its slow end, in the slow band, in (0, 1]; bands may overlap.
        sink: leading blocks always read, without counting towards the threshold.
        recent: likewise trailing blocks, own diagonal included; ignored without causality.
        gqa: what query heads that share keys do together, see ``choose``.
    """

    threshold: float | tuple[tuple[float, ...], ...] = 0.95
    block: int = 128
    high: float = 0.5
    low: float = 0.75
    sink: int = 1
    recent: int = 1
    gqa: str = "per_head"

    def __post_init__(self):
        object.__setattr__(self, "threshold", as_table(self.threshold, 0, 1))
        require(self.block > 0, f"block={self.block} must be positive; 128 is usual")
        for name, band in (("high", self.high), ("low", self.low)):
            require(0 < band <= 1, f"{name}={band} is outside (0, 1]; it is a share of each rotary half")
        require(min(self.sink, self.recent) >= 0, f"sink={self.sink} and recent={self.recent} count blocks; use 0 for none")
        require_gqa(self.gqa)

    def bands(self, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels of the fast and of the slow band.

        Example:
            >>> Prism().bands(16)
            ((0, 1, 2, 3, 8, 9, 10, 11), (2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15))
        """
        half = dim // 2
        fast, slow = (range(max(1, round(half * self.high))), range(half - max(1, round(half * self.low)), half))
        return (*fast, *(half + c for c in fast)), (*slow, *(half + c for c in slow))

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if q.shape[3] % 2:
            raise NotServed(f"needs an even head_dim, got {q.shape[3]}")
        k, _ = kv.fetch()
        index = empty_index(q, kv, ctx, self.block)
        always = index.reachable(sink=self.sink, recent=self.recent if ctx.causal else 0)
        threshold = per_head(self.threshold, ctx.layer, q.shape[1], q.device)
        keep = None
        for score in band_scores(q, k, ctx.scale, index, self.bands(q.shape[3])):
            kept = choose(score, index, k.shape[1], threshold=threshold, sink=0, recent=0, always=always, gqa=self.gqa).to_mask()
            keep = kept if keep is None else keep | kept
        return ReadPlan(index.where(keep))


def band_scores(q: Tensor, k: Tensor, scale: float, index: BlockIndex, bands: Iterable[tuple[int, ...]]) -> list[Tensor]:
    """float32 ``[B, H, Qb, Kb]`` per band of channels: mean-pooled attention of that band alone, at its own temperature."""
    pooled, group = (pool_queries(q, index), pool_keys(k, index)), q.shape[1] // k.shape[1]
    scores = []
    for band in bands:
        q_band, k_band = (x[..., list(band)] for x in pooled)
        shrunk = _power(q_band) / _power(pooled[0]) * (_power(k_band) / _power(pooled[1])).repeat_interleave(group, 1)
        sharp = scale * q.shape[3] / len(band) / shrunk.sqrt()  # [B, H]
        scores.append(shares(q_band, k_band, sharp.float(), index))
    return scores


def _power(x: Tensor) -> Tensor:
    """float64 ``[B, heads]``: mean square over blocks and channels; blocks of padding are 0 and cancel in a ratio."""
    return x.double().square().mean((2, 3)).clamp(min=1e-12)
