"""python -m benchmarks.methods: every prefill method side by side on the shipped model.

Each method answers the same needles as dense attention. One JSON line per case; a run that was stopped goes on from its file.
Then one table per length: accuracy per task, density, and the speedups of attention (choosing blocks included) and of the
whole prefill, each the median over the same prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from sparse_attn import PATTERNS

from .needle import runner
from .needle.grade import CaseFile, Row
from .needle.haystack import FORM, TASKS, NeedleError

RESULTS = Path("build") / "methods.jsonl"
# what a needle prompt cannot give a method
WITHOUT = {"block_rank": "documents with segment ids"}
# methods whose defaults were made for prompts far longer than these read all of a short one; a second row shows them smaller
SMALLER: dict[str, list[dict]] = {
    "block_topk": [{"top_k": 16}],
    "critiprefill": [{"budget": 512, "dense_below": 512}],
    "flexprefill": [{"min_budget": 256}],
    "minference": [{"heads": {"name": "vertical_slash", "vertical": 100, "slash": 800}}],
    "moba": [{"block_k": 256, "top_k": 4}],
    "proxyattn": [{"min_budget": 512}],
}
# one needle stands at a depth; the other tasks spread theirs over the text, so one prompt says as much
BY_DEPTH = ("single", "multikey")


def methods(names: Sequence[str], profiles: Path) -> list[runner.Method]:
    """Dense, every named method with its defaults and, where SMALLER has them, smaller ones, then by the model's profiles."""
    unknown = [name for name in names if name not in PATTERNS]
    if unknown:
        raise NeedleError(f"--methods names {unknown[0]!r}; there are {', '.join(sorted(PATTERNS))}")
    without = [name for name in names if name in WITHOUT]
    if without:
        raise NeedleError(f"--methods names {without[0]!r}, which needs {WITHOUT[without[0]]}; a needle prompt has none")
    found = [runner.Method()]
    for name in names:
        if name not in ("dense", "duo"):  # without a profile duo has no retrieval heads to read with
            found += [runner.Method(name, arguments) for arguments in ({}, *SMALLER.get(name, ()))]
    for method in found:
        method.check()
    # what calibration found for this very model
    calibrated = [runner.Method.calibrated(path) for path in sorted(profiles.glob("profile_*.json"))]
    found += [method for method in calibrated if method.name in names]
    return found


def cases(lengths: Sequence[int], tasks: Sequence[str], depths: Sequence[int], trials: int) -> list[list[runner.Case]]:
    """``depths`` needle depths per length for the tasks where depth matters, one prompt per trial for the others."""
    found = []
    for length, n in zip(lengths, depths):
        spread = [0.5] if n == 1 else [round(i / (n - 1), 4) for i in range(n)]
        for task in tasks:
            for seed in range(trials):
                found += [[runner.Case(task, length, depth, seed)] for depth in (spread if task in BY_DEPTH else [0.5])]
    return found


def summary(rows: Iterable[Row]) -> list[Row]:
    """One row per length and method, by length and then by density."""
    rows = list(rows)
    place = ("task", "length", "depth", "seed")
    dense = {tuple(row[name] for name in place): row for row in rows if row["prefill"] == "dense"}
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["length"], row["prefill"], json.dumps(row["prefill_args"])].append(row)
    found = []
    for (length, name, arguments), group in groups.items():
        accuracy: dict[str, list[float]] = defaultdict(list)
        speed: dict[str, list[float]] = defaultdict(list)
        for row in group:
            accuracy[row["task"]].append(row["correct"])
            for key in ("attention_s", "prefill_s"):
                other = dense.get(tuple(row[name] for name in place))
                if other is not None:
                    speed[key].append(other[key] / row[key])
        found.append({"length": length, "method": name, "prefill_args": json.loads(arguments), "cases": len(group),
                      "accuracy": {task: statistics.fmean(values) for task, values in accuracy.items()},
                      "density": statistics.fmean(row["density"] for row in group),
                      **{f"{key[:-2]}_speedup": statistics.median(values) for key, values in speed.items()}})
    return sorted(found, key=lambda row: (row["length"], -row["density"]))


def markdown(rows: Iterable[Row]) -> str:
    """A table per length."""
    lines: list[str] = []
    summed = summary(rows)
    for length in dict.fromkeys(row["length"] for row in summed):
        here = [row for row in summed if row["length"] == length]
        tasks = list(dict.fromkeys(task for row in here for task in row["accuracy"]))
        head = ["method", *tasks, "density", "attention", "prefill"]
        lines += [f"{length} tokens", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in here:
            arguments = ", ".join(f"{name}={value}" for name, value in row["prefill_args"].items())
            arguments = "calibrated" if "profile" in row["prefill_args"] else arguments
            accuracy = [f"{row['accuracy'][task]:.2f}" if task in row["accuracy"] else "" for task in tasks]
            speed = [f"{row[key]:.2f}x" if key in row else "" for key in ("attention_speedup", "prefill_speedup")]
            name = row["method"] + (f" ({arguments})" if arguments else "")
            cells = [name, *accuracy, f"{row['density']:.3f}", *speed]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> None:
    lengths = [int(n) for n in args.lengths.split(",")]
    depths = [int(n) for n in args.depths.split(",")]
    depths = depths * len(lengths) if len(depths) == 1 else depths
    if len(depths) != len(lengths) or min(lengths + depths) < 1:
        raise NeedleError(f"--depths {args.depths} gives {len(depths)} numbers for {len(lengths)} lengths; give one, or one each")
    tasks = args.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise NeedleError(f"task {unknown[0]!r} is not known; use one of {', '.join(TASKS)}")
    names = args.methods.split(",") if args.methods else [name for name in PATTERNS if name not in WITHOUT]
    chosen = methods(names, Path(args.model))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    file = CaseFile(args.json, runner.KEY)
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    dtype = runner.pick_dtype("auto", args.device)
    model, tokenizer = runner.load(args.model, args.device, dtype, False)
    settings = runner.Settings(
        model="bundled" if Path(args.model) == runner.BUNDLED else args.model,
        weights=runner.weights_id(args.model),
        haystack=f"generated, form {FORM}",
        device=args.device,
        dtype=str(dtype).removeprefix("torch."),
        threads=args.threads,
        batch_size=1,
        chunk=None,
    )
    batches = cases(lengths, tasks, depths, args.trials)
    with tqdm(total=len(chosen) * len(batches), unit="case", file=sys.stderr, smoothing=0) as bar:

        def tick(row: Row) -> None:
            bar.set_postfix_str(f"{row['length']} {row['task']} {row['prefill']}", refresh=False)
            bar.update()

        rows = runner.run(model, tokenizer, runner.make_haystack(tokenizer, None), batches, chosen, settings, file, tick)
    print(markdown(rows))
    for name, why in WITHOUT.items():
        print(f"not run: {name} needs {why}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", help="names separated by commas (default: all)")
    add("--model", default=str(runner.BUNDLED), help="local folder or hub id (default: the model that ships)")
    add("--lengths", default="4096,8192,16384,32768,65536", help="tokens (default: %(default)s)")
    add("--depths", default="5,5,5,5,1", help="needle depths per length, for single and multikey (default: %(default)s)")
    add("--tasks", default=",".join(TASKS), help="default: %(default)s")
    add("--trials", type=int, default=1, help="prompts per task, length and depth (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="JSON lines (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (NeedleError, ValueError) as error:
        parser.exit(2, f"methods: {error} (see --help)\n")
    except KeyboardInterrupt:
        print("methods: stopped; the same command goes on from the JSON file", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
