"""Tri-shape: an A-shape whose last queries read everything; TriangleMix: dense layers below, tri-shape above."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import NotServed, require
from ..types import KVView, LayerContext, ReadPlan, Selector
from .a_shape import near_plan, require_near
from .dense import Dense


@dataclass(frozen=True)
class TriShape:
    """Read the first ``sink_tokens`` keys and each query's last ``recent_tokens``; the last ``dense_rows`` queries read everything.

    The last queries are where the question stands, so what generation starts from has seen the whole prompt. Tokens in the
    middle have not: scores over the prompt itself (perplexity) get worse by design.
    Source: MInference's tri_shape (microsoft/MInference; SCBench, arXiv:2412.10319), its default sizes. Differs from that code:
    the dense rows are rows of the same pass, not a second product that holds ``dense_rows x Nk`` logits per head.
    In chunked prefill the last rows of every chunk are dense, because a layer cannot know that more chunks follow.
    Cannot serve attention without causality.

    Attributes:
        sink_tokens, recent_tokens, block: as in AShape.
        dense_rows: last queries of each row that read everything.
    """

    sink_tokens: int = 128
    recent_tokens: int = 3968
    dense_rows: int = 100
    block: int = 128

    def __post_init__(self):
        require_near(self.sink_tokens, self.recent_tokens, self.block)
        require(self.dense_rows >= 0, f"dense_rows={self.dense_rows} is negative; it counts queries")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        return near_plan(q, kv, ctx, [(self.sink_tokens, self.recent_tokens)] * q.shape[1], self.block, self.dense_rows)


@dataclass(frozen=True)
class TriangleMix:
    """Read by ``early`` in the layers below ``start_layer`` and a narrow tri-shape from there on.

    In deep layers only the tokens after the prompt still use what lies far back, so the middle of the triangle is left out there.
    Source: TriangleMix, arXiv:2507.21526; default sizes as in its published code. Differs from that code: ``start_layer`` is half
    of the layers wherever it is not given (the code falls to layer 0, every layer a triangle, when its arguments are left out).
    The paper uses layer 16 of 32 for Llama-3.1-8B and 20 of 28 for Qwen2.5-7B. What TriShape says of chunks holds here too.

    Attributes:
        sink_tokens, recent_tokens, dense_rows, block: as in TriShape, for the layers from ``start_layer`` on.
        start_layer: first layer that is a triangle; None for half of the model's layers.
        early: the selector of the layers below, or in JSON its name or dict; dense in the paper, or MInference.
    """

    sink_tokens: int = 8
    recent_tokens: int = 512
    dense_rows: int = 128
    start_layer: int | None = None
    early: Selector = Dense()
    block: int = 128

    def __post_init__(self):
        require_near(self.sink_tokens, self.recent_tokens, self.block)
        require(self.dense_rows >= 0, f"dense_rows={self.dense_rows} is negative; it counts queries")
        start = self.start_layer
        require(start is None or start >= 0, f"start_layer={start} is negative; layers count from 0")
        require(isinstance(self.early, Selector) and not isinstance(self.early, type),
                f"early={self.early!r} is not a selector; give an object such as Dense(), or a name in the JSON form")

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        if self.start_layer is None and not ctx.n_layers:
            raise NotServed("needs the number of layers to find their middle; give start_layer or patch the model")
        start = ctx.n_layers // 2 if self.start_layer is None else self.start_layer
        if ctx.layer < start:
            return self.early.select(q, kv, ctx)
        return TriShape(self.sink_tokens, self.recent_tokens, self.dense_rows, self.block).select(q, kv, ctx)
