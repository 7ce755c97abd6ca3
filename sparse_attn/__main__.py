"""python -m sparse_attn: which backend each op would use here, and why the others would not.

Shown for the shapes of a usual prefill call, bfloat16 and float32; ops that answer alike for both share a row. The environment
variable SPARSE_ATTN_BACKEND is obeyed, as in any other call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .errors import NoBackendError
from .ops import OPS, cuda, native

DTYPES = (torch.bfloat16, torch.float32)
_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
_TOKENS, _BLOCK, _STRIDE, _HEADS, _KV_HEADS, _HEAD_DIM = 256, 128, 8, 32, 8, 128


def typical(op: str, dtype: torch.dtype, device: str) -> tuple:
    """Arguments of a usual prefill call of ``op``."""
    scale, blocks = _HEAD_DIM**-0.5, _TOKENS // _BLOCK
    q = torch.zeros(1, _HEADS, _TOKENS, _HEAD_DIM, dtype=dtype, device=device)
    k = q[:, :_KV_HEADS].clone()
    counts = torch.arange(1, blocks + 1, dtype=torch.int32, device=device).expand(1, _HEADS, -1)
    lists = torch.arange(blocks, dtype=torch.int32, device=device).expand(1, _HEADS, blocks, -1)
    share = torch.full((_HEADS,), 0.9, dtype=torch.float64, device=device)
    score = torch.rand(1, _HEADS, blocks, blocks, device=device)
    pooled = torch.zeros(1, _HEADS, blocks, _HEAD_DIM, device=device)
    runs = (torch.arange(_KV_HEADS, device=device)[None] * _TOKENS, torch.full((1, _KV_HEADS), _TOKENS, device=device))
    angles = (torch.zeros(_TOKENS, 2, _HEAD_DIM // 2, device=device),)
    geometry = (_BLOCK, _BLOCK, _TOKENS, _TOKENS)
    return {
        "antidiagonal_score": lambda: (q, k, _BLOCK, _BLOCK, _STRIDE, scale),
        "gather_pages": lambda: (k[0, 0], k[0, 1], runs[0], runs[0] // _TOKENS),
        "js_distance": lambda: (score[:, :, 0].softmax(-1), score[:, :, 1].softmax(-1)),
        "key_mass": lambda: (q, k[0].flatten(0, 1), q[..., 0].float(), *runs, scale),
        "keep_top": lambda: (torch.rand(_KV_HEADS * _TOKENS, device=device), *runs, (runs[1] // 2).int(), _TOKENS),
        "lowrank_keys": lambda: (k.flatten(0, 2), k[0, 0], k[:, :, :_HEAD_DIM], runs[0][..., None] * 0, runs[1][..., None].int(),
                                 runs[0][..., None], torch.arange(_TOKENS, dtype=torch.int32, device=device), *angles * 2),
        "merge_attention": lambda: (q[None], score[None, ..., 0].repeat_interleave(_BLOCK, -1)),
        "move_rows": lambda: (k.flatten(0, 2), runs[0].flatten() + 1, runs[0].flatten()),
        "page_score": lambda: (q[:, :, -1:], *[k[0, :, ::_BLOCK].flatten(0, 1)] * 2, *(table // _BLOCK for table in runs)),
        "paged_attention": lambda: (q[:, :, -1:], *[k.flatten(0, 2)] * 2, runs[0][..., None], runs[1][..., None].int(), scale),
        "place_pages": lambda: (lists[0, :, 0] * 0 - 1, lists[0, :, 0].contiguous(), lists[0, :, 0]),
        "pool_blocks": lambda: (q, _BLOCK, "mean"),
        "pooled_score": lambda: (pooled, pooled[:, :_KV_HEADS], pooled[:, :, 0, 0], *geometry),
        "row_score": lambda: (q[:, :, -1:], k.flatten(0, 2), *runs, scale),
        "select_blocks": lambda: (score, share, None, *geometry),
        "select_global": lambda: (score, share, "head", *geometry),
        "strided_score": lambda: (q, k, _BLOCK, _BLOCK, _STRIDE, scale),
        "window_mass": lambda: (q, k[0].flatten(0, 1), *runs, scale, 64),
        "window_score": lambda: (q, k, torch.arange(64, dtype=torch.int32, device=device)[None], scale),
        "block_sparse_attention": lambda: (q, k, k, counts, lists, _BLOCK, _BLOCK, scale),
    }[op]()  # fmt: skip


def verdict(op: str, dtype: torch.dtype, device: str) -> dict:
    """What would run for these shapes, and what each backend that would not says."""
    args = typical(op, dtype, device)
    try:
        runs = OPS[op].chosen(*args)
    except NoBackendError:
        runs = "nothing"
    refused = {name: why for name, why in OPS[op].explain(*args).items() if why is not None}
    return {"op": op, "dtype": str(dtype).removeprefix("torch."), "device": device, "would_run": runs, "refused": refused}


def status() -> dict:
    """Everything the table shows, as data."""
    devices = ["cpu", *([f"cuda:{torch.cuda.current_device()}"] if torch.cuda.is_available() else [])]
    able = torch.cpu.get_capabilities()
    return {
        "version": __version__,
        "cpu": {
            "name": able.get("cpu_name", "unknown"),
            "features": [name for name in _FEATURES if able.get(name)],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "libraries": {isa: native.why_not(isa) for isa in native.ISAS} | {"cuda": cuda.why_not()},
        "forced": os.environ.get("SPARSE_ATTN_BACKEND") or None,
        "ops": [verdict(op, dtype, device) for op in OPS for device in devices for dtype in DTYPES],
    }


def _merged(verdicts: list[dict]) -> list[tuple[str, str, str]]:
    """Rows of the table: op, what would run, refusals; dtypes that agree share one row."""
    rows: dict[tuple, list[dict]] = {}
    for v in verdicts:
        rows.setdefault((v["op"], v["device"], v["would_run"], tuple(v["refused"].items())), []).append(v)
    several = len({v["device"] for v in verdicts}) > 1
    table = []
    for (op, device, runs, refused), members in rows.items():
        alike = len(members) == len(DTYPES)
        name = op + (f" {device}" if several else "") + ("" if alike else f" {members[0]['dtype']}")
        table.append((name, runs, "; ".join(f"{backend}: {why}" for backend, why in refused)))
    return table


def text(found: dict) -> str:
    """The table."""
    cpu, libraries = found["cpu"], found["libraries"]
    ready = [isa for isa in (*reversed(native.ISAS), "cuda") if libraries[isa] is None]
    lines = [
        f"sparse_attn {found['version']}   CPU: {cpu['name']}, {' '.join(cpu['features']) or 'no AVX2'} ({cpu['cores']} cores)   "
        f"GPU: {', '.join(found['gpu']) or 'none'}   torch {found['torch']}   libraries: {' '.join(ready) or 'none'}"
    ]
    if found["forced"]:
        lines.append(f"SPARSE_ATTN_BACKEND={found['forced']} forces one backend")
    rows = [("op", "would run", "refused"), *_merged(found["ops"])]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines += [f"{row[0]:<{widths[0]}}   {row[1]:<{widths[1]}}   {row[2]}".rstrip() for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    args = parser.parse_args(argv)
    forced, known = os.environ.get("SPARSE_ATTN_BACKEND"), {name for op in OPS.values() for name in op.names}
    if forced and forced not in known:
        parser.exit(2, f"SPARSE_ATTN_BACKEND={forced}: no such backend; there are {', '.join(sorted(known))}\n")
    found = status()
    print(json.dumps(found, indent=1) if args.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
