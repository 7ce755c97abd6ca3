"""How tiers fail. Every function makes the exception that its backends raise; ``csrc/host`` calls them by name."""

from __future__ import annotations

from sparse_attn.errors import ContractError

_KEPT = "nothing that the tiers hold is lost"
_AGAIN = "the cache must be made again"


class CapacityError(ContractError):
    """A tier is full and there is none behind it; everything that was written can still be read."""


class TierError(RuntimeError):
    """A page does not come back as it was written: its file was cut, altered, or cannot be read."""


def full(tier: str, held: int, limit: int, more: int) -> CapacityError:
    """The last tier would exceed its limit."""
    below = "add the tier 'disk', " if tier == "host" else ""
    return CapacityError(f"the {tier} tier holds {held:,} of at most {limit:,} bytes and cannot take {more:,} more; raise its bytes=, {below}or "
                         f"cache fewer tokens; {_KEPT}")


def unwritten(folder: str, why: str, more: int) -> CapacityError:
    """The disk is fuller than its limit says."""
    return CapacityError(f"the disk tier cannot write {more:,} bytes to {folder}: {why}; make room there, or give Disk another folder; {_KEPT}")


def no_memory(more: int, why: str) -> CapacityError:
    """The system has less memory than the host tier's limit says."""
    return CapacityError(f"the host tier cannot get {more:,} bytes of memory: {why}; give Host a smaller bytes= and add the tier 'disk'; {_KEPT}")


def no_file(folder: str, why: str) -> ContractError:
    """The folder of the disk tier is not there, or not ours to write to."""
    return ContractError(f"the disk tier cannot make a file in {folder}: {why}; give Disk a folder that can be written to")


def truncated(folder: str) -> TierError:
    return TierError(f"the file of the disk tier in {folder} was truncated, and a page is lost; {_AGAIN}")


def altered(folder: str) -> TierError:
    return TierError(f"a page of the disk tier in {folder} was altered or only half written; {_AGAIN}")


def unreadable(folder: str, why: str) -> TierError:
    return TierError(f"a page of the disk tier in {folder} cannot be read: {why}; {_AGAIN}")


def not_held(page: int) -> ContractError:
    return ContractError(f"nobody holds page {page} of this pool; a page is gone once it is released as often as it was held")


def no_row(slot: int, rows: int) -> ContractError:
    return ContractError(f"there is no row {slot} for a page among the {rows} of out; slots count from 0")


def same_row() -> ContractError:
    return ContractError("two pages would be read into one row of out; give each its own slot")


def closed() -> ContractError:
    return ContractError("this pool was closed; make another")


def forked() -> ContractError:
    return ContractError("this process was forked from the one that made these pools, and would write into its file; make others here")


def too_many(wanted: int, slots: int) -> ContractError:
    return ContractError(f"a run wants {wanted} pages at once and has {slots} slots; give it more")
