"""Every op; the list of what exists."""

from .antidiagonal_score import antidiagonal_score
from .block_sparse_attention import block_sparse_attention
from .gather_pages import gather_pages
from .js_distance import js_distance
from .keep_top import keep_top
from .key_mass import key_mass
from .lowrank_keys import lowrank_keys
from .merge_attention import merge_attention
from .move_rows import move_rows
from .page_score import page_score
from .paged_attention import paged_attention
from .place_pages import place_pages
from .pool_blocks import pool_blocks
from .pooled_score import pooled_score
from .registry import OPS, use_backend
from .row_score import row_score
from .select_blocks import select_blocks
from .select_global import select_global
from .strided_score import strided_score
from .window_mass import window_mass
from .window_score import window_score

__all__ = ["OPS", "antidiagonal_score", "block_sparse_attention", "gather_pages", "js_distance", "keep_top", "key_mass",
           "lowrank_keys", "merge_attention", "move_rows", "page_score", "paged_attention", "place_pages", "pool_blocks",
           "pooled_score", "row_score", "select_blocks", "select_global", "strided_score", "use_backend", "window_mass",
           "window_score"]
