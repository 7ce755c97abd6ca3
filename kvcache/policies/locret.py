"""Locret: tokens that small trained heads expect to be needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.errors import require

from ..retaining import Heads, score, token_vectors
from ..types import Seen

# scored at once: their vectors are float32 copies of all heads, 100 MiB for 48 heads of 128
_TOKENS = 4096


@dataclass(frozen=True)
class Locret:
    """Rank by the score that a retaining head gives each token from its own query, key and value, once, when it comes.

    The score asks for nothing that comes later, so a prompt in chunks keeps what the same scores would keep of it in one piece.
    The heads are trained per model, to predict the largest logit that a token gets from the queries of an answer:
    ``python -m kvcache.train_locret``.
    Source: Locret, arXiv:2410.01805. Differs from its code:
    - Keys stay at the positions they had; there the cache is rotated anew, side by side, in every layer and step.
    - The newest tokens of every chunk stay by way of the cache's ``recent``, the last chunk being no exception, and the first
      ones by way of ``sinks``; there the end of the prompt is held back and read last.
    - The budget holds while an answer is generated too; there the cache grows.

    Attributes:
        path: safetensors file of the heads.
        stabilizers: newest tokens that stay whatever their score, unless the cache's ``recent`` says otherwise; less than the
            budget, or nothing else has room. 2500 as its examples have it, for budgets from 6000.

    Raises:
        ContractError: if the file holds no retaining heads; when the model runs, if they are not made for it.
    """

    path: str
    stabilizers: int = 2500

    needs: ClassVar[frozenset[str]] = frozenset({"q", "turn"})
    decoding: ClassVar[bool] = True

    def __post_init__(self):
        whole = isinstance(self.stabilizers, int) and not isinstance(self.stabilizers, bool)
        require(whole and self.stabilizers >= 0, f"stabilizers={self.stabilizers!r} must be a number of tokens, 0 or more")
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "heads", Heads.read(self.path))

    @property
    def protect(self) -> tuple[int, int]:
        return 4, self.stabilizers

    def require_model(self, model) -> None:
        """Raise ContractError unless the heads fit the model (a ``ModelId``)."""
        self.heads.require_model(model)

    def observe(self, seen: Seen) -> Tensor:
        kv_heads, new, state = seen.starts.shape[1], seen.n_new.tolist(), seen.state.clone()
        low = [0] * len(new) if seen.q_first is None else seen.q_first.tolist()
        runs = zip(seen.new_rows.split([kv_heads * n for n in new]), new)
        rows = torch.cat([of_one.view(kv_heads, n).T for of_one, n in runs])  # [N, Hkv]
        sequence = torch.arange(len(new)).repeat_interleave(seen.n_new)
        number = torch.cat([torch.arange(n) for n in new])
        column, at = (number + torch.as_tensor(first)[sequence] for first in (low, seen.n_seen - seen.n_new))
        for b, i, to, where in zip(*(x.split(_TOKENS) for x in (sequence, column, rows, at))):
            x = token_vectors(seen.q[b, :, i], seen.k[to], seen.v[to], where, seen.turn)
            w1, w2 = (w.to(x.device) for w in self.heads.of_layer(seen.layer, x.shape[1], kv_heads))
            state.index_copy_(0, to.flatten(), score(x, w1, w2).flatten())
        return state

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        return state
