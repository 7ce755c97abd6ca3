"""How many tokens stay: per layer, and within a layer per KV head."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require
from sparse_attn.profile import load as load_profile

from .types import Budget


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Uniform:
    """The same number of tokens for every layer and KV head.

    Attributes:
        tokens: per KV head; give either this or ``ratio``.
        ratio: share of the tokens seen so far, in (0, 1]; rounded to the nearest whole token, at least 1.

    Example:
        >>> Uniform(4096).layer_tokens(layer=0, n_layers=32, n_seen=torch.tensor([100, 9000])).tolist()
        [4096, 4096]
        >>> Uniform(ratio=0.2).layer_tokens(layer=0, n_layers=32, n_seen=torch.tensor([100, 9000])).tolist()
        [20, 1800]
    """

    tokens: int | None = None
    ratio: float | None = None

    alike: ClassVar[bool] = True

    def __post_init__(self):
        require((self.tokens is None) != (self.ratio is None), "give either tokens or ratio, not both and not neither")
        require(self.tokens is None or (_whole(self.tokens) and self.tokens >= 1),
                f"tokens={self.tokens!r} must be a number of tokens per KV head, 1 or more")
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        require(self.ratio is None or (number and 0 < self.ratio <= 1),
                f"ratio={self.ratio!r} is outside (0, 1]; it is the share of the tokens seen so far that stays")

    def layer_tokens(self, layer: int, n_layers: int, n_seen: Tensor) -> Tensor:
        if self.ratio is None:
            return torch.full_like(n_seen, self.tokens)
        return (n_seen.double() * self.ratio).round().long().clamp(min=1)

    def per_head(self, rank: Tensor, starts: Tensor, lengths: Tensor, tokens: Tensor, layer: int) -> Tensor:
        return torch.minimum(lengths, tokens.to(lengths.device)[:, None]).int()

    def require_room(self, tokens: int) -> None:
        _require_room(self.tokens, tokens, "")

    def require_model(self, n_layers: int, kv_heads: int | None) -> None:
        pass  # fits any


def _require_room(has: int | None, wanted: int, where: str) -> None:
    require(has is None or has >= wanted,
            f"a budget of {has} tokens{where} has no room for the {wanted} that always stay (sinks and recent); give more tokens")


@dataclass(frozen=True)
class Pyramid(Uniform):
    """More tokens for low layers, fewer for high ones, on a straight line whose mean is ``tokens``.

    The top layer gets ``base + (tokens - base) // beta``, and the first as much above the mean as that is below it, but no more
    than the tokens seen. Layers add up to exactly ``n_layers * tokens``: every layer is rounded down, and what is missing then goes
    to the lowest layers behind the first, one token each.
    Source: PyramidKV, arXiv:2406.02069, section 4.2, and its code, whose observation window is ``base`` here.
    Differs from its code: sequences between ``tokens`` and twice that are on the line too, not uniform, so that nothing jumps
    while a prompt comes in chunks.

    Attributes:
        beta: how much less than the mean the top layer gets.
        base: tokens that every layer gets before the rest is shared out.

    Example:
        >>> [Pyramid(100, beta=10).layer_tokens(i, 4, torch.tensor([1000])).item() for i in range(4)]
        [190, 130, 70, 10]
    """

    _: KW_ONLY
    beta: int = 20
    base: int = 0

    alike: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require(_whole(self.beta) and self.beta >= 1, f"beta={self.beta!r} must be 1 or more; 1 is uniform")
        require(_whole(self.base) and self.base >= 0, f"base={self.base!r} must be a number of tokens, 0 or more")
        fits = self.tokens is None or self.base <= self.tokens
        require(fits, f"base={self.base} is more than all {self.tokens} tokens; give less")

    def layer_tokens(self, layer: int, n_layers: int, n_seen: Tensor) -> Tensor:
        mean = super().layer_tokens(layer, n_layers, n_seen)
        if n_layers < 2:
            return mean
        base = mean.clamp(max=self.base)
        rest = mean - base
        rise = torch.minimum(rest - rest // self.beta, (n_seen - mean).clamp(min=0))  # of the first layer above the mean
        # what layer i has more than the mean: from rise down to -rise
        above = rise[:, None] * torch.arange(n_layers - 1, -n_layers, -2, device=n_seen.device)
        above = above.div(n_layers - 1, rounding_mode="floor")
        missing = -above.sum(1)
        return mean + above[:, layer] + ((missing >= layer).long() if layer else 0)

    def require_room(self, tokens: int) -> None:
        top = None if self.tokens is None else self.base + (self.tokens - self.base) // self.beta
        _require_room(top, tokens, " in the highest layer")


@dataclass(frozen=True)
class Table:
    """A number of tokens for each layer, the same for all its KV heads.

    Attributes:
        layers: tokens per KV head, one entry per layer.

    Example:
        >>> Table((512, 2048)).layer_tokens(layer=1, n_layers=2, n_seen=torch.tensor([100, 9000])).tolist()
        [2048, 2048]
    """

    layers: tuple[int, ...]

    alike: ClassVar[bool] = False

    def __post_init__(self):
        fits = isinstance(self.layers, tuple | list) and len(self.layers) and all(_whole(n) and n >= 1 for n in self.layers)
        require(fits, f"layers={self.layers!r} must list a number of tokens per layer, each 1 or more")
        object.__setattr__(self, "layers", tuple(self.layers))

    def layer_tokens(self, layer: int, n_layers: int, n_seen: Tensor) -> Tensor:
        require(len(self.layers) == n_layers, f"the table has {len(self.layers)} layers, the model {n_layers}; give one entry each")
        return torch.full_like(n_seen, self.layers[layer])

    per_head = Uniform.per_head

    def require_model(self, n_layers: int, kv_heads: int | None) -> None:
        require(len(self.layers) == n_layers, f"the table has {len(self.layers)} layers but the model has {n_layers}; give one entry each")

    def require_room(self, tokens: int) -> None:
        _require_room(min(self.layers), tokens, f" in layer {self.layers.index(min(self.layers))}")


@dataclass(frozen=True)
class PerHead(Uniform):
    """The same number of tokens for every layer, given to those of its KV heads whose tokens rank highest.

    The heads of a sequence share ``Hkv * tokens`` by one ranking of all their tokens, so ranks must be comparable between heads,
    as attention masses are. Each head first gets ``safeguard * tokens`` (rounded down) for its own best. Of equal ranks those of
    the lower head stay, then those at the lower offset. The counts of a sequence add up to exactly ``Hkv * tokens``, or to all
    its tokens where they are fewer.
    Source: AdaKV, arXiv:2407.11550, algorithm 1.

    Attributes:
        safeguard: share of the mean that every head gets, in [0, 1]; 1 is uniform.
    """

    _: KW_ONLY
    safeguard: float = 0.2

    alike: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.safeguard <= 1, f"safeguard={self.safeguard} is outside [0, 1]; it is a share of the mean budget")

    def per_head(self, rank: Tensor, starts: Tensor, lengths: Tensor, tokens: Tensor, layer: int) -> Tensor:
        batch, heads = lengths.shape
        device, sizes = rank.device, lengths.flatten().tolist()
        rows = zip(starts.flatten().tolist(), sizes, strict=True)
        # the runs side by side: the heads of a sequence are one run of it
        rank = torch.cat([rank[start : start + size] for start, size in rows]) if sizes else rank[:0]
        lengths = lengths.to(device)
        begins = (lengths.flatten().cumsum(0) - lengths.flatten()).view(batch, heads)
        sure = torch.minimum(lengths, (tokens.double() * self.safeguard).long().to(device)[:, None])
        best = ops.keep_top(rank, begins, lengths, sure.int(), int(sure.max()) if sizes else 0)
        rank[(best + begins[..., None])[best >= 0]] = float("inf")
        all_of = lengths.sum(1, keepdim=True)
        total = torch.minimum(all_of, heads * tokens.to(device)[:, None])
        kept = ops.keep_top(rank, begins[:, :1].contiguous(), all_of, total.int(), int(total.max()) if batch else 0)[:, 0]
        ends = lengths.cumsum(1).int()
        head = torch.searchsorted(ends, kept.contiguous(), right=True)
        return torch.zeros(batch, heads + 1, dtype=torch.int32, device=device).scatter_add_(
            1, head.where(kept >= 0, heads), torch.ones_like(kept))[:, :heads]


@dataclass(frozen=True)
class DuoHeads:
    """Some KV heads keep everything, the others only their sinks and recent tokens.

    Source: DuoAttention, arXiv:2410.10819, section 2.3; ``python -m sparse_attn.calibrate`` finds the heads. Use with the policy
    "streaming".

    Attributes:
        full: table ``[layers][kv heads]``: True where a head keeps everything.
        sink, recent: tokens of the others, together their budget.

    Example:
        >>> duo = DuoHeads(full=((True, False), (False, False)), sink=2, recent=6)
        >>> duo.layer_tokens(layer=0, n_layers=2, n_seen=torch.tensor([100])).tolist()
        [54]
    """

    full: tuple[tuple[bool, ...], ...]
    sink: int = 64
    recent: int = 256

    alike: ClassVar[bool] = False

    def __post_init__(self):
        rows = self.full if isinstance(self.full, tuple | list) else ()
        good = rows and all(isinstance(row, tuple | list) and row and all(isinstance(x, bool) for x in row) for row in rows)
        require(good, "full must be a table [layers][kv heads] of True and False, one or more entries per row")
        object.__setattr__(self, "full", tuple(tuple(row) for row in rows))
        for name in ("sink", "recent"):
            tokens = getattr(self, name)
            require(_whole(tokens) and tokens >= 0, f"{name}={tokens!r} must be a number of tokens, 0 or more")
        require(self.sink + self.recent >= 1, "sink and recent are both 0, so that nothing stays; give recent=1 or more")

    @classmethod
    def measured(cls, profile: str | Path, **near: int) -> DuoHeads:
        """What a profile of ``python -m sparse_attn.calibrate --method duo`` says; ``near`` is sink or recent unlike there.

        Raises:
            ContractError: if the file is no profile, or one of another method.
        """
        found = load_profile(profile)
        require(found.method == "duo",
                f"profile {profile} is for {found.method}, which does not tell whole heads from others; calibrate with --method duo")
        duo = found.selector()
        return cls(duo.retrieves(), **{"sink": duo.sink_tokens, "recent": duo.recent_tokens} | near)

    def layer_tokens(self, layer: int, n_layers: int, n_seen: Tensor) -> Tensor:
        require(len(self.full) == n_layers, f"full has {len(self.full)} layers but the model has {n_layers}; give one row each")
        whole, heads = sum(self.full[layer]), len(self.full[layer])
        return (whole * n_seen + (heads - whole) * n_seen.clamp(max=self.sink + self.recent)) // heads

    def per_head(self, rank: Tensor, starts: Tensor, lengths: Tensor, tokens: Tensor, layer: int) -> Tensor:
        row = self.full[layer]
        heads = lengths.shape[1]
        require(len(row) == heads, f"full has {len(row)} heads in layer {layer}, the layer {heads} KV heads; give one entry each")
        return torch.where(torch.tensor(row, device=lengths.device), lengths, lengths.clamp(max=self.sink + self.recent)).int()

    @property
    def protect(self) -> tuple[int, int]:
        """The (sinks, recent) tokens that make up the budget of a streaming head."""
        return self.sink, self.recent

    def require_model(self, n_layers: int, kv_heads: int | None) -> None:
        require(len(self.full) == n_layers, f"full has {len(self.full)} layers but the model has {n_layers}; give one row each")
        other = next((i for i, row in enumerate(self.full) if kv_heads and len(row) != kv_heads), None)
        require(other is None, f"full has {len(self.full[other or 0])} heads in layer {other}, the model {kv_heads} KV heads; give one entry each")

    def require_room(self, tokens: int) -> None:
        _require_room(self.sink + self.recent, tokens, " per streaming head")


BUDGETS = {"uniform": Uniform, "pyramid": Pyramid, "table": Table, "per_head": PerHead, "duo_heads": DuoHeads}

__all__ = ["BUDGETS", "Budget", *(cls.__name__ for cls in BUDGETS.values())]
