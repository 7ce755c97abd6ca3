"""What patterns that look at a few probe queries have in common: which rows probe, and what is read because of them.

Everything is counted as a batch row alone would count it: queries from its first real query, keys from its first real key
(``ops.spans``). Learned sink logits are left out of the probe: they scale a row's masses and change no order within it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import NotServed
from ..ops.spans import Span, spans
from ..types import BlockIndex, KVView, LayerContext


def rows_alone(q: Tensor, kv: KVView, ctx: LayerContext) -> list[Span]:
    """The batch rows of a causal call alone; NotServed for any other, whose queries have no distance to a key."""
    if not ctx.causal:
        raise NotServed("needs causal attention")
    return spans(q.shape[0], q.shape[2], kv.n_tokens, ctx.q_start, ctx.causal, ctx.first, ctx.last)


def tails(n: int, segments: int, tail: int) -> Tensor:
    """int64, ascending: the last ``tail`` rows of each of ``segments`` equal parts of ``n`` rows, fewer where a part is shorter."""
    edge = torch.arange(segments + 1) * n // segments
    row = edge[1:, None] - tail + torch.arange(tail)
    return row[row >= edge[:-1, None]]


def packed(lists: list[Tensor], device: torch.device) -> Tensor:
    """int32 ``[B, R]``: one list of probe rows per batch row, -1 after the last."""
    return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1).int().to(device)


def probed_blocks(span: Span, window_rows: int, block: int, window: int) -> range:
    """Key blocks that the last ``window_rows`` real queries of a row could see any key of; ``window`` is the sliding window."""
    end = span.q_start + span.n_q
    oldest = max(0, end - min(window_rows, span.n_q) - window + 1) if window else 0
    return range(oldest // block, (end - 1) // block + 1 if span.n_q else 0)


def observe(q: Tensor, k: Tensor, rows: Tensor, ctx: LayerContext, block: int = 1) -> tuple[Tensor, Tensor]:
    """Mass per key and per distance, or per ``block`` of them, that the probe ``rows`` give: ``ops.window_score``."""
    return ops.window_score(q, k, rows, ctx.scale, ctx.q_start, ctx.causal, ctx.window, ctx.softcap, ctx.first, ctx.last, block)


def largest(score: Tensor, most: int, count: Tensor) -> Tensor:
    """int64 ``[B, H, most]``: places of the ``count`` (int ``[H]`` or ``[B, H]``, at most ``most``) largest entries, ascending.

    Ties go to the lower place; slots past ``count`` hold N. ``score`` is float32 ``[B, H, N]``, not negative, inf where forced.
    """
    n = score.shape[-1]
    # floats that are not negative order as their bits do, so one integer holds the score and, below it, the place
    key = (score.contiguous().view(torch.int32).long() << 32) - torch.arange(n, device=score.device)
    place = key.topk(most).indices
    return place.masked_fill(torch.arange(most, device=score.device) >= count[..., None], n).sort(-1).values


def marked(places: Tensor, n: int) -> Tensor:
    """bool ``[B, H, n]``: is the place listed? Places of ``n`` mark nothing."""
    found = torch.zeros(*places.shape[:2], n + 1, dtype=torch.bool, device=places.device)
    return found.scatter_(-1, places, True)[..., :n]


def covering(mass: Tensor, threshold: float, forced: Tensor) -> Tensor:
    """bool ``[B, H, N]``: the smallest set that holds ``forced`` and ``threshold`` of each row's mass; ties to the lower place.

    As ``ops.select_blocks`` words it: forced places count first, the place that crosses the threshold is kept, 1 keeps all.
    """
    order = mass.masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True).indices
    ranked = mass.double().gather(-1, order)
    after = ranked.cumsum(-1)
    before = torch.cat([torch.zeros_like(after[..., :1]), after[..., :-1]], -1)
    keep = (before < threshold * after[..., -1:]) & (ranked > 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep) | forced | (threshold >= 1)


def slash_tiles(distances: Tensor, index: BlockIndex) -> Tensor:
    """bool ``[B, H, Qb, Kb]``: tiles that hold a pair of query and key at a marked distance.

    A diagonal at one distance crosses two tiles of every query block unless it is a multiple of the block; both are read.

    Args:
        distances: bool ``[B, H, Nk]``, tokens from a query back to a key.
        index: the geometry.
    """
    n, (_, block_k) = distances.shape[-1], index.block
    start, real = (x.to(distances.device)[..., None] for x in index.rows())
    edge = torch.arange(-(-index.n_k // block_k), device=distances.device) * block_k
    # the pairs of a tile lie at every distance from low to high - 1
    low, high = ((x - edge).clamp(0, n).flatten(1)[:, None].expand(-1, distances.shape[1], -1) for x in
                 (start - block_k + 1, start + real))  # fmt: skip
    before = torch.nn.functional.pad(distances.cumsum(-1, dtype=torch.int32), (1, 0))
    return (before.gather(-1, high) > before.gather(-1, low)).unflatten(-1, (-1, len(edge)))
