"""Where pages of bytes lie that left the device: memory of the host first, then a file. Knows nothing of what is in them."""

from .errors import CapacityError, TierError
from .pool import Fence, Pool, Pools, Slots
from .specs import TIERS, Device, Disk, Host, as_tiers

__all__ = ["TIERS", "CapacityError", "Device", "Disk", "Fence", "Host", "Pool", "Pools", "Slots", "TierError", "as_tiers"]
