"""Brute-force definitions in float64, written without the package, and the tolerance that torch itself earns."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_mask(case: dict, counts: Tensor, indices: Tensor) -> Tensor:
    """bool ``[B, H, Nq, Nk]``, token by token from absolute positions."""
    (batch, heads, n_q, _), n_k = case["q"].shape, case["k"].shape[2]
    bq, bk, q_start = case["block_q"], case["block_k"], case["q_start"]
    lists, key = counts.shape[1], torch.arange(n_k)
    seen = torch.zeros(batch, lists, n_q, n_k, dtype=torch.bool)
    for b in range(batch):
        low = int(case["first"][b]) if case["first"] is not None else 0
        high = int(case["last"][b]) if case["last"] is not None else n_k
        skipped = max(0, low - q_start) if case["causal"] else 0
        for t in range(n_q):
            at = q_start + t
            if case["causal"] and not low <= at < high:
                continue
            visible = (key >= low) & (key < high)
            if case["causal"]:
                visible &= key <= at
            if case["window"]:
                visible &= key > at - case["window"]
            i = (t - skipped) // bq
            for h in range(lists):
                seen[b, h, t] = visible & torch.isin((key - low) // bk, indices[b, h, i, : counts[b, h, i]])
    return seen.repeat_interleave(heads // lists, dim=1)


def plan_mask(case: dict, plan) -> Tensor:
    """bool ``[B, H, Nq, Nk]``: what each query reads of a ReadPlan, as ``block_sparse_attention`` words it."""
    (batch, heads, n_q, _), n_k, kv_heads = case["q"].shape, case["k"].shape[2], case["k"].shape[1]
    everything = torch.zeros(batch, 1, -(-n_q // 1), 1, dtype=torch.int32)
    whole = attention_mask({**case, "block_q": 1, "block_k": n_k}, everything[..., 0] + 1, everything)
    if plan.blocks is None:
        return whole
    blocks, read = plan.blocks, torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    key = torch.arange(n_k)
    for b in range(batch):
        low = int(case["first"][b]) if case["first"] is not None else 0
        high = int(case["last"][b]) if case["last"] is not None else n_k
        rows = range(n_q) if not case["causal"] else range(max(0, low - case["q_start"]), min(n_q, high - case["q_start"]))
        for h in range(heads):
            slot = key - low
            if plan.order is not None:
                order = plan.order[b, h * kv_heads // heads, : high - low]
                slot = slot.clone()
                slot[low:high] = torch.argsort(order.long())
            sink, local = plan.near[h].tolist() if plan.near is not None else (0, 0)
            fixed = (key - low) < sink
            if plan.columns is not None:
                fixed |= torch.isin(key - low, plan.columns[b, h * plan.columns.shape[1] // heads])
            at = h * blocks.counts.shape[1] // heads
            for n, t in enumerate(rows):
                i = n // blocks.block[0]
                read[b, h, t] = fixed | torch.isin(slot // blocks.block[1], blocks.indices[b, at, i, : blocks.counts[b, at, i]])
                read[b, h, t] |= (key > case["q_start"] + t - local) if local else False
                read[b, h, t] |= len(rows) - n <= plan.dense_rows
    return read & whole


def attention(case: dict, seen: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Masked softmax attention and its log-sum-exp in ``dtype``; softmax itself never below float32."""
    group = case["q"].shape[1] // case["k"].shape[1]
    q, k, v = (case[name].to(dtype) for name in "qkv")
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.promote_types(dtype, torch.float32)
    logits = (q @ k.mT).to(wide) * case["scale"]
    if case["softcap"]:
        logits = case["softcap"] * torch.tanh(logits / case["softcap"])
    logits = logits.masked_fill(~seen, -math.inf)
    sink = torch.full_like(logits[..., :1], -math.inf)
    if case["sinks"] is not None:
        sink = case["sinks"].to(wide)[None, :, None, None].expand_as(sink)
    lse = torch.cat([logits, sink], -1).logsumexp(-1)
    p = (logits - lse[..., None]).exp().nan_to_num(0.0)
    if case["causal"]:  # a padded query row has no position and no sink either
        lse = lse.masked_fill(~real_queries(case)[:, None, :], -math.inf)
    return p.to(dtype) @ v, lse


def real_queries(case: dict) -> Tensor:
    """bool ``[B, Nq]``."""
    at = case["q_start"] + torch.arange(case["q"].shape[2])
    low = case["first"][:, None] if case["first"] is not None else 0
    high = case["last"][:, None] if case["last"] is not None else case["k"].shape[2]
    return ((at >= low) & (at < high)).expand(case["q"].shape[0], -1)


def antidiagonal_shares(q: Tensor, k: Tensor, block_q: int, block_k: int, stride: int, scale: float, q_start: int, causal: bool,
                        window: int, alternate: bool) -> Tensor:
    """Block shares of one head: q ``[n_q, D]``, k ``[n_k, D]``; loops over token pairs."""
    n_q, n_k = len(q), len(k)
    dots = q.double() @ k.double().T * scale
    shares = torch.zeros(-(-n_q // block_q), -(-n_k // block_k), dtype=torch.float64)
    for u in range(-(-n_q // stride)):
        logits = []
        last_q = q_start + min((u + 1) * stride, n_q) - 1
        for w in range(-(-n_k // stride)):
            pairs = []
            for r in range(stride):
                turn = u % 2 if alternate else 0
                t, p = u * stride + (stride - 1 - r - turn) % stride, w * stride + r
                if t < n_q and p < n_k:
                    pairs.append(float(dots[t, p]))
            future = causal and w * stride > last_q
            old = window and w * stride + stride - 1 <= q_start + u * stride - window
            logits.append(-math.inf if future or old or not pairs else sum(pairs) / len(pairs))
        top = max(logits)
        if top == -math.inf:
            continue
        weights = [math.exp(x - top) for x in logits]
        for w, x in enumerate(weights):
            shares[u * stride // block_q, w * stride // block_k] += x / sum(weights)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)


def kept_blocks(mass: list[float], reachable: list[int], forced: list[int], threshold: float | None, top_k: int,
                inclusive: bool = True) -> list[int]:
    """The selection rule on one row, one block at a time."""
    others = sorted((j for j in reachable if j not in forced), key=lambda j: (-mass[j], j))
    if threshold is None:
        return sorted(forced + others[: max(0, top_k - len(forced))])
    if threshold >= 1:
        return sorted(reachable)
    total, before, kept = sum(mass[j] for j in reachable), sum(mass[j] for j in forced), list(forced)
    for j in others:
        if not (before < threshold * total if inclusive else before + mass[j] <= threshold * total) or mass[j] == 0:
            break
        kept.append(j)
        before += mass[j]
    return sorted(kept)


def assert_as_good_as_torch(got: Tensor, torch_same_dtype: Tensor, truth: Tensor, floor: float = 4e-6) -> None:
    """Largest error against float64 is at most twice that of plain torch in the same dtype.

    The floor is what rounding float32 logits of size 40 may cost when torch happened to be lucky on a handful of rows.
    """
    assert got.isfinite().all(), "output has a non-finite element"
    allowed = 2 * (torch_same_dtype.double() - truth).abs().max().item() + floor
    error = (got.double() - truth).abs()
    assert error.max() <= allowed, f"max error {error.max():.2e} exceeds {allowed:.2e} at flat index {error.argmax().item()}"
