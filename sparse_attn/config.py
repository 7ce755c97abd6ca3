"""Which method runs where, as one frozen value that equals its JSON form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from .dual_chunk import DualChunk
from .errors import ContractError, require
from .patterns import PATTERNS, Dense
from .types import Selector


@dataclass(frozen=True)
class SparseAttnConfig:
    """What a model's attention layers read during prefill.

    Attributes:
        prefill: decides which blocks a query reads. Also accepts the JSON form: a name, or a dict with ``name`` and arguments.
        dense_layers: indices of layers that always run dense; the first ones often matter most.
        dense_below: tokens; calls over fewer keys run dense, because choosing would cost more than it saves.
        min_queries: tokens; calls with fewer queries run dense (decoding, verifying drafted tokens, a short new turn).
        dual_chunk: lets layers with RoPE read texts longer than the model was trained for, see ``DualChunk``; also accepts its
            JSON form, a dict of its fields. None leaves distances as they are.

    Example:
        >>> config = SparseAttnConfig.from_json({"prefill": {"name": "xattention", "stride": 16}, "dense_layers": [0, 1]})
        >>> config.prefill.stride, config.dense_layers
        (16, (0, 1))
        >>> SparseAttnConfig.from_json(config.to_json()) == config
        True
    """

    prefill: Selector = Dense()
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 4096
    min_queries: int = 16
    dual_chunk: DualChunk | None = None

    def __post_init__(self):
        object.__setattr__(self, "prefill", as_selector(self.prefill))
        layers = self.dense_layers
        require(isinstance(layers, (tuple, list)), f"dense_layers={layers!r} must list layer indices, e.g. (0, 1)")
        object.__setattr__(self, "dual_chunk", as_dual_chunk(self.dual_chunk))
        bad = [i for i in layers if not _whole(i) or i < 0]
        require(not bad, f"dense_layers names {bad[0] if bad else ''!r}; layers are counted from 0")
        object.__setattr__(self, "dense_layers", tuple(layers))
        for name in ("dense_below", "min_queries"):
            tokens = getattr(self, name)
            require(_whole(tokens) and tokens >= 0, f"{name}={tokens!r} must be a number of tokens, 0 or more")

    def to_json(self) -> dict:
        """The JSON form, as the value that ``json.dumps`` takes; only for methods in PATTERNS."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _plain(values)

    @classmethod
    def from_json(cls, value: str | dict) -> SparseAttnConfig:
        """The config that ``to_json`` wrote; left-out entries take their defaults, a string alone is a method's name."""
        if isinstance(value, str):
            return cls(prefill=value)
        require(isinstance(value, dict), f"a config is a method name or a dict, got {type(value).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in value if key not in known]
        require(not unknown, f"the config has no entry {unknown[0] if unknown else ''!r}; it has {_listed(known)}")
        return cls(**value)


def as_selector(value: Selector | str | dict) -> Selector:
    """The selector itself, or the one that a name or ``{"name": ..., argument: ...}`` describes.

    Example:
        >>> as_selector("xattention").threshold
        0.9
        >>> as_selector({"name": "xattention", "stired": 8})
        Traceback (most recent call last):
        ...
        sparse_attn.errors.ContractError: xattention has no argument 'stired'; it has threshold, stride, block, top_k, sink, recent, alternate, gqa
    """
    if isinstance(value, Selector) and not isinstance(value, type):
        return value
    if isinstance(value, str):
        value = {"name": value}
    require(isinstance(value, dict), f"a method is a name, a dict with 'name', or a selector object, got {value!r}")
    require("name" in value, f"the method has no 'name' in {value}; there are {_listed(PATTERNS)}")
    name, arguments = value["name"], {key: v for key, v in value.items() if key != "name"}
    require(name in PATTERNS, f"{name!r}: no such method; there are {_listed(PATTERNS)}")
    known = [f.name for f in fields(PATTERNS[name])]
    unknown = [key for key in arguments if key not in known]
    has = f"it has {_listed(known)}" if known else "it takes none"
    require(not unknown, f"{name} has no argument {unknown[0] if unknown else ''!r}; {has}")
    nested = [f.name for f in fields(PATTERNS[name]) if isinstance(f.default, Selector) and f.name in arguments]
    arguments.update({key: as_selector(arguments[key]) for key in nested})
    try:
        return PATTERNS[name](**arguments)
    except ContractError:
        raise
    except (TypeError, ValueError) as error:
        raise ContractError(f"{name} cannot take {arguments}: {error}") from error


def as_dual_chunk(value: DualChunk | dict | None) -> DualChunk | None:
    """The value itself, or the DualChunk that a dict of its fields describes.

    Example:
        >>> as_dual_chunk({"chunk": 262144, "local": 8192})
        DualChunk(chunk=262144, local=8192, trained=0, critical=True)
    """
    if value is None or isinstance(value, DualChunk):
        return value
    require(isinstance(value, dict), f"dual_chunk is a DualChunk, its dict or None, got {value!r}")
    known = [f.name for f in fields(DualChunk)]
    wrong = [key for key in value if key not in known] + [name for name in ("chunk", "local") if name not in value]
    got = _listed(value) or "none"
    require(not wrong, f"dual_chunk takes {_listed(known)}, of which chunk and local must be given; got {got}")
    return DualChunk(**value)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(names) -> str:
    return ", ".join(names)


def _plain(value):
    """Tuples as lists and selectors as their JSON form, all the way down."""
    if isinstance(value, Selector):
        name = next((n for n, cls in PATTERNS.items() if type(value) is cls), None)
        require(name is not None, f"{type(value).__name__} has no JSON form; there are {_listed(PATTERNS)}")
        return {"name": name} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, DualChunk):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
