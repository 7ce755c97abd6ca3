"""From answers to figures: the share of expected values found, JSON lines that survive a kill, tables and a heat map."""

import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .haystack import NeedleError

Row = dict[str, object]

# what earlier versions could not vary, and what their lines, which do not mention it, had
_ADDED: dict[str, object] = {"dual_chunk": {}, "cache": "", "cache_args": {}, "cache_file": "", "question": "inside"}


def grade(answer: str, expected: Iterable[str]) -> float:
    """Share of the expected values among the answer's first values, as many as were expected.

    A value counts as a whole number (or word), so 48213 does not answer 4821, and listing many guesses does not help.
    """
    wanted = list(expected)
    pattern = r"\d+" if all(value.isdigit() for value in wanted) else r"[^\W\d_]+"
    given = re.findall(pattern, answer)
    if pattern != r"\d+":  # names stand between other words
        given = [word for word in given if word.isupper()]
    said = set(given[: len(wanted)])
    return sum(value in said for value in wanted) / len(wanted)


class CaseFile:
    """The JSON lines of a run; cases found in it are not run again.

    A last line without its newline was torn by a kill and is cut off. Any other unreadable line is refused, so that a
    wrong file name never costs the user a file.
    """

    def __init__(self, path: Path | None, key: Iterable[str]):
        self._path, self._key = path, tuple(key)
        self.rows: list[Row] = []
        if path is None:
            return
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise NeedleError(f"cannot write {path}; give a file in a folder that exists and is writable")
        if path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.key(row)
            except (ValueError, KeyError, TypeError):
                raise NeedleError(f"line {number} of {path} is not a case of this runner; give another --json file") from None
            self.rows.append(row)
        if len(whole) < len(text):
            if not self.rows and not _starts_a_case(text):
                raise NeedleError(f"line 1 of {path} is not a case of this runner; give another --json file")
            os.truncate(path, len(whole))

    def key(self, row: Row) -> str:
        added = [row.get(name, usual) for name, usual in _ADDED.items()]
        return json.dumps([*(row[name] for name in self._key), *added], sort_keys=True)

    def done(self) -> dict[str, Row]:
        return {self.key(row): row for row in self.rows}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


# what a line says of the cache; absent from lines of earlier versions
HELD = ("kept_tokens", "kv_bytes", "kv_peak_bytes")


def _starts_a_case(text: bytes) -> bool:
    start = b'{"task": '
    return text.startswith(start[: len(text)])


def method_name(row: Row) -> str:
    def called(name: str, arguments: dict) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in arguments.items())
        return f"{name}({inside})" if inside else name

    parts = [called(row["prefill"], row["prefill_args"])]
    parts += [called("dual_chunk", row["dual_chunk"])] if row.get("dual_chunk") else []
    parts += [called(row["cache"], row["cache_args"])] if row.get("cache") else []
    return " + ".join(parts) + (", question after" if row.get("question") == "after" else "")


def is_baseline(row: Row) -> bool:
    """Is this the model as it was loaded, with the cache that transformers makes?"""
    return row["prefill"] == "dense" and not row.get("dual_chunk") and not row.get("cache")


def _mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _pair(row: Row) -> tuple:
    return row["task"], row["length"], row["depth"], row["seed"], row.get("question", "inside")


def summary(rows: list[Row]) -> list[Row]:
    """One row per method and length: accuracy per task, density, seconds, paired speedup over dense, what the cache held."""
    dense = {_pair(row): row["prefill_s"] for row in rows if is_baseline(row)}
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["length"], method_name(row)].append(row)
    out = []
    for (length, method), group in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "dense", item[0][1])):
        tasks: dict[str, list[Row]] = defaultdict(list)
        for row in group:
            tasks[row["task"]].append(row)
        ratios = [dense[_pair(row)] / row["prefill_s"] for row in group if _pair(row) in dense]
        out.append(
            {
                "length": length,
                "method": method,
                "cases": len(group),
                "accuracy": {task: _mean(found, "correct") for task, found in tasks.items()},
                "density": _mean(group, "density"),
                "prefill_s": statistics.median(row["prefill_s"] for row in group),
                "speedup": statistics.median(ratios) if ratios else None,
                **{name: _mean(group, name) for name in HELD if all(name in row for row in group)},
            }
        )
    return out


def print_tables(rows: list[Row], console: Console) -> None:
    """The summary, then accuracy over depth x length for every method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(title="Needle in a haystack")
    held = any(row.get("cache") for row in rows)
    columns = ("kept tokens", "KV MiB", "peak KV MiB") if held else ()
    for name in ("length", "method", "cases", *tasks, "density", "prefill s", "speedup over dense", *columns):
        table.add_column(name, justify="left" if name == "method" else "right")
    for line in summary(rows):
        accuracy = [f"{line['accuracy'][task]:.3f}" if task in line["accuracy"] else "" for task in tasks]
        speedup = "" if line["speedup"] is None else f"{line['speedup']:.2f}"
        figures = (f"{line['density']:.3f}", f"{line['prefill_s']:.2f}", speedup)
        if held:
            known = HELD[0] in line
            figures += (f"{line['kept_tokens']:.0f}", *(f"{line[name] / 2**20:.2f}" for name in HELD[1:])) if known else ("",) * 3
        table.add_row(str(line["length"]), line["method"], str(line["cases"]), *accuracy, *figures)
    console.print(table)

    for method, (depths, lengths, grid) in grids(rows).items():
        table = Table(title=f"{method}: accuracy by depth and length")
        table.add_column("depth", justify="right")
        for length in lengths:
            table.add_column(str(length), justify="right")
        for depth, line in zip(depths, grid):
            table.add_row(f"{depth:.2f}", *("" if share is None else f"{share:.2f}" for share in line))
        console.print(table)


def grids(rows: list[Row]) -> dict[str, tuple[list[float], list[int], list[list[float | None]]]]:
    """For every method its depths, its lengths and the accuracy at each pair, over all tasks."""
    out = {}
    for method in dict.fromkeys(map(method_name, rows)):
        cells: dict[tuple, list[float]] = defaultdict(list)
        for row in rows:
            if method_name(row) == method:
                cells[row["depth"], row["length"]].append(row["correct"])
        depths, lengths = (sorted(set(side)) for side in zip(*cells))
        found = [[statistics.fmean(cells[d, n]) if (d, n) in cells else None for n in lengths] for d in depths]
        out[method] = depths, lengths, found
    return out


def plot(rows: list[Row], path: Path) -> None:
    """Heat map of accuracy over depth and length, one panel per method, as PNG."""
    from matplotlib.figure import Figure

    panels = grids(rows)
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2), layout="constrained")
    for axes, (method, (depths, lengths, grid)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        shares = [[float("nan") if share is None else share for share in line] for line in grid]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axes.set(xlabel="length (tokens)", ylabel="depth (0 start, 1 end)", title=method)
        for y, line in enumerate(grid):
            for x, share in enumerate(line):
                if share is not None:
                    axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="accuracy")
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)
