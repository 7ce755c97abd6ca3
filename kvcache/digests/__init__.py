"""What readers know of the pages of a layer without reading them, one kind per file."""

from .factors import Factors
from .keys import Keys
from .min_max import MinMax
from .pages import PageDigest

__all__ = ["Factors", "Keys", "MinMax", "PageDigest"]
