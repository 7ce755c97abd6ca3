"""Locret: tokens that small trained heads expect to be needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.errors import require

from ..retaining import Heads, score, token_vectors
from ..types import Seen


@dataclass(frozen=True)
class Locret:
    """Rank by the score that a retaining head gives each token from its own query, key and value, once, when it comes.

    The score asks for nothing that comes later, so a prompt in chunks keeps what the same scores would keep of it in one piece.
    The heads are trained per model, to predict the largest logit that a token gets from the queries of an answer:
    ``python -m kvcache.train_locret``.
    Source: Locret, arXiv:2410.01805, sections 3.2 and 3.3. Differs from its code:
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
        (batch, kv_heads), n_q, device = seen.starts.shape, seen.q.shape[2], seen.q.device
        new = seen.n_new.tolist()
        low = [0] * batch if seen.q_first is None else seen.q_first.clamp(0, n_q).tolist()
        tokens = torch.cat([torch.arange(n) + b * n_q + low[b] for b, n in enumerate(new)])
        at = torch.cat([torch.arange(n) + before for n, before in zip(new, (seen.n_seen - seen.n_new).tolist())])
        runs = seen.new_rows.split([kv_heads * n for n in new])
        rows = torch.cat([of_one.view(kv_heads, n).T for of_one, n in zip(runs, new)])  # [N, Hkv]
        q = seen.q.transpose(1, 2).flatten(0, 1)[tokens.to(device)]
        x = token_vectors(q, seen.k[rows], seen.v[rows], at, seen.turn)
        w1, w2 = (w.to(device) for w in self.heads.of_layer(seen.layer, x.shape[1], kv_heads))
        return seen.state.index_copy(0, rows.flatten(), score(x, w1, w2).flatten())

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        return state
