"""What a calibration found for one model: an entry per layer and head, and what must hold before it is used.

``python -m sparse_attn.calibrate`` writes profiles, ``patch(model, profile=...)`` reads them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .config import as_selector
from .errors import ContractError, require
from .types import Selector

VERSION = 1
# method -> (its argument that takes the table, which heads the table counts)
TABLES = {"minference": ("heads", "heads"), "xattention": ("threshold", "heads"), "duo": ("retrieval", "kv_heads")}
_ENDS = 256  # values of each end of a parameter that a model's identity is read from


@dataclass(frozen=True)
class ModelId:
    """Which model a profile belongs to.

    Attributes:
        name: folder name or hub id it was loaded from; for people, not compared.
        model_type: as in its config.
        layers, heads, kv_heads, head_dim: of its attention.
        weights: changes when the weights do, the same in float32 and bfloat16; empty where the load itself rounds (float16,
            quantised), and then not compared.
    """

    name: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    weights: str = ""

    @classmethod
    def of(cls, model: torch.nn.Module, layers: int) -> ModelId:
        """Of a transformers text model without its head, with so many layers."""
        config = model.config
        heads = config.num_attention_heads
        name = getattr(config, "_name_or_path", "") or ""
        return cls(
            Path(name).name if Path(name).is_dir() else name, config.model_type, layers, heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads, weights_id(model),
        )  # fmt: skip

    def same_shape(self, other: ModelId) -> bool:
        """Are both of one kind, layers and heads counted?"""
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self) if f.name not in ("name", "weights"))

    def same_weights(self, other: ModelId) -> bool:
        """False where both know their weights and they differ."""
        return not self.weights or not other.weights or self.weights == other.weights

    def __str__(self) -> str:
        shape = f"{self.layers} layers of {self.heads} heads on {self.kv_heads} of {self.head_dim}"
        return f"{self.name or 'unnamed'} ({self.model_type}, {shape})"


def weights_id(model: torch.nn.Module) -> str:
    """Twelve hex digits from both ends of every parameter, rounded to bfloat16; empty if some are neither that nor float32.

    Read from memory, not from files: a hub id, a moved folder and weights changed after loading all get the right answer.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if p.dtype not in (torch.float32, torch.bfloat16) or p.is_meta:
            return ""
        flat = p.detach().reshape(-1)
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).bfloat16().cpu().view(torch.uint8)
        digest.update(f"{name} {list(p.shape)}".encode() + bytes(ends.tolist()))
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Profile:
    """One calibrated method for one model; equal to its JSON form.

    Attributes:
        method: its name in PATTERNS: minference, xattention or duo.
        model: the model it was measured on.
        table: one row per layer: a selector's JSON form per head (minference), a threshold per head (xattention), or a score per
            key head (duo).
        arguments: the method's other arguments, those the table was measured with.
        retained: share of attention mass that each query head keeps under the profile, mean over the measured query rows.
        density: tiles read over tiles reachable of each query head, at the measured length.
        search: how the table was searched.
        data: hash of the token ids.
        tokens: length of each text.
        date: day of the measurement, ISO 8601.
        version: of this form.
    """

    method: str
    model: ModelId
    table: tuple
    arguments: dict
    retained: tuple[tuple[float, ...], ...]
    density: tuple[tuple[float, ...], ...]
    search: dict
    data: str
    tokens: tuple[int, ...]
    date: str
    version: int = VERSION

    def __post_init__(self):
        require(self.version == VERSION,
                f"the profile has version {self.version!r} but this package reads {VERSION}; calibrate again")
        require(self.method in TABLES, f"{self.method!r} is no calibrated method; there are {', '.join(TABLES)}")
        if isinstance(self.model, dict):
            object.__setattr__(self, "model", _made(ModelId, self.model, "the profile's model"))
        for name in ("table", "retained", "density"):
            object.__setattr__(self, name, self._rows(name))
        require(isinstance(self.arguments, dict), f"the profile's arguments are {self.arguments!r}, not an object; calibrate again")
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def _rows(self, name: str) -> tuple:
        """A table as tuples, of the shape that the model says."""
        rows, model = getattr(self, name), self.model
        require(isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in rows),
                f"the profile's {name} is not a list of layers, each a list of heads; calibrate again")
        require(len(rows) == model.layers,
                f"the profile's {name} has {len(rows)} layers but its model {model.layers}; calibrate again")
        want = model.kv_heads if name == "table" and TABLES[self.method][1] == "kv_heads" else model.heads
        for i, row in enumerate(rows):
            require(len(row) == want,
                    f"the profile's {name} has {len(row)} heads in layer {i} but its model {want}; calibrate again")
        return tuple(map(tuple, rows))

    def selector(self) -> Selector:
        """The method with its table; ``patch(model, prefill=profile.selector())`` uses it on a model it was not made for."""
        return as_selector({"name": self.method, **self.arguments, TABLES[self.method][0]: self.table})

    def require_model(self, model: ModelId) -> None:
        """Raise unless ``model`` is the one that was measured."""
        require(self.model.same_shape(model), f"the profile was made for {self.model} but this model is {model}; calibrate this one")
        require(self.model.same_weights(model),
                f"the profile was made for other weights of {self.model} ({self.model.weights}, these are {model.weights}); "
                "calibrate again, or pass prefill=profile.selector() to use it all the same")

    def to_json(self) -> dict:
        """The JSON form, as the value that ``json.dumps`` takes."""
        return asdict(self)

    def write(self, path: str | Path) -> None:
        """Write the JSON form, one line per layer and table."""
        value = self.to_json()
        parts = []
        for name, entry in value.items():
            if name in ("table", "retained", "density"):
                parts.append(f' "{name}": [\n' + ",\n".join("  " + json.dumps(row) for row in entry) + "\n ]")
            else:
                parts.append(f' "{name}": {json.dumps(entry)}')
        Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

    @classmethod
    def from_json(cls, value: dict) -> Profile:
        """The profile that ``to_json`` wrote."""
        require(isinstance(value, dict), f"a profile is an object, got {type(value).__name__}; calibrate writes one")
        version = value.get("version")
        require(version == VERSION, f"the profile has version {version!r} but this package reads {VERSION}; calibrate again")
        return _made(cls, value, "the profile")


def load(path: str | Path) -> Profile:
    """The profile in a JSON file.

    Raises:
        ContractError: if the file cannot be read, is not JSON, or is not a profile of this version.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = f"profile {path} cannot be read ({error.strerror}); write one with python -m sparse_attn.calibrate"
        raise ContractError(why) from error
    except ValueError as error:
        raise ContractError(f"profile {path} is not JSON ({error}); write one with python -m sparse_attn.calibrate") from error
    try:
        profile = Profile.from_json(value)
        profile.selector()
    except ContractError as error:
        raise ContractError(f"profile {path}: {error}") from error
    return profile


def _made(cls, value: dict, what: str):
    """``cls(**value)``, every missing and unknown entry named."""
    known = [f.name for f in fields(cls)]
    needed = [name for name in known if name not in ("weights", "version")]
    unknown = [name for name in value if name not in known]
    missing = [name for name in needed if name not in value]
    require(not unknown, f"{what} has no entry {unknown[0] if unknown else ''!r}; it has {', '.join(known)}")
    require(not missing, f"{what} lacks {missing[0] if missing else ''!r}; calibrate again")
    return cls(**value)
