"""Generated inputs: shapes, strides, padding and positions that some implementation has got wrong."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """Gaussian ``[batch, heads, tokens, dim]``; ``layout`` decides what it is a view of."""
    g = torch.Generator().manual_seed(seed)
    if layout == "tokens_first":  # what transformers passes: a transposed view
        return torch.randn(batch, tokens, heads, dim, generator=g).to(dtype).transpose(1, 2)
    if layout == "sliced":  # heads cut out of a fused projection, tokens out of a longer cache
        return torch.randn(batch, heads, tokens + 3, dim + 5, generator=g).to(dtype)[:, :, 2 : tokens + 2, 1 : dim + 1]
    if layout == "dim_strided":
        return torch.randn(batch, heads, dim, tokens, generator=g).to(dtype).mT
    return torch.randn(batch, heads, tokens, dim, generator=g).to(dtype)


@st.composite
def attention_cases(draw, max_tokens: int = 150) -> dict:
    """Arguments of block_sparse_attention without the lists, and what is needed to make those."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 8]))
    causal = draw(st.sampled_from([True, True, True, False]))
    n_k = draw(st.integers(1, max_tokens))
    n_q = draw(st.integers(1, n_k))
    q_start = draw(st.sampled_from([n_k - n_q, (n_k - n_q) // 2])) if causal else 0
    dim = draw(st.sampled_from([64, 128, 80, 96, 256, 24]))
    value_dim = draw(st.sampled_from([dim, dim, 40, 128]))
    dtype, layout, seed = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["plain", "tokens_first", "sliced", "dim_strided"])), \
        draw(st.integers(0, 99))
    first = last = None
    if draw(st.booleans()):
        first = torch.tensor([draw(st.integers(0, n_k)) for _ in range(batch)], dtype=torch.int32)
        last = torch.tensor([draw(st.integers(int(f), n_k)) for f in first], dtype=torch.int32)
    heads = kv_heads * group
    return dict(
        q=randn(batch, heads, n_q, dim, dtype, layout, seed) * draw(st.sampled_from([1.0, 4.0])),
        k=randn(batch, kv_heads, n_k, dim, dtype, layout, seed + 1),
        v=randn(batch, kv_heads, n_k, value_dim, dtype, layout, seed + 2),
        block_q=draw(st.sampled_from([16, 32, 64, 128])), block_k=draw(st.sampled_from([16, 48, 64, 128])),
        scale=draw(st.sampled_from([dim**-0.5, 0.3 * dim**-0.5])), q_start=q_start, causal=causal,
        window=draw(st.sampled_from([0, 0, 1, 17, 64])) if causal else 0, softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        first=first, last=last,
        sinks=torch.randn(heads, generator=torch.Generator().manual_seed(seed)) if draw(st.booleans()) else None,
    )  # fmt: skip


@st.composite
def listed_cases(draw, max_tokens: int = 150) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """An attention case with random ascending block lists, some empty, some naming unreachable blocks."""
    case = draw(attention_cases(max_tokens))
    heads, kv_heads = case["q"].shape[1], case["k"].shape[1]
    lists = draw(st.sampled_from([heads, kv_heads, 1]))
    qb, kb = -(-case["q"].shape[2] // case["block_q"]), -(-case["k"].shape[2] // case["block_k"])
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    keep = torch.rand(case["q"].shape[0], lists, qb, kb, generator=g) < draw(st.sampled_from([1.0, 0.6, 0.1]))
    column = torch.where(keep, torch.arange(kb), kb).sort(-1).values
    return case, keep.sum(-1, dtype=torch.int32), column.masked_fill(column == kb, -1).int()


ORDER = ("q", "k", "v", "counts", "indices", "block_q", "block_k", "scale", "q_start", "causal", "window", "softcap", "first",
         "last", "sinks")


def attention_args(case: dict, counts: torch.Tensor, indices: torch.Tensor) -> tuple:
    """Positional arguments of block_sparse_attention."""
    return tuple({**case, "counts": counts, "indices": indices}[name] for name in ORDER)


def share(value: float, heads: int) -> torch.Tensor:
    """The same threshold for every head."""
    return torch.full((heads,), value, dtype=torch.float64)


def most(blocks: int) -> torch.Tensor:
    """The same top_k for every row."""
    return torch.full((1, 1, 1), blocks, dtype=torch.int32)


def plain_args(op: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    """Arguments that every backend of an op takes in some dtype; a refusal of these is the machine's."""
    q = randn(2, 4, 70, 64, dtype, "tokens_first", seed)
    k, v = (randn(2, 2, 90, 64, dtype, "plain", seed + i) for i in (1, 2))
    first, last = torch.tensor([0, 25], dtype=torch.int32), torch.tensor([90, 88], dtype=torch.int32)
    lists = torch.arange(6, dtype=torch.int32).expand(2, 2, 5, 6).contiguous()
    counts = torch.full((2, 2, 5), 6, dtype=torch.int32)
    store, stored = k.flatten(0, 2)[:330], (torch.tensor([[3, 95], [187, 250]]), torch.tensor([[90, 88], [60, 71]]))
    real = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([70, 60], dtype=torch.int32)
    score, geometry = torch.rand(2, 4, 5, 6), (16, 16, 70, 90, 20, True, 0, first, last)
    runs = torch.tensor([[0, 30], [12, 19]]), torch.tensor([[11, 10], [0, 7]])
    return {
        "antidiagonal_score": (q, k, 16, 16, 4, 0.125, 20, True, 0, True, first, last),
        "gather_pages": (torch.zeros(9, 64, dtype=dtype), k[0, 0], torch.tensor([[3, -1, 0], [-1, 89, 3]]),
                         torch.tensor([[8, 0, 1], [0, 0, 2]])),
        "js_distance": (torch.rand(2, 4, 9).softmax(-1), torch.rand(2, 4, 9).softmax(-1)),
        "keep_top": (torch.rand(40), *runs, torch.tensor([[3, 0], [9, 7]], dtype=torch.int32), 7),
        "key_mass": (q, store, torch.full((2, 4, 70), 5.0), *stored, 0.125, 5.0, 40, "max", *real),
        "lowrank_keys": (torch.zeros(90, 64, dtype=dtype), store[:50, :24], v[:, :, :24], *(t[..., None] for t in runs[:1]),
                         torch.tensor([[[11], [10]], [[0], [7]]]).int(), runs[0][..., None] * 2, torch.arange(50).int(),
                         torch.randn(4, 2, 20), torch.randn(16, 2, 20), True),
        "merge_attention": (torch.stack([q, -q]), torch.randn(2, 2, 4, 70)),
        "move_rows": (torch.rand(40, 3).to(dtype), torch.tensor([3, 4, 9, 30]), torch.tensor([1, 3, 4, 5])),
        "page_score": (q[:, :, :5], store[:40], store[:40] + 1, *runs, "mean",
                       *(torch.tensor(bound).int() for bound in ([0, 2], [5, 4]))),
        "paged_attention": (q[:, :, :4], k[0, 0], v[1, 1], torch.tensor([[[0, 60], [9, 0]]] * 2),
                            torch.tensor([[[40, 30], [81, 0]]] * 2).int(), 0.125, True, 5.0, torch.randn(4),
                            *(torch.tensor(bound).int() for bound in ([0, 2], [4, 3])), torch.randn(90)),
        "place_pages": (torch.tensor([[7, -1, 3, 5], [-1, -1, -1, -1]]).int(), torch.tensor([[1, 3, 0, 2], [0, 1, 2, 3]]).int(),
                        torch.tensor([[3, 9, 7], [4, -1, 4]]).int()),
        "pool_blocks": (q, 16, "unit_mean", first.clamp(max=60), last.clamp(max=70)),
        "pooled_score": (torch.randn(2, 4, 5, 64), torch.randn(2, 2, 6, 64), torch.rand(2, 4), *geometry),
        "row_score": (q[:, :, :5], store[:40], *runs, 0.125, True, "mean",
                      *(torch.tensor(bound).int() for bound in ([0, 2], [5, 4]))),
        "select_blocks": (score, share(0.7, 4), None, *geometry[:-2], 1, 1, first, last, score > 0.9, False),
        "select_global": (score, share(0.7, 4), "head", *geometry, score > 0.9, False),
        "strided_score": (q, k, 16, 32, 4, 0.125, 20, True, 33, True, first, last),
        "window_mass": (q, store, *stored, 0.125, 16, 5.0, torch.randn(4), 5, "max", "sum", *real),
        "window_score": (q, k, torch.tensor([[3, 5, 6, 69], [-1, 0, 9, 60]], dtype=torch.int32), 0.125, 20, True, 33, 5.0, first, last,
                         16),
        "block_sparse_attention": (q, k, v, counts, lists, 16, 16, 0.125, 20, True, 33, 5.0, first, last, torch.randn(4)),
    }[op]
