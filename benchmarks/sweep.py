"""Many methods on the same needles of the shipped model: what the commands that make our tables of accuracy share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .needle import runner
from .needle.grade import CaseFile, Row
from .needle.haystack import FORM, TASKS, NeedleError

# one needle stands at a depth; the other tasks spread theirs over the text, so one prompt says as much
BY_DEPTH = ("single", "multikey")


def parser(name: str, doc: str, lengths: str, depths: str, tasks: str, file: Path) -> argparse.ArgumentParser:
    """A command line with the options of every sweep, and these defaults."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--model", default=str(runner.BUNDLED), help="local folder or hub id (default: the model that ships)")
    add("--lengths", default=lengths, help="tokens (default: %(default)s)")
    add("--depths", default=depths, help="needle depths per length, for single and multikey (default: %(default)s)")
    add("--tasks", default=tasks, help="default: %(default)s")
    add("--trials", type=int, default=1, help="prompts per task, length and depth (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, default=file, metavar="FILE", help="JSON lines (default: %(default)s)")
    return made


def ends_included(n: int) -> list[float]:
    """n depths from start to end; the middle for one."""
    return [0.5] if n == 1 else [round(i / (n - 1), 4) for i in range(n)]


def ends_left_out(n: int) -> list[float]:
    """n depths, each in the middle of its part of the text."""
    return [round((i + 0.5) / n, 4) for i in range(n)]


def cases(args: argparse.Namespace, spread: Callable[[int], list[float]]) -> list[list[runner.Case]]:
    """``--depths`` needle depths per length for the tasks where depth matters, one prompt per trial for the others."""
    lengths, depths = ([int(n) for n in text.split(",")] for text in (args.lengths, args.depths))
    depths = depths * len(lengths) if len(depths) == 1 else depths
    if len(depths) != len(lengths) or min(lengths + depths) < 1:
        raise NeedleError(f"--depths {args.depths} gives {len(depths)} numbers for {len(lengths)} lengths; give one, or one each")
    tasks = args.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise NeedleError(f"task {unknown[0]!r} is not known; use one of {', '.join(TASKS)}")
    found = []
    for length, n in zip(lengths, depths):
        for task in tasks:
            for seed in range(args.trials):
                found += [[runner.Case(task, length, depth, seed)] for depth in (spread(n) if task in BY_DEPTH else [0.5])]
    return found


def run(args: argparse.Namespace, methods: Sequence[runner.Method], batches: Sequence[Sequence[runner.Case]],
        chunk: int | None) -> list[Row]:
    """Every case with every method; what ``--json`` holds already is taken from there."""
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
        chunk=chunk,
    )
    with tqdm(total=len(methods) * len(batches), unit="case", file=sys.stderr, smoothing=0) as bar:

        def tick(row: Row) -> None:
            bar.set_postfix_str(f"{row['length']} {row['task']} {row['prefill']} {row.get('cache', '')}", refresh=False)
            bar.update()

        return runner.run(model, tokenizer, runner.make_haystack(tokenizer, None), batches, methods, settings, file, tick)


def finish(name: str, made: argparse.ArgumentParser, command: Callable[[], None]) -> int:
    """Run a command; exit status 2 on bad input, 130 when stopped."""
    try:
        command()
    except (NeedleError, ValueError) as error:
        made.exit(2, f"{name}: {error} (see --help)\n")
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from the JSON file", file=sys.stderr)
        return 130
    return 0
