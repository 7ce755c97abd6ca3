"""Locret's retaining heads: what they see of a token, the score they give it, and the file they are kept in.

``python -m kvcache.train_locret`` writes such a file, the policy ``locret`` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_attn.errors import ContractError, require, warn_once
from sparse_attn.profile import ModelId

VERSION = "1"
_KEYS = ("version", "model", "data", "date")


def token_vectors(q: Tensor, k: Tensor, v: Tensor, at: Tensor, turn: Callable[[Tensor, Tensor, Tensor], Tensor] | None) -> Tensor:
    """float32 ``[N, (H + Hkv) D + Hkv Dv]``: queries, keys and values of all heads of each token, as they were before rotation.

    Args:
        q: ``[N, H, D]``.
        k, v: ``[N, Hkv, D]`` and ``[N, Hkv, Dv]``.
        at: int64 ``[N]`` on the host, the positions that q and k were rotated for.
        turn: moves them to other positions (``Seen.turn``); None where the layer does not rotate.
    """
    if turn is not None:
        both = torch.cat([q, k], 1).transpose(0, 1)[None]
        q, k = turn(both, at, torch.zeros_like(at))[0].transpose(0, 1).split([q.shape[1], k.shape[1]], 1)
    return torch.cat([x.flatten(1).float() for x in (q, k, v)], 1)


def score(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """float32 ``[N, Hkv]``: ``w2 silu(w1 x)`` of each token's vector, in float32.

    Args:
        x: float32 ``[N, I]``, see ``token_vectors``.
        w1, w2: ``[hidden, I]`` and ``[Hkv, hidden]``.

    Example:
        >>> score(torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [-1.0]]))
        tensor([[ 5.2848, -1.7616]])
    """
    return torch.nn.functional.silu(x @ w1.to(x).T) @ w2.to(x).T


@dataclass(frozen=True, eq=False)
class Heads:
    """The retaining heads of one model.

    Attributes:
        layers: of each attention layer that evicts, ``(w1 [hidden, I], w2 [Hkv, hidden])``.
        model: whom they were trained for.
        data: hash of the token ids.
        date: day of the training, ISO 8601.
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    model: ModelId
    data: str
    date: str

    def write(self, path: str | Path) -> None:
        """Write a safetensors file: ``layers.<i>.w1`` and ``.w2``, and the rest as its header."""
        tensors = {f"layers.{i}.w{n}": w.contiguous() for i, pair in self.layers.items() for n, w in enumerate(pair, 1)}
        header = {"version": VERSION, "model": json.dumps(asdict(self.model)), "data": self.data, "date": self.date}
        save_file(tensors, path, metadata=header)

    @classmethod
    def read(cls, path: str | Path) -> Heads:
        """The heads in a file.

        Raises:
            ContractError: if it cannot be read, is no safetensors file, or holds something else.
        """
        again = "write one with python -m kvcache.train_locret"
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ContractError(f"retaining heads {path} cannot be read ({error}); {again}") from error
        missing = [key for key in _KEYS if key not in header]
        require(not missing, f"{path} holds no retaining heads: its header lacks {missing[0] if missing else ''!r}; {again}")
        require(header["version"] == VERSION,
                f"the retaining heads {path} have version {header['version']} but this package reads {VERSION}; train again")
        layers = {}
        for i in sorted(int(found[1]) for name in tensors if (found := re.fullmatch(r"layers\.(\d+)\.w1", name))):
            layers[i] = cls._pair(tensors, i, path)
        require(len(tensors) == 2 * len(layers) > 0, f"{path} holds tensors that are no retaining heads, or none; {again}")
        try:
            model = ModelId(**json.loads(header["model"]))
        except (ValueError, TypeError) as error:
            raise ContractError(f"{path} does not say which model its retaining heads are for ({error}); {again}") from error
        return cls(layers, model, header["data"], header["date"])

    @staticmethod
    def _pair(tensors: dict[str, Tensor], i: int, path: str | Path) -> tuple[Tensor, Tensor]:
        w1, w2 = tensors[f"layers.{i}.w1"], tensors.get(f"layers.{i}.w2", torch.empty(0))
        require(w1.dim() == w2.dim() == 2 and w2.shape[1] == w1.shape[0],
                f"{path}: w1 {list(w1.shape)} and w2 {list(w2.shape)} of layer {i} do not fit together; train again")
        return w1, w2

    def of_layer(self, layer: int, inputs: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """``(w1, w2)`` of a layer whose tokens have ``inputs`` channels and ``kv_heads`` scores; raises ContractError otherwise."""
        require(layer in self.layers,
                f"there is no retaining head for layer {layer}, only for {', '.join(map(str, self.layers))}; train heads for this "
                "model")
        w1, w2 = self.layers[layer]
        require(w1.shape[1] == inputs and w2.shape[0] == kv_heads,
                f"the retaining head of layer {layer} takes {w1.shape[1]} channels and scores {w2.shape[0]} key heads, but the "
                f"layer has {inputs} and {kv_heads}; train heads for this model")
        return w1, w2

    def require_model(self, model: ModelId) -> None:
        """Raise unless these heads fit ``model``; warn once where they were trained for other weights of its kind."""
        require(self.model.same_shape(model),
                f"the retaining heads were trained for {self.model} but this model is {model}; train heads for it")
        if not self.model.same_weights(model):
            warn_once(f"the retaining heads were trained for other weights of {self.model} ({self.model.weights}, these are "
                      f"{model.weights}); they may rank worse than heads trained for these")
