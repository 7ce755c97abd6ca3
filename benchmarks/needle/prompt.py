"""python -m benchmarks.needle.prompt: one needle prompt as text, for tools that read a file, such as sparse_attn.calibrate."""

import argparse
import sys
from collections.abc import Sequence

from transformers import AutoTokenizer

from . import runner
from .haystack import TASKS, NeedleError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.needle.prompt", description=__doc__)
    add = parser.add_argument
    add("--model", default=str(runner.BUNDLED), help="whose tokenizer counts the length (default: the model that ships)")
    add("--task", default="multikey", choices=TASKS)
    add("--length", type=int, default=4096, help="tokens (default: %(default)s)")
    add("--depth", type=float, default=0.5, help="place of the needle, 0 start to 1 end (default: %(default)s)")
    add("--seed", type=int, default=1000, help="default: %(default)s, which no case of the runner has unless asked")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        prompt = runner.make_haystack(tokenizer, None).prompt(args.task, args.length, args.depth, args.seed)
    except NeedleError as error:
        parser.exit(2, f"prompt: {error}\n")
    sys.stdout.write(tokenizer.decode(prompt.ids, skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
