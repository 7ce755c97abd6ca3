"""Inputs of the kernel benchmark: shapes, block lists at a density, and the float64 truth of a few rows.

Data is Gaussian, never zeros: the clock of a matrix unit depends on the bits it multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.types import BlockIndex

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One causal prefill call, batch 1."""

    n: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 128
    dtype: str = "bf16"
    device: str = "cpu"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[1, H, N, D]``, k and v ``[1, Hkv, N, D]``."""
        sizes = [(1, h, self.n, self.head_dim) for h in (self.heads, self.kv_heads, self.kv_heads)]
        return tuple(self.random(self.n, *sizes))

    def random(self, seed: int, *sizes: tuple[int, ...]) -> Iterator[Tensor]:
        """Gaussian tensors in the dtype."""
        g = torch.Generator(self.device).manual_seed(seed)
        yield from (torch.randn(size, generator=g, device=self.device).to(DTYPES[self.dtype]) for size in sizes)

    @property
    def store(self) -> Tensor:
        """The keys as rows of a flat store, ``[Hkv N, D]``."""
        return self.tensors[1][0].flatten(0, 1)

    @property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Where the run of each head starts in the store, and how long it is: int64 ``[1, Hkv]`` each."""
        starts = torch.arange(self.kv_heads)[None] * self.n
        return starts, torch.full_like(starts, self.n)

    def mass_truth(self, rows: int) -> Tensor:
        """float64 ``[N]``: probability that each key received from the last rows, mean over the heads; for one KV head."""
        q, k, _ = (t.double() for t in self.tensors)
        future = torch.ones(self.n, self.n).triu(1).bool()
        return (q @ k.mT * self.scale).masked_fill(future, float("-inf")).softmax(-1)[0, :, -rows:].sum(1).mean(0)

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block)

    def fields(self) -> dict:
        """What a measurement's line says of the shape."""
        return {"B": 1, "H": self.heads, "Hkv": self.kv_heads, "N": self.n, "D": self.head_dim, "block": self.block,
                "dtype": self.dtype}


def random_lists(shape: Shape, density: float, seed: int = 0) -> BlockIndex:
    """Blocks drawn uniformly below the diagonal, per head, so that ``density`` of the reachable ones are read.

    Every query block reads its own diagonal and the first block; where those alone are more than asked for, they are all.

    Example:
        >>> lists = random_lists(Shape(n=1024, heads=2, kv_heads=1, block=64), density=0.5)
        >>> lists.density()
        0.5
        >>> bool(lists.to_mask()[..., 0].all())
        True
    """
    dense = BlockIndex.dense(1, shape.heads, shape.n, shape.n, (shape.block, shape.block), device=shape.device)
    if density >= 1:
        return dense
    reachable = dense.reachable()[0, 0].cpu()
    forced = torch.eye(shape.blocks, dtype=torch.bool)
    forced[:, 0] = True
    wanted = round(density * int(reachable.sum())) - int(forced.sum())
    g = torch.Generator().manual_seed(seed)
    keep = forced.expand(shape.heads, -1, -1).clone()
    free = (reachable & ~forced).flatten().nonzero()[:, 0]
    for head in range(shape.heads):
        chosen = free[torch.randperm(len(free), generator=g)[: max(wanted, 0)]]
        keep[head].view(-1)[chosen] = True
    return dense.where(keep[None].to(shape.device))


def top_k_for(shape: Shape, density: float) -> int:
    """Blocks per query block whose density comes closest: early query blocks have fewer to read.

    Example:
        >>> top_k_for(Shape(n=16384), 0.1), top_k_for(Shape(n=16384), 1.0)
        (7, 128)
    """
    def read(k: int) -> int:
        return sum(min(row + 1, k) for row in range(shape.blocks))

    return min(range(1, shape.blocks + 1), key=lambda k: abs(read(k) - density * read(shape.blocks)))


def visible_pairs(index: BlockIndex) -> int:
    """Query-key pairs that a causal call over these lists has to look at, all heads."""
    mask = index.to_mask()[0].cpu()
    rows, cols = (torch.arange(blocks)[:, None] * size for blocks, size in zip(mask.shape[1:], index.block))
    seen = torch.zeros(mask.shape[1:], dtype=torch.int64)  # of each block pair
    for offset in range(index.block[0]):
        row = rows + offset
        seen += (row - cols.T + 1).clamp(0, index.block[1]) * (row < index.n_q)
    return int((mask.sum(0) * seen).sum())


@dataclass(frozen=True)
class Sample:
    """A few query rows of a call and what they may see, to be compared with float64.

    Attributes:
        heads, rows: which; ``[h]`` and ``[r]``.
        seen: bool ``[h, r, Nk]``.
    """

    heads: Tensor
    rows: Tensor
    seen: Tensor

    @classmethod
    def of(cls, index: BlockIndex, heads: int, count: int = 48) -> Sample:
        """First, last and evenly spread rows of the first and last head."""
        device = index.counts.device
        chosen = torch.tensor(sorted({0, heads - 1}), device=device)
        rows = torch.linspace(0, index.n_q - 1, min(count, index.n_q)).long().unique().to(device)
        lists = index.to_mask()[0].expand(heads, -1, -1)[chosen]
        keys = torch.arange(index.n_k, device=device)
        seen = lists[:, rows // index.block[0]][:, :, keys // index.block[1]] & (keys <= rows[:, None])
        return cls(chosen, rows, seen)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sample's own q ``[1, h, r, D]`` and the keys and values of its heads ``[1, h, Nk, D]``."""
        kv = self.heads // (q.shape[1] // k.shape[1])
        return q[:, self.heads][:, :, self.rows], k[:, kv], v[:, kv]

    def truth(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """float64 attention ``[1, h, r, D]``."""
        q, k, v = (t.double() for t in self.inputs(q, k, v))
        return (q @ k.mT * scale).masked_fill(~self.seen, float("-inf")).softmax(-1) @ v

    def torch_answer(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What torch SDPA makes of the same rows in the same dtype with the same mask."""
        q, k, v = self.inputs(q, k, v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.seen[None], scale=scale)

    def of_output(self, out: Tensor) -> Tensor:
        """The sample's rows of a whole output."""
        return out[:, self.heads][:, :, self.rows]


def rms_error(got: Tensor, truth: Tensor) -> float:
    """Root mean square of got - truth over that of truth.

    Example:
        >>> rms_error(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
        0.5
    """
    return float((got.double() - truth.double()).norm() / truth.double().norm())
