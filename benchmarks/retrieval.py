"""python -m benchmarks.retrieval PART: caches that keep everything and read little of it.

needle  every way to read less, by budget and length, on the needles of the shipped model: accuracy, memory on the device, bytes that a
        generated token reads, ms per token; a run that was stopped goes on from its file
replay  16384 tokens of prompt and 4096 generated ones, every method made to choose every page, beside transformers' own cache
disk    a text four times as long as the memory that the process may take for it, pages on disk, answered or not
shadow  one layer of 64K tokens with low-rank keys on the device and values in host memory, beside SDPA over all of it: bytes and time

One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcache
import sparse_attn
from kvcache import READERS
from sparse_attn import ops
from sparse_attn.kept import attend_kept
from sparse_attn.patterns import Dense
from sparse_attn.types import LayerContext

from . import measure, sweep
from .cases import DTYPES
from .needle import runner
from .needle.grade import Row
from .needle.haystack import NeedleError

RESULTS = Path("build") / "retrieval.jsonl"
# methods beside the readers, and what suits the model that ships: its first layer looks one token back, whatever the text
METHODS = tuple(name for name in kvcache.METHODS if name in (*READERS, "shadowkv"))
DENSE = {"dense_layers": [0]}
# low ranks are for large heads: the model that ships has 2 KV heads of 64
SETTINGS = {"shadowkv": {"rank": 32}, "lrqk": {"rank": 16}}


# -- needle ---------------------------------------------------------------------------------------------------------------


def needle(args: argparse.Namespace) -> list[Table]:
    names = args.methods.split(",") if args.methods else list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise NeedleError(f"--methods names {unknown[0]!r}; there are {', '.join(METHODS)}")
    budgets = [int(n) for n in args.budgets.split(",")]
    chosen = [runner.Method(args.prefill), *(
        runner.Method(args.prefill, cache=name, cache_args={"budget": n, **DENSE, **SETTINGS.get(name, {})}) for name in names for n in budgets)]
    for method in chosen:
        method.check()
    rows = sweep.run(args, chosen, sweep.cases(args, sweep.ends_left_out), None)
    args.json.with_suffix(".md").write_text(markdown(rows))
    return [needle_table(length, group) for length, group in _by(rows, "length").items()]


def _by(rows: Iterable[Row], key: str) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


HEAD = ("reads", "budget", "accuracy", "device MiB", "elsewhere MiB", "step KiB", "hits", "ms per token")


def needle_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Of prompts of one length: a line per method and budget."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.get("cache", "everything"), row.get("cache_args", {}).get("budget", "")].append(row)
    lines = []
    for (name, budget), group in groups.items():
        def mean(key: str, scale: float, form: str, group=group) -> str:
            found = [row[key] for row in group if row.get(key) is not None]
            return format(statistics.fmean(found) / scale, form) if found else ""

        elsewhere = [sum(row["tier_bytes"].values()) / 2**20 for row in group if "tier_bytes" in row]
        took = [1000 * row["decode_s"] / row["decode_steps"] for row in group if row.get("decode_steps")]
        lines.append((name, str(budget), mean("correct", 1, ".2f"), mean("kv_bytes", 2**20, ".1f"), f"{statistics.fmean(elsewhere):.1f}" if elsewhere else "",
                      mean("step_bytes", 2**10, ".0f"), mean("hit_rate", 1, ".2f"), f"{statistics.median(took):.2f}" if took else ""))
    return lines


def needle_table(length: int, rows: list[Row]) -> Table:
    made = Table(title=f"{length} tokens, {len({(r['task'], r['depth'], r['seed']) for r in rows})} prompts")
    for name in HEAD:
        made.add_column(name, justify="left" if name == "reads" else "right")
    for line in needle_lines(rows):
        made.add_row(*line)
    return made


def markdown(rows: Iterable[Row]) -> str:
    """The same as Markdown."""
    lines = []
    for length, group in sorted(_by(rows, "length").items()):
        prompts = len({(r["task"], r["depth"], r["seed"]) for r in group})
        lines += [f"## {length} tokens, {prompts} prompts", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        lines += [f"| {' | '.join(line)} |" for line in needle_lines(group)] + [""]
    return "\n".join(lines)


# -- replay ---------------------------------------------------------------------------------------------------------------


def replay(args: argparse.Namespace) -> Iterator[dict]:
    """Largest difference of logits over every generated token; float32, so what is left is rounding."""
    config = LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=32, vocab_size=128, max_position_embeddings=args.prompt + args.generate, initializer_range=0.1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 128, (1, args.prompt + args.generate))
    wanted = _replayed(model, DynamicCache(config=config), ids, args.prompt)
    exact = _replayed(model.double(), DynamicCache(config=config), ids, args.prompt)
    model.float()
    own = float((wanted - exact).abs().max())
    everything = {"budget": 1024, "dense_layers": ()}
    with sparse_attn.patch(model, prefill="dense"):
        for name in METHODS:
            # the whole matrix of two heads of 32 has rank 64
            full = everything | ({"rank": 64} if name == "shadowkv" else {"rank": 32} if name == "lrqk" else {})
            for tiers in (("device",), ("device", "host")):
                if name == "shadowkv" and len(tiers) == 1 or name == "token_select" and len(tiers) > 1:
                    continue
                began, cache = time.perf_counter(), kvcache.make_cache(model, decode=name, tiers=tiers, **full)
                object.__setattr__(cache.kept.decode, "choose", _all_pages)
                found = _replayed(model, cache, ids, args.prompt)
                error = float((found - exact).abs().max())
                yield {"benchmark": "replay", "cache": name, "tiers": list(tiers), "prompt": args.prompt, "generated": args.generate,
                       "max_error": error, "dense_max_error": own, "logits_std": float(exact.std()),
                       "seconds": time.perf_counter() - began, "moved": sum(cache.report().tiers.values())}


def _all_pages(q, lengths, digest, first=None, last=None) -> torch.Tensor:
    """In place of what a reader would choose, so that every page goes the way of a chosen one."""
    return ops.keep_top(torch.zeros(int((digest.starts + digest.pages).max())), digest.starts, digest.pages, digest.pages.int(), int(digest.pages.max()))


def _replayed(model: LlamaForCausalLM, cache, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits behind the prompt and every token after it, which are given."""
    for piece in ids[:, :prompt].split(512, 1):
        out = model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
    found = [out.logits[:, -1].double()]
    for token in ids[:, prompt:].split(1, 1):
        found.append(model(input_ids=token, past_key_values=cache).logits[:, -1].double())
    return torch.cat(found)


# -- disk -----------------------------------------------------------------------------------------------------------------


def disk(args: argparse.Namespace) -> Iterator[dict]:
    """In processes of their own: pages on disk, and transformers' own cache, which has to fail."""
    for cache in (args.cache, "everything"):
        asked = {"cache": cache, "length": args.length, "times": args.times, "folder": args.folder, "threads": args.threads}
        code = "import json, sys; from benchmarks.retrieval import *; print(json.dumps(answer_within(**json.loads(sys.argv[1]))))"
        done = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True,
                              env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
        why = (done.stderr.strip().splitlines() or [""])[-1]
        row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"correct": None, "failed": why[:200]}
        yield {"benchmark": "disk", **asked, **row}


def answer_within(cache: str, length: int, times: int, folder: str, threads: int) -> dict:
    """Answer one needle prompt of the shipped model when the process may grow by no more than 1 / ``times`` of its keys and values."""
    torch.set_num_threads(threads)
    model, tokenizer = runner.load(str(runner.BUNDLED), "cpu", torch.float32, False)
    text = model.config.get_text_config()
    prompt = runner.make_haystack(tokenizer, None).prompt("single", length, 0.5, 0)
    ids, chunk = torch.tensor([prompt.ids]), 512
    kv_bytes = length * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 4
    with torch.inference_mode(), sparse_attn.patch(model, prefill="dense", dense_below=0):
        def make():
            if cache == "everything":
                return DynamicCache(config=model.config)
            return kvcache.make_cache(model, decode=cache, budget=2048, dense_layers=(), tiers=("device", {"name": "disk", "folder": folder}))

        made = make()  # what only first calls take, threads' stacks included
        for piece in [*ids[:, : 8 * chunk].split(chunk, 1), ids[:, :1]]:  # more than the budget, so that pages leave
            model(input_ids=piece, past_key_values=made, logits_to_keep=1)
        del made
        status = {line.split(":")[0]: line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")}
        before = int(status["VmData"]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (before + kv_bytes // times, before + kv_bytes // times))
        began, made = time.perf_counter(), make()
        for piece in ids.split(chunk, 1):
            out = model(input_ids=piece, past_key_values=made, logits_to_keep=1)
        token, written = out.logits[:, -1:].argmax(-1), []
        for _ in range(prompt.answer_tokens):
            written.append(int(token))
            token = model(input_ids=token, past_key_values=made).logits[:, -1:].argmax(-1)
    answer = tokenizer.decode(runner._until_stop(written, runner.stop_tokens(model)), skip_special_tokens=True)
    row = {"kv_mib": kv_bytes / 2**20, "limit_mib": kv_bytes / times / 2**20, "correct": runner.grade(answer, prompt.expected),
           "seconds": time.perf_counter() - began}
    if cache != "everything":
        report = made.report()
        row |= {"device_mib": report.n_bytes / 2**20, "disk_mib": report.tiers["disk"] / 2**20, "hit_rate": report.hit_rate}
    return row


# -- shadow ---------------------------------------------------------------------------------------------------------------


def shadow(args: argparse.Namespace) -> Iterator[dict]:
    """Keys are random: bytes and time do not depend on them."""
    heads, kv_heads, dim, n, dtype = 32, 8, 128, args.tokens, DTYPES[args.dtype]
    config = LlamaConfig(hidden_size=heads * dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=dim, vocab_size=8, max_position_embeddings=n + 64)
    model = LlamaForCausalLM(config).to(dtype).eval()
    cache = kvcache.make_cache(model, decode="shadowkv", budget=args.budget, rank=args.rank, dense_layers=())
    core, g = cache.layers[0].core, torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, kv_heads, n, dim, generator=g).to(dtype) for _ in range(2))
    for tokens in (slice(n), slice(1)):  # with the first generated token the room of the prompt is given back
        core.append(k[:, :, tokens], v[:, :, tokens])
        core.admit()
        core.observe(None)
    walk = torch.randn(args.reps + 8, 1, heads, 1, dim, generator=g)
    for i in range(1, len(walk)):  # queries of neighbouring tokens look at much the same pages
        walk[i] = 0.9 * walk[i - 1] + 0.19**0.5 * walk[i]
    queries = iter(walk.to(dtype).repeat(64, 1, 1, 1, 1))
    context = LayerContext(layer=0, scale=dim**-0.5, q_start=0)

    def step():
        return attend_kept(next(queries), core, context, Dense(), Dense())

    began = time.perf_counter()
    step()
    fit = time.perf_counter() - began
    q = walk[0].to(dtype)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=dim**-0.5)
    baselines = {"sdpa": lambda: attend(q, k, v, enable_gqa=True), "sdpa, group folded": lambda: attend(q.view(1, kv_heads, -1, dim), k, v)}
    dense = k.nbytes + v.nbytes
    for call in baselines.values():
        call()
    us, report = measure.interleave({"step": step, **baselines}, args.reps), cache.report()
    yield {"benchmark": "shadow", "tokens": n, "rank": args.rank, "budget": args.budget, "dtype": args.dtype,
           "device_mib": report.n_bytes / 2**20, "dense_mib": dense / 2**20, "smaller_by": dense / report.n_bytes, "host_mib": report.tiers["host"] / 2**20,
           "hit_rate": report.hit_rate, "fit_s": fit, "us": measure.percentiles(us["step"]),
           "baselines": {name: {"us": measure.percentiles(us[name]), "ratio": measure.pairwise(us[name], us["step"])} for name in baselines}}


# -- command line -----------------------------------------------------------------------------------------------------------


def _shown(rows: Sequence[dict]) -> Table:
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("device", "features", "versions", "commit", "benchmark", "threads", "folder")))
    made = Table(title=rows[0]["benchmark"])
    for key in keys:
        made.add_column(key, justify="right")
    for row in rows:
        made.add_row(*(f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in keys))
    return made


def _measured(part) -> object:
    def run(args: argparse.Namespace) -> list[Table]:
        lines = measure.Lines(args.json)
        torch.set_num_threads(args.threads)
        with torch.inference_mode():
            for row in part(args):
                lines.write(row)
        return [_shown(lines.rows)]

    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    swept = sweep.parser("retrieval needle", "see above", "16384,32768,65536,131072", "2,2,1,1", "single,multikey", RESULTS)
    add = parts.add_parser("needle", parents=[swept], add_help=False).add_argument
    add("--methods", help=f"names separated by commas (default: {','.join(METHODS)})")
    add("--budgets", default="1024,4096", help="tokens per KV head that a generated token reads (default: %(default)s)")
    add("--prefill", default="chorus", help="how the prompt is read (default: %(default)s)")
    for name, options in (("replay", {"--prompt": 16384, "--generate": 4096}), ("disk", {"--length": 131072, "--times": 4}),
                          ("shadow", {"--tokens": 65536, "--rank": 160, "--budget": 1024, "--reps": 20})):
        of = parts.add_parser(name)
        for option, usual in options.items():
            of.add_argument(option, type=int, default=usual, help="default: %(default)s")
        of.add_argument("--threads", type=int, default=torch.get_num_threads())
        of.add_argument("--json", type=Path, metavar="FILE", help="append JSON lines")
        if name == "disk":
            of.add_argument("--cache", choices=METHODS, default="quest")
            of.add_argument("--folder", default="/tmp", help="of the pages (default: %(default)s)")
        if name == "shadow":
            of.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args(argv)
    run = {"needle": needle, "replay": _measured(replay), "disk": _measured(disk), "shadow": _measured(shadow)}[args.part]
    console = Console(width=None if sys.stdout.isatty() else 160)

    def command() -> None:
        for shown in run(args):
            console.print(shown)

    return sweep.finish("retrieval", parser, command)


if __name__ == "__main__":
    sys.exit(main())
