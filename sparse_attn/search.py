"""What a calibration looks for: per head a pattern, a threshold, or whether the head retrieves at all.

A search is shown q, k, v of every layer of every text, once; every decision rests on exact attention. Nothing here knows a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .attention import attend_args
from .config import as_selector
from .errors import require
from .patterns import XAttention
from .patterns.choose import choose, empty_index
from .types import BlockIndex, KVView, LayerContext, ReadPlan, ResidentKV, Selector, dense_index

# tokens at which MInference (arXiv:2407.02490, appendix) chose its sizes; ours keep their proportions at any length
_SHAPES = (
    ("a_shape", {"sink_tokens": 1024, "recent_tokens": 4096}),
    ("vertical_slash", {"vertical": 30, "slash": 2048}),
    ("vertical_slash", {"vertical": 100, "slash": 1800}),
    ("vertical_slash", {"vertical": 500, "slash": 1500}),
    ("vertical_slash", {"vertical": 3000, "slash": 200}),
    ("block_topk", {"top_k": 6400}),
)
_STEPS = 12  # sizes tried per shape, each smaller by sqrt(2)
_LEVEL = 1e-4  # share of mass below which two candidates retain the same, and the one named first wins
_HALVINGS = 14  # of the interval that a threshold is searched in


@dataclass(frozen=True)
class Exact:
    """One layer's call, computed in float32 over everything it may see.

    Attributes:
        q, kv, ctx: the call; q, k and v in float32.
        out: ``[B, H, Nq, Dv]``.
        lse: float32 ``[B, H, Nq]``; -inf for padding.
    """

    q: Tensor
    kv: KVView
    ctx: LayerContext
    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, q: Tensor, kv: KVView, ctx: LayerContext) -> Exact:
        q, kv = q.float(), ResidentKV(*(x.float() for x in kv.fetch()))
        return cls(q, kv, ctx, *attend(q, kv, ctx, ReadPlan()))

    def mean(self, rows: Tensor, start: int) -> Tensor:
        """float64 ``[H]``: mean of ``rows`` ``[B, H, Nq]`` over the real queries from position ``start`` on."""
        real = self.lse.isneginf().logical_not()
        real[..., : max(0, start - self.ctx.q_start)] = False
        return rows.double().masked_fill(~real, 0.0).sum((0, 2)) / real.sum((0, 2)).clamp(min=1)

    def retained(self, plan: ReadPlan, start: int) -> Tensor:
        """float64 ``[H]``: share of attention mass that ``plan`` reads, mean over the queries from ``start`` on.

        The sum of exponentials over part of the keys, divided by that over all, is the mass of the part: two log-sum-exps say it
        exactly, and no matrix of Nq x Nk numbers is made. The share of a learned sink counts as retained.
        """
        if plan.blocks is None:
            return torch.ones(self.q.shape[1], dtype=torch.float64, device=self.q.device)
        _, lse = attend(self.q, self.kv, self.ctx, plan)
        return self.mean((lse.double() - self.lse).exp().nan_to_num(0.0).clamp(max=1.0), start)

    def block_mass(self, block: int) -> Tensor:
        """float32 ``[1, H, Qb, Kb]``: attention mass between blocks, summed over the queries of each; one unpadded text.

        Works through one query block of one group of heads at a time.
        """
        k, _ = self.kv.fetch()
        (batch, heads, n_q, _), (_, kv_heads, n_k, _), ctx = self.q.shape, k.shape, self.ctx
        require(batch == 1 and ctx.first is None and ctx.last is None, f"block_mass takes one unpadded text, got {batch} rows")
        mass = torch.zeros(1, heads, -(-n_q // block), -(-n_k // block), device=k.device)
        key = torch.arange(n_k, device=k.device)
        for i, rows in enumerate(torch.arange(n_q, device=k.device).split(block)):
            back = (rows + ctx.q_start)[:, None] - key
            hidden = (back < 0) & ctx.causal | ((back >= ctx.window) if ctx.window else False)
            for at in range(kv_heads):
                group = slice(at * heads // kv_heads, (at + 1) * heads // kv_heads)
                logits = self.q[0, group, rows] @ k[0, at].mT * ctx.scale
                if ctx.softcap:
                    logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
                p = (logits - self.lse[0, group, rows, None]).exp().masked_fill(hidden, 0.0).sum(1)
                mass[0, group, i] = torch.nn.functional.pad(p, (0, -n_k % block)).unflatten(1, (-1, block)).sum(2)
        return mass


def attend(q: Tensor, kv: KVView, ctx: LayerContext, plan: ReadPlan) -> tuple[Tensor, Tensor]:
    blocks = plan.blocks if plan.blocks is not None else dense_index(q, kv, ctx, (128, 128))
    return ops.block_sparse_attention(*attend_args(q, kv, ctx, plan, blocks))


class Search(Protocol):
    """Settings of one search; what it learns goes through its caller, who keeps one list per layer."""

    def see(self, q: Tensor, kv: KVView, ctx: LayerContext, earlier: list) -> object:
        """What one text says about one layer; ``earlier`` holds what the texts before it said."""
        ...

    def first_query(self, n_tokens: int) -> int:
        """Position from which the queries of a text count."""
        ...

    def entries(self, seen: list) -> list:
        """The layer's row of the profile's table."""
        ...

    def arguments(self) -> dict:
        """What else the method must be given."""
        ...


@dataclass(frozen=True)
class PatternSearch:
    """``minference``: which pattern retains the most exact attention mass of each head, at equal cost.

    Every shape (sink to local, vertical to slash, blocks) takes part with the largest size that reads at most ``density`` of the
    head's reachable tiles, counted as the attention kernel reads them on the first text. The one that retains the most
    mass, averaged over the texts, wins; of those within 0.0001 of it, the one that needs no probe (a_shape), then vertical_slash.
    What is measured is the selector that will run, its probe included.
    Source: the kernel-aware search of MInference, arXiv:2407.02490, section 3.2.
    Differs from its published code, which compares fixed sizes of unlike cost and then replaces every winner that is not
    vertical-slash: a search whose result is overwritten chooses nothing.

    Attributes:
        density: tiles read over tiles reachable that every shape may use; where no shape can go so low, all take part at
            their smallest.
        last: so many last queries of a text count; 0 for all but the first quarter, where queries see so little that any pattern
            retains them. Few, to let the question at a text's end decide.
        block: edge of the blocks of every shape, tokens.
    """

    density: float = 0.2
    last: int = 0
    block: int = 64

    def __post_init__(self):
        require(0 < self.density <= 1, f"density={self.density} is outside (0, 1]; it is a share of the reachable tiles")
        require(self.last >= 0, f"last={self.last} is negative; it counts queries, 0 for all but the first quarter")
        require(self.block > 0, f"block={self.block} must be positive; 64 is usual")

    def see(self, q: Tensor, kv: KVView, ctx: LayerContext, earlier: list) -> list[_Candidate]:
        exact = Exact.of(q, kv, ctx)
        start = self.first_query(kv.n_tokens)
        found = earlier[0] if earlier else [c for shape in _SHAPES for c in self._largest(*shape, q, kv, ctx)]
        return [replace(c, mass=exact.retained(c.selector().select(q, kv, ctx), start).cpu()) for c in found]

    def _largest(self, name: str, sizes: dict, q: Tensor, kv: KVView, ctx: LayerContext) -> list[_Candidate]:
        """Per size of one shape that is the right one for some head: which heads, and what they read."""
        tokens = min(1.0, 2 * self.density) * kv.n_tokens / sum(sizes.values())
        open_heads = torch.ones(q.shape[1], dtype=torch.bool)
        found: list[_Candidate] = []
        for step in range(_STEPS):
            scaled = {key: max(1, round(size * tokens * 2 ** (-step / 2))) for key, size in sizes.items()}
            spec = {"name": name, **_written(name, scaled, self.block), "block": self.block}
            candidate = _Candidate(spec, open_heads, open_heads)
            density = candidate.selector().select(q, kv, ctx).head_density().cpu()
            density = density.repeat_interleave(q.shape[1] // len(density))
            fits = open_heads & ((density <= self.density) | (step == _STEPS - 1))
            if fits.any():
                found.append(replace(candidate, heads=fits, density=density))
            open_heads = open_heads & ~fits
            if not open_heads.any():
                break
        return found

    def first_query(self, n_tokens: int) -> int:
        return max(0, n_tokens - self.last) if self.last else n_tokens // 4

    def entries(self, seen: list[list[_Candidate]]) -> list[dict]:
        candidates = seen[0]
        mass = torch.stack([sum(text[i].mass for text in seen) / len(seen) for i in range(len(candidates))])
        heads, density = (torch.stack([getattr(c, name) for c in candidates]) for name in ("heads", "density"))
        fits = heads & (density <= self.density)
        mass = mass.masked_fill(~torch.where(fits.any(0), fits, heads), -1.0)
        level = mass >= mass.amax(0) - _LEVEL
        return [candidates[i].spec for i in level.int().argmax(0).tolist()]

    def arguments(self) -> dict:
        return {}


def _written(name: str, sizes: dict, block: int) -> dict:
    """A shape's sizes in tokens as the arguments of its pattern; at most a quarter of what a probe may choose is forced."""
    if name == "block_topk":
        return {"top_k": -(-sizes["top_k"] // block)}
    if name == "vertical_slash":
        return {**sizes, "sink_tokens": min(30, -(-sizes["vertical"] // 4)), "recent_tokens": min(100, -(-sizes["slash"] // 4))}
    return sizes


@dataclass(frozen=True, eq=False)
class _Candidate:
    """One size of one shape: its JSON form, the heads it is the right size for, what they read and (once measured) retain."""

    spec: dict
    heads: Tensor  # bool [H]
    density: Tensor  # [H]
    mass: Tensor | None = None  # float64 [H]

    def selector(self) -> Selector:
        return as_selector(self.spec)


@dataclass(frozen=True)
class ThresholdSearch:
    """``xattention``: per head the threshold at which its estimate finds the blocks that hold ``mass`` of the exact attention.

    The fewest block pairs that cover ``mass`` of the exact mass of the whole map are taken; the smallest estimate among them is a
    cut, and the share of the whole estimate at or above the cut is the threshold. Of several texts the largest counts.
    One block that the estimate hardly sees makes that threshold 1; ``search="lowest"`` sets no cut and finds the lowest threshold
    that retains ``mass``, to one part in 16384. That leaves no margin: give several texts of several lengths.
    Source: the threshold profiler in the code of XAttention, arXiv:2503.16428.
    Differs from it in two steps. Sink and diagonal blocks set no cut, because they are read whatever their estimate; a head
    that needs nothing else gets 0. And the cut is one number for the map but the threshold is applied row by row, where it may
    keep less: where the retained mass stays below ``mass``, the threshold is raised until it does not.
    The paper's own search (dynamic programming on task accuracy) is not done: it needs a graded task.

    Attributes:
        mass: share of the exact attention mass to find.
        last: so many last queries of a text count; 0 for all. A head that retrieves does so in few queries, which are lost in the
            mass of a whole text: let the text end in a question and count from there.
        stride, block: as in ``XAttention``; the thresholds hold for these alone.
        search: ``cut``, the published profiler, or ``lowest``.
    """

    mass: float = 0.9
    last: int = 0
    stride: int = 8
    block: int = 128
    search: str = "cut"

    def __post_init__(self):
        require(0 < self.mass <= 1, f"mass={self.mass} is outside (0, 1]; it is a share of attention mass")
        require(self.last >= 0, f"last={self.last} is negative; it counts queries, 0 for all")
        require(self.search in ("cut", "lowest"), f"search={self.search!r} is not known; use cut or lowest")
        XAttention(**self.arguments())

    def see(self, q: Tensor, kv: KVView, ctx: LayerContext, earlier: list) -> Tensor:
        (k, _), exact, method = kv.fetch(), Exact.of(q, kv, ctx), XAttention(**self.arguments())
        score = ops.antidiagonal_score(q, k, self.block, self.block, self.stride, ctx.scale, q_start=ctx.q_start,
                                       causal=ctx.causal, window=ctx.window, alternate=method.alternate)
        index, start = empty_index(q, kv, ctx, self.block), self.first_query(kv.n_tokens)

        def enough(threshold: Tensor) -> Tensor:
            lists = choose(score, index, k.shape[1], threshold=threshold, sink=method.sink, recent=method.recent, gqa=method.gqa)
            return exact.retained(ReadPlan(lists), start) >= self.mass

        low = torch.zeros(q.shape[1], dtype=torch.float64, device=q.device)
        if self.search == "cut":
            counted = torch.arange(score.shape[2], device=score.device)[:, None] >= max(0, start - ctx.q_start) // self.block
            low = self._profiled(score * counted, exact.block_mass(self.block) * counted, index,
                                 index.reachable(sink=method.sink, recent=method.recent))
        fits, high = enough(low), torch.ones_like(low)
        for _ in range(_HALVINGS if not fits.all() else 0):
            middle = (low + high) / 2
            reached = enough(middle)
            high, low = torch.where(reached & ~fits, middle, high), torch.where(reached | fits, low, middle)
        return torch.where(fits, low, high).cpu()

    def _profiled(self, score: Tensor, mass: Tensor, index: BlockIndex, forced: Tensor) -> Tensor:
        """float64 ``[H]``: share of the estimate at or above the smallest one that matters."""
        share = torch.full(score.shape[1:2], self.mass, dtype=torch.float64, device=score.device)
        counts, indices = ops.select_global(mass, share, "head", *index.block, index.n_q, index.n_k, index.q_start, index.causal,
                                            index.window)
        needed = replace(index, counts=counts, indices=indices).to_mask() & ~forced
        cut = score.masked_fill(~needed, float("inf")).amin((0, 2, 3))
        kept = forced | (score >= cut[:, None, None])
        wide = score.double()
        found = wide.masked_fill(~kept, 0.0).sum((0, 2, 3)) / wide.sum((0, 2, 3))
        return found.clamp(max=1.0).masked_fill(~needed.any(-1).any(-1)[0], 0.0)

    def first_query(self, n_tokens: int) -> int:
        return max(0, n_tokens - self.last) if self.last else 0

    def entries(self, seen: list[Tensor]) -> list[float]:
        most = torch.stack(seen).amax(0)
        return [min(1.0, math.ceil(t * 1e6) / 1e6) for t in most.tolist()]

    def arguments(self) -> dict:
        return {"stride": self.stride, "block": self.block}


@dataclass(frozen=True)
class RetrievalSearch:
    """``duo``: how much each key head's output would change if it read only the start of the text and the last tokens.

    The score is the root of the squared change over that of the full output, summed over the query heads of the group and over
    the ``last`` queries, largest over the texts. The text decides: it should end in a question whose
    answer stands far above, so that the rows that count are those that retrieve.
    Differs from DuoAttention, arXiv:2410.10819, section 3.2, which trains one gate per head to leave the last hidden states of answer
    tokens as they are: here nothing is trained, each head is judged by its own output and alone, so a change that later layers
    would undo counts in full, and two heads that could stand in for each other both count. It takes seconds, not GPU hours.

    Attributes:
        sink_tokens: leading tokens that a streaming head reads.
        recent_tokens: last tokens that it reads, own token included.
        sparsity: share of the key heads that will stream, those of the lowest scores.
        last: so many last queries of a text count.
    """

    sink_tokens: int = 64
    recent_tokens: int = 256
    sparsity: float = 0.5
    last: int = 64

    def __post_init__(self):
        require(self.last >= 1, f"last={self.last} leaves no query to count; 64 is usual")
        require(self.sink_tokens >= 0, f"sink_tokens={self.sink_tokens} is negative; it counts leading tokens")
        require(self.recent_tokens >= 1, f"recent_tokens={self.recent_tokens} leaves queries without themselves; use 1 or more")
        require(0 <= self.sparsity <= 1, f"sparsity={self.sparsity} is outside [0, 1]; it is a share of the key heads")

    def see(self, q: Tensor, kv: KVView, ctx: LayerContext, earlier: list) -> Tensor:
        exact, heads, kv_heads = Exact.of(q, kv, ctx), q.shape[1], kv.fetch()[0].shape[1]
        near = torch.tensor([self.sink_tokens, self.recent_tokens], dtype=torch.int32, device=q.device).expand(heads, 2)
        out, _ = attend(exact.q, exact.kv, ctx, ReadPlan(empty_index(q, kv, ctx, 128), near=near))
        start = self.first_query(kv.n_tokens)
        changed, full = (exact.mean(x.double().square().sum(-1), start) for x in (out - exact.out, exact.out))
        changed, full = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (changed, full))
        return (changed / full.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().cpu()

    def first_query(self, n_tokens: int) -> int:
        return max(0, n_tokens - self.last)

    def entries(self, seen: list[Tensor]) -> list[float]:
        return [round(score, 4) for score in torch.stack(seen).amax(0).tolist()]

    def arguments(self) -> dict:
        return {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens, "sparsity": self.sparsity}


SEARCHES = {"minference": PatternSearch, "xattention": ThresholdSearch, "duo": RetrievalSearch}
