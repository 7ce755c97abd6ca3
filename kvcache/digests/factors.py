"""Few numbers per token whose products with those of a query stand for the products of key and query."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.errors import require
from sparse_attn.kept import Queries

from ..store import Meter, empty_rows
from .pages import PageDigest, Rows

# queries that are widened to float32 at once
_PIECE = 4096
# what keeps matrices of few tokens invertible in float64, as a share of their size
_RIDGE = 1e-9
# likewise, in roundings of a Gram matrix: float32 made eigenvalues of -0.5 of them (128K tokens in a third of the directions)
_ROUNDINGS = 16


def joint_factors(queries: Tensor, keys: Tensor, rank: int, weights: tuple[float, float] = (0.01, 0.01), max_iter: int = 2,
                  tol: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Maps of queries and of keys to ``rank`` numbers whose dot products stand for those of queries and keys.

    Minimises ``|Q K^T - A_Q A_K^T|^2 + w_Q |Q - A_Q B_Q|^2 + w_K |K - A_K B_K|^2`` by turns: A_Q, A_K, then B_Q and B_K, each by
    its closed form. A_Q = Q W_Q and A_K = K W_K throughout, so the D x D matrices Q^T Q and K^T K say all that the solve needs of
    any number of tokens. It starts where the first term is least: A_K spans the leading right singular vectors of Q K^T.
    Source: LRQK, arXiv:2510.23649, prefill stage.
    Differs from the paper: rows of Q are those of all query heads that share the keys, which makes one A_K per KV head; the start
    is no random one; w_Q and w_K count in mean eigenvalues of K^T K and Q^T Q, so that they mean the same whatever the length.

    Args:
        queries, keys: ``[..., D, D]`` Gram matrices Q^T Q and K^T K; zeros for queries mean that none is known, and every direction
            counts the same.
        rank: at most D.
        weights: w_Q and w_K, 0 or more.
        max_iter: rounds at most; 0 for the start itself.
        tol: a solve is over when a round changes the entries of A_Q and A_K, of queries and keys of mean square 1, by less in the
            mean square.

    Returns:
        W_Q, W_K: float64 ``[..., D, rank]``.
    """
    n, m = _normalised(queries), _normalised(keys)
    root = torch.linalg.cholesky(m)
    leading = torch.linalg.eigh(root.mT @ n @ root).eigenvectors[..., -rank:]
    w_k = torch.linalg.solve_triangular(root.mT, leading, upper=True)
    w_q = _divided(m @ w_k, w_k.mT @ m @ w_k)
    moving = torch.ones(n.shape[:-2], dtype=torch.bool, device=n.device)
    for _ in range(max_iter):
        if not bool(moving.any()):
            break
        b_q, b_k = _divided(n @ w_q, w_q.mT @ n @ w_q).mT, _divided(m @ w_k, w_k.mT @ m @ w_k).mT
        new_q = _divided(m @ w_k + weights[0] * b_q.mT, w_k.mT @ m @ w_k + weights[0] * b_q @ b_q.mT)
        new_k = _divided(n @ new_q + weights[1] * b_k.mT, new_q.mT @ n @ new_q + weights[1] * b_k @ b_k.mT)
        change = torch.maximum(_mean_square(new_q - w_q, n), _mean_square(new_k - w_k, m))
        w_q, w_k = (torch.where(moving[..., None, None], new, old) for new, old in ((new_q, w_q), (new_k, w_k)))
        moving = moving & (change >= tol)
    return w_q, w_k


class Factors(PageDigest):
    """The rows of A_K (LRQK, arXiv:2510.23649), an entry per token, and the map that makes rows of A_Q of queries.

    Queries are counted as they come, prompt and generated ones alike; keys when they are needed: once more is held than a step
    may read, and again whenever a run has doubled. Tokens that come in between are mapped as those before them. Queries of tokens
    that were taken back still count.
    Differs from the paper: no A_K is refined per token and no B by gradient steps while generating; see ``readers.LRQK``.

    Args:
        meter: counts the bytes.
        rank: numbers per token.
        least: tokens of a run up to which everything is read, and nothing solved.
        weights, max_iter, tol: see ``joint_factors``.

    Attributes:
        factor: ``[P, rank]`` in the dtype of the keys.
        queries: float32 ``[B, Hkv, D, D]``, Q^T Q of the query heads that share a KV head.
        to_query, to_key: float32 ``[B, Hkv, D, rank]``; zeros for runs that were not solved.
        solved: int64 ``[B, Hkv]`` on the host, tokens of each run when it was solved last; 0 before.

    Raises:
        ContractError: from the first update, if rank is larger than D.
    """

    names = ("factor",)
    learned = ("queries", "to_query", "to_key", "solved")

    def __init__(self, meter: Meter, rank: int, least: int, weights: tuple[float, float], max_iter: int, tol: float):
        self.rank, self._least, self._weights, self._max_iter, self._tol = rank, least, weights, max_iter, tol
        super().__init__(meter, 1)

    def clear(self) -> None:
        super().clear()
        self._hold("solved", None)  # other keys, other factors

    def recall(self, learned: dict[str, Tensor]) -> None:
        super().recall({name: t.cpu() if name == "solved" else t for name, t in learned.items()})

    def blank(self, k: Tensor) -> dict[str, Tensor]:
        require(self.rank <= k.shape[1], f"rank={self.rank} is more than the {k.shape[1]} channels of a key; give {k.shape[1]} or less")
        return {"factor": k.new_empty(0, self.rank)}

    def describe(self, keys: Tensor, run: Tensor) -> dict[str, Tensor]:
        if self.to_key is None:
            return {"factor": keys.new_zeros(len(keys), self.rank)}
        maps = self.to_key.flatten(0, 1)
        if int(run[0]) == int(run[-1]):
            return {"factor": keys[:, 0].float() @ maps[int(run[0])]}
        return {"factor": (keys.float() @ maps[run.to(maps.device)])[:, 0]}

    def observe(self, queries: Queries, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
        q, heads = queries.q, starts.shape[1]
        if self.queries is None:
            self._hold("queries", _zeros(q, len(q), heads, q.shape[3], q.shape[3]))
        at = torch.arange(q.shape[2], device=q.device)
        for i in range(0, q.shape[2], _PIECE):
            piece, t = q[:, :, i : i + _PIECE].float(), at[i : i + _PIECE]
            for bound, padding in ((queries.first, torch.lt), (queries.last, torch.ge)):
                if bound is not None:
                    piece = piece.masked_fill(padding(t, bound[:, None])[:, None, :, None], 0.0)
            piece = piece.unflatten(1, (heads, -1)).flatten(2, 3)
            self.queries += piece.mT @ piece

    def ready(self, rows: Rows) -> None:
        if self.solved is None:
            self._hold("solved", torch.zeros_like(self.pages))
        due = (self.pages > self._least) & (self.pages >= 2 * self.solved)
        if bool(due.any()):
            self._solve(due, rows)

    def _solve(self, due: Tensor, rows: Rows) -> None:
        grams: dict[tuple[int, int], Tensor] = {}
        for k, b, h, _ in rows():
            if due[b, h]:
                wide = k.float()
                grams[b, h] = grams.get((b, h), 0) + wide.mT @ wide
        which = tuple(torch.tensor(list(grams)).T.to(self.factor.device))
        keys = torch.stack(list(grams.values()))
        queries = torch.zeros_like(keys) if self.queries is None else self.queries[which]
        found = joint_factors(queries, keys, self.rank, self._weights, self._max_iter, self._tol)
        for name, w in zip(("to_query", "to_key"), found):
            if getattr(self, name) is None:
                self._hold(name, _zeros(self.factor, *due.shape, *w.shape[1:]))
            getattr(self, name)[which] = w.float()
        for k, b, h, first in rows():
            if due[b, h]:
                at = int(self.starts[b, h]) + first
                self._write(slice(at, at + len(k)), {"factor": k.float() @ self.to_key[b, h]})
        self._hold("solved", torch.where(due, self.pages, self.solved))


def _zeros(like: Tensor, n: int, *shape: int) -> Tensor:
    return empty_rows(torch.empty(0, *shape, dtype=torch.float32, device=like.device), n).zero_()


def _normalised(gram: Tensor) -> Tensor:
    """In float64, of mean eigenvalue 1 and surely positive, whatever was lost to float32; the identity for zeros."""
    ridge, gram = max(_RIDGE, _ROUNDINGS * torch.finfo(gram.dtype).eps), gram.double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = gram / mean
    return torch.where(mean > 0, gram + ridge * gram.norm(dim=(-2, -1), keepdim=True) * one, one)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """``x @ by^-1`` of symmetric ``by``, which few tokens leave singular."""
    ridge = _RIDGE * by.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(by.shape[-1], dtype=by.dtype, device=by.device)
    return torch.cholesky_solve(x.mT, torch.linalg.cholesky(by + ridge)).mT


def _mean_square(change: Tensor, gram: Tensor) -> Tensor:
    """Mean square of the entries that a change of a map makes, times the vectors that the Gram matrix is of."""
    return (change.mT @ gram @ change).diagonal(dim1=-2, dim2=-1).mean(-1)
