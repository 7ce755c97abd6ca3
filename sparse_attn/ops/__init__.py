"""Every op; the list of what exists."""

from .antidiagonal_score import antidiagonal_score
from .block_sparse_attention import block_sparse_attention
from .registry import OPS, use_backend
from .select_blocks import select_blocks

__all__ = ["OPS", "antidiagonal_score", "block_sparse_attention", "select_blocks", "use_backend"]
