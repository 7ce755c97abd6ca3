"""TOVA: tokens that the newest query looks at, the same for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..budget import DuoHeads, PerHead
from ..types import Budget, Seen


@dataclass(frozen=True)
class Tova:
    """Rank by the attention probability from the newest query alone, averaged over all heads of the layer.

    All heads keep the same tokens, so the budget must be the same for all of them.
    Source: TOVA, arXiv:2401.06104, section 3.2; the newest token itself stays.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"q"})
    decoding: ClassVar[bool] = True
    protect: ClassVar[tuple[int, int]] = (0, 1)

    def require_budget(self, budget: Budget) -> None:
        """Raise ContractError on a budget whose heads keep different numbers of tokens."""
        require(not isinstance(budget, PerHead | DuoHeads),
                f"tova keeps one set of tokens for all heads, which {type(budget).__name__} does not; use uniform, pyramid or table")

    def observe(self, seen: Seen) -> Tensor:
        votes = ops.window_mass(seen.q, seen.k, seen.starts, seen.lengths, seen.scale, 1, seen.softcap, seen.sinks,
                                q_first=seen.q_first, q_last=seen.q_last)
        return torch.where(seen.by_sequence(seen.n_new) > 0, votes, seen.state)

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        lengths = seen.lengths.to(state.device)
        require(bool((lengths == lengths[:, :1]).all()),
                "tova keeps one set of tokens for all heads, but they hold different numbers of them; use a budget that is the "
                "same for every head")
        offset = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=state.device)
        inside = (offset < lengths[..., None]).expand(*lengths.shape, -1)
        rows = (seen.starts.to(state.device)[..., None] + offset).where(inside, 0)
        mean = state[rows].mean(1, keepdim=True).expand(rows.shape)
        return torch.zeros_like(state).index_copy_(0, rows[inside], mean[inside])
