"""python -m benchmarks.needle: does a model still find a sentence hidden in a long text when it reads only part of it?

Every case runs dense and with each ``--prefill``, ``--profile`` or ``--cache`` on the same prompt. One JSON line per case and
method; a run that was stopped goes on from its file.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from . import grade, runner
from .haystack import FORM, TASKS, NeedleError

RESULTS = Path("build") / "needle"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"needle: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.needle", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(runner.BUNDLED), help="local folder or hub id (default: the model that ships)")
    add("--prefill", action="append", default=[], metavar="NAME", help="method to compare with dense; may be repeated")
    add("--prefill-args", action="append", default=[], metavar="JSON", help="its arguments: once for all, or once per --prefill")
    add("--profile", action="append", default=[], type=Path, metavar="FILE",
        help="a calibrated profile of the model to compare with dense; may be repeated")
    add("--dual-chunk", metavar="JSON", help="""read with dual chunk attention, e.g. '{"chunk": 2048, "local": 256}':
every --prefill, or dense if there is none; the baseline stays plain""")
    add("--cache", action="append", default=[], metavar="NAME",
        help="""cache that evicts (a kvcache method), to compare with one that keeps everything; may be repeated;
prompts are read by the one --prefill or --profile, or dense; --chunk evicts after every piece""")
    add("--cache-args", action="append", default=[], metavar="JSON",
        help="""its budget and settings, e.g. '{"budget": 512, "window": 32}': once for all, or once per --cache""")
    add("--question", choices=("inside", "after"), default="inside",
        help="""inside: part of the prompt that is compressed
after: the text is read and compressed, then the question comes as a new turn (default: %(default)s)""")
    add("--no-baseline", action="store_true", help="do not run dense")
    add("--lengths", default="1024,2048,4096,8192,16384,32768", help="prompt lengths in tokens (default: %(default)s)")
    add("--depths", type=int, default=5, help="how many needle depths from start to end (default: %(default)s)")
    add("--tasks", default="single,multikey", help=f"of {','.join(TASKS)} (default: %(default)s)")
    add("--haystack", type=Path, metavar="FILE", help="hide the needles in this text instead of generated sentences")
    add("--trials", type=int, default=1, help="prompts per task, length and depth (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help=f"auto, {', '.join(runner.DTYPES)}; auto is bfloat16 where the device is fast at it")
    add("--chunk", type=int, help="read the prompt in pieces of this many tokens")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--json", type=Path, metavar="FILE", help=f"JSON lines (default: {RESULTS / 'cases.jsonl'})")
    add("--plot", type=Path, metavar="FILE.png", help=f"heat map (default: {RESULTS / 'heatmap.png'})")
    return parser


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(piece) for piece in text.split(",")]
    except ValueError:
        raise NeedleError(f"{option} is {text!r}; give whole numbers separated by commas") from None
    return list(dict.fromkeys(numbers))


def _object(text: str, option: str, example: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise NeedleError(f"{option} {text!r} is not JSON ({error}); give an object such as {example}") from None
    if not isinstance(value, dict):
        raise NeedleError(f"{option} {text!r} is not an object; give one such as {example}")
    return value


def _arguments(args: argparse.Namespace, option: str, example: str) -> list[dict]:
    """The ``--OPTION-args`` of each ``--OPTION``."""
    names, texts = getattr(args, option), getattr(args, f"{option}_args")
    if len(texts) > 1 and len(texts) != len(names):
        raise NeedleError(f"--{option}-args came {len(texts)} times for {len(names)} --{option}; give it once, or once for each")
    if texts and not names:
        raise NeedleError(f"--{option}-args has no --{option} to apply to; name a method")
    each = texts if len(texts) == len(names) else (texts or ["{}"]) * len(names)
    return [_object(text, f"--{option}-args", example) for text in each]


def _methods(args: argparse.Namespace) -> list[runner.Method]:
    given = _arguments(args, "prefill", '{"threshold": 0.9}')
    caches = list(zip(args.cache, _arguments(args, "cache", '{"budget": 512}')))
    reading = len(args.prefill) + len(args.profile)
    if caches and reading > 1:
        raise NeedleError(f"--cache goes with one --prefill or --profile, got {reading}; give one of them")
    if args.question == "after" and args.batch_size > 1:
        raise NeedleError(f"--question after came with --batch-size {args.batch_size}, but questions differ in length; drop one")
    methods = [] if args.no_baseline else [runner.Method(question=args.question)]
    dual = {} if args.dual_chunk is None else _object(args.dual_chunk, "--dual-chunk", '{"chunk": 2048, "local": 256}')
    if args.dual_chunk is not None and not dual:
        raise NeedleError("--dual-chunk {} holds nothing; give chunk and local, or leave it out")
    plain = not args.profile and (bool(dual) or bool(caches))
    readers = [runner.Method(name, arguments, dual) for name, arguments in zip(args.prefill or ["dense"] * plain, given or [{}])]
    readers += [runner.Method.calibrated(path, dual) for path in dict.fromkeys(args.profile)]
    for reader in readers:
        for cache, arguments in caches or [("", {})]:
            method = replace(reader, cache=cache, cache_args=arguments, question=args.question)
            method.check()
            if method not in methods:
                methods.append(method)
    if not methods:
        raise NeedleError("nothing to run: --no-baseline without --prefill, --profile or --cache; name a method")
    return methods


def _cases(args: argparse.Namespace) -> list[list[runner.Case]]:
    tasks = list(dict.fromkeys(args.tasks.split(",")))
    for task in tasks:
        if task not in TASKS:
            raise NeedleError(f"task {task!r} is not known; use one of {', '.join(TASKS)}")
    for option in ("depths", "trials", "batch_size", "threads", "chunk"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise NeedleError(f"--{option.replace('_', '-')} is {value}; give 1 or more")
    depths = [0.5] if args.depths == 1 else [round(i / (args.depths - 1), 4) for i in range(args.depths)]
    batches = []
    for length in sorted(_numbers(args.lengths, "--lengths")):
        for task in tasks:
            seeds = range(args.seed, args.seed + args.trials)
            cases = [runner.Case(task, length, depth, seed) for seed in seeds for depth in depths]
            batches += [cases[at : at + args.batch_size] for at in range(0, len(cases), args.batch_size)]
    return batches


def _output(given: Path | None, name: str) -> Path:
    if given is None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        return RESULTS / name
    if given.is_dir() or not os.access(given.parent, os.W_OK):
        raise NeedleError(f"cannot write {given}; give a file in a folder that exists and is writable")
    return given


def _read_haystack(path: Path | None) -> tuple[str | None, str]:
    if path is None:
        return None, f"generated, form {FORM}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NeedleError(f"cannot read --haystack {path} ({error}); give a UTF-8 text file") from error
    return text, f"{hashlib.sha256(text.encode()).hexdigest()[:12]}, form {FORM}"


def _needle(args: argparse.Namespace) -> None:
    methods, batches = _methods(args), _cases(args)
    if args.dtype not in ("auto", *runner.DTYPES):
        raise NeedleError(f"dtype {args.dtype!r} is not known; use one of auto, {', '.join(runner.DTYPES)}")
    try:
        device = str(torch.empty(0, device=args.device).device)
    except (RuntimeError, AssertionError) as error:
        raise NeedleError(f"device {args.device!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from error
    text, haystack_name = _read_haystack(args.haystack)
    if importlib.util.find_spec("matplotlib") is None:
        raise NeedleError("the heat map needs matplotlib, which is not installed; pip install matplotlib")
    plot = _output(args.plot, "heatmap.png")
    if plot.suffix.lower() != ".png":
        raise NeedleError(f"--plot {plot} does not end in .png; the heat map is a PNG file")
    file = grade.CaseFile(_output(args.json, "cases.jsonl"), runner.KEY)

    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    dtype = runner.pick_dtype(args.dtype, device)
    model, tokenizer = runner.load(args.model, device, dtype, args.trust_remote_code)
    for method in methods:
        method.require_model(model)
    haystack = runner.make_haystack(tokenizer, text)
    shortest = batches[0][0].length
    for task in {batch[0].task for batch in batches}:
        haystack.prompt(task, shortest, 0.5, args.seed)
    settings = runner.Settings(
        model="bundled" if Path(args.model) == runner.BUNDLED else args.model,
        weights=runner.weights_id(args.model),
        haystack=haystack_name,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        threads=args.threads,
        batch_size=args.batch_size,
        chunk=args.chunk,
    )
    total, before = len(methods) * sum(map(len, batches)), len(file.rows)
    with tqdm(total=total, unit="case", file=sys.stderr, smoothing=0) as bar:

        def tick(row: grade.Row) -> None:
            bar.set_postfix_str(f"{row['length']} {row['task']} {row['prefill']} {row.get('cache', '')}", refresh=False)
            bar.update()

        rows = runner.run(model, tokenizer, haystack, batches, methods, settings, file, tick)
    grade.plot(rows, plot)
    console = Console(width=None if sys.stdout.isatty() else 140)
    grade.print_tables(rows, console)
    reused = total - (len(file.rows) - before)
    if reused:
        print(f"{reused} of {total} cases were already in the JSON file; delete it to measure them again")
    print(f"cases: {args.json or RESULTS / 'cases.jsonl'}   heat map: {plot}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _needle(args)
    except NeedleError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("needle: stopped; the same command goes on from the JSON file", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
