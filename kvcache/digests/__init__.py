"""What readers know of the pages of a layer without reading them, one kind per file."""

from .factors import Factors
from .keys import Keys
from .labels import Labels
from .landmarks import Landmarks
from .min_max import MinMax
from .pages import PageDigest
from .representatives import Question, Representatives
from .votes import Votes

__all__ = ["Factors", "Keys", "Labels", "Landmarks", "MinMax", "PageDigest", "Question", "Representatives", "Votes"]
