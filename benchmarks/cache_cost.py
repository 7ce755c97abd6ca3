"""python -m benchmarks.cache_cost [PART ...]: what an evicting cache costs and saves, beside a cache that keeps everything.

memory  a long prompt read in chunks by a Llama of random weights, each cache in a process of its own: peak resident memory above
        that of the same model reading chunks without a cache, and the cache's own count of bytes beside budget + chunk; with
        ``--heap mapped`` glibc gives every allocation of 1 MiB a mapping of its own, else its heap grows with the chunks read
decode  one generated token on one layer, over a budget's worth of a long text, beside SDPA over all of it: attention alone, and the
        whole step (append, attend, score, evict)
ragged  the same where the fullest head keeps sixteen times as many tokens as the emptiest, beside equally many, at the same total

One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from kvcache import METHODS, make_cache
from kvcache.cache import CacheLayer
from kvcache.config import as_config
from kvcache.store import Meter
from sparse_attn.kept import Queries, attend_kept
from sparse_attn.ops import paged_attention
from sparse_attn.patterns import Dense
from sparse_attn.types import LayerContext

from . import measure
from .cases import DTYPES, Shape
from .decode import SPREAD, Store
from .needle import kv

PARTS = ("memory", "decode", "ragged")
WINDOW = 64  # queries that a policy sees when the text has been read
STEPS = ("snapkv", "streaming", "heavy_hitter")


class CostError(ValueError):
    """Bad input: one sentence, exit status 2."""


# -- memory ---------------------------------------------------------------------------------------------------------------


def read_prompt(cache: str | None, tokens: int, chunk: int, budget: int, layers: int, heads: int, kv_heads: int, head_dim: int,
                dtype: str, threads: int) -> dict:
    """Read a random prompt in chunks and say what that took; with ``cache`` None nothing is cached, "everything" evicts nothing.

    Attention is ours, dense, in all three, so that what differs is the cache. Narrow layers around it keep the model small.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=256, max_position_embeddings=tokens)
    model = LlamaForCausalLM(config).to(DTYPES[dtype]).eval()
    ids = torch.randint(0, 256, (1, tokens))
    if cache in (None, "everything"):
        made = DynamicCache(config=config) if cache else None
    else:
        made = make_cache(model, cache, budget)
    with torch.inference_mode(), sparse_attn.patch(model, prefill="dense", dense_below=0):
        # what only a first call takes
        model(input_ids=ids[:, :chunk], use_cache=False, logits_to_keep=1)
        began = time.perf_counter()

        def read() -> None:
            for piece in ids.split(chunk, 1) if made is not None else [ids[:, :chunk]]:
                model(input_ids=piece, past_key_values=made, use_cache=made is not None, logits_to_keep=1)

        peak = measure.peak_mib(read)
    row = {"peak_mib": peak, "seconds": round(time.perf_counter() - began, 2)}
    return row | (kv.figures(made, 1, [tokens], chunk) if made is not None else {})


def memory(args: argparse.Namespace) -> Iterator[dict]:
    """The model alone, with a cache that keeps everything, and with ``--cache``; a process each."""
    asked = {"tokens": args.tokens, "chunk": args.chunk, "budget": args.budget, "layers": args.layers, "heads": args.kv_heads,
             "kv_heads": args.kv_heads, "head_dim": args.head_dim, "dtype": args.dtype, "threads": args.threads}
    heap = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if args.heap == "mapped" else {}
    code = "import json, sys; from benchmarks.cache_cost import *; print(json.dumps(read_prompt(**json.loads(sys.argv[1]))))"
    alone = whole = None
    for cache in (None, "everything", args.cache):
        command = [sys.executable, "-c", code, json.dumps(asked | {"cache": cache})]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | heap)
        if done.returncode:
            raise CostError(f"reading with cache {cache or 'none'} failed: {done.stderr.strip().splitlines()[-1]}")
        row = json.loads(done.stdout.splitlines()[-1])
        if row["peak_mib"] is None:
            raise CostError("this kernel does not let a process forget older peaks of its memory (/proc/self/clear_refs)")
        alone = row["peak_mib"] if cache is None else alone
        above = row["peak_mib"] - alone
        whole = above if cache == "everything" else whole
        row |= {"above_model_mib": round(above, 1), "smaller_by": whole / max(above, 0.1)} if cache else {}
        if "kv_peak_bytes" in row:
            row["of_formula"] = row["kv_peak_bytes"] / row["kv_formula_bytes"]
        yield {"benchmark": "memory", "what": cache or "model alone", **asked, "heap": args.heap, **row}


# -- decode ---------------------------------------------------------------------------------------------------------------


class Layer:
    """One layer of a cache that has read a random text, and the token that comes next.

    Args:
        policy: a method's name; with ``counts`` (int64 ``[1, Hkv]``, tokens per head) nothing is chosen or evicted.
    """

    def __init__(self, args: argparse.Namespace, policy: str, n: int, counts: Tensor | None = None):
        g = torch.Generator().manual_seed(n)

        def random(heads: int, tokens: int) -> Tensor:
            return torch.randn(1, heads, tokens, args.head_dim, generator=g).to(DTYPES[args.dtype])

        self.k, self.v = random(args.kv_heads, n), random(args.kv_heads, n)
        self.q, self.k_new, self.v_new = random(args.heads, 1), random(args.kv_heads, 1), random(args.kv_heads, 1)
        self.ctx = LayerContext(layer=0, scale=args.head_dim**-0.5, q_start=0)
        self.core = CacheLayer(as_config(policy, args.budget if counts is None else n), 0, 1, Meter())
        self.core.append(self.k, self.v)
        self.core.admit()
        starts, lengths = self.core.table()
        q = random(args.heads, min(n, WINDOW))
        _, lse = paged_attention(q, self.core.k, self.core.v, starts[..., None], lengths[..., None].int(), self.ctx.scale)
        self.core.observe(Queries(q, lse, None, None, self.ctx.scale))
        if counts is not None:
            offsets = torch.arange(n, dtype=torch.int32).expand(1, args.kv_heads, n)
            self.core.store.keep(offsets.masked_fill(offsets >= counts[..., None], -1), counts)
        self.step()  # gives back the room of the prompt

    def attend(self) -> Tensor:
        """The query over what is kept."""
        return attend_kept(self.q, self.core, self.ctx, Dense(), Dense()).out

    def step(self) -> Tensor:
        """All that happens to the layer when a token is generated."""
        self.core.append(self.k_new, self.v_new)
        self.core.admit()
        found = attend_kept(self.q, self.core, self.ctx, Dense(), Dense())
        self.core.observe(Queries(self.q, found.lse, None, None, self.ctx.scale))
        return found.out


def _rows(benchmark: str, args: argparse.Namespace, ours: dict[str, Callable], baselines: dict[str, Callable],
          more: dict) -> Iterator[dict]:
    for call in (*ours.values(), *baselines.values()):
        call()
    us = measure.interleave({**ours, **baselines}, args.reps)
    for name in ours:
        against = {b: {"us": measure.percentiles(us[b]), "ratio": measure.pairwise(us[b], us[name])} for b in baselines}
        yield {"benchmark": benchmark, "what": name, "H": args.heads, "Hkv": args.kv_heads, "D": args.head_dim, "dtype": args.dtype,
               "reps": args.reps, "us": measure.percentiles(us[name]), "baselines": against, **more}


def decode(args: argparse.Namespace) -> Iterator[dict]:
    """A token over ``--budget`` of ``--context`` tokens, beside SDPA over all of them."""
    layers = {name: Layer(args, name, args.context) for name in STEPS}
    some = layers[STEPS[0]]
    folded = some.q.unflatten(1, (args.kv_heads, -1)).squeeze(3)  # [1, Hkv, G, D]: one head's rows, faster on CPU, same result
    baselines = {
        "sdpa": lambda: scaled_dot_product_attention(some.q, some.k, some.v, scale=some.ctx.scale, enable_gqa=True),
        "sdpa, group folded": lambda: scaled_dot_product_attention(folded, some.k, some.v, scale=some.ctx.scale),
    }
    ours = {"attention": some.attend} | {f"step, {name}": layer.step for name, layer in layers.items()}
    yield from _rows("decode", args, ours, baselines, {"context": args.context, "budget": args.budget})


def ragged(args: argparse.Namespace) -> Iterator[dict]:
    """Heads that keep different numbers of tokens beside heads that keep equally many."""
    shape = Shape(args.budget, args.heads, args.kv_heads, args.head_dim, dtype=args.dtype)
    uneven = Store(shape).lists(SPREAD)[1][..., 0].long()
    layers = [Layer(args, "streaming", int(uneven.max()), counts) for counts in (torch.full_like(uneven, args.budget), uneven)]
    for name in ("attend", "step"):
        calls = [getattr(layer, name) for layer in layers]
        what = "attention" if name == "attend" else "step"
        more = {"budget": args.budget, "lengths": uneven[0].tolist()}
        yield from _rows("ragged", args, {what: calls[1]}, {"uniform": calls[0]}, more)


# -- command line -------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict]) -> list[Table]:
    """What was measured, memory apart from time."""
    tables = []
    held = [row for row in rows if row["benchmark"] == "memory"]
    if held:
        first = held[0]
        model = f"{first['layers']} layers of {first['kv_heads']} KV heads of {first['head_dim']}, {first['dtype']}"
        tables.append(Table(title=f"{first['tokens']} tokens in chunks of {first['chunk']}, {model}; budget {first['budget']}"))
        for name in ("cache", "peak MiB", "above model", "smaller by", "KV MiB at most", "of budget + chunk", "s"):
            tables[-1].add_column(name, justify="left" if name == "cache" else "right")
        for row in held:
            cells = [f"{row['above_model_mib']:.1f}", f"{row['smaller_by']:.1f}x"] if "smaller_by" in row else ["", ""]
            cells += [f"{row['kv_peak_bytes'] / 2**20:.1f}", f"{row['of_formula']:.3f}"] if "of_formula" in row else ["", ""]
            tables[-1].add_row(row["what"], f"{row['peak_mib']:.1f}", *cells, f"{row['seconds']:.1f}")
    timed = [row for row in rows if row["benchmark"] != "memory"]
    if timed:
        tables.append(Table(title="one token, one layer"))
        for name in ("part", "what", "us", "baseline", "its us", "times as fast"):
            tables[-1].add_column(name, justify="left" if name in ("part", "what", "baseline") else "right")
        for row in timed:
            for name, other in row["baselines"].items():
                tables[-1].add_row(row["benchmark"], row["what"], f"{row['us'][1]:,.0f}", name, f"{other['us'][1]:,.0f}",
                                   f"{other['ratio']:.2f}")
    return tables


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    for name in args.parts:
        if name not in PARTS:
            raise CostError(f"part {name!r} is not known; use one of {', '.join(PARTS)}")
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            raise CostError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    if args.heads % args.kv_heads:
        raise CostError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}; choose a divisor")
    if args.cache not in METHODS:
        raise CostError(f"--cache {args.cache!r} is not known; use one of {', '.join(sorted(METHODS))}")
    args.parts = args.parts or list(PARTS)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_cost", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--tokens", type=int, default=65536, help="memory: prompt (default: %(default)s)")
    add("--chunk", type=int, default=2048, help="memory: tokens read at once (default: %(default)s)")
    add("--layers", type=int, default=4, help="memory: default %(default)s")
    add("--heap", choices=("usual", "mapped"), default="usual", help="memory: see above (default: %(default)s)")
    add("--cache", default="snapkv", metavar="NAME", help="memory: what evicts (default: %(default)s)")
    add("--context", type=int, default=32768, help="decode: tokens of the text (default: %(default)s)")
    add("--budget", type=int, help="tokens per KV head (default: 4096 for memory, 2048 for the others)")
    add("--heads", type=int, default=32, help="query heads of decode and ragged; memory: one per KV head (default: %(default)s)")
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    add("--reps", type=int, default=20, help="rounds of decode and ragged (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, metavar="FILE", help="append JSON lines")
    args = parser.parse_args(argv)
    try:
        args = _checked(args)
        lines = measure.Lines(args.json)
        torch.set_num_threads(args.threads)
        with torch.inference_mode():
            for part, run in (("memory", memory), ("decode", decode), ("ragged", ragged)):
                if part in args.parts:
                    usual = 4096 if part == "memory" else 2048
                    for row in run(argparse.Namespace(**vars(args) | {"budget": args.budget or usual})):
                        lines.write(row)
    except (ValueError, OSError) as error:
        parser.exit(2, f"cache_cost: {error} (see --help)\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for shown in table(lines.rows):
        console.print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
