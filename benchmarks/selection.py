"""python -m benchmarks.selection: what each prefill method's choice of keys costs, as a share of dense attention.

Times ``select()`` alone (scores, probes, lists) and causal SDPA in turn, on one layer of random q and k, and prints the median
share. One JSON line per method and length.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn import PATTERNS
from sparse_attn.errors import NotServed
from sparse_attn.types import LayerContext, ResidentKV

from .cases import DTYPES, Shape
from .measure import Lines, interleave, pairwise, percentiles


def measure(shape: Shape, names: Sequence[str], reps: int) -> list[dict]:
    """A row per method: time of select(), its share of SDPA, and the density it chose on random input."""
    q, k, v = shape.tensors
    ctx = LayerContext(layer=1, scale=shape.scale, q_start=0, n_layers=4, carry={})
    view, calls, density = ResidentKV(k, v), {}, {}
    for name in names:
        selector = PATTERNS[name]()
        try:
            density[name] = selector.select(q, view, ctx).density()  # also warms up
        except NotServed as reason:
            print(f"not measured: {name} {reason}")
        else:
            calls[name] = functools.partial(selector.select, q, view, ctx)
    sdpa = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True, scale=shape.scale, enable_gqa=True)
    us = interleave({**calls, "": sdpa}, reps)
    return [{"benchmark": "selection", "method": name, **shape.fields(), "us": percentiles(us[name]),
             "sdpa_us": percentiles(us[""]), "share": 1 / pairwise(us[""], us[name]), "density": density[name], "reps": reps} for name in calls]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("methods", nargs="*", metavar="METHOD", help="default: all")
    add("--n", default="16384,32768", help="tokens (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--reps", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, metavar="FILE", help="append JSON lines")
    args = parser.parse_args(argv)
    unknown = [name for name in args.methods if name not in PATTERNS]
    if unknown:
        parser.exit(2, f"selection: {unknown[0]!r} is no method; there are {', '.join(PATTERNS)}\n")
    if args.reps < 1:
        parser.exit(2, f"selection: --reps is {args.reps}; give 1 or more\n")
    torch.set_num_threads(args.threads)
    table = Table(title="choosing keys, share of causal SDPA")
    for name in ("tokens", "method", "ms", "share of SDPA", "density on random input"):
        table.add_column(name, justify="left" if name == "method" else "right")
    lines = Lines(args.json)
    with torch.inference_mode():
        for n in (int(piece) for piece in args.n.split(",")):
            names = args.methods or [name for name in PATTERNS if name != "dense"]
            for row in measure(Shape(n, dtype=args.dtype), names, args.reps):
                table.add_row(str(n), row["method"], f"{row['us'][1] / 1e3:.1f}", f"{row['share']:.2%}", f"{row['density']:.3f}")
                lines.write(row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
