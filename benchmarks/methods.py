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

from sparse_attn import PATTERNS

from . import sweep
from .needle import runner
from .needle.grade import Row
from .needle.haystack import TASKS, NeedleError

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
        tasks = [task for task in TASKS if any(task in row["accuracy"] for row in here)]
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
    names = args.methods.split(",") if args.methods else [name for name in PATTERNS if name not in WITHOUT]
    batches = sweep.cases(args, sweep.ends_included)
    rows = sweep.run(args, methods(names, Path(args.model)), batches, chunk=None)
    print(markdown(rows))
    for name, why in WITHOUT.items():
        print(f"not run: {name} needs {why}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = sweep.parser("methods", __doc__, "4096,8192,16384,32768,65536", "5,5,5,5,1", ",".join(TASKS), RESULTS)
    parser.add_argument("--methods", help="names separated by commas (default: all)")
    args = parser.parse_args(argv)
    return sweep.finish("methods", parser, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
