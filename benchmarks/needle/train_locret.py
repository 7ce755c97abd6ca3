"""python -m benchmarks.needle.train_locret: train the retaining heads that ship, on needle prompts that no run has.

The prompts are of all tasks, of 512 to 4096 tokens, with the needle anywhere; seeds begin at 1000000. Answers are taught in the
form of the text, so that every wanted value is looked up.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from kvcache.train_locret import Sample, Training, add_settings, run, settings_of
from sparse_attn.calibrate import Parser, require_writable
from sparse_attn.errors import ContractError

from . import runner
from .haystack import TASKS, Haystack

FIRST_SEED = 1_000_000
LENGTHS = (512, 1024, 2048, 4096)
# small enough to ship, and a rate that a few minutes suffice for
USUAL = Training(hidden=64, rate=1e-2, warmup=0.1)


def sample(haystack: Haystack, tokenizer: PreTrainedTokenizerBase, task: str, length: int, depth: float, seed: int) -> Sample:
    """A needle prompt of ``length`` tokens and its answer."""
    prompt = haystack.prompt(task, length, depth, seed)
    together = task == "tracking" or len(prompt.expected) == 1
    said = ", ".join(prompt.expected) if together else prompt.expected[0]
    answer = tokenizer.encode(f" {said}.", add_special_tokens=False)
    if answer[0] == prompt.ids[-1]:  # the space that all answers begin with
        answer = answer[1:]
    for start, stop in () if together else prompt.needle:
        answer += prompt.ids[start:stop]
    return Sample(torch.tensor([prompt.ids + answer]), len(prompt.ids))


def samples(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Sample]:
    """``count`` of them, the tasks in turn."""
    rng, haystack = random.Random(seed), runner.make_haystack(tokenizer, None)
    return [
        sample(haystack, tokenizer, TASKS[i % len(TASKS)], rng.choice(LENGTHS), rng.random(), FIRST_SEED + i) for i in range(count)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.needle.train_locret", description=__doc__,
                    formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(runner.BUNDLED), help="local folder or hub id (default: the model that ships)")
    add("--out", type=Path, default=runner.BUNDLED / "locret.safetensors", help="default: %(default)s")
    add("--samples", type=int, default=400, help="prompts, each for one step unless --steps says otherwise (default: %(default)s)")
    add("--threads", type=int, default=1)
    add_settings(parser, USUAL)
    args = parser.parse_args(argv)
    try:
        settings = settings_of(args)
        require_writable(args.out)
        torch.set_num_threads(args.threads)
        model, tokenizer = runner.load(args.model, "cpu", torch.float32, trust=False)
        print(run(model, samples(tokenizer, args.samples, settings.seed), settings, args.out))
    except (ContractError, runner.NeedleError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
