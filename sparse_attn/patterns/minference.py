"""MInference: every head has its own pattern, found once and kept in a profile."""

from __future__ import annotations

import json
from dataclasses import dataclass

from torch import Tensor

from ..errors import require
from ..types import KVView, LayerContext, ReadPlan, Selector
from .per_head import select_per_head

Entry = str | dict


@dataclass(frozen=True)
class MInference:
    """Read what the pattern of each head reads, as a profile says per layer and head.

    Which pattern suits a head is found offline (``python -m sparse_attn.calibrate``). The paper's patterns are ``a_shape``,
    ``vertical_slash`` and ``block_topk``; any method by name may stand in the table.
    Source: MInference, arXiv:2407.02490, section 3.2; without a profile every head is vertical-slash (1000, 6096), as its code
    falls back to.

    Differs from the code: its search replaces the A-shape and block-sparse heads that it found by vertical-slash ones; here an
    entry means what it says. Heads of one layer must agree in block size.

    Attributes:
        heads: a method by name or as ``{"name": ..., argument: ...}`` for every head, or a table ``[layers][heads]`` of such.
    """

    heads: Entry | tuple[tuple[Entry, ...], ...] = "vertical_slash"

    def __post_init__(self):
        if not isinstance(self.heads, (str, dict)):
            table = all(isinstance(row, (tuple, list)) for row in self.heads) if isinstance(self.heads, (tuple, list)) else False
            require(table, f"heads={self.heads!r} is no method and no table [layers][heads] of methods")
            object.__setattr__(self, "heads", tuple(tuple(row) for row in self.heads))
        self._selectors([self.heads] if isinstance(self.heads, (str, dict)) else sum(self.heads, ()))

    def __hash__(self) -> int:
        return hash(json.dumps(self.heads, sort_keys=True))

    def select(self, q: Tensor, kv: KVView, ctx: LayerContext) -> ReadPlan:
        entries = [self.heads] * q.shape[1]
        if isinstance(self.heads, tuple):
            require(ctx.layer < len(self.heads), f"heads has {len(self.heads)} layers but layer {ctx.layer} asked; add rows")
            entries = self.heads[ctx.layer]
        return select_per_head(self._selectors(entries), q, kv, ctx)

    @staticmethod
    def _selectors(entries) -> list[Selector]:
        """The entries as selectors; equal entries give one object."""
        from ..config import as_selector  # it lists this class too

        bad = [entry for entry in entries if not isinstance(entry, (str, dict))]
        require(not bad, f"heads names {bad[0] if bad else ''!r}; an entry is a method's name or a dict with 'name'")
        known: dict[str, Selector] = {}
        written = [json.dumps(entry, sort_keys=True) for entry in entries]
        return [known[text] if text in known else known.setdefault(text, as_selector(entry)) for text, entry in zip(written, entries)]
