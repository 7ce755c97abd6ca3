"""What the stages hand to each other: block lists, read plans, the layer's context, and the view of a cache.

A mask is never stored here: a query at position t sees keys 0..t. Blocks of 2 x 2 tokens, x marks what is read::

    keys      0 1 | 2 3        BlockIndex.counts  = [1, 2]
    query 0   x . | . .        BlockIndex.indices = [[0, -1], [0, 1]]
          1   x x | . .
          2   x x | x .        the diagonal block is listed; the future inside it is cut by position
          3   x x | x x
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import require
from .ops.spans import reach, spans


@dataclass(frozen=True)
class LayerContext:
    """Everything about one attention call that is not a tensor of tokens.

    Attributes:
        layer: index of the layer in the model.
        scale: softmax scale.
        q_start: position of query 0 among the keys, tokens.
        causal: whether a query sees only keys at or before its position.
        first: int32 ``[B]`` first real key of each row (left padding); None means 0.
        last: int32 ``[B]`` one past the last real key of each row (right padding, StaticCache tail); None means all.
        window: sliding window of the layer in tokens, own token included; 0 for none.
        softcap: bound on the logits; 0 for none.
        sinks: learned sink logits ``[H]``; None for none.
        n_layers: attention layers of the model; 0 where nobody said.
        segments: int32 ``[B, >= Nk]`` document of each key and, where known, of the prompt after it; rising from 0, -1 for tokens
            of no document; None where nobody said.
        carry: what one layer leaves for the next of the same forward (a method keys it by its own name); None outside a
            patched model.
    """

    layer: int
    scale: float
    q_start: int
    causal: bool = True
    first: Tensor | None = None
    last: Tensor | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    n_layers: int = 0
    segments: Tensor | None = None
    carry: dict | None = None


@dataclass(frozen=True, repr=False)
class BlockIndex:
    """Which key blocks each query block reads, per batch row and list of heads.

    Attributes:
        counts: int32 ``[B, Hp, Qb]`` key blocks read by each query block; Hp divides the number of query heads.
        indices: int32 ``[B, Hp, Qb, S]`` key block numbers, ascending; slots past ``counts`` hold -1.
        block: ``(block_q, block_k)`` tokens; the last block of each axis may be partial.
        n_q, n_k: tokens covered, padding included.
        q_start, causal, window, first, last: as in LayerContext; they say which blocks could be reached at all.

    Example:
        >>> index = BlockIndex.dense(batch=1, heads=1, n_q=256, n_k=256, block=(64, 64))
        >>> index.counts.tolist()
        [[[1, 2, 3, 4]]]
        >>> index
        BlockIndex(B=1, H=1, blocks=4x4, block=(64, 64), density=1.000)
    """

    counts: Tensor
    indices: Tensor
    block: tuple[int, int]
    n_q: int
    n_k: int
    q_start: int = 0
    causal: bool = True
    window: int = 0
    first: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def dense(cls, batch: int, heads: int, n_q: int, n_k: int, block: tuple[int, int], q_start: int = 0, causal: bool = True,
              window: int = 0, first: Tensor | None = None, last: Tensor | None = None, device=None) -> BlockIndex:
        """Every reachable block."""
        index = cls.empty(batch, heads, n_q, n_k, block, q_start, causal, window, first, last, device)
        return index.where(index.reachable().expand(-1, heads, -1, -1))

    @classmethod
    def empty(cls, batch: int, heads: int, n_q: int, n_k: int, block: tuple[int, int], q_start: int = 0, causal: bool = True,
              window: int = 0, first: Tensor | None = None, last: Tensor | None = None, device=None) -> BlockIndex:
        """No block at all; where() and the other fields of a ReadPlan add to it."""
        none = torch.zeros(batch, heads, -(-n_q // block[0]), 0, dtype=torch.int32, device=device)
        return cls(none.sum(-1, dtype=torch.int32), none, block, n_q, n_k, q_start, causal, window, first, last)

    def where(self, keep: Tensor) -> BlockIndex:
        """The same geometry, reading exactly the blocks where ``keep`` (bool ``[B, Hp, Qb, Kb]``) holds."""
        column = torch.arange(keep.shape[3], device=keep.device)
        order = torch.where(keep, column, keep.shape[3]).sort(-1).values
        indices = order.masked_fill(order == keep.shape[3], -1).int()
        return replace(self, counts=keep.sum(-1, dtype=torch.int32), indices=indices)

    def to_mask(self) -> Tensor:
        """bool ``[B, Hp, Qb, Kb]``: is the block listed?"""
        slot = torch.arange(self.indices.shape[3], device=self.indices.device)
        kb = -(-self.n_k // self.block[1])
        listed = self.indices.masked_fill(slot >= self.counts[..., None], -1).long()
        mask = torch.zeros(*self.counts.shape, kb + 1, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, listed.masked_fill(listed < 0, kb), True)[..., :kb]

    def reachable(self, sink: int | None = None, recent: int | None = None) -> Tensor:
        """bool ``[B, 1, Qb, Kb]``: could causality, window and padding let any query of the block see any key?

        With ``sink`` or ``recent`` only the first ``sink`` of those blocks and the last ``recent``, counted back from the query
        block's own diagonal as in ``ops.select_blocks``.
        """
        kb = -(-self.n_k // self.block[1])
        found = torch.zeros(*self.counts.shape[::2], kb, dtype=torch.bool)
        column = torch.arange(kb)
        for b, span in enumerate(self._spans()):
            low, own, high = (edge[:, None] for edge in reach(span, *self.block, self.causal, self.window))
            inside = (column >= low) & (column <= high)
            if sink is not None or recent is not None:
                inside &= (column < (sink or 0)) | ((column > own - recent) if recent else False)
            found[b, : len(low)] = inside
        return found[:, None].to(self.counts.device)

    def rows(self) -> tuple[Tensor, Tensor]:
        """int64 ``[B, Qb]`` each, on the host: position of each query block's first query, counted from the row's first real
        key, and how many real queries the block has."""
        start = torch.zeros(self.counts.shape[0], self.counts.shape[2], dtype=torch.int64)
        real = torch.zeros_like(start)
        edge = torch.arange(self.counts.shape[2]) * self.block[0]
        for b, span in enumerate(self._spans()):
            start[b], real[b] = edge + span.q_start, (span.n_q - edge).clamp(0, self.block[0])
        return start, real

    def n_reachable(self) -> int:
        """Blocks that one head could read, summed over the batch."""
        edges = [reach(span, *self.block, self.causal, self.window) for span in self._spans() if span.n_k]
        return sum(int((high - low + 1).sum()) for low, _, high in edges)

    def head_density(self) -> Tensor:
        """float64 ``[Hp]`` on the lists' device: blocks read over blocks causally reachable, per list; NaN if none are."""
        return self.counts.sum((0, 2), dtype=torch.float64) / self.n_reachable()

    def density(self) -> float:
        """Blocks read over blocks causally reachable; copies one number to the host."""
        return float(self.head_density().mean())

    def _spans(self):
        return spans(self.counts.shape[0], self.n_q, self.n_k, self.q_start, self.causal, self.first, self.last)

    def __repr__(self) -> str:
        batch, heads, qb = self.counts.shape
        kb = -(-self.n_k // self.block[1])
        return f"BlockIndex(B={batch}, H={heads}, blocks={qb}x{kb}, block={self.block}, density={self.density():.3f})"


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """What one attention call reads: the union of everything named here. ``blocks`` None means everything: the dense path.

    Attributes:
        blocks: block lists, possibly empty ones; they carry the geometry of the call.
        columns, near, dense_rows, order, pv_threshold: as in ``ops.block_sparse_attention``.
    """

    blocks: BlockIndex | None = None
    columns: Tensor | None = None
    near: Tensor | None = None
    dense_rows: int = 0
    order: Tensor | None = None
    pv_threshold: float = 0.0

    def extras(self) -> tuple:
        """The last arguments of ``ops.block_sparse_attention``."""
        return self.columns, self.near, self.dense_rows, self.order, self.pv_threshold

    def head_density(self) -> Tensor:
        """float64 ``[heads]``: tiles read over tiles causally reachable, per list; 1 for a dense plan.

        A tile that ``near`` reaches counts whole, a column outside every listed tile as its ``1 / block_k``, and a dense row
        as its share of its query block. Sorted by ``order``, a query block may read more tiles than it reaches unsorted; it then
        counts as dense.
        """
        blocks = self.blocks
        if blocks is None:
            return torch.ones(1, dtype=torch.float64)
        if self.columns is None and self.near is None and self.order is None and not self.dense_rows:
            return blocks.head_density()
        start, real = (x.to(blocks.counts.device)[:, None] for x in blocks.rows())  # [B, 1, Qb]
        mask, reachable = blocks.to_mask(), blocks.reachable()
        if self.near is not None:
            edge = torch.arange(mask.shape[3], device=mask.device) * blocks.block[1]
            sink, local = self.near.long().view(1, -1, 2, 1, 1).unbind(2)
            mask = mask.repeat_interleave(len(self.near) // mask.shape[1], 1)
            mask = mask | reachable & ((edge < sink) | (local > 0) & (edge + blocks.block[1] > start[..., None] - local + 1))
        read = mask.sum(-1, dtype=torch.float64)
        if self.columns is not None:
            heads = max(mask.shape[1], self.columns.shape[1])
            lines = self.columns.long().repeat_interleave(heads // self.columns.shape[1], 1)[:, :, None]  # [B, heads, 1, C]
            covered = mask.repeat_interleave(heads // mask.shape[1], 1)
            covered = covered.gather(3, (lines.clamp(min=0) // blocks.block[1]).expand(-1, -1, mask.shape[2], -1))
            seen = (lines >= 0) & (lines < (start + real)[..., None]) if blocks.causal else lines >= 0
            loose = (~covered & seen & (real > 0)[..., None]).sum(-1, dtype=torch.float64) / blocks.block[1]
            read = read.repeat_interleave(heads // read.shape[1], 1) + loose
        whole = reachable.sum(-1, dtype=torch.float64)
        if self.dense_rows:
            left = real.sum(-1, keepdim=True) - real.cumsum(-1)  # real queries after each block
            share = (self.dense_rows - left).clamp(min=0).minimum(real).double() / real.clamp(min=1)
            read = share * whole + (1 - share) * read
        return torch.minimum(read, whole).sum((0, 2)) / whole.sum()

    def density(self) -> float:
        """Mean of ``head_density``; copies one number to the host."""
        return float(self.head_density().mean())


@runtime_checkable
class KVView(Protocol):
    """What a cache shows to attention."""

    n_tokens: int

    def fetch(self, blocks: BlockIndex | None = None) -> tuple[Tensor, Tensor]:
        """Keys ``[B, Hkv, Nk, D]`` and values ``[B, Hkv, Nk, Dv]``; those of the listed blocks are valid, or all for None."""
        ...


@dataclass(frozen=True)
class ResidentKV:
    """Keys and values that are simply there."""

    k: Tensor
    v: Tensor

    @property
    def n_tokens(self) -> int:
        return self.k.shape[2]

    def fetch(self, blocks: BlockIndex | None = None) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@runtime_checkable
class Selector(Protocol):
    """Decides which blocks a query reads; a frozen dataclass with validated fields."""

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan: ...


def dense_index(q: Tensor, kv: KVView, ctx: LayerContext, block: tuple[int, int]) -> BlockIndex:
    """Everything the context lets ``q`` reach, one list per batch row shared by all heads."""
    require(q.dim() == 4, f"q needs 4 dimensions [B, H, Nq, D], got {q.dim()}")
    return BlockIndex.dense(q.shape[0], 1, q.shape[2], kv.n_tokens, block, ctx.q_start, ctx.causal, ctx.window, ctx.first,
                            ctx.last, q.device)
