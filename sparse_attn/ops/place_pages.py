"""Which slot of the device each wanted page is in, or comes to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import cuda
from .registry import op


@op(mutates=("held", "order"))
def place_pages(held: Tensor, order: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Give every wanted page a slot of its run; only those that miss have to move, and a page that stays keeps its slot.

    A missing page takes an unused slot, the lowest first, else that of the page which was longest not wanted. Slots in the order in which
    they were last wanted, unused ones in front, say both: the next slots to take are the first that nobody wants now. So no clock is
    kept and nothing sorted, and the same call serves any step of a CUDA graph.
    Source: kvcache.md 25.5 (C). The same rule on the host is ``kvcache.tiers.Slots``.

    Args:
        held: int32 ``[R, S]`` page in each of a run's slots, -1 for none; all -1 at first. Written.
        order: int32 ``[R, S]`` slots, the longest not wanted first; ``0 .. S - 1`` in each run at first. Written.
        ids: int32 ``[R, m]`` wanted pages, negative for none; m <= S. One named twice has one slot.

    Returns:
        int32 ``[R, m]`` slots, -1 for none; bool ``[R, m]`` misses: pages that have to be copied (one named twice: the first time).

    Raises:
        ContractError: on mismatched shapes or dtypes, and if a run may want more pages than it has slots. Nothing was written then.
    """
    n_slots, wanted, position = held.shape[1], ids >= 0, torch.arange(ids.shape[1], device=ids.device)
    same = (ids[:, :, None] == ids[:, None, :]) & wanted[:, None]
    first = position.where(same, ids.shape[1]).amin(2) if ids.numel() else ids.long()  # [R, m], where each is named first
    named = wanted & (first == position)
    hits = (held[:, None] == ids[..., None]) & wanted[..., None]  # [R, m, S]
    there, new = hits.any(2), named & ~hits.any(2)
    idle = ~hits.any(1).gather(1, order.long())
    free = order.gather(1, idle.int().argsort(dim=1, descending=True, stable=True)).long()
    slots = hits.to(torch.int8).argmax(2).where(there, free.gather(1, (new.cumsum(1) - 1).clamp(min=0)))
    slots = slots.gather(1, first.clamp(max=max(ids.shape[1] - 1, 0)))  # named twice: as the first time
    _scatter(held, slots, new, ids)
    place = torch.arange(n_slots, dtype=torch.int32, device=ids.device)
    age = torch.empty_like(order).scatter_(1, order.long(), place.expand_as(order))
    _scatter(age, slots, named, (n_slots + position).int().expand_as(ids))
    order.copy_(age.argsort(1))
    return slots.where(wanted, -1).int(), new


def _scatter(into: Tensor, at: Tensor, real: Tensor, values: Tensor) -> None:
    """``into[r, at[r, i]] = values[r, i]`` where ``real``; a boolean index would synchronise."""
    wider = torch.cat([into, into[:, :1]], 1).scatter_(1, at.where(real, into.shape[1]), values)
    into.copy_(wider[:, :-1])


@place_pages.check
def _(held, order, ids):
    for name, t in (("held", held), ("order", order), ("ids", ids)):
        require(t.dtype == torch.int32 and t.dim() == 2 and len(t) == len(held) and t.device == held.device,
                f"{name} must be int32 [{len(held)}, n] on {held.device}, a row per run, got {t.dtype} {list(t.shape)} on {t.device}")
    require(held.is_contiguous() and order.is_contiguous(), "held and order must be contiguous; pass the tensors that own the memory")
    require(order.shape == held.shape and held.shape[1] > 0,
            f"order must be {list(held.shape)}, like held, with a slot at least, got {list(order.shape)}")
    require(ids.shape[1] <= held.shape[1], f"a run may want {ids.shape[1]} pages at once and has {held.shape[1]} slots; give it more")


@place_pages.fake
def _outputs(held, order, ids):
    return torch.empty_like(ids, memory_format=torch.contiguous_format), torch.empty(ids.shape, dtype=torch.bool, device=ids.device)


# a block has all of a run in 99 KiB of shared memory, what the smallest GPU gives it
_MOST_WANTED, _MOST_SLOTS = 4096, 4096


def _fits(held, order, ids) -> str | None:
    if ids.shape[1] <= _MOST_WANTED and held.shape[1] <= _MOST_SLOTS:
        return None
    return f"needs at most {_MOST_SLOTS} slots and {_MOST_WANTED} pages of a run, got {held.shape[1]} and {ids.shape[1]}"


cuda.add(place_pages, _outputs, _fits)
