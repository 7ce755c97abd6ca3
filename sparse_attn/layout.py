"""Where queries sit among keys and which keys are real, as one small tensor that survives a trip through transformers.

The mask that our mask function hands to a model is None (the queries are the last keys, all keys are real), an exact 4-D mask,
or a code: int64 ``[B, N]`` over positions 0..N-1, a packed ``(marker, window, q_start)`` where a key is real and 0 elsewhere. So
it says which positions are queries even where a row ends in padding, and cast to bool, as transformers does before it asks the
mask function again, it is the plain padding mask::

    right-padded prompt, 3 and 4 tokens, StaticCache of 6      a a a . . .     a = (marker, 0, q_start=0), '.' = 0
                                                               a a a a . .
    decoding one token after it: row 0 has a hole              b b b . b .     b = (marker, 0, q_start=4)
                                                               b b b b b .
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import require

_MARKER = 1 << 62
_FIELD = 31  # bits of q_start and of window
_MASK = (1 << _FIELD) - 1
_NO_WINDOW = _MASK  # further back than any key


def encode(real: Tensor | None, batch: int, q_start: int, n_q: int, n_k: int, window: int, device) -> Tensor:
    """The code of ``n_k`` positions of which ``q_start + n_q`` are written; ``real`` bool ``[B, >= q_start + n_q]`` or None."""
    code = torch.zeros(batch, n_k, dtype=torch.int64, device=device)
    written = code[:, : q_start + n_q]
    written.fill_(_MARKER + (window << _FIELD) + q_start)
    if real is not None:
        written.masked_fill_(~real[:, : q_start + n_q].to(device), 0)
    return code


@dataclass(eq=False)
class Layout:
    """One forward's geometry, shared by all layers that see the same keys.

    Attributes:
        q_start: position of query 0 among the keys.
        n_k: keys.
        n_seen: one past the last key that is real in any row.
        window: sliding window in tokens, 0 for none.
        offset: position of key 0 in the prompt; not 0 where a sliding cache has let go of the first keys.
        real: bool ``[B, n_k]``; None if every key is real.
        first, last: int32 ``[B]`` the run of real keys of each row; None where it starts at 0, or ends at n_k, in every row.
        holes: some row's real keys are not one run, so ``first`` and ``last`` cannot describe them.
    """

    q_start: int
    n_k: int
    n_seen: int
    window: int = 0
    real: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    holes: bool = False
    offset: int = 0
    _allowed: dict = field(default_factory=dict, repr=False)

    def plain(self, n_q: int) -> bool:
        """Can SDPA express it without a mask?"""
        return self.real is None and not self.window and n_q in (1, self.n_k)

    def allowed(self, n_q: int, device: torch.device) -> Tensor:
        """bool ``[B or 1, 1, n_q, n_k]``: what each query may see; built once per forward."""
        if (n_q, device) not in self._allowed:
            self._allowed[n_q, device] = _allowed(self.real, self.q_start, self.window or _NO_WINDOW, n_q, self.n_k, device)
        return self._allowed[n_q, device]


def layout_of(mask: Tensor | None, n_q: int, n_k: int) -> Layout:
    """The geometry behind None, a code, or a plain 2-D padding mask whose last columns are the keys."""
    if mask is None:
        return Layout(n_k - n_q, n_k, n_k)
    known = mask.__dict__.setdefault("_sparse_attn_layouts", {})
    if (n_q, n_k) not in known:
        known[n_q, n_k] = _read(mask, n_q, n_k)
    return known[n_q, n_k]


def layout_of_one(mask: Tensor) -> Layout:
    """The geometry behind an exact bool mask ``[B, 1, 1, n_k]`` of a single query, which is the last key that it may see.

    What transformers asks for when it decodes with a StaticCache.
    """
    layout = _read(mask[:, 0, 0].int(), 1, mask.shape[3])
    return replace(layout, q_start=layout.n_seen - 1, _allowed={})


def allowed_traced(mask: Tensor, n_q: int, n_k: int) -> Tensor:
    """What ``layout_of(...).allowed`` says, without reading a value: for torch.compile."""
    real = mask[:, -n_k:] != 0
    if mask.dtype != torch.int64:
        return _allowed(real, n_k - n_q, _NO_WINDOW, n_q, n_k, mask.device)
    code = mask.amax()
    window = (code >> _FIELD) & _MASK
    q_start = torch.where(code >= _MARKER, (code & _MASK) - (mask.shape[1] - n_k), n_k - n_q)
    window = torch.where((code >= _MARKER) & (window > 0), window, _NO_WINDOW)
    return _allowed(real, q_start, window, n_q, n_k, mask.device)


def _allowed(real: Tensor | None, q_start, window, n_q: int, n_k: int, device) -> Tensor:
    row = torch.arange(n_q, device=device)[:, None] + q_start
    key = torch.arange(n_k, device=device)
    seen = ((key <= row) & (key > row - window))[None, None]
    return seen if real is None else seen & real[:, None, None]


def _read(mask: Tensor, n_q: int, n_k: int) -> Layout:
    require(mask.shape[1] >= n_k, f"the 2-D mask covers {mask.shape[1]} positions but there are {n_k} keys; give one per key")
    real = mask[:, -n_k:] != 0
    n_real = real.sum(1)
    first = real.int().argmax(1)
    last = torch.where(n_real > 0, n_k - real.flip(1).int().argmax(1), 0)
    holes = (last - first != n_real).any()
    # one copy to the host per forward
    facts = torch.stack([mask.amax().long(), first.amax(), last.amin(), last.amax(), holes]).tolist()
    code, latest_first, earliest_last, n_seen, holes = facts
    q_start, window = n_k - n_q, 0
    if code >= _MARKER:
        q_start, window = (code & _MASK) - (mask.shape[1] - n_k), (code >> _FIELD) & _MASK
    starts_whole, ends_whole = latest_first == 0, earliest_last == n_k
    return Layout(q_start, n_k, n_seen, window, None if starts_whole and ends_whole and not holes else real,
                  None if starts_whole else first.int(), None if ends_whole else last.int(), bool(holes), mask.shape[1] - n_k)
