"""A few channels of every key."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.errors import require
from sparse_attn.kept import Queries

from ..channels import largest
from ..store import Meter, empty_rows
from .pages import PageDigest, Rows

# of a forward's queries the last so many say which channels matter
_SEEN = 64


class Labels(PageDigest):
    """The channels of each key that weigh most in its products with queries (Double Sparsity, arXiv:2408.07092).

    Channels are given, or chosen when a run first holds more tokens than a step reads: those with the largest sum of |q_c k_c| over
    the last 64 queries of every forward so far, q and k of the same token, and over the query heads of the group. They stay then.

    Args:
        meter: counts the bytes.
        width: channels of a label.
        least: tokens of a run up to which everything is read, and nothing chosen.
        given: int64 ``[Hkv, width]``; None to choose.

    Attributes:
        label: ``[P, width]`` in the dtype of the keys; zeros until channels are chosen.
        weight: float32 ``[B, Hkv, D]``, the sums.
        channels: int64 ``[B, Hkv, width]``; -1 for runs whose are not chosen yet.

    Raises:
        ContractError: from the first update, if the channels are not those of such keys.
    """

    names = ("label",)
    learned = ("weight", "channels")

    def __init__(self, meter: Meter, width: int, least: int, given: Tensor | None = None):
        self.width, self._least, self._given = width, least, given
        super().__init__(meter, 1)

    def blank(self, k: Tensor) -> dict[str, Tensor]:
        require(self.width <= k.shape[1],
                f"labels of {self.width} channels are wider than keys, which have {k.shape[1]}; give {k.shape[1]} or less")
        return {"label": k.new_empty(0, self.width)}

    def update(self, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        if self.channels is None:
            self._begin(k, *lengths.shape)
        super().update(k, starts, lengths)

    def _begin(self, k: Tensor, batch: int, heads: int) -> None:
        unknown = empty_rows(torch.empty(0, heads, self.width, dtype=torch.int64, device=k.device), batch).fill_(-1)
        if self._given is not None:
            require(len(self._given) == heads, f"channels are given for {len(self._given)} KV heads, but the layer has {heads}")
            require(int(self._given.max()) < k.shape[1], f"channel {int(self._given.max())} is given, but keys have {k.shape[1]}")
            unknown.copy_(self._given)
        self._hold("channels", unknown)
        self._hold("weight", empty_rows(torch.empty(0, heads, k.shape[1], dtype=torch.float32, device=k.device), batch).zero_())

    def describe(self, keys: Tensor, run: Tensor) -> dict[str, Tensor]:
        of = self.channels.flatten(0, 1)[run.to(keys.device)]
        return {"label": keys[:, 0].gather(1, of.clamp(min=0)).masked_fill(of < 0, 0)}

    def observe(self, queries: Queries, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        if bool((self.channels >= 0).all()):
            return
        q, heads = queries.q, starts.shape[1]
        low = [0] * len(q) if queries.first is None else queries.first.tolist()
        high = [q.shape[2]] * len(q) if queries.last is None else queries.last.tolist()
        for b, (first, last) in enumerate(zip(low, high)):
            n = min(max(last - first, 0), _SEEN)
            own = ((starts + lengths)[b, :, None] - n + torch.arange(n)).to(k.device)
            size = q[b, :, last - n : last].float().abs().unflatten(0, (heads, -1)).mean(1)
            self.weight[b] += (size * k[own].float().abs()).sum(1)

    def ready(self, rows: Rows) -> None:
        due = (self.pages > self._least) & (self.channels[..., 0] < 0).cpu()
        if not bool(due.any()):
            return
        self.channels[due.to(self.channels.device)] = largest(self.weight[due.to(self.weight.device)], self.width)
        for k, b, h, first in rows():
            if due[b, h]:
                at = int(self.starts[b, h]) + first
                self._write(slice(at, at + len(k)), self.describe(k[:, None], torch.full((len(k),), b * due.shape[1] + h)))

    def of(self, q: Tensor) -> Tensor:
        """``[B, H, Nq, width]``: the channels of ``[B, H, Nq, D]`` that meet a label."""
        channels = self.channels.clamp(min=0).repeat_interleave(q.shape[1] // self.channels.shape[1], 1)
        return q.gather(3, channels[:, :, None].expand(-1, -1, q.shape[2], -1))
