"""The decode cases of the kernel benchmark: one token over a long flat store, whole, by the pages that Quest chooses, from factors."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.cache import CacheLayer
from kvcache.config import CacheConfig
from kvcache.readers import Quest
from kvcache.store import Meter
from sparse_attn import ops
from sparse_attn.kept import attend_kept
from sparse_attn.ops import OPS
from sparse_attn.patterns import Dense
from sparse_attn.types import LayerContext

from .cases import DTYPES, Shape, rms_error
from .entries import GATE, Baseline, Entry, GateError

SPREAD, PAGE, DRAFT = 16.0, 16, 5  # longest run / shortest, rows of a page, queries of a draft
SHARE = 16  # one of so many pages is read
RANK, NEAR = 160, 256  # of the factors; rows of the near table
_GATE_SCORE = 1e-4


@dataclass(frozen=True)
class Store:
    """The flat store of one sequence that is being decoded: on average ``shape.n`` rows for each key head, head after head."""

    shape: Shape

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """k and v ``[Hkv * N, D]``."""
        k, v = self.shape.random(self.shape.n, *[(self.shape.kv_heads * self.shape.n, self.shape.head_dim)] * 2)
        return k, v

    def q(self, tokens: int) -> Tensor:
        """``[1, H, tokens, D]``."""
        return next(self.shape.random(tokens, (1, self.shape.heads, tokens, self.shape.head_dim)))

    def lists(self, spread: float = 1.0, page: int = 0) -> tuple[Tensor, Tensor]:
        """starts and counts of pages: one run per head, the longest ``spread`` times the shortest, or pages in random order.

        Example:
            >>> starts, counts = Store(Shape(n=1024, kv_heads=4)).lists(spread=8)
            >>> starts.flatten().tolist(), counts.flatten().tolist()
            ([0, 273, 819, 1911], [273, 546, 1092, 2185])
        """
        n, heads = self.shape.n, self.shape.kv_heads
        share = spread ** torch.linspace(0, 1, heads, dtype=torch.float64)
        counts = (share / share.sum() * heads * n).long()
        counts[-1] += heads * n - counts.sum()
        starts = counts.cumsum(0) - counts
        if not page:
            return starts[None, :, None], counts.int()[None, :, None]
        g, pages = torch.Generator().manual_seed(page), -(-n // page)
        order = torch.stack([torch.randperm(pages, generator=g) for _ in range(heads)]) * page
        return (order + starts[:, None])[None], (n - order).clamp(max=page).int()[None]


def baselines(store: Store, args: argparse.Namespace) -> dict[str, Baseline]:
    """SDPA of one query, as transformers calls it and with the heads of a group as its queries; and merely reading the store."""
    shape, q, (k, v) = store.shape, store.q(1), store.tensors
    keys, values = (x.view(1, shape.kv_heads, shape.n, shape.head_dim) for x in (k, v))
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=shape.scale)
    apply = {
        "sdpa": lambda: attend(q, keys, values, enable_gqa=True),
        "folded": lambda: attend(q.view(1, shape.kv_heads, -1, shape.head_dim), keys, values),
        "read": lambda: [x.view(torch.int64).sum() for x in (k, v)],
    }
    return {name: Baseline(f"decode {name}", lambda call=call: call) for name, call in apply.items() if name in args.baseline}


def paged_errors(store: Store, q: Tensor, starts: Tensor, counts: Tensor) -> dict:
    """rms error against float64 of our decode attention and of torch SDPA: the last query, which sees all, on the first head."""
    group, first = q.shape[1] // starts.shape[1], (starts[:, :1], counts[:, :1])
    q, (k, v) = q[:, :group], (x[: int((starts + counts)[0, 0].max())] for x in store.tensors)
    truth = ops.paged_attention.reference(q[:, :, -1:].double(), k.double(), v.double(), *first, store.shape.scale)[0]
    ours = rms_error(ops.paged_attention(q, k, v, *first, store.shape.scale)[0][:, :, -1:], truth)
    attend = torch.nn.functional.scaled_dot_product_attention
    theirs = rms_error(attend(q[:, None, :, -1], k[None, None], v[None, None], scale=store.shape.scale).transpose(1, 2), truth)
    if not ours <= GATE * theirs + 1e-6:
        raise GateError(f"paged_attention at {store.shape.n} tokens is off by {ours:.2e} (rms) where torch SDPA is off by "
                        f"{theirs:.2e}; fix the kernel before timing it")
    return {"rms_error": ours, "baseline_rms_error": theirs, "error_ratio": ours / theirs}


def paged_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    store, uniform = Store(shape), None
    for of, tokens, lists in (("uniform", 1, store.lists()), ("ragged", 1, store.lists(SPREAD)),
                              (f"pages of {PAGE}", 1, store.lists(page=PAGE)), (f"draft of {DRAFT}", DRAFT, store.lists())):
        call_args = store.q(tokens), *store.tensors, *lists, shape.scale
        call = functools.partial(ops.paged_attention, *call_args)
        fields = {"of": of, "bytes": sum(x.nbytes for x in store.tensors), "backend": OPS["paged_attention"].chosen(*call_args)}
        against = {"uniform": uniform} if uniform else baselines(store, args)
        entry = Entry("paged_attention", call, fields | paged_errors(store, store.q(tokens), *lists),
                      4.0 * shape.heads * shape.head_dim * shape.n * tokens, against)
        uniform = uniform or Baseline(entry.name, lambda call=call: call)
        yield entry


def quest_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    """The scan of the digest alone, and all that a layer does about attention when a token is generated."""
    store, q = Store(shape), Store(shape).q(1)
    core = CacheLayer(CacheConfig(None, None, decode=Quest(max(shape.n // SHARE, 2 * PAGE), PAGE, dense_layers=())), 0, 1, Meter())
    core.append(*(x.view(1, shape.kv_heads, shape.n, shape.head_dim) for x in store.tensors))
    core.admit()
    digest = core.digest
    call_args = q, digest.low, digest.high, digest.starts, digest.pages
    error = rms_error(ops.page_score(*call_args), ops.page_score.reference(*(x.double() for x in call_args[:3]), *call_args[3:]))
    if not error <= _GATE_SCORE:
        raise GateError(f"page_score at {shape.n} tokens is off by {error:.2e} (rms, relative), more than {_GATE_SCORE:.0e}; fix the "
                        "kernel before timing it")
    fields = {"rms_error": error, "backend": OPS["page_score"].chosen(*call_args)}
    against = baselines(store, args)
    scan = against | ({"read": Baseline("digest read", lambda: lambda: [x.view(torch.int64).sum() for x in (digest.low, digest.high)])}
                      if "read" in against else {})
    yield Entry("page_score", functools.partial(ops.page_score, *call_args), {"of": "scan", "bytes": digest.n_bytes, **fields},
                4.0 * shape.heads * shape.head_dim * shape.n / PAGE, scan)
    context = LayerContext(layer=0, scale=shape.scale, q_start=0)
    step = functools.partial(attend_kept, q, core, context, Dense(), Dense())
    step()
    read = int(core.read.sum()) * 2 * shape.head_dim * q.element_size() + int(digest.pages.sum()) * digest.page_bytes()
    yield Entry("page_score", step, {"of": f"scan, choose, attend 1/{SHARE}", "bytes": read, **fields}, against=against)


def lowrank_calls(shape: Shape, against: dict[str, Baseline]) -> Iterator[Entry]:
    """The keys of the pages that a generated token reads, a share of the context for each head, from factors."""
    dtype, heads, dim, pages = DTYPES[shape.dtype], shape.kv_heads, shape.head_dim, -(-shape.n // PAGE)
    g, chosen = torch.Generator().manual_seed(shape.n), max(1, pages // SHARE)
    factors, basis = torch.randn(shape.n, RANK, generator=g).to(dtype), torch.randn(1, heads, RANK, dim, generator=g).to(dtype)
    starts = torch.stack([torch.randperm(pages, generator=g)[:chosen].sort().values for _ in range(heads)])[None] * PAGE
    counts = (shape.n - starts).clamp(max=PAGE).int()
    far, near = (torch.randn(n, 2, dim // 2, generator=g) for n in (-(-shape.n // NEAR), NEAR))
    rest = starts, counts, torch.arange(heads * chosen).view_as(starts) * PAGE, torch.arange(shape.n).int(), far, near
    rows, exact = torch.zeros(heads * chosen * PAGE, dim, dtype=dtype), torch.zeros(heads * chosen * PAGE, dim, dtype=torch.float64)
    ops.lowrank_keys(rows, factors, basis, *rest)
    ops.lowrank_keys.reference(exact, factors.double(), basis.double(), *rest)
    error = rms_error(rows, exact)
    if not error <= torch.finfo(dtype).eps:
        raise GateError(f"lowrank_keys at {shape.n} tokens is off by {error:.2e} (rms, relative); fix the kernel before timing it")
    tokens = int(counts.sum())
    fields = {"of": f"rank {RANK}, 1/{SHARE}", "bytes": tokens * (RANK + dim) * rows.element_size(), "rms_error": error,
              "backend": OPS["lowrank_keys"].chosen(rows, factors, basis, *rest)}
    yield Entry("lowrank_keys", functools.partial(ops.lowrank_keys, rows, factors, basis, *rest), fields, 2.0 * tokens * RANK * dim, against)
