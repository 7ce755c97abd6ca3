"""Which tiers there are, and in what order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields

from sparse_attn.errors import require


@dataclass(frozen=True)
class Device:
    """Where attention reads: the slots that chosen pages come into. Always the first tier."""


@dataclass(frozen=True)
class Host:
    """Memory of the process.

    Attributes:
        bytes: what all pages of a cache may take of it; None for no limit.
    """

    bytes: int | None = None

    def __post_init__(self):
        _require_bytes("host", self.bytes)


@dataclass(frozen=True)
class Disk:
    """A file without a name, which only this process can read and which is gone when the process is, however that ends.

    Attributes:
        bytes: what all pages of a cache may take of it, each rounded up to 4 KiB; None for no limit.
        folder: where the file lies; None for the system's folder for temporary files.
    """

    bytes: int | None = None
    folder: str | None = None

    def __post_init__(self):
        _require_bytes("disk", self.bytes)
        object.__setattr__(self, "folder", tempfile.gettempdir() if self.folder is None else str(self.folder))


# every tier by name, in the order in which pages go down
TIERS = {"device": Device, "host": Host, "disk": Disk}

Tier = Device | Host | Disk


def as_tiers(tiers: Iterable[Tier | str | dict]) -> tuple[Tier, ...]:
    """The tiers of a cache, from the device down; a full one passes its oldest pages on to the next.

    Args:
        tiers: each a tier, its name, or its JSON form: a dict with ``name`` and arguments.

    Raises:
        ContractError: unless these are the device and then some of host and disk, in that order.

    Example:
        >>> as_tiers(("device", "host"))
        (Device(), Host(bytes=None))
        >>> as_tiers(["device", {"name": "host", "bytes": 4096}, Disk(folder="spill")])
        (Device(), Host(bytes=4096), Disk(bytes=None, folder='spill'))
        >>> as_tiers(("device", "disk", "host"))
        Traceback (most recent call last):
        ...
        sparse_attn.errors.ContractError: tiers=device, disk, host must begin with the device and go down: device, host, disk, each at \
most once
    """
    require(not isinstance(tiers, str), f"tiers={tiers!r} must be a list of tiers, such as ('device', {tiers!r})")
    made = tuple(_as_tier(tier) for tier in tiers)
    order = [list(TIERS.values()).index(type(tier)) for tier in made]
    require(order[:1] == [0] and all(a < b for a, b in zip(order, order[1:])),
            f"tiers={', '.join(list(TIERS)[i] for i in order) or 'none'} must begin with the device and go down: {', '.join(TIERS)}, each at "
            "most once")
    return made


def _as_tier(tier: Tier | str | dict) -> Tier:
    if isinstance(tier, Tier):
        return tier
    form = {"name": tier} if isinstance(tier, str) else tier
    require(isinstance(form, dict), f"{tier!r} is no tier; use one of {', '.join(TIERS)}")
    name = form.get("name")
    require(name in TIERS, f"{name!r}: no such tier; there are {', '.join(TIERS)}")
    known = [field.name for field in fields(TIERS[name])]
    unknown = [key for key in form if key not in ("name", *known)]
    require(not unknown, f"the tier {name} has no argument {unknown[0] if unknown else ''!r}; it has {', '.join(known) or 'none'}")
    return TIERS[name](**{key: value for key, value in form.items() if key != "name"})


def _require_bytes(tier: str, limit: int | None) -> None:
    whole = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
    require(limit is None or whole, f"bytes={limit!r} of the {tier} tier must be 1 or more, or None for no limit")
