"""A mixture: every head of every layer has its own selector, and one plan comes out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import require
from ..types import BlockIndex, KVView, LayerContext, ReadPlan, ResidentKV, Selector


def select_per_head(selectors: list[Selector], q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
    """One plan for all heads, each head's part chosen by its own selector.

    A selector sees its heads and their keys as if they were the whole layer, so that a GQA policy concerns only its own heads;
    equal selectors run once per number of heads that they have in a key head. Nothing passes to the next layer (``ctx.carry``).

    Args:
        selectors: one per query head.
        q, kv, ctx: as in ``Selector.select``.

    Returns:
        Lists, columns and near keys for H heads. A head whose selector reads everything has every key near, or without
        causality every block listed. ``pv_threshold`` is the most careful one.

    Raises:
        ContractError: if the number of selectors is not H, or two plans differ in block size or dense rows, or reorder keys.
        NotServed: if any selector cannot serve the call.
    """
    heads = q.shape[1]
    require(len(selectors) == heads, f"there are {len(selectors)} selectors but the layer has {heads} heads; give one per head")
    if all(selector == selectors[0] for selector in selectors):
        return selectors[0].select(q, kv, replace(ctx, carry=None))
    k, v = kv.fetch()
    plans = []
    for selector, own in parts(selectors, heads // k.shape[1]):
        at = _run(own)
        keys = _run(list(dict.fromkeys(h * k.shape[1] // heads for h in own)))
        alone = replace(ctx, carry=None, sinks=ctx.sinks[at] if ctx.sinks is not None else None)
        plans.append((own, selector.select(q[:, at], ResidentKV(k[:, keys], v[:, keys]), alone)))
    return merge(plans, heads, q, kv, ctx)


def parts(selectors: list[Selector], group: int) -> list[tuple[Selector, list[int]]]:
    """Heads of equal selectors, cut so that every key head of a part serves equally many of them."""
    found: list[tuple[Selector, int, list[int]]] = []
    for start in range(0, len(selectors), group):
        mine = selectors[start : start + group]
        for selector in (s for i, s in enumerate(mine) if s not in mine[:i]):
            own = [start + i for i, s in enumerate(mine) if s == selector]
            same = next((f for f in found if f[0] == selector and f[1] == len(own)), None)
            if same is None:
                found.append((selector, len(own), own))
            else:
                same[2].extend(own)
    return [(selector, own) for selector, _, own in found]


def _run(places: list[int]) -> slice | list[int]:
    """The places as a slice where they are evenly spaced, so that indexing with them copies nothing."""
    steps = {b - a for a, b in zip(places, places[1:])}
    return slice(places[0], places[-1] + 1, steps.pop() if steps else 1) if len(steps) <= 1 else places


def merge(plans: list[tuple[list[int], ReadPlan]], heads: int, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
    """One plan from plans for disjoint sets of query heads (ascending), which together are all ``heads``."""
    some = [plan for _, plan in plans if plan.blocks is not None]
    if not some:
        return ReadPlan()
    require(all(plan.order is None for plan in some), "a selector that reorders keys cannot be mixed per head; give it every head")
    dense_rows = sorted({plan.dense_rows for plan in some})
    require(len(dense_rows) == 1, f"selectors ask for {' and '.join(map(str, dense_rows))} dense rows; heads of a layer must agree")
    # a plan without any list fits every block size
    edges = sorted({plan.blocks.block for plan in some if plan.blocks.indices.shape[3]}) or [some[0].blocks.block]
    require(len(edges) == 1, f"selectors choose blocks of {' and '.join(map(str, edges))} tokens; heads of a layer must agree")
    index = BlockIndex.empty(q.shape[0], heads, q.shape[2], kv.n_tokens, edges[0], ctx.q_start, ctx.causal, ctx.window, ctx.first,
                             ctx.last, q.device)  # fmt: skip
    if not ctx.causal:  # no key is near
        full = index.where(index.reachable())
        plans = [(own, plan if plan.blocks is not None else ReadPlan(full)) for own, plan in plans]
    whole = torch.tensor([0, kv.n_tokens], dtype=torch.int32, device=q.device)
    near = [(own, whole.expand(len(own), 2) if plan.blocks is None else plan.near) for own, plan in plans]
    listed = [(own, plan.blocks) for own, plan in plans if plan.blocks is not None and plan.blocks.indices.shape[3]]
    careful = [plan.pv_threshold for _, plan in plans]
    indices = _joined([(own, blocks.indices) for own, blocks in listed], index.indices)
    counts = _joined([(own, blocks.counts[..., None]) for own, blocks in listed], index.counts[..., None])
    columns = [(own, plan.columns[..., None, :]) for own, plan in plans if plan.columns is not None]
    near = [(own, x.reshape(1, -1, 1, 2)) for own, x in near if x is not None]
    none = torch.full((q.shape[0], heads, 1, 0), -1, dtype=torch.int32, device=q.device)
    return ReadPlan(
        replace(index, counts=counts.clamp(min=0)[..., 0], indices=indices),
        columns=_joined(columns, none)[:, :, 0] if columns else None,
        near=_joined(near, none[:1]).clamp(min=0)[0, :, 0] if near else None,
        dense_rows=dense_rows[0],
        pv_threshold=max(careful) if min(careful) > 0 else 0.0,
    )


def _joined(pieces: list[tuple[list[int], Tensor]], like: Tensor) -> Tensor:
    """int32 ``[B, H, rows, slots]`` with the pieces in the places of their heads and -1 elsewhere."""
    slots = max([like.shape[3], *(x.shape[3] for _, x in pieces)])
    found = like.new_full((*like.shape[:3], slots), -1)
    for own, x in pieces:
        found[:, own, :, : x.shape[3]] = x.repeat_interleave(len(own) // x.shape[1], 1)
    return found
