"""Blocks by a few keys that represent them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_attn import ops
from sparse_attn.errors import require

from ..digests import Question, Representatives
from ..store import Meter
from .common import Reader


@dataclass(frozen=True)
class InfLLM(Reader):
    """The blocks whose representative keys fit the query best, one list per layer (InfLLM, arXiv:2402.04617).

    Differs from the paper: keys stay at their true positions, where it gives everything older than ``recent`` the same distance; so
    this does not stretch a model's context. Prompts read everything; sinks and recent count towards the budget; a query scores by
    itself instead of with its chunk.

    Attributes:
        budget: tokens that a step reads; whole blocks, as many as fit.
        page: tokens of a block.
        representatives: tokens whose mean key stands for a block.
        sinks, recent: first and last tokens that are always read, besides the queries' own; recent is whole blocks.
        dense_layers: indices of layers that read everything; the first ones attend too broadly to be cut.
    """

    budget: int = 2048
    page: int = 128
    representatives: int = 4
    sinks: int = 128
    recent: int = 512
    dense_layers: tuple[int, ...] = (0, 1)

    one_list: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.require_room()
        count = self.representatives
        whole = isinstance(count, int) and not isinstance(count, bool)
        require(whole and count >= 1, f"representatives={count!r} must be 1 or more tokens")
        require(self.recent >= self.page and self.recent % self.page == 0,
                f"recent={self.recent} is not one or more blocks of {self.page} tokens, which are described when no longer recent")

    def digest(self, meter: Meter, layer: int) -> Representatives:
        """See ``PageReader``."""
        return Representatives(meter, self.page, self.representatives, self.recent)

    def choose(self, q: Tensor, lengths: Tensor, digest: Representatives, first: Tensor | None = None,
               last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""

        def product(starts: Tensor, pages: Tensor) -> Tensor:
            return ops.row_score(q, digest.vector, starts, pages, 1.0, False, "sum", first, last)

        return self.best(product, q, lengths, digest, first, last, self.recent)


@dataclass(frozen=True)
class QuickLLaMA(InfLLM):
    """InfLLM's blocks, scored by the query and by the question that the prompt ended with (QuickLLaMA, arXiv:2406.07528).

    Differs from the paper: as ``InfLLM`` does; and the question is told by its length at the end of the prompt, where it looks for
    the question's text in a first chunk.

    Attributes:
        question: tokens of the question, the last ones of the prompt; not more than ``recent``.
        question_weight: of the question's product beside the query's; 1 for Mistral and 4 for Llama 3 in the paper's settings.
    """

    question: int = 32
    question_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        n, weight = self.question, self.question_weight
        require(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= self.recent,
                f"question={n!r} must be the question's tokens, from 1 to the {self.recent} recent ones")
        require(isinstance(weight, int | float) and 0 <= weight < float("inf"),
                f"question_weight={weight!r} must be a number, 0 or more")

    def digest(self, meter: Meter, layer: int) -> Question:
        """See ``PageReader``."""
        return Question(meter, self.page, self.representatives, self.recent, self.question)

    def choose(self, q: Tensor, lengths: Tensor, digest: Question, first: Tensor | None = None,
               last: Tensor | None = None) -> Tensor | None:
        """See ``PageReader``."""

        def product(starts: Tensor, pages: Tensor) -> Tensor:
            found = ops.row_score(q, digest.vector, starts, pages, 1.0, False, "sum", first, last)
            if digest.asked is not None:
                found += self.question_weight * ops.row_score(digest.asked, digest.vector, starts, pages, 1.0, False, "sum")
            return found

        return self.best(product, q, lengths, digest, first, last, self.recent)
