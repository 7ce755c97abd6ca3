"""python -m benchmarks.caches: every cache that evicts, by budget, on the same needles of the shipped model.

Prompts are read in chunks. The question is part of what is compressed ("inside"), or comes after the text was read and compressed
("after"): what such a cache has dropped by then, no question brings back. One JSON line per case; a run that was stopped goes on
from its file. Beside that file a Markdown file of the same name gets tables of accuracy and of bytes for each length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvcache import METHODS, READERS, RETRIEVING

from . import sweep
from .needle import runner
from .needle.grade import HELD, Row
from .needle.haystack import NeedleError

RESULTS = Path("build") / "caches.jsonl"
QUESTIONS = ("inside", "after")
# a score that waits until it knows the whole prompt holds all of it until then: a second row shows what that buys
ALSO: dict[str, list[dict]] = {"snapkv": [{"evict": "prompt"}]}
# methods that read a file made for the model: their argument, the file beside the model, and what suits small budgets
FILES = {"duo": ("profile", "profile_duo.json", {}), "locret": ("path", "locret.safetensors", {"stabilizers": 64})}
# a split of the heads says itself how much is kept
NO_BUDGET = ("duo",)


def methods(names: Sequence[str], budgets: Sequence[int], questions: Sequence[str], model: Path) -> list[runner.Method]:
    """For each question a cache that keeps everything, then every named one with every budget.

    Without names: all that evict and need no file, or whose file lies beside the model.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise NeedleError(f"--caches names {unknown[0]!r}; there are {', '.join(sorted(METHODS))}")
    without = [name for name in names if name in FILES and not (model / FILES[name][1]).is_file()]
    if without:
        raise NeedleError(f"--caches names {without[0]!r}, which needs {FILES[without[0]][1]} beside the model; it is not in {model}")
    names = names or [name for name in METHODS if name not in (*READERS, *RETRIEVING) and (name not in FILES or (model / FILES[name][1]).is_file())]
    unknown = [question for question in questions if question not in QUESTIONS]
    if unknown:
        raise NeedleError(f"--questions names {unknown[0]!r}; use {','.join(QUESTIONS)} or one of them")
    found = []
    for question in questions:
        found.append(runner.Method(question=question))
        for name in names:
            argument, file, settings = FILES.get(name, ("", "", {}))
            of_model = {argument: os.path.relpath(model / file), **settings} if file else {}
            sizes = [{}] if name in NO_BUDGET else [{"budget": n} for n in budgets]
            found += [runner.Method(cache=name, cache_args=size | of_model | more, question=question)
                      for more in ({}, *ALSO.get(name, ())) for size in sizes]
    for method in found:
        method.check()
    return found


def summary(rows: Iterable[Row]) -> list[Row]:
    """One row per length, question, cache with its settings, and budget (None where there is none); no cache is "everything"."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        settings = dict(row.get("cache_args", {}))
        budget = settings.pop("budget", None)
        more = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in ("path", "profile"))
        groups[row["length"], row.get("question", "inside"), row.get("cache", "everything"), more, budget].append(row)
    found = []
    for (length, question, cache, more, budget), group in groups.items():
        accuracy: dict[str, list[float]] = defaultdict(list)
        for row in group:
            accuracy[row["task"]].append(row["correct"])
        means = {name: statistics.fmean(row[name] for row in group) for name in (*HELD, "kv_formula_bytes")}
        name = f"{cache} ({more})" if more else cache
        found.append({"length": length, "question": question, "cache": name, "settings": more, "budget": budget,
                      "cases": len(group), **means, "accuracy": {task: statistics.fmean(values) for task, values in accuracy.items()}})
    return found


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines, an empty one behind."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _cells(rows: list[Row], text) -> dict[tuple, str]:
    """``text(row)`` by (cache, question, budget); what has no budget stands under every one."""
    cells, budgets = {}, sorted({row["budget"] for row in rows if row["budget"]})
    for row in rows:
        for budget in [row["budget"]] if row["budget"] else budgets or [None]:
            cells[row["cache"], row["question"], budget] = text(row)
    return cells


def accuracy_table(rows: list[Row]) -> list[str]:
    """Accuracy of each task, by cache and question x budget."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["accuracy"]))

    def of(row: Row) -> str:
        return " / ".join(f"{row['accuracy'][task]:.2f}" if task in row["accuracy"] else "-" for task in tasks)

    cells = _cells(rows, of)
    budgets = list(dict.fromkeys(budget for _, _, budget in cells))
    named = sorted({key[:2] for key in cells}, key=lambda key: (key[1] != "inside", key[0] != "everything", key[0]))
    lines = [(cache, question, *(cells.get((cache, question, n), "") for n in sorted(budgets))) for cache, question in named]
    return [f"Accuracy ({' / '.join(tasks)}), budget in tokens per KV head:", "",
            *table(["cache", "question", *map(str, sorted(budgets))], lines)]


def bytes_table(rows: list[Row]) -> list[str]:
    """What is held once the answer is written, and at the most; medians over caches and questions."""
    def mib(group: list[Row], name: str) -> float:
        return statistics.median(row[name] for row in group) / 2**20

    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["budget"] is None, "evict" in row["settings"], row["budget"] or 0)):
        waits = ", evict=prompt" if "evict=prompt" in row["settings"] else ""
        groups[row["cache"] if row["budget"] is None else f"{row['budget']}{waits}"].append(row)
    whole, lines = groups.get("everything"), []
    for name, group in groups.items():
        less = [f"{mib(whole, key) / mib(group, key):.1f}x" if whole else "" for key in HELD[1:]]
        kept = statistics.median(row["kept_tokens"] for row in group)
        held, peak, formula = (f"{mib(group, key):.2f}" for key in (*HELD[1:], "kv_formula_bytes"))
        lines.append((name, f"{kept:.0f}", held, less[0], peak, formula, less[1]))
    return table(["budget", "tokens kept", "KV MiB", "smaller by", "peak KV MiB", "by formula", "smaller by"], lines)


def markdown(rows: Iterable[Row]) -> str:
    """Accuracy and bytes, a pair of tables per length."""
    summed, lines = summary(rows), []
    for length in sorted({row["length"] for row in summed}):
        here = [row for row in summed if row["length"] == length]
        lines += [f"## {length} tokens, {max(row['cases'] for row in here)} prompts a cell", ""]
        lines += [*accuracy_table(here), *bytes_table(here)]
    return "\n".join(lines)


def compact(rows: Iterable[Row]) -> str:
    """One table of the longest prompts: accuracy over all tasks, questions side by side."""
    summed = summary(rows)
    longest = max(row["length"] for row in summed)
    here = [row for row in summed if row["length"] == longest]
    cells = _cells(here, lambda row: f"{statistics.fmean(row['accuracy'].values()):.2f}")
    columns = sorted({key[1:] for key in cells}, key=lambda column: (column[0] != "inside", column[1]))
    caches = sorted({key[0] for key in cells}, key=lambda cache: (cache != "everything", cache))
    return "\n".join(table([f"{longest} tokens", *(f"{question}, {budget}" for question, budget in columns)],
                            ((cache, *(cells.get((cache, *column), "") for column in columns)) for cache in caches)))


def _run(args: argparse.Namespace) -> None:
    names = args.caches.split(",") if args.caches else []
    chosen = methods(names, [int(n) for n in args.budgets.split(",")], args.questions.split(","), Path(args.model))
    if args.chunk < 1:
        raise NeedleError(f"--chunk is {args.chunk}; give 1 or more tokens")
    rows = sweep.run(args, chosen, sweep.cases(args, sweep.ends_left_out), args.chunk)
    tables = args.json.with_suffix(".md")
    tables.write_text(markdown(rows))
    print(compact(rows))
    print(f"cases: {args.json}   tables: {tables}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = sweep.parser("caches", __doc__, "4096,16384,32768", "4,2,1", "single,multikey", RESULTS)
    add = parser.add_argument
    add("--caches", help="names separated by commas (default: all, but of those that read a file only what the model has)")
    add("--budgets", default="256,512,1024,2048", help="tokens per KV head (default: %(default)s)")
    add("--questions", default=",".join(QUESTIONS), help="default: %(default)s")
    add("--chunk", type=int, default=2048, help="tokens read at once (default: %(default)s)")
    args = parser.parse_args(argv)
    return sweep.finish("caches", parser, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
