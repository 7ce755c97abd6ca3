"""Contract lines that more than one op shares."""

import torch
from torch import Tensor

from ..errors import require

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require_heads(q: Tensor, k: Tensor) -> None:
    """q ``[B, H, Nq, D]`` and k ``[B, Hkv, Nk, D]`` belong together."""
    require(q.dim() == 4 and k.dim() == 4, f"q and k need 4 dimensions [B, heads, tokens, D], got {q.dim()} and {k.dim()}")
    require(q.dtype == k.dtype, f"q is {q.dtype} but k is {k.dtype}; cast one of them")
    require(q.dtype in DTYPES, f"dtype {q.dtype} is not supported; use bfloat16, float16 or float32")
    require(q.device == k.device, f"q is on {q.device} but k on {k.device}; move one of them")
    require(q.shape[0] == k.shape[0], f"q has batch {q.shape[0]} but k has {k.shape[0]}; they must agree")
    require(q.shape[3] == k.shape[3], f"q has head_dim {q.shape[3]} but k has {k.shape[3]}; they must agree")
    require(
        k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads; pass key heads un-repeated",
    )


def require_span(batch: int, n_q: int, n_k: int, q_start: int, causal: bool, window: int, first: Tensor | None,
                 last: Tensor | None) -> None:
    """Positions, sliding window and padding bounds make sense."""
    require(q_start >= 0, f"q_start={q_start} is negative; it is the position of query 0 among the keys")
    require(
        not causal or q_start + n_q <= n_k,
        f"queries at positions {q_start}..{q_start + n_q - 1} lie past the {n_k} keys; q_start is usually n_k - n_q",
    )
    require(window >= 0, f"window={window} is negative; use 0 for no sliding window")
    require(causal or window == 0, f"window={window} needs causal=True; a sliding window looks back from a position")
    for name, bound in (("first", first), ("last", last)):
        if bound is not None:
            require(
                bound.dtype == torch.int32 and tuple(bound.shape) == (batch,),
                f"{name} must be int32 [{batch}], one entry per batch row, got {bound.dtype} {list(bound.shape)}",
            )


def require_blocks(block_q: int, block_k: int) -> None:
    """Block edges are positive."""
    require(block_q > 0 and block_k > 0, f"block ({block_q}, {block_k}) must be positive; 128 is usual")
