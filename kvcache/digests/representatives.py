"""The mean of the few keys of every block that its neighbours attend to most."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import ops
from sparse_attn.kept import FEW_QUERIES, Queries

from ..store import Meter, empty_rows
from .pages import PageDigest, Rows


class Representatives(PageDigest):
    """One vector per block, from the tokens that received the most attention while the block was recent (InfLLM,
    arXiv:2402.04617).

    Queries give to the keys of their own block and of the ``recent`` tokens before it, whatever chunks they come in; a block is
    described by its best tokens when the last of these has come, until then by all of them. All KV heads hold the same tokens.
    Differs from the paper: keys are as they were rotated, and one vector is made per KV head, of the attention of all its query
    heads.

    Args:
        meter: counts the bytes.
        page: tokens of a block.
        count: tokens that represent it.
        recent: tokens that a block waits for, whole blocks.

    Attributes:
        vector: ``[P, D]`` in the dtype of the keys.
        mass: float32 ``[B, Hkv, recent + page]``, attention that each recent token received so far.
        best: int32 ``[B, Hkv, blocks, count]``, the tokens that represent a block, counted from its first.
        progress: int64 ``[B, 2]`` on the host: tokens whose queries were seen, and blocks described for good.
    """

    names = ("vector",)
    learned = ("mass", "best", "progress")

    def __init__(self, meter: Meter, page: int, count: int, recent: int):
        self._count, self._recent = min(count, page), recent
        super().__init__(meter, page)

    def recall(self, learned: dict[str, Tensor]) -> None:
        super().recall({name: t.cpu() if name == "progress" else t for name, t in learned.items()})

    def blank(self, k: Tensor) -> dict[str, Tensor]:
        return {"vector": k.new_empty(0, k.shape[1])}

    def describe(self, keys: Tensor, run: Tensor) -> dict[str, Tensor]:
        return {"vector": keys.float().mean(1)}

    def update(self, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        made = 0 if self._covered is None else torch.minimum(self._covered, lengths)[:, 0] // self.page
        super().update(k, starts, lengths)
        if self.progress is None:
            return
        self.progress[:, 1] = self.progress[:, 1].minimum(lengths[:, 0] // self.page)
        for b, first in enumerate((self.progress[:, 1] * 0 + made).tolist()):
            self._tell(b, k, starts[b], first, int(self.progress[b, 1]))

    def observe(self, queries: Queries, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        (batch, heads), n_q = starts.shape, queries.q.shape[2]
        if self.mass is None:
            self._hold("mass", zeros(k, batch, heads, self._recent + self.page))
            self._hold("best", zeros(k, batch, heads, 0, self._count, dtype=torch.int32))
            self._hold("progress", zeros(torch.empty(0), batch, 2, dtype=torch.int64))
        first = [0] * batch if queries.first is None else queries.first.tolist()
        last = [n_q] * batch if queries.last is None else queries.last.tolist()
        for b in range(batch):
            end, real = int(lengths[b, 0]), max(last[b] - first[b], 0)
            at = end - real
            self._take_back(b, at)
            while at < end:
                to = min((at // self.page + 1) * self.page, end)
                asked = slice(last[b] - (end - at), last[b] - (end - to))
                self._give(b, queries, asked, k, starts[b], to)
                self._leave(b, k, starts[b], to)
                at = to

    def _base(self, seen: int) -> int:
        """The token that the first entry of ``mass`` is of."""
        return max(seen // self.page * self.page - self._recent, 0)

    def _take_back(self, b: int, at: int) -> None:
        """The next query is of token ``at``: tokens from there on are new."""
        seen, described = self.progress[b].tolist()
        if seen == at:
            return
        old, base = self._base(seen), self._base(at)
        moved = torch.zeros_like(self.mass[b])
        kept = slice(max(old, base), max(min(seen, at, base + moved.shape[1]), old, base))
        moved[:, kept.start - base : kept.stop - base] = self.mass[b, :, kept.start - old : kept.stop - old]
        self.mass[b] = moved
        self.progress[b] = torch.tensor([at, min(described, at // self.page)])

    def _give(self, b: int, queries: Queries, asked: slice, k: Tensor, starts: Tensor, to: int) -> None:
        """Add what queries of one block, the last of them of token ``to - 1``, attend to."""
        base = self._base(to - 1)
        n = to - base
        rows = ((starts + base)[:, None] + torch.arange(n)).to(k.device)
        begin = torch.arange(len(starts), device=k.device)[None] * n
        q, lse = (t[b : b + 1, :, asked] for t in (queries.q, queries.lse))
        mass = ops.key_mass(q, k[rows.flatten()], lse, begin, torch.full_like(begin, n), queries.scale, queries.softcap, 0, "sum")
        self.mass[b, :, :n] += mass.view(-1, n)

    def _leave(self, b: int, k: Tensor, starts: Tensor, seen: int) -> None:
        """Describe the blocks that no query to come gives to, once ``seen`` tokens were."""
        old, base = self._base(seen - 1), self._base(seen)
        described, whole = int(self.progress[b, 1]), base // self.page
        if whole > self.best.shape[2]:
            more = zeros(self.best, len(self.best), len(starts), whole + whole // 4 + 1, self._count, dtype=torch.int32)
            more[:, :, : self.best.shape[2]] = self.best
            self._hold("best", more)
        first = max(old // self.page, described)
        if first < whole:
            mass = self.mass[b, :, first * self.page - old : base - old].unflatten(1, (-1, self.page))
            self.best[b, :, first:whole] = mass.topk(self._count).indices.int()
            self._tell(b, k, starts, first, whole)
        if base > old:
            self.mass[b] = torch.nn.functional.pad(self.mass[b][:, base - old :], (0, base - old))
        self.progress[b] = torch.tensor([seen, max(described, whole)])

    def _tell(self, b: int, k: Tensor, starts: Tensor, first: int, last: int) -> None:
        """Describe blocks by their best tokens."""
        if first >= last:
            return
        block = torch.arange(first, last)
        rows = (starts[:, None] + block * self.page).to(k.device)[..., None] + self.best[b, :, first:last]
        self._write((self.starts[b][:, None] + block).to(k.device), {"vector": k[rows].float().mean(2)})


class Question(Representatives):
    """The same, and what a prompt asked (QuickLLaMA, arXiv:2406.07528).

    The question is the last tokens of the prompt: of the last forward over more than 16 tokens and of what followed until the first
    choice of pages. Its vector is the mean query of those of its tokens that received the most attention.

    Args:
        length: tokens of the question; not more than ``recent``.

    Attributes:
        heard: ``[B, H, length, D]`` the last queries, zeros before the first.
        asked: ``[B, H, 1, D]`` the question; None until it is needed.
    """

    learned = (*Representatives.learned, "heard", "asked")

    def __init__(self, meter: Meter, page: int, count: int, recent: int, length: int):
        self._length = length
        super().__init__(meter, page, count, recent)

    def observe(self, queries: Queries, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        super().observe(queries, k, starts, lengths)
        q = queries.q
        if q.shape[2] > FEW_QUERIES:
            self._hold("asked", None)
        if self.asked is not None:
            return
        if self.heard is None:
            self._hold("heard", zeros(q, len(q), q.shape[1], self._length, q.shape[3], dtype=q.dtype))
        for b in range(len(q)):
            first = 0 if queries.first is None else int(queries.first[b])
            last = q.shape[2] if queries.last is None else int(queries.last[b])
            new = q[b, :, max(first, last - self._length) : max(first, last)]
            self.heard[b] = torch.cat([self.heard[b], new], 1)[:, -self._length :]

    def ready(self, rows: Rows) -> None:
        if self.asked is not None or self.heard is None:
            return
        heads = self.pages.shape[1]
        asked = zeros(self.heard, len(self.heard), self.heard.shape[1], 1, self.heard.shape[3], dtype=self.heard.dtype)
        for b, (seen, _) in enumerate(self.progress.tolist()):
            n = min(self._length, seen)
            end = seen - self._base(seen)
            best = self.mass[b, :, end - n : end].topk(min(self._count, n)).indices[:, None, :, None]
            of = self.heard[b, :, self._length - n :].float().unflatten(0, (heads, -1))
            if n:
                asked[b] = of.gather(2, best.expand(-1, of.shape[1], -1, of.shape[3])).mean(2).flatten(0, 1)[:, None]
        self._hold("asked", asked)


def zeros(like: Tensor, n: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return empty_rows(torch.empty(0, *shape, dtype=dtype, device=like.device), n).zero_()
