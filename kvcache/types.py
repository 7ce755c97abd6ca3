"""What a layer of a cache shows to its policy and its budget, and what it asks of them.

A layer keeps its tokens as rows of flat tensors. The tokens of sequence b and KV head h are the rows
``starts[b, h] <= row < starts[b, h] + lengths[b, h]``, a *run*; what lies between runs is garbage::

    rows      a a a a . . b b . . . . c c c c c .      runs a, b, c; '.' is nobody's

Kept tokens are older than the chunk at hand, whose own tokens are the last rows of each run; the order among the older ones says
nothing, ``positions`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparse_attn.rotary import Rotation

from .digests import PageDigest
from .store import Meter


def owners(starts: Tensor, lengths: Tensor, n_rows: int) -> Tensor:
    """int64 ``[n_rows]``: number ``b * Hkv + h`` of the run that each row belongs to, -1 for rows of nobody.

    Example:
        >>> owners(torch.tensor([[0, 4]]), torch.tensor([[3, 2]]), 7).tolist()
        [0, 0, 0, -1, 1, 1, -1]
    """
    number = torch.arange(1, starts.numel() + 1, device=starts.device)
    edges = torch.zeros(n_rows + 1, dtype=torch.int64, device=starts.device)
    edges.index_add_(0, starts.flatten(), number).index_add_(0, (starts + lengths).flatten(), -number)
    return edges[:-1].cumsum(0) - 1


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer shows its policy after attention has read a chunk; the chunk's own tokens are among the rows.

    Attributes:
        k, v: ``[S, D]`` and ``[S, Dv]``.
        starts, lengths: int64 ``[B, Hkv]``.
        positions: int32 ``[S]``, counted from each sequence's first real token.
        state: float32 ``[S]`` what ``observe`` returned before; 0 for new rows; moved along with the rows.
        n_seen: int64 ``[B]`` real tokens of each sequence so far, evicted ones included.
        n_new: int64 ``[B]`` of those, how many came with this chunk.
        q, lse: ``[B, H, Nq, D]`` and float32 ``[B, H, Nq]``; None unless the policy needs them.
        q_first, q_last: int32 ``[B]`` real rows of q; None for all.
        scale, softcap, sinks: of the layer's attention; sinks ``[H]`` or None.
        layer, n_layers: which of the model's attention layers this is.
        turn: moves q or k ``[1, heads, N, D]`` rotated for positions ``at`` to positions ``to`` (int64 ``[N]`` each, host); None
            where the layer does not rotate, or the policy does not need it.
    """

    k: Tensor
    v: Tensor
    starts: Tensor
    lengths: Tensor
    positions: Tensor
    state: Tensor
    n_seen: Tensor
    n_new: Tensor
    q: Tensor | None = None
    lse: Tensor | None = None
    q_first: Tensor | None = None
    q_last: Tensor | None = None
    scale: float = 0.0
    softcap: float = 0.0
    sinks: Tensor | None = None
    layer: int = 0
    n_layers: int = 0
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @cached_property
    def owner(self) -> Tensor:
        """int64 ``[S]``: see ``owners``; starts and lengths may be on the host."""
        device = self.state.device
        return owners(self.starts.to(device), self.lengths.to(device), len(self.state))

    def by_sequence(self, values: Tensor) -> Tensor:
        """``values[b]`` (``[B]``) at each row of sequence b; anything at rows of nobody."""
        if len(values) == 1:
            return values.to(self.state.device).expand(len(self.state))
        return values.to(self.state.device)[self.owner // self.starts.shape[1]]

    @cached_property
    def new_rows(self) -> Tensor:
        """int64 ``[Hkv * n_new.sum()]``: the rows of the chunk's own tokens, run by run."""
        device = self.state.device
        count = torch.minimum(self.n_new.to(device)[:, None], self.lengths.to(device))[..., None]
        offset = torch.arange(int(count.max()) if count.numel() else 0, device=device)
        rows = (self.starts + self.lengths).to(device)[..., None] - count + offset
        return rows[offset < count]


class CachePolicy(Protocol):
    """Ranks the tokens of one layer. Never moves bytes; frozen, so that one serves all layers and requests.

    Attributes:
        needs: of {"q", "lse", "turn"}, what of attention it has to see; empty: it works under any attention implementation.
        decoding: whether the budget is also enforced token by token while generating.
        protect: the (sinks, recent) tokens that a cache keeps by default whatever the policy says.
    """

    needs: ClassVar[frozenset[str]]
    decoding: ClassVar[bool]
    protect: ClassVar[tuple[int, int]]

    def observe(self, seen: Seen) -> Tensor:
        """float32 ``[S]``: the new state, after every chunk."""
        ...

    def rank(self, seen: Seen, state: Tensor) -> Tensor:
        """float32 ``[S]``: higher is kept longer. Asked only when something has to go; ``seen.q`` may be None then."""
        ...


@runtime_checkable
class Budget(Protocol):
    """How many tokens stay; frozen. A rank of +inf marks protected tokens, which count like any other.

    Attributes:
        alike: whether every layer and head keeps the same number, which any attention implementation can read.
    """

    alike: ClassVar[bool]

    def layer_tokens(self, layer: int, n_layers: int, n_seen: Tensor) -> Tensor:
        """int64 ``[B]``: tokens per KV head of a layer, on average over its heads, once ``n_seen`` (int64 ``[B]``) have come."""
        ...

    def per_head(self, rank: Tensor, starts: Tensor, lengths: Tensor, tokens: Tensor, layer: int) -> Tensor:
        """int32 ``[B, Hkv]``: tokens that each run keeps of its ``lengths`` when its layer may keep ``tokens`` (``[B]``).

        rank float32 ``[S]``; starts and lengths int64 ``[B, Hkv]``.
        """
        ...

    def require_room(self, tokens: int) -> None:
        """Raise ContractError if some layer's budget is known to be below ``tokens``, those that a cache protects."""
        ...

    def require_model(self, n_layers: int, kv_heads: int | None) -> None:
        """Raise ContractError if the budget is for a model of other numbers of layers or (where known) KV heads."""
        ...


class PageReader(Protocol):
    """Says which pages of a layer a few queries read; frozen, so that one serves all layers and requests.

    Attributes:
        page: tokens of a page, counted from the first that a head keeps.
        recent: last tokens that it has to find among the rows themselves, whatever leaves for another tier.
    """

    page: int
    recent: int

    def reads_all(self, layer: int) -> bool:
        """Whether a layer of the model reads everything, and needs no digest."""
        ...

    def digest(self, meter: Meter, layer: int) -> PageDigest | None:
        """An empty digest for a layer of the model, its bytes counted by ``meter``; None where none is needed."""
        ...

    def exact(self, digest: PageDigest, pages: Tensor) -> Tensor | None:
        """Which of the first ``pages`` (int64 ``[B, Hkv]``, host) of each run no other form of their keys will do for.

        int32 ``[B, Hkv, m]`` numbers, -1 for none; None for none at all.
        """
        ...

    def choose(self, q: Tensor, lengths: Tensor, digest: PageDigest, first: Tensor | None = None, last: Tensor | None = None) -> Tensor | None:
        """int32 ``[B, Hkv, slots]``: numbers of the pages to read, ascending, -1 behind them; None for all.

        Args:
            q: ``[B, H, Nq, D]``, whose real queries' tokens are the last rows of each run; their pages are among those chosen.
            lengths: int64 ``[B, Hkv]`` rows of each run, where q is; the digest has seen them.
            first, last: int32 ``[B]``, the real queries of each sequence; None for all.
        """
        ...


class KeyForm(Protocol):
    """Keys of the older tokens of one layer in a form that is not the keys themselves. All KV heads hold the same tokens."""

    n_bytes: int

    def fit(self, pieces: Callable[[], Iterator[tuple[int, Tensor, Tensor]]], batch: int) -> None:
        """Take the first tokens of ``batch`` sequences, some of which may have none yet.

        Args:
            pieces: yields sequence, keys ``[Hkv, n, D]`` and int64 positions ``[n]`` of all tokens in order; may be called again.
        """
        ...

    def append(self, b: int, k: Tensor, positions: Tensor) -> None:
        """Take the next tokens of a sequence, as ``fit`` gets them."""
        ...

    def rebuild(self, pages: Tensor, page: int, out: Tensor, targets: Tensor) -> None:
        """Write the keys of pages (int32 ``[B, Hkv, m]`` numbers, -1 for none) to the rows of ``out`` from int64 ``targets`` on."""
        ...

    def select(self, sequences: Tensor) -> None:
        """Make the sequences with these numbers (host, repeats allowed) the batch."""
        ...

    def copy(self, meter: Meter) -> KeyForm:
        """The same in memory of its own, counted by ``meter``."""
        ...

    def clear(self) -> None:
        """Forget everything and release the memory."""
        ...


class Codec(Protocol):
    """Says what keys become when they leave the device; frozen, so that one serves all layers and requests.

    Attributes:
        unrotates: whether it has to know how the model rotates.
    """

    unrotates: ClassVar[bool]

    def layer(self, meter: Meter, rotation: Rotation | None) -> KeyForm | None:
        """What holds the keys of one layer, whose rotation is given where it rotates; None to keep them as they are."""
        ...
