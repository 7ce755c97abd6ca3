"""Keys before rotation as few numbers per token, shared by all KV heads, and a basis per sequence."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require
from sparse_attn.ops.lowrank_keys import turned, turns_at
from sparse_attn.rotary import Rotation

from ..store import Meter, empty_rows, side_by_side

# rows of the table of single positions; the other one has a row for each so many positions
_NEAR = 256
# what the factors of a sequence may grow by before they are copied again: a share, and rows at the least
_GROW, _GROW_ROWS = 16, 64
# a basis of less than so many tokens per rank is made anew whenever they have doubled
_FEW = 8

# yields sequence, keys [Hkv, n, D] and int64 positions [n], of all tokens in order
Pieces = Callable[[], Iterator[tuple[int, Tensor, Tensor]]]


@dataclass(frozen=True)
class LowRankKeys:
    """The keys of a token, un-rotated, all KV heads side by side, as ``rank`` numbers in the basis that keeps most of them.

    ShadowKV, arXiv:2410.21465, sections 3.1 and 4.1: keys before rotation have few directions. Differs from the paper: the
    basis comes from the eigenvectors of the Gram matrix of the keys, added up a piece at a time, not from a singular value
    decomposition of all keys at once, which is the same subspace but more memory; the factors are the keys' coordinates in it, so
    tokens that come later are projected, any number of them, where the paper keeps them whole.

    Attributes:
        rank: numbers per token and layer; the paper's 160 are for 8 heads of 128 channels.
    """

    rank: int = 160

    unrotates = True

    def __post_init__(self):
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        require(whole and self.rank >= 1, f"rank={self.rank!r} must be 1 or more; 160 is usual for 8 KV heads of 128 channels")

    def layer(self, meter: Meter, rotation: Rotation | None) -> KeyFactors:
        """See ``Codec``."""
        return KeyFactors(self.rank, meter, rotation)


class KeyFactors:
    """The keys of one layer as ``LowRankKeys`` keeps them.

    Factors and basis are of the keys' dtype. In bfloat16 their rounding costs 0.24% of a key (rms), where that of the key itself
    costs 0.17%, and less than any rank leaves out that is worth having; float32 would double the bytes per token.

    Args:
        rank: numbers per token.
        meter: counts the bytes.
        rotation: of the layer; None where it does not rotate.

    Attributes:
        factors: ``[T, rank]``; None before ``fit``. Those of sequence b are the rows from ``starts[b]`` on, ``lengths[b]`` of them.
        positions: int32 ``[T]``.
        basis: ``[B, Hkv, rank, D]``, orthonormal over heads and channels together.
        starts, lengths: int64 ``[B]`` on the host.
        energy: float64 ``[B]``, share of the squared length of the keys that ``fit`` saw which the basis keeps.
    """

    def __init__(self, rank: int, meter: Meter, rotation: Rotation | None):
        self._rank, self._meter, self._rotation = rank, meter, rotation
        self.factors = self.positions = self.basis = self.starts = self.lengths = self.energy = None
        self._room = self._turn = None
        self._grams: dict[int, Tensor] = {}  # of sequences that have few tokens
        self._fitted: list[int] = []  # tokens that made the basis of each sequence

    @property
    def n_bytes(self) -> int:
        """Bytes allocated, room to grow and tables of angles included."""
        return sum(map(_bytes, (self.factors, self.positions, self.basis, self._turn, self._grams)))

    def clear(self) -> None:
        """Forget everything and release the memory."""
        for name in ("factors", "positions", "basis", "_turn"):
            self._hold(name, None)
        self._hold("_grams", {})
        self.starts = self.lengths = self.energy = self._room = None

    # -- coming -----------------------------------------------------------------------------------------------------------------

    def fit(self, pieces: Pieces, batch: int) -> None:
        """Take the first tokens of ``batch`` sequences, and the bases from them.

        Args:
            pieces: called twice; a sequence may have no tokens yet.

        Raises:
            ContractError: if the rank is above heads times channels, or the keys have another shape.
        """
        self.clear()
        grams, counts, k = {}, [0] * batch, None
        for b, k, positions in pieces():
            grams[b] = grams.get(b, 0) + _gram(self._at_zero(k, positions))
            counts[b] += k.shape[1]
        require(k is not None, "there is no token to make a basis from; fit() comes once there are some")
        heads, _, dim = k.shape
        require(self._rank <= heads * dim,
                f"rank={self._rank} is above the {heads * dim} channels of all KV heads ({heads} of {dim}); use that or less")
        self._hold("basis", empty_rows(k.new_empty(0, heads, self._rank, dim), batch))
        self.energy, self.lengths = torch.ones(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.int64)
        self._fitted = counts
        none = torch.zeros_like(next(iter(grams.values())))
        for b in range(batch):
            self._learn(b, grams.setdefault(b, none))
        self._lay_out(torch.tensor(counts), [])
        for b, k, positions in pieces():
            self._project(b, self._at_zero(k, positions), positions)
        self._hold("_grams", {b: gram for b, gram in grams.items() if counts[b] < _FEW * self._rank})

    def append(self, b: int, k: Tensor, positions: Tensor) -> None:
        """Take the next tokens of a sequence.

        Args:
            k: ``[Hkv, n, D]`` as the layer rotated them.
            positions: int64 ``[n]`` that they were rotated for.
        """
        require(self.basis is not None, "there is no basis yet to append to; fit() comes first")
        batch, heads, _, dim = self.basis.shape
        require(0 <= b < batch, f"there is no sequence {b} among the {batch} that were fitted")
        require((k.shape[0], k.shape[2]) == (heads, dim),
                f"k is {list(k.shape)}, not [{heads}, n, {dim}] as it was when the basis was made")
        keys, length = self._at_zero(k, positions), int(self.lengths[b]) + k.shape[1]
        if length > int(self._room[b]):
            wanted = self.lengths.clone()
            wanted[b] = length
            self._lay_out(wanted + (wanted // _GROW).clamp(min=_GROW_ROWS), self._runs())
        if b in self._grams:
            self._hold("_grams", self._grams | {b: self._grams[b] + _gram(keys)})
            if length >= 2 * self._fitted[b]:
                self._refit(b, length)
        self._project(b, keys, positions)

    @contextlib.contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """What is appended within is as if it had not been, should one of it fail."""
        basis, factors = self.basis, self.factors
        if self._grams:  # a basis may be made anew, and the factors with it
            basis, factors = (empty_rows(t, len(t)).copy_(t) for t in (basis, factors))
        facts = {name: getattr(self, name) for name in ("starts", "lengths", "energy", "_room", "_fitted")}
        held = {"basis": basis, "factors": factors} | {name: getattr(self, name) for name in ("positions", "_turn", "_grams")}
        try:
            yield
        except BaseException:
            for name, before in held.items():
                self._hold(name, before)
            self.__dict__.update(facts)
            raise

    def _refit(self, b: int, length: int) -> None:
        """A basis of few tokens may miss what later ones need: make it anew, and say the factors so far in it.

        What the older basis missed of the tokens since is lost; the Gram matrix has it, so later ones lose it no more.
        """
        before = self.basis[b].clone()
        self._learn(b, self._grams[b])
        wide = torch.promote_types(before.dtype, torch.float32)
        rows = slice(int(self.starts[b]), int(self.starts[b] + self.lengths[b]))
        change = torch.einsum("hrd,hsd->rs", before.to(wide), self.basis[b].to(wide))
        self.factors[rows] = (self.factors[rows].to(wide) @ change).to(self.factors.dtype)
        self._fitted = [*self._fitted[:b], length, *self._fitted[b + 1 :]]
        if length >= _FEW * self._rank:
            self._hold("_grams", {i: gram for i, gram in self._grams.items() if i != b})

    def _learn(self, b: int, gram: Tensor) -> None:
        """Make the basis that keeps most of the keys with this Gram matrix."""
        values, vectors = torch.linalg.eigh(gram)  # ascending
        kept, total = (float(values[i:].clamp(min=0).sum()) for i in (-self._rank, 0))
        self.energy = self.energy.clone()  # what inference mode made cannot be written outside it
        self.energy[b] = kept / total if total else 1.0
        self.basis[b] = vectors[:, -self._rank :].mT.unflatten(-1, self.basis.shape[1::2]).transpose(0, 1)

    def _project(self, b: int, keys: Tensor, positions: Tensor) -> None:
        """Write the factors of keys at position 0 behind those of the sequence, where there is room."""
        end = int(self.starts[b] + self.lengths[b])
        rows = slice(end, end + keys.shape[1])
        self.factors[rows] = torch.einsum("hnd,hrd->nr", keys, self.basis[b].to(keys.dtype)).to(self.factors.dtype)
        self.positions[rows] = positions.to(self.positions)
        self.lengths = self.lengths.clone()
        self.lengths[b] += keys.shape[1]

    def _at_zero(self, k: Tensor, positions: Tensor) -> Tensor:
        """float32 ``[Hkv, n, D]`` as if rotated for position 0: an attention factor in the model's tables stays."""
        require(k.dim() == 3 and tuple(positions.shape) == (k.shape[1],),
                f"k must be [Hkv, n, D] and positions [n], the same tokens for all KV heads, got {list(k.shape)} and "
                f"{list(positions.shape)}")
        if self._turn is None:
            self._hold("_turn", _Turn.of(self._rotation, k.shape[2], k.device))
        if positions.numel():
            self._hold("_turn", self._turn.reaching(int(positions.max()), k.shape[2]))
        return self._turn.back(k.to(torch.promote_types(k.dtype, torch.float32)), positions)

    # -- going ------------------------------------------------------------------------------------------------------------------

    def rebuild(self, pages: Tensor, page: int, out: Tensor, targets: Tensor) -> None:
        """Write the keys of some pages, rotated.

        Args:
            pages: int32 ``[B, Hkv, m]`` numbers, counted from each sequence's first token; -1 for none. On the host, or where the
                factors are, which is then not asked what they are.
            page: tokens of a page.
            out: ``[S, D]``, contiguous.
            targets: int64 ``[B, Hkv, m]`` row of ``out`` where the first key of each page goes.
        """
        require(self.basis is not None, "there are no keys yet to rebuild; fit() comes first")
        first, lengths = pages.long() * page, self.lengths[:, None, None].to(pages.device, non_blocking=True)
        require(pages.device.type != "cpu" or bool((first < lengths).all()),  # where looking is free
                f"sequences have {self.lengths.tolist()} tokens, and pages of {page} were asked for that lie behind them")
        counts = (lengths - first).clamp(max=page).masked_fill(first < 0, 0).int()
        starts = (self.starts[:, None, None].to(pages.device, non_blocking=True) + first).where(first >= 0, 0)
        on_device = (t.to(out.device) for t in (starts, counts, targets))
        turn = self._turn
        ops.lowrank_keys(out, self.factors, self.basis, *on_device, self.positions, turn.far, turn.near, turn.interleaved)
        if turn.pairs is None:
            token = torch.arange(page)
            real = token < counts.cpu()[..., None]
            rows, sources = ((t.cpu()[..., None] + token)[real].to(out.device) for t in (targets, starts))
            at = self.positions[sources].long().cpu()
            out[rows] = self._rotation.move(out[rows][None, None], torch.zeros_like(at), at)[0, 0]

    # -- the batch --------------------------------------------------------------------------------------------------------------

    def select(self, sequences: Tensor) -> None:
        """Make the sequences numbered ``sequences`` (int64 ``[B']``, host, repeats allowed) the batch."""
        if self.basis is None:
            return
        runs, at = self._runs(), sequences.to(self.basis.device)
        self._hold("basis", torch.index_select(self.basis, 0, at, out=empty_rows(self.basis, len(at))))
        self.energy, self.lengths = self.energy[sequences], self.lengths[sequences]
        self._hold("_grams", {i: self._grams[b] for i, b in enumerate(sequences.tolist()) if b in self._grams})
        self._fitted = [self._fitted[b] for b in sequences.tolist()]
        self._lay_out(self.lengths, [runs[b] for b in sequences.tolist()])

    def copy(self, meter: Meter) -> KeyFactors:
        """The same in memory of its own, counted by ``meter``."""
        twin = KeyFactors(self._rank, meter, self._rotation)
        if self.basis is not None:
            twin._hold("basis", empty_rows(self.basis, len(self.basis)).copy_(self.basis))
            twin._hold("_turn", self._turn)
            twin._hold("_grams", self._grams)
            twin.energy, twin.lengths, twin._fitted = self.energy.clone(), self.lengths, self._fitted
            twin._lay_out(self.lengths, self._runs(), self)
        return twin

    # -- memory -----------------------------------------------------------------------------------------------------------------

    def _runs(self) -> list[tuple[int, int]]:
        return list(zip(self.starts.tolist(), self.lengths.tolist()))

    def _hold(self, name: str, held: _Held) -> None:
        """Make ``held`` the attribute ``name``, and count its bytes instead of those of what it replaces."""
        self._meter.add(_bytes(held))
        self._meter.add(-_bytes(getattr(self, name)))
        setattr(self, name, held)

    def _lay_out(self, room: Tensor, runs: list[tuple[int, int]], source: KeyFactors | None = None) -> None:
        """Move the rows of ``runs`` (first and number) of ``source``, or self, to new memory of ``room`` rows each."""
        like, bases = self.basis.new_empty(0, self._rank), side_by_side(room)
        for name, blank in (("factors", like), ("positions", like.new_empty(0, dtype=torch.int32))):
            old, new = getattr(source or self, name), empty_rows(blank, int(room.sum()))
            for (first, n), target in zip(runs, bases.tolist()):
                new[target : target + n] = old[first : first + n]
            self._hold(name, new)
        self.starts, self._room = bases, room


@dataclass(frozen=True, eq=False)
class _Turn:
    """How the keys of a layer go to position 0 and back.

    Both ways by the same two tables, so that what one does the other undoes to float32 rounding; the tables are the model's own at
    each of their rows, while between them a model rounds large angles, and turns by up to 0.004 more or less near position 100000.

    Attributes:
        rotation: of the layer; None where it does not rotate.
        pairs: see ``Rotation.pairs``; None where no table says how the layer rotates, and the model's own function does it.
        far, near: float32 ``[F, 2, R]`` and ``[N, 2, R]`` as ``ops.lowrank_keys`` takes them; R = 0 without tables.
    """

    rotation: Rotation | None
    pairs: tuple[int, bool] | None
    far: Tensor
    near: Tensor

    @classmethod
    def of(cls, rotation: Rotation | None, dim: int, device: torch.device) -> _Turn:
        pairs = (0, False) if rotation is None else rotation.pairs(dim)
        if pairs is None:
            warnings.warn("the lowrank codec does not know how this model lays out the pairs that rotate, and has the model's own "
                          "function rotate the keys that it rebuilds, which is slower", stacklevel=2)
        if not pairs or not pairs[0]:
            return cls(rotation, pairs, *torch.empty(2, 1, 2, 0, device=device))
        far, near = (rotation.turns(torch.arange(n), dim, *pairs).to(device) for n in (1, _NEAR))
        return cls(rotation, pairs, far, near)

    @property
    def interleaved(self) -> bool:
        return self.pairs is not None and self.pairs[1]

    def reaching(self, position: int, dim: int) -> _Turn:
        """One whose tables tell of the position."""
        known, rows = len(self.far), position // len(self.near) + 1
        if not self.far.shape[2] or rows <= known:
            return self
        more = torch.arange(known, max(rows, known + known // _GROW)) * len(self.near)
        return replace(self, far=torch.cat([self.far, self.rotation.turns(more, dim, *self.pairs).to(self.far)]))

    def back(self, k: Tensor, positions: Tensor) -> Tensor:
        """``k`` ``[Hkv, n, D]``, rotated for ``positions``, as if for position 0."""
        if self.pairs is None:
            at = positions.cpu()
            return self.rotation.move(k[None], at, torch.zeros_like(at))[0]
        turns = turns_at(positions.to(k.device), self.far, self.near).to(k.dtype) if self.far.shape[2] else k.new_empty(1, 2, 0)
        return turned(k, turns * turns.new_tensor([1.0, -1.0])[:, None], self.interleaved)


_Held = Tensor | _Turn | dict[int, Tensor] | None


def _gram(keys: Tensor) -> Tensor:
    """float64 ``[Hkv D, Hkv D]`` of keys ``[Hkv, n, D]``: wide, so that it does not matter in how many pieces they came."""
    flat = keys.transpose(0, 1).flatten(1)
    return (flat.mT @ flat).double()


def _bytes(held: _Held) -> int:
    if isinstance(held, _Turn):
        return _bytes(held.far) + _bytes(held.near)
    if isinstance(held, dict):
        return sum(map(_bytes, held.values()))
    return 0 if held is None else held.numel() * held.element_size()
