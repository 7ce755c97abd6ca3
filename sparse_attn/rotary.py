"""A model's own rotary embedding, to move queries and keys that it has rotated already to other positions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ContractError
from .ops.lowrank_keys import turned

# these recompute their frequencies from the longest position seen, so what rotated a cached key is not known later
_CHANGING = ("dynamic", "longrope")
# families whose layers have RoPE only where they have a sliding window
_ROPE_ONLY_IN_WINDOWS = ("Cohere2", "Exaone4", "ExaoneMoe", "Kolibri1")


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one attention layer rotates.

    Attributes:
        tables: positions int64 ``[1, N]`` on some device to ``(cos, sin)``, float32 ``[1, N, R]`` in the family's own layout.
        apply: the family's ``apply_rotary_pos_emb(q, k, cos, sin)``.
        width: leading channels that ``apply`` is given; None where it is given all and leaves some alone itself.
    """

    tables: Callable[[Tensor], tuple[Tensor, Tensor]]
    apply: Callable
    width: int | None = None

    def move(self, x: Tensor, at: Tensor, to: Tensor) -> Tensor:
        """``x`` ``[B, heads, N, D]``, rotated for positions ``at``, as if it had been rotated for ``to`` (int64 ``[N]``, host).

        Turns by the difference of the angles that the model's own tables give, in float32, so the rotation of ``at`` cancels
        whatever the size of the position; an attention factor in the tables stays in x once. Rounds once to x's dtype.
        """
        if torch.equal(at, to):
            return x
        cos, sin = self.tables(torch.cat([at, to])[None].to(x.device))
        (cos, cos_to), (sin, sin_to) = cos.split([len(at), len(to)], 1), sin.split([len(at), len(to)], 1)
        norm = cos * cos + sin * sin
        turn = (cos_to * cos + sin_to * sin) / norm, (sin_to * cos - cos_to * sin) / norm
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        moved = self.apply(wide[..., : self.width], wide[:, :0, :, : self.width], *turn)[0]
        return (moved if self.width is None else torch.cat([moved, wide[..., self.width :]], -1)).to(x.dtype)

    def pairs(self, dim: int) -> tuple[int, bool] | None:
        """Which of ``dim`` channels turn together: how many pairs, and whether they are interleaved (``ops.lowrank_keys``).

        None where ``move`` turns them in some other way. Found by trying, because families differ in what their tables hold.
        """
        at, to = torch.zeros(3, dtype=torch.int64), torch.tensor([1, 70, 3000])
        x = torch.linspace(-1, 2, 3 * dim).sin().view(1, 1, 3, dim)
        moved, width = self.move(x, at, to), self.tables(at[None])[0].shape[-1]
        for pairs in (n for n in (width // 2, width) if 2 * n <= dim):
            for interleaved in (False, True):
                if torch.allclose(turned(x, self.turns(to, dim, pairs, interleaved), interleaved), moved, atol=1e-5):
                    return pairs, interleaved
        return None

    def turns(self, positions: Tensor, dim: int, pairs: int, interleaved: bool) -> Tensor:
        """float32 ``[N, 2, pairs]``: cosines and sines by which ``move`` turns each pair from 0 to ``positions`` (int64)."""
        one = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
        other = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
        x = torch.zeros(1, 1, len(positions), dim)
        x[..., one] = 1
        moved = self.move(x, torch.zeros_like(positions), positions)[0, 0]
        return torch.stack([moved[:, one], moved[:, other]], 1)

    def works(self, dim: int) -> bool:
        """Does moving a vector of ``dim`` channels equal rotating it to the new position in the first place?"""
        x = torch.linspace(-1, 2, 2 * dim).sin().view(1, 1, 2, dim)
        at, to = torch.tensor([3, 11]), torch.tensor([8, 5])
        whole, rest = x[..., : self.width], x[..., self.width :] if self.width else x[..., :0]
        try:
            there, wanted = (torch.cat([self.apply(whole, whole[:, :0], *self.tables(p[None]))[0], rest], -1) for p in (at, to))
            turned = there.shape == x.shape and not torch.equal(there, wanted)
            return turned and torch.allclose(self.move(there, at, to), wanted, atol=1e-4)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False


def rotations(tower: torch.nn.Module, modules: dict[str, torch.nn.Module], wanted_by: str = "dual_chunk",
              none: bool = False) -> dict[str, Rotation]:
    """The rotation of every attention module that rotates and sees all keys; layers without RoPE or with a window are left out.

    Args:
        wanted_by: the option that an error names.
        none: whether there may be no such layer.

    Raises:
        ContractError: if the model's rotation cannot be repeated.
    """
    rotary = next((m.rotary_emb for m in tower.modules() if isinstance(getattr(m, "rotary_emb", None), torch.nn.Module)), None)
    refusal = _refusal(tower, rotary)
    found = {}
    for name, module in modules.items() if refusal is None else ():
        if not _rotates_everywhere(module):
            continue
        if hasattr(module, "kv_lora_rank"):
            refusal = "its heads mix rotated and plain channels (latent attention)"
            break
        apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        tables, dim = _tables(rotary, module), _head_dim(module)
        width = tables(torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
        fits = [r for r in (Rotation(tables, apply), Rotation(tables, apply, width)) if apply is not None and r.works(dim)]
        if not fits:
            refusal = f"{type(module).__name__} rotates in a way that cannot be repeated"
            break
        found[name] = fits[0]
    if refusal is None and not found and not none:
        refusal = "no layer of it has both rotary positions and full attention"
    if refusal is not None:
        raise ContractError(f"{wanted_by} cannot serve {type(tower).__name__}: {refusal}; leave it out")
    return found


def _refusal(tower: torch.nn.Module, rotary: torch.nn.Module | None) -> str | None:
    if rotary is None:
        return "it has no rotary_emb"
    if "mrope_section" in str(getattr(tower.config, "rope_parameters", "")) or hasattr(rotary, "mrope_section"):
        return "its positions have several axes (M-RoPE)"
    kinds = getattr(rotary, "rope_type", "default")
    changing = [k for k in (kinds.values() if isinstance(kinds, dict) else [kinds]) if k in _CHANGING]
    return f"rope_type {changing[0]!r} changes its frequencies with the length" if changing else None


def _tables(rotary: torch.nn.Module, module: torch.nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    kind = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kind = {"layer_type": module.config.layer_types[module.layer_idx]}
    return lambda positions: rotary(torch.zeros(1, device=positions.device), positions, **kind)


def _rotates_everywhere(module: torch.nn.Module) -> bool:
    """Has the layer RoPE and no sliding window?"""
    config = module.config
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window and kinds is not None and not hasattr(module, "sliding_window"):
        window = kinds[module.layer_idx] == "sliding_attention"
    only_in_windows = type(module).__name__.startswith(_ROPE_ONLY_IN_WINDOWS) and getattr(config, "sliding_window", None)
    return not window and not only_in_windows and bool(getattr(module, "use_rope", True))


def _head_dim(module: torch.nn.Module) -> int:
    own = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or getattr(module.config, "head_dim", None)
    return own or module.config.hidden_size // module.config.num_attention_heads
