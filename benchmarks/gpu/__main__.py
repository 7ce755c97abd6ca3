"""python -m benchmarks.gpu, or make bench-gpu: is everything right on this GPU, and how fast is it.

Builds what is missing, checks every op against float64, times it beside what people use instead, and appends a JSON line per
measurement to RESULTS/<gpu>.jsonl. Exit status: 0 all is right, 1 something failed, 2 there is no GPU, or the command line is
wrong. Bars that were not reached are printed; they are no failure.

    python -m benchmarks.gpu table benchmarks/results/<gpu>.jsonl       the lines as Markdown
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_RESULTS = Path(__file__).parents[1] / "results"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu: {message} (see --help)\n")


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help=f"these parts: {', '.join(names)} (default: all)")
    add("--list", action="store_true", help="say what the parts do")
    add("--results", type=Path, metavar="FOLDER", help="where the lines go (default: benchmarks/results)")
    add("--limit", type=float, metavar="SECONDS", help="for everything together (default: 520)")
    add("--commit", help="of a copy without its git history")
    add("--rehearse", action="store_true", help="on the CPU and tiny shapes: does the benchmark itself work?")
    for internal in ("--part", "--start", "--step", "--seconds", "--report"):
        add(internal, help=argparse.SUPPRESS)
    return parser


def bench(rehearse: bool = False, path: Path | None = None, commit: str | None = None, seconds: float = float("inf")):
    """What the units of a part share."""
    import torch

    from .. import measure
    from .machine import Gpu, StandIn
    from .units import TINY, Bench, Sizes

    machine = StandIn() if rehearse else Gpu()
    if rehearse:
        torch.set_num_threads(1)
    lines = measure.Lines(path, functools.partial(machine.stamp, commit))
    return Bench(machine, TINY if rehearse else Sizes(), lines, time.monotonic() + seconds, functools.partial(print, flush=True))


def table(words: Sequence[str]) -> int:
    """The subcommand of that name."""
    from .bars import markdown, read

    parser = _Parser(prog="python -m benchmarks.gpu table", description="The lines of a run as Markdown.")
    parser.add_argument("file", type=Path)
    file = parser.parse_args(words).file
    try:
        rows = read(file)
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {file} ({error}); give a file that make bench-gpu wrote")
    if not rows:
        parser.error(f"{file} holds no line of this benchmark; give a file that make bench-gpu wrote")
    print(markdown(rows))
    return 0


def child(args: argparse.Namespace, path: Path) -> int:
    """One part, in this process."""
    import torch

    from .runner import PARTS, run_units

    def report(said: dict) -> None:
        with open(args.report, "a") as file:
            file.write(json.dumps(said) + "\n")

    part = next(part for part in PARTS if part.name == args.part)
    with torch.inference_mode():
        mine = bench(args.rehearse, path, args.commit, float(args.seconds))
        return run_units(part, mine, int(args.start), report, int(args.step))


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["table"]:
        return table(words[1:])
    try:
        from .bars import read, verdicts
        from .machine import Gpu, StandIn, no_gpu
        from .runner import LIMIT_S, PARTS, run
    except ModuleNotFoundError as error:
        print(f"gpu: {error}; run make setup, or name an interpreter that has torch: make bench-gpu PYTHON=...", file=sys.stderr)
        return 2
    names = [part.name for part in PARTS]
    parser = _parser(names)
    args = parser.parse_args(words)
    if args.list:
        print("\n".join(f"{part.name:<12} {part.says}" for part in PARTS))
        return 0
    for name in args.only or ():
        if name not in names:
            parser.error(f"part {name!r} is not known; use some of {', '.join(names)}")
    if args.limit is not None and not args.limit > 0:
        parser.error(f"--limit is {args.limit:g}; give the seconds that everything together may take")
    missing = None if args.rehearse else no_gpu()
    if missing is not None:
        print(f"gpu: {missing}", file=sys.stderr)
        return 2
    machine = StandIn() if args.rehearse else Gpu()
    folder = (args.results or (Path(tempfile.mkdtemp()) if args.rehearse else _RESULTS)).absolute()
    path = folder / machine.file
    if args.part:
        return child(args, path)
    try:
        path.open("a").close()
        before = len(read(path))
    except OSError as error:
        parser.error(f"cannot write --results {args.results or folder} ({error.strerror}); give a folder that exists")
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(folder), *(["--rehearse"] if args.rehearse else []),
               *(["--commit", args.commit] if args.commit else [])]
    with tempfile.TemporaryDirectory() as reports:
        outcome = run([name for name in names if name in (args.only or names)], args.limit or LIMIT_S, command, Path(reports))
    print("\n".join([*verdicts(read(path)[before:]), *outcome.lines()]))
    print(f"lines: {path}   as Markdown: python -m benchmarks.gpu table {path}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    # what was started ends with us
    signal.signal(signal.SIGTERM, lambda *said: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
