"""python -m benchmarks.peer_kvpress SIDE: the same needles, budgets and model with kvpress's caches and with ours.

kvpress pins transformers below 5.3, so each side runs in its own environment and appends to the same JSON lines:

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 transformers==5.2.0 kvpress
    PYTHONPATH=. /tmp/peer/bin/python -m benchmarks.peer_kvpress kvpress
    python -m benchmarks.peer_kvpress ours
    python -m benchmarks.peer_kvpress table

Every method runs in a process of its own, so that its peak memory is its own. The prompt is read in one piece, question included,
compressed to ``budget`` tokens per KV head, and answered greedily. kvpress rotates the queries that it recomputes for every layer; the
shipped model's second layer has no rotary positions, so here that layer is handed the identity rotation: without it kvpress would
score with wrong queries, a limit of the comparison's model and not of the method.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .needle.haystack import Haystack

MODEL = Path(__file__).parent / "needle" / "model"
RESULTS = Path(__file__).parent / "results" / "peer_kvpress_cpu.jsonl"
METHODS = ("dense", "streaming", "knorm", "keydiff", "tova", "snapkv", "pyramidkv", "adakv")
WINDOW, KERNEL = 64, 5


def _press(method: str, ratio: float):
    import kvpress

    snap = {"compression_ratio": ratio, "window_size": WINDOW, "kernel_size": KERNEL}
    return {
        "streaming": lambda: kvpress.StreamingLLMPress(compression_ratio=ratio),
        "knorm": lambda: kvpress.KnormPress(compression_ratio=ratio),
        "keydiff": lambda: kvpress.KeyDiffPress(compression_ratio=ratio),
        "tova": lambda: kvpress.TOVAPress(compression_ratio=ratio),
        "snapkv": lambda: kvpress.SnapKVPress(**snap),
        "pyramidkv": lambda: kvpress.PyramidKVPress(**snap),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(**snap)),
    }[method]()


def _identity_where_nothing_rotates(model) -> None:
    def turn_nothing(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    for layer, rotates in zip(model.model.layers, model.config.no_rope_layers):
        if not rotates:
            layer.self_attn.register_forward_pre_hook(turn_nothing, with_kwargs=True)


@contextlib.contextmanager
def _compressing(side: str, model, method: str, budget: int, n: int) -> Iterator[object]:
    """Yields the cache to read the prompt into; kvpress compresses while its context is open."""
    if side == "kvpress":
        from transformers import DynamicCache

        ratio = max(0.0, 1 - (budget + 0.5) / n)
        with _press(method, ratio)(model) if method != "dense" else contextlib.nullcontext():
            yield DynamicCache()
        return
    import kvcache
    import sparse_attn

    settings = {"window": WINDOW, "kernel": KERNEL} if method in ("snapkv", "pyramidkv", "adakv") else {}
    with sparse_attn.patch(model, prefill="dense") if method != "dense" else contextlib.nullcontext():
        yield kvcache.make_cache(model, method, budget, **settings) if method != "dense" else None


@torch.inference_mode()
def _answer(side: str, model, method: str, budget: int, ids: torch.Tensor, steps: int, stop: set[int]) -> tuple[list[int], float, float]:
    n, began = ids.shape[1], time.perf_counter()
    with _compressing(side, model, method, budget, n) as cache:
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, read, written = out.past_key_values, time.perf_counter(), [int(out.logits[0, -1].argmax())]
        if side == "ours":
            _write(model, cache, n, steps, stop, written)
    if side == "kvpress":
        _write(model, cache, n, steps, stop, written)
    return written, read - began, (time.perf_counter() - read) / max(1, len(written) - 1)


def _write(model, cache, n: int, steps: int, stop: set[int], written: list[int]) -> None:
    while len(written) < steps and written[-1] not in stop:
        at = torch.tensor([[n + len(written) - 1]])  # kvpress's cache does not know how long the text is
        out = model(torch.tensor([[written[-1]]]), position_ids=at, past_key_values=cache, use_cache=True)
        written.append(int(out.logits[0, -1].argmax()))


@torch.inference_mode()
def _padding_error(side: str, model, method: str, budget: int, ids: torch.Tensor) -> float:
    """Largest difference of the logits behind a prompt when it is left-padded beside a longer one, and when it is alone."""
    short, pad = ids[:, : ids.shape[1] // 2], ids.shape[1] - ids.shape[1] // 2
    both = torch.cat([ids, torch.nn.functional.pad(short, (pad, 0), value=model.config.pad_token_id or 0)])
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    where = (mask.cumsum(1) - 1).clamp(min=0)
    token, logits = torch.tensor([[5], [5]]), []
    for batch, real, at in ((both, mask, where), (short, torch.ones_like(short), torch.arange(short.shape[1])[None])):
        rows = batch.shape[0]
        with _compressing(side, model, method, budget, batch.shape[1]) as cache:
            cache = model(batch, attention_mask=real, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            if side == "ours":
                logits.append(_next(model, token[:rows], real, at, cache))
        if side == "kvpress":
            kept = cache.layers[0].keys.shape[2]
            logits.append(_next(model, token[:rows], real[:, -kept:], at, cache))
    return float((logits[0][-1] - logits[1][-1]).abs().max())


def _next(model, token: torch.Tensor, real: torch.Tensor, at: torch.Tensor, cache) -> torch.Tensor:
    real = torch.cat([real, torch.ones_like(token)], 1)
    return model(token, attention_mask=real, position_ids=at[:, -1:] + 1, past_key_values=cache, use_cache=True).logits[:, -1]


def _run_one(side: str, method: str, lengths: list[int], budgets: list[int], depths: int, threads: int, file: str) -> None:
    """All cases of one method, in this process."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
    if side == "kvpress":
        _identity_where_nothing_rotates(model)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    haystack = Haystack(lambda piece: tokenizer.encode(piece, add_special_tokens=False), start, None)
    stop = {model.generation_config.eos_token_id}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for length in lengths:
        for budget in budgets:
            right, reads, writes = 0, [], []
            for i in range(depths):
                prompt = haystack.prompt("multikey", length, i / max(1, depths - 1), 0)
                ids = torch.tensor([prompt.ids])
                written, read, write = _answer(side, model, method, budget, ids, prompt.answer_tokens, stop)
                text = tokenizer.decode([t for t in written if t not in stop], skip_special_tokens=True)
                right += all(value in text for value in prompt.expected)
                reads.append(read), writes.append(write)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            padded = _padding_error(side, model, method, budget, ids[:, :2048]) if length == min(lengths) else None
            row = {"side": side, "method": method, "length": length, "budget": budget, "accuracy": right / depths, "prompts": depths,
                   "prefill_s": statistics.median(reads), "decode_s": statistics.median(writes), "peak_rss_mib": peak, "padding_error": padded,
                   "threads": threads, **versions}
            with open(file, "a") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{side} {method} {length} {budget}: {row['accuracy']:.2f}", flush=True)
            if method == "dense":
                break


def _table(file: Path) -> str:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = ["| length | budget | method | accuracy kvpress, ours | prefill s | decode ms | peak MiB | left-padded error |", "|---" * 8 + "|"]
    for key in dict.fromkeys((r["length"], r["budget"], r["method"]) for r in rows):
        pair = [next((r for r in rows if (r["length"], r["budget"], r["method"], r["side"]) == (*key, side)), None) for side in ("kvpress", "ours")]
        if None in pair:
            continue

        def both(text) -> str:
            return ", ".join(text(row) for row in pair)

        padded = "" if pair[0]["padding_error"] is None else both(lambda r: f"{r['padding_error']:.1e}")
        cells = [str(key[0]), str(key[1]), key[2], both(lambda r: f"{r['accuracy']:.2f}"), both(lambda r: f"{r['prefill_s']:.2f}"),
                 both(lambda r: f"{1e3 * r['decode_s']:.1f}"), both(lambda r: f"{r['peak_rss_mib']:.0f}"), padded]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_kvpress", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("side", choices=("kvpress", "ours", "table"))
    add("--methods", default=",".join(METHODS))
    add("--lengths", default="4096,16384")
    add("--budgets", default="512,2048")
    add("--depths", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.side == "table":
        print(_table(args.json))
        return 0
    for method in args.methods.split(","):
        numbers = ([int(n) for n in text.split(",")] for text in (args.lengths, args.budgets))
        work = multiprocessing.get_context("spawn").Process(
            target=_run_one, args=(args.side, method, *numbers, args.depths, args.threads, str(args.json)))
        work.start()
        work.join()
        if work.exitcode:
            print(f"peer_kvpress: {method} ended with {work.exitcode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
