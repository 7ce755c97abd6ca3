"""python -m benchmarks.kernels [OP ...]: our kernels and what people use instead, timed in turn in one process.

First the gate: a few rows are compared with float64, and nothing is timed that is further off than twice torch's own error.
Then rounds of one call each, so that every ratio is taken within a round. One JSON line per measurement and baseline.
benchmarks/README.md says what a line means.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from sparse_attn import ops
from sparse_attn.attention import sparse_attention
from sparse_attn.errors import NoBackendError
from sparse_attn.ops import OPS, use_backend
from sparse_attn.patterns import XAttention
from sparse_attn.types import BlockIndex, LayerContext, ResidentKV

from . import decode, measure
from .cases import DTYPES, Sample, Shape, random_lists, rms_error, top_k_for, visible_pairs
from .entries import GATE, Baseline, BenchError, Entry, GateError

BASELINES = ("sdpa", "flex", "mm", "dense", "folded", "read")
STRIDES = (8, 16)
PROXY_STRIDE = 4
PROBES = 64
OVERHEAD_CALLS = 200
MM_SIZE = 2048  # the smallest square that reaches torch.mm's full rate (specs: 2048 and 4096 alike)
_GATE_SCORE = 1e-2  # relative rms; a share only ranks
_GATE_POOLED = 1e-5  # relative rms of float32 arithmetic
_GATE_MASS = 1e-3  # largest relative error of a sum of probabilities
_EXACT_SCORE_ROWS = 2048  # tokens; the float64 score of a longer call takes minutes


# -- baselines ----------------------------------------------------------------------------------------------------------


def sdpa(shape: Shape) -> Callable:
    """torch's dense causal attention."""
    q, k, v = shape.tensors
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, scale=shape.scale, enable_gqa=True)


def mm(shape: Shape) -> Callable:
    """A large matrix product."""
    a, b = shape.random(0, *[(MM_SIZE, MM_SIZE)] * 2)
    return lambda: torch.mm(a, b)


def block_mask(index: BlockIndex):
    """The same lists for FlexAttention: blocks on the diagonal are tested by position, those below are not."""
    from torch.nn.attention.flex_attention import BlockMask

    mask = index.to_mask()
    start_q = torch.arange(mask.shape[2], device=mask.device)[:, None] * index.block[0]
    end_k = (torch.arange(mask.shape[3], device=mask.device) + 1) * index.block[1]
    whole = (end_k <= start_q + 1) & (end_k <= index.n_k)
    partial, full = index.where(mask & ~whole), index.where(mask & whole)
    return BlockMask.from_kv_blocks(partial.counts, partial.indices, full.counts, full.indices, BLOCK_SIZE=index.block,
                                    mask_mod=lambda b, h, q, k: k <= q, seq_lengths=(index.n_q, index.n_k))


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(shape: Shape, index: BlockIndex) -> Callable:
    """Compiled FlexAttention over the same lists."""
    (q, k, v), mask, run = shape.tensors, block_mask(index), _compiled_flex()
    return lambda: run(q, k, v, block_mask=mask, scale=shape.scale, enable_gqa=True)


def dense(shape: Shape) -> Callable:
    """Our own attention over every block."""
    (q, k, v), index = shape.tensors, random_lists(shape, 1.0)
    return functools.partial(ops.block_sparse_attention, q, k, v, index.counts, index.indices, *index.block, shape.scale)


def baselines(shape: Shape, args: argparse.Namespace, index: BlockIndex | None = None, rate: bool = True,
              attention: bool = False) -> dict[str, Baseline]:
    """Those asked for that apply: flex needs lists, mm an operation count, our own dense attention who repeats a part of it."""
    apply = {"sdpa": Baseline("sdpa", functools.partial(sdpa, shape))}
    if attention:
        apply["dense"] = Baseline("dense", functools.partial(dense, shape))
    if index is not None:
        apply["flex"] = Baseline(f"flex density={index.density():.4f}", functools.partial(flex, shape, index))
    if rate:
        apply["mm"] = Baseline("mm", functools.partial(mm, shape), flop=2.0 * MM_SIZE**3)
    return {name: baseline for name, baseline in apply.items() if name in args.baseline}


# -- gates --------------------------------------------------------------------------------------------------------------


def attention_errors(shape: Shape, index: BlockIndex) -> dict:
    """rms error against float64 of our attention and of torch SDPA on the last group of heads, also with q four times as large."""
    group, found = shape.heads // shape.kv_heads, {}
    q, (k, v) = shape.tensors[0][:, -group:], (t[:, -1:] for t in shape.tensors[1:])
    index = replace(index, counts=index.counts[:, -group:].contiguous(), indices=index.indices[:, -group:].contiguous())
    sample = Sample.of(index, group)
    for times, suffix in ((1, ""), (4, "_q4")):
        inputs = (q * times, k, v)
        truth = sample.truth(*inputs, shape.scale)
        out, _ = ops.block_sparse_attention(*inputs, index.counts, index.indices, *index.block, shape.scale)
        ours = rms_error(sample.of_output(out), truth)
        theirs = rms_error(sample.torch_answer(*inputs, shape.scale), truth)
        if not ours <= GATE * theirs + 1e-6:
            raise GateError(f"block_sparse_attention at {shape.n} tokens is off by {ours:.2e} (rms) where torch SDPA is off by "
                            f"{theirs:.2e}; fix the kernel before timing it")
        found |= {f"rms_error{suffix}": ours, f"baseline_rms_error{suffix}": theirs, f"error_ratio{suffix}": ours / theirs}
    return found


def score_error(shape: Shape, stride: int) -> float:
    """rms error of the scores of one group of heads against the same formula in float64."""
    group, n = shape.heads // shape.kv_heads, min(shape.n, _EXACT_SCORE_ROWS)
    q, k = shape.tensors[0][:, :group, :n], shape.tensors[1][:, :1, :n]
    rest = shape.block, shape.block, stride, shape.scale
    error = rms_error(ops.antidiagonal_score(q, k, *rest), ops.antidiagonal_score.reference(q.double(), k.double(), *rest))
    if not error <= _GATE_SCORE:
        raise GateError(f"antidiagonal_score stride {stride} at {n} tokens is off by {error:.2e} (rms, relative), more than "
                        f"{_GATE_SCORE:.0e}; fix the kernel before timing it")
    return error


def probe_rows(shape: Shape, of: str) -> Tensor:
    """int32 ``[1, R]``: the last rows, or as many again at the ends of equal segments."""
    if of == "last":
        return torch.arange(max(0, shape.n - PROBES), shape.n, dtype=torch.int32)[None]
    ends = torch.linspace(0, shape.n, 9).int()[1:, None]
    return (ends - torch.arange(2 * PROBES // 8, 0, -1).int()).clamp(min=0).flatten().unique()[None]


def probe_error(shape: Shape, op: str, rest: tuple) -> float:
    """rms error of a probe op on one group of heads against its formula in float64."""
    group = shape.heads // shape.kv_heads
    n = shape.n if op == "window_score" else min(shape.n, _EXACT_SCORE_ROWS)
    q, k = shape.tensors[0][:, :group, :n], shape.tensors[1][:, :1, :n]
    ours, exact = OPS[op](q, k, *rest), OPS[op].reference(q.double(), k.double(), *rest)
    pairs = [(ours, exact)] if isinstance(ours, Tensor) else zip(ours, exact, strict=True)
    error = max(rms_error(*pair) for pair in pairs)
    if not error <= _GATE_SCORE:
        raise GateError(f"{op} at {n} tokens is off by {error:.2e} (rms, relative), more than {_GATE_SCORE:.0e}; fix the kernel "
                        "before timing it")
    return error


def mass_error(shape: Shape, op: str, rest: tuple) -> float:
    """Largest relative error of one group's mass against the sum of float64 probabilities; the lse is that of our attention."""
    few = Shape(min(shape.n, _EXACT_SCORE_ROWS), shape.heads // shape.kv_heads, 1, shape.head_dim, shape.block, shape.dtype)
    of_attention = (dense(few)()[1],) if op == "key_mass" else ()
    exact = few.mass_truth(few.n if of_attention else PROBES)
    error = float((OPS[op](few.tensors[0], few.store, *of_attention, *few.runs, *rest) / exact - 1).abs().max())
    if not error <= _GATE_MASS:
        raise GateError(f"{op} at {few.n} tokens is off by {error:.2e} (largest, relative), more than {_GATE_MASS:.0e}; "
                        "fix the kernel before timing it")
    return error


# -- what to time -------------------------------------------------------------------------------------------------------


def _attention_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, k, v = shape.tensors
    for density in args.density:
        index = random_lists(shape, density)
        rest = index.counts, index.indices, *index.block, shape.scale
        fields = {"density": round(index.density(), 4), "wanted_density": density, "out": ""}
        fields |= attention_errors(shape, index)
        fields["backend"] = OPS["block_sparse_attention"].chosen(q, k, v, *rest)
        against = baselines(shape, args, index)
        flop = 4.0 * shape.head_dim * visible_pairs(index)
        yield Entry("block_sparse_attention", functools.partial(ops.block_sparse_attention, q, k, v, *rest), fields, flop, against)
        if fields["backend"] != "reference":
            out = torch.empty(1, shape.n, shape.heads, shape.head_dim, dtype=q.dtype).transpose(1, 2)
            given = out, torch.empty(1, shape.heads, shape.n)
            call = functools.partial(ops.block_sparse_attention.out, q, k, v, *rest, out=given)
            yield Entry("block_sparse_attention", call, {**fields, "out": "given"}, flop, against)


def _score_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, k, _ = shape.tensors
    for stride in STRIDES:
        call_args = q, k, shape.block, shape.block, stride, shape.scale
        fields = {"stride": stride, "rms_error": score_error(shape, stride),
                  "backend": OPS["antidiagonal_score"].chosen(*call_args)}
        # half of the (N / stride)^2 group pairs, each a dot product over stride * D
        flop = shape.heads * shape.n**2 * shape.head_dim / stride
        yield Entry("antidiagonal_score", functools.partial(ops.antidiagonal_score, *call_args), fields, flop,
                    baselines(shape, args))


def _window_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, k, _ = shape.tensors
    for of, by in (("last", 1), ("tails", 1), ("tails by block", shape.block)):
        rows = probe_rows(shape, of)
        call_args = q, k, rows, shape.scale, 0, True, 0, 0.0, None, None, by
        fields = {"of": of, "probes": rows.shape[1], "rms_error": probe_error(shape, "window_score", call_args[2:]),
                  "backend": OPS["window_score"].chosen(*call_args)}
        # a dot product per visible pair
        flop = 2.0 * shape.heads * shape.head_dim * float((rows + 1).sum())
        yield Entry("window_score", functools.partial(ops.window_score, *call_args), fields, flop, baselines(shape, args))


def _mass_calls(shape: Shape, args: argparse.Namespace, op: str) -> Iterator[Entry]:
    q = shape.tensors[0]
    rest = (shape.scale,) if op == "key_mass" else (shape.scale, PROBES)
    fields = {"of": "every query" if op == "key_mass" else f"last {PROBES}", "max_error": mass_error(shape, op, rest)}
    # an lse is an lse: any finite one costs the same
    call_args = (q, shape.store, *([torch.full(q.shape[:3], 10.0)] if op == "key_mass" else []), *shape.runs, *rest)
    fields["backend"] = OPS[op].chosen(*call_args)
    # a dot product per visible pair; the window makes two passes
    pairs = shape.n * (shape.n + 1) / 2 if op == "key_mass" else 2 * float(probe_rows(shape, "last").add(1).sum())
    flop = 2.0 * shape.heads * shape.head_dim * pairs
    yield Entry(op, functools.partial(OPS[op], *call_args), fields, flop, baselines(shape, args, attention=True))


def _strided_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, k, _ = shape.tensors
    # every head on its own, and ProxyAttn's one mean head for the layer
    for of, heads in (("every head", (q, k)), ("one proxy", tuple(t.float().mean(1, keepdim=True).to(t.dtype) for t in (q, k)))):
        rest = shape.block, shape.block, PROXY_STRIDE, shape.scale
        fields = {"of": of, "stride": PROXY_STRIDE, "rms_error": probe_error(shape, "strided_score", rest),
                  "backend": OPS["strided_score"].chosen(*heads, *rest)}
        flop = heads[0].shape[1] * (shape.n / PROXY_STRIDE) ** 2 * shape.head_dim
        yield Entry("strided_score", functools.partial(ops.strided_score, *heads, *rest), fields, flop, baselines(shape, args))


def _pooled_lists(shape: Shape, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What choosing blocks from pooled queries and keys costs: pool both, score, select."""
    q, k, _ = shape.tensors
    q_pooled, k_pooled = (ops.pool_blocks(x, shape.block, "mean") for x in (q, k))
    score = ops.pooled_score(q_pooled, k_pooled, torch.full((1, shape.heads), shape.scale), shape.block, shape.block, shape.n, shape.n)
    return ops.select_blocks(score, threshold, None, shape.block, shape.block, shape.n, shape.n)


def pooled_error(shape: Shape) -> float:
    """rms error of the pooled scores against the same formulas in float64."""
    q, k, _ = shape.tensors
    q_pooled, k_pooled = (ops.pool_blocks(x, shape.block, "mean") for x in (q, k))
    q_exact, k_exact = (ops.pool_blocks.reference(x.double(), shape.block, "mean") for x in (q, k))
    rest = torch.full((1, shape.heads), shape.scale), shape.block, shape.block, shape.n, shape.n
    exact = ops.pooled_score.reference(q_exact.double(), k_exact.double(), *rest)
    error = rms_error(ops.pooled_score(q_pooled, k_pooled, *rest), exact)
    if not error <= _GATE_POOLED:
        raise GateError(f"pooled_score at {shape.n} tokens is off by {error:.2e} (rms, relative), more than {_GATE_POOLED:.0e}; "
                        "fix the kernel before timing it")
    return error


def _pooled_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, _, _ = shape.tensors
    threshold = torch.full((shape.heads,), 0.9, dtype=torch.float64)
    fields = {"rule": "threshold 0.9", "rms_error": pooled_error(shape), "backend": OPS["pool_blocks"].chosen(q, shape.block, "mean")}
    yield Entry("pooled_score", functools.partial(_pooled_lists, shape, threshold), fields, against=baselines(shape, args, rate=False))


def _select_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, k, _ = shape.tensors
    score = ops.antidiagonal_score(q, k, shape.block, shape.block, STRIDES[0], shape.scale)
    share = torch.full((shape.heads,), 0.9, dtype=torch.float64)
    top_k = torch.full((1, 1, 1), top_k_for(shape, min(args.density)), dtype=torch.int32)
    for rule, threshold, top_k in (("threshold 0.9", share, None), ("top_k", None, top_k)):
        call_args = score, threshold, top_k, shape.block, shape.block, shape.n, shape.n
        ours, exact = ops.select_blocks(*call_args), ops.select_blocks.reference(*call_args)
        if not all(torch.equal(a, b) for a, b in zip(ours, exact)):
            raise GateError(f"select_blocks by {rule} at {shape.n} tokens differs from its reference; fix the kernel first")
        fields = {"rule": rule, "backend": OPS["select_blocks"].chosen(*call_args)}
        yield Entry("select_blocks", functools.partial(ops.select_blocks, *call_args), fields,
                    against=baselines(shape, args, rate=False))


def _xattention_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    q, k, v = shape.tensors
    context = LayerContext(layer=0, scale=shape.scale, q_start=0)
    for stride in STRIDES:
        for density in args.density:
            pattern = XAttention(stride=stride, block=shape.block, top_k=top_k_for(shape, density))
            index = pattern.select(q, ResidentKV(k, v), context).blocks
            call = functools.partial(sparse_attention, q, ResidentKV(k, v), context, pattern)
            fields = {"stride": stride, "density": round(index.density(), 4), "wanted_density": density, "top_k": pattern.top_k}
            fields |= attention_errors(shape, index)
            fields["backend"] = OPS["block_sparse_attention"].chosen(q, k, v, index.counts, index.indices, *index.block, shape.scale)
            flop = 4.0 * shape.head_dim * visible_pairs(index) + shape.heads * shape.n**2 * shape.head_dim / stride
            yield Entry("xattention", call, fields, flop, baselines(shape, args))


def _overhead_calls(shape: Shape, args: argparse.Namespace) -> Iterator[Entry]:
    """One-token calls through the registry, against the same straight into the backend: the difference is what a call costs."""
    one = Shape(n=1, heads=1, kv_heads=1, head_dim=shape.head_dim, block=shape.block, dtype=shape.dtype)
    q, k, v = one.tensors
    index, edges = random_lists(one, 1.0), (one.block, one.block)
    run = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    few = {
        "antidiagonal_score": (q, k, *edges, STRIDES[0], one.scale),
        "gather_pages": (k[0, 0], v[0, 0], *torch.zeros(2, 1, dtype=torch.int64)),
        "js_distance": (torch.ones(1, 1, 1), torch.ones(1, 1, 1)),
        "keep_top": (torch.ones(1), *run, torch.ones(1, 1, dtype=torch.int32), 1),
        "lowrank_keys": (k[0, 0].clone(), q[0, 0, :, :1], k[:, :, :1], run[0][..., None], run[1][..., None].int(), run[0][..., None],
                         torch.zeros(1, dtype=torch.int32), torch.zeros(1, 2, 0), torch.zeros(1, 2, 0)),
        "merge_attention": (q[None], torch.zeros(1, *q.shape[:3])),
        "move_rows": (k[0, 0], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
        "page_score": (q, k[0, 0], k[0, 0], *run),
        "paged_attention": (q, k[0, 0], v[0, 0], torch.zeros(1, 1, 1).long(), torch.ones(1, 1, 1).int(), one.scale),
        "place_pages": torch.zeros(3, 1, 1, dtype=torch.int32).unbind(),
        "pool_blocks": (q, one.block, "mean"),
        "pooled_score": (q.float(), k.float(), torch.ones(1, 1), *edges, 1, 1),
        "row_score": (q, k[0, 0], *run),
        "select_blocks": (torch.ones(1, 1, 1, 1), None, torch.ones(1, 1, 1, dtype=torch.int32), *edges, 1, 1),
        "key_mass": (q, k[0, 0], torch.zeros(q.shape[:3]), *run, one.scale),
        "strided_score": (q, k, *edges, PROXY_STRIDE, one.scale),
        "window_mass": (q, k[0, 0], *run, one.scale, 1),
        "window_score": (q, k, torch.zeros(1, 1, dtype=torch.int32), one.scale),
        "select_global": (torch.ones(1, 1, 1, 1), torch.ones(1, dtype=torch.float64), "head", *edges, 1, 1),
        "block_sparse_attention": (q, k, v, index.counts, index.indices, *edges, one.scale),
    }
    for name, call_args in few.items():
        op = OPS[name]
        backend, whole = op.chosen(*call_args), op.signature.bind(*call_args)
        whole.apply_defaults()
        run = next((b.run for b in op.backends if b.name == backend), op.reference)
        direct = Baseline(f"direct {name}", functools.partial(_repeat, run, whole.args))
        yield Entry("overhead", _repeat(op, call_args), {**one.fields(), "of": name, "backend": backend},
                    against={"direct": direct}, repeats=OVERHEAD_CALLS)


def _repeat(call: Callable, call_args: tuple) -> Callable:
    def run() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waking a second thread costs more than the call that is measured
        for _ in range(OVERHEAD_CALLS):
            call(*call_args)
        torch.set_num_threads(threads)

    return run


PLANS: dict[str, Callable[[Shape, argparse.Namespace], Iterator[Entry]]] = {
    "block_sparse_attention": _attention_calls,
    "antidiagonal_score": _score_calls,
    "window_score": _window_calls,
    "key_mass": functools.partial(_mass_calls, op="key_mass"),
    "window_mass": functools.partial(_mass_calls, op="window_mass"),
    "strided_score": _strided_calls,
    "pooled_score": _pooled_calls,
    "paged_attention": decode.paged_calls,
    "page_score": decode.quest_calls,
    "lowrank_keys": lambda shape, args: decode.lowrank_calls(shape, baselines(shape, args)),
    "select_blocks": _select_calls,
    "xattention": _xattention_calls,
    "overhead": _overhead_calls,
}


# -- running ------------------------------------------------------------------------------------------------------------


def entries(shape: Shape, args: argparse.Namespace, first: bool) -> list[Entry]:
    """Everything to time at one length, gates passed; overhead does not depend on the length, so only ``first`` has it."""
    return [entry for op in args.ops if op != "overhead" or first for entry in PLANS[op](shape, args)]


def warm_up(todo: list[Entry], args: argparse.Namespace) -> tuple[dict[str, Callable], dict[str, float | None], float]:
    """The calls of a round by name, peak memory of each entry, and the seconds a round takes.

    A baseline that cannot run here is reported and taken off the entries.
    """
    calls: dict[str, Callable] = {}
    peaks: dict[str, float | None] = {}
    broken: set[str] = set()
    for baseline in {b.key: b for entry in todo for b in entry.against.values()}.values():
        try:
            calls[baseline.key] = baseline.make()
            calls[baseline.key]()
        except Exception as error:  # a compiler that is missing or gives up raises whatever it likes
            calls.pop(baseline.key, None)
            broken.add(baseline.key)
            reason = " ".join(str(error).split())[:200]
            print(f"kernels: {baseline.key} cannot run here and is left out: {type(error).__name__}: {reason}", file=sys.stderr)
    for entry in todo:
        entry.against = {name: b for name, b in entry.against.items() if b.key not in broken}
        calls[entry.name] = entry.call
        peaks[entry.name] = measure.peak_mib(entry.call)
    return calls, peaks, sum(measure.seconds(call) for call in calls.values())


def record(entry: Entry, shape: Shape, us: dict[str, list[float]], peak: float | None, reps: int, lines: measure.Lines) -> None:
    """One line per baseline, or one without when there is none."""
    ours = [t / entry.repeats for t in us[entry.name]]
    row = {"op": entry.op, **shape.fields(), **entry.fields, "us": measure.percentiles(ours), "reps": reps, "peak_mib": peak}
    if entry.flop:
        row |= {"flop": entry.flop, "tflops": round(entry.flop / row["us"][1] / 1e6, 4)}
    if not entry.against:
        lines.write({**row, "baseline": None, "baseline_us": None, "ratio": None})
    for name, baseline in entry.against.items():
        theirs = [t / entry.repeats for t in us[baseline.key]]
        ratio = measure.pairwise(theirs, ours)
        if baseline.flop:  # of rates: another amount of work
            ratio *= entry.flop / baseline.flop
        if name == "direct":
            row["overhead_us"] = round(statistics.median(o - t for o, t in zip(ours, theirs)), 2)
        lines.write({**row, "baseline": name, "baseline_us": measure.percentiles(theirs), "ratio": round(ratio, 3)})


def run(args: argparse.Namespace, lines: measure.Lines) -> None:
    """Gate, estimate, time and record, one length after the other."""
    forced = use_backend(args.backend) if args.backend else contextlib.nullcontext()
    with forced, torch.inference_mode():
        for n in args.n:
            shape = Shape(n, args.heads, args.kv_heads, args.head_dim, args.block, args.dtype)
            print(f"{n} tokens: comparing with float64", file=sys.stderr, flush=True)
            todo = entries(shape, args, first=n == args.n[0])
            calls, peaks, a_round = warm_up(todo, args)
            print(f"{n} tokens: {len(calls)} calls x {args.reps} rounds, about {a_round * args.reps:.0f} s", file=sys.stderr,
                  flush=True)
            with tqdm(total=len(calls) * args.reps, unit="call", file=sys.stderr, leave=False) as bar:

                def tick(name: str) -> None:
                    bar.set_postfix_str(name, refresh=False)
                    bar.update()

                us = measure.interleave(calls, args.reps, tick)
            for entry in todo:
                record(entry, shape, us, peaks[entry.name], args.reps, lines)


def table(rows: list[dict]) -> Table:
    """The lines, one row each."""
    def number(value: float | None, form: str = "{:.3g}") -> str:
        return "" if value is None else form.format(value)

    shown = Table(title="ratio: baseline time / ours (mm: our rate / its rate); share: our time / baseline time")
    for heading in ("op", "backend", "tokens", "density", "", "us p50", "TFLOP/s", "baseline", "its us", "ratio", "share", "rms error",
                    "of torch's", "at 4q"):
        shown.add_column(heading, justify="left" if heading in ("op", "backend", "", "baseline") else "right")
    for row in rows:
        what = " ".join(str(row[key]) for key in ("of", "rule") if row.get(key))
        what += f" stride {row['stride']}" if row.get("stride") else ""
        what += "out=" if row.get("out") else ""
        what += f": {row['overhead_us']} us a call" if "overhead_us" in row else ""
        ratio = row["ratio"]
        share = f"{100 / ratio:.2f}%" if ratio and row["baseline"] != "mm" else ""
        shown.add_row(row["op"], row["backend"], str(row["N"]), number(row.get("density")), what.strip(), number(row["us"][1], "{:,.1f}"),
                      number(row.get("tflops")), row["baseline"] or "", number(row["baseline_us"] and row["baseline_us"][1], "{:,.1f}"),
                      number(ratio, "{:.2f}"), share, number(row.get("rms_error"), "{:.2e}"),
                      number(row.get("error_ratio"), "{:.2f}"), number(row.get("error_ratio_q4"), "{:.2f}"))
    return shown


# -- command line -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kernels: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"of {', '.join(PLANS)} (default: all)")
    add("--n", default="8192,16384", help="tokens (default: %(default)s)")
    add("--density", default="1,0.5,0.25,0.1,0.05", help="blocks read / causally reachable (default: %(default)s)")
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--block", type=int, default=128, help="tokens per block (default: %(default)s)")
    add("--dtype", default="bf16", help=f"of {', '.join(DTYPES)} (default: %(default)s)")
    add("--backend", metavar="NAME", help="force this backend instead of the one that would be chosen")
    add("--threads", type=int, default=2)
    add("--baseline", default=",".join(BASELINES), help=f"of {','.join(BASELINES)}, or none (default: %(default)s)")
    add("--reps", type=int, default=5, help="rounds (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="append the lines to this file")
    return parser


def _numbers(text: str, kind: type, option: str) -> list:
    try:
        return list(dict.fromkeys(kind(piece) for piece in text.split(",")))
    except ValueError:
        raise BenchError(f"{option} is {text!r}; give numbers separated by commas") from None


def _known(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    for name in names:
        if name not in known:
            raise BenchError(f"{what} {name!r} is not known; use one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The same with lists parsed and every bound held."""
    args.ops = _known(args.ops or list(PLANS), list(PLANS), "op")
    args.n = _numbers(args.n, int, "--n")
    args.density = _numbers(args.density, float, "--density")
    args.baseline = _known([] if args.baseline == "none" else args.baseline.split(","), BASELINES, "baseline")
    _known([args.dtype], list(DTYPES), "dtype")
    for density in args.density:
        if not 0 < density <= 1:
            raise BenchError(f"--density {density} is outside (0, 1]; it is the share of reachable blocks that are read")
    for option, values in {"n": args.n, **{o: [getattr(args, o)] for o in ("heads", "kv_heads", "head_dim", "block", "threads",
                                                                           "reps")}}.items():
        if min(values) < 1:
            raise BenchError(f"--{option.replace('_', '-')} is {min(values)}; give 1 or more")
    if args.heads % args.kv_heads:
        raise BenchError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}; choose a divisor")
    wrong = [s for s in (*STRIDES, PROXY_STRIDE) if args.block % s]
    if wrong:
        raise BenchError(f"--block {args.block} is not a multiple of stride {wrong[0]}; 64 and 128 are usual")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args = _checked(args)
        try:
            lines = measure.Lines(args.json)
        except OSError as error:
            raise BenchError(f"cannot write --json {args.json} ({error.strerror}); give a file in a folder that exists") from error
        torch.set_num_threads(args.threads)
        run(args, lines)
    except (BenchError, NoBackendError) as error:
        parser.error(str(error))
    except GateError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kernels: stopped; what was finished is in the JSON file", file=sys.stderr)
        return 130
    Console(width=None if sys.stdout.isatty() else 200).print(table(lines.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
