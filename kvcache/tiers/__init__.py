"""Where pages of bytes lie that left the device: memory of the host first, then a file. Knows nothing of what is in them."""

from .errors import CapacityError, TierError
from .pool import Fence, Pool, Pools, Slots
from .specs import TIERS, Device, Disk, Host, as_tiers
from .streams import Event, Pin, Streams, streams_of

__all__ = ["TIERS", "CapacityError", "Device", "Disk", "Event", "Fence", "Host", "Pin", "Pool", "Pools", "Slots", "Streams", "TierError",
           "as_tiers", "streams_of"]
