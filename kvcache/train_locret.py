"""python -m kvcache.train_locret: train Locret's retaining heads for a model and write the file that the policy locret reads.

The data are questions with their answers, one JSON object a line: {"prompt": text, "answer": text}. The model is only read: each
pair is prefilled once, in a random order, and a head per layer learns the largest logit that each token of the prompt gets from the
queries of the answer.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_attn.calibrate import Parser, add_device, digest, load_for, require_writable
from sparse_attn.errors import ContractError, require

from .retaining import Heads, score, token_vectors

_POINTS = 100  # lines of the loss curve, at most


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer.

    Attributes:
        ids: int64 ``[1, N]``, the start token first where the model has one.
        answer: index of the answer's first token.
    """

    ids: Tensor
    answer: int


@dataclass(frozen=True)
class Training:
    """How heads are trained; the defaults are the paper's, where 3000 samples make as many steps.

    Attributes:
        hidden: channels inside a head.
        steps: samples to learn from, one a step; 0 for each sample once.
        rate: highest learning rate of AdamW.
        warmup: share of the steps while it rises; it falls to 0 over the others.
        smooth: weight of the squared difference between neighbours' scores.
        clip: largest gradient of any weight.
        seed: of the first weights and of the order.
    """

    hidden: int = 1024
    steps: int = 0
    rate: float = 5e-4
    warmup: float = 2 / 3
    smooth: float = 0.0025
    clip: float = 0.5
    seed: int = 0

    def __post_init__(self):
        require(self.hidden >= 1, f"hidden={self.hidden} must be 1 or more channels")
        require(self.steps >= 0, f"steps={self.steps} must be 1 or more, or 0 for each sample once")
        require(self.rate > 0 and self.clip > 0, f"rate={self.rate} and clip={self.clip} must be above 0")
        require(0 <= self.warmup <= 1, f"warmup={self.warmup} is outside [0, 1]; it is a share of the steps")
        require(self.smooth >= 0, f"smooth={self.smooth} is below 0")

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of ``steps``."""
        rising = round(self.warmup * steps)
        return self.rate * min((step + 1) / max(rising, 1), (steps - step) / max(steps - rising, 1), 1.0)


def labels(q: Tensor, k: Tensor, answer: int, scale: float) -> Tensor:
    """float32 ``[answer, Hkv]``: the largest logit of each prompt token, over its group's query heads and the answer's queries.

    Those are the queries that predict a token of the answer: from the prompt's last one to the one before the answer's last.

    Args:
        q, k: ``[1, H, N, D]`` and ``[1, Hkv, N, D]`` as attention sees them.
        answer: index of the answer's first token.
        scale: softmax scale.
    """
    asking = q[0, :, answer - 1 : -1].unflatten(0, (k.shape[1], -1)).flatten(1, 2).float()  # [Hkv, G A, D]
    # one head at a time: logits of a long answer are large
    return torch.stack([(some @ keys.float().T).amax(0) * scale for some, keys in zip(asking, k[0, :, :answer])], 1)


class _Learner:
    """The head of one layer while it learns."""

    def __init__(self, inputs: int, kv_heads: int, layer: int, settings: Training, device: torch.device):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer)
        shapes = (settings.hidden, inputs), (kv_heads, settings.hidden)
        self.weights = [
            torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator).to(device).requires_grad_()
            for shape in shapes
        ]
        self._settings, self._solver = settings, torch.optim.AdamW(self.weights, betas=(0.9, 0.95))

    def step(self, x: Tensor, wanted: Tensor, rate: float) -> float:
        """Learn from one prompt; its loss before that."""
        for group in self._solver.param_groups:
            group["lr"] = rate
        given = score(x, *self.weights)
        loss = torch.nn.functional.smooth_l1_loss(given, wanted)
        if len(given) > 1:
            loss = loss + self._settings.smooth * torch.nn.functional.mse_loss(given[:-1], given[1:])
        self._solver.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.weights, self._settings.clip)
        self._solver.step()
        return loss.item()


def train(model, samples: Sequence[Sample], settings: Training, tick: Callable[[float], None] = lambda loss: None
          ) -> tuple[Heads, list[float]]:
    """Retaining heads for a transformers model, and the loss of each step, mean over layers.

    Loss per layer: smooth L1 between scores and ``labels`` over the prompt's tokens, and ``settings.smooth`` times the squared
    difference of neighbours. Source: Locret, arXiv:2410.01805.

    Args:
        model: a causal language model; left as it was.
        samples: in any order; a step takes one.
        tick: called with the loss after each step.

    Raises:
        ContractError: if there is no sample, one has no prompt or no answer, or some layer's attention cannot be shown.
    """
    from sparse_attn.hf import model_id, model_rotations, observe

    require(len(samples) > 0, "there is no sample to learn from; give one or more")
    for i, sample in enumerate(samples):
        require(0 < sample.answer < sample.ids.shape[1],
                f"sample {i} has {sample.ids.shape[1]} tokens and its answer begins at {sample.answer}; it needs a prompt and an "
                "answer")
    turns = {layer: rotation.move for layer, rotation in model_rotations(model, "Locret").items()}
    learners: dict[int, _Learner] = {}
    steps = settings.steps or len(samples)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.cat([torch.randperm(len(samples), generator=generator) for _ in range(-(-steps // len(samples)))])[:steps]
    curve: list[float] = []
    for step, index in enumerate(order.tolist()):
        sample, losses = samples[index], []

        def look(q, kv, ctx):
            if ctx.window:
                return  # transformers' own cache keeps a window
            k, v = kv.fetch()
            wanted = labels(q, k, sample.answer, ctx.scale)
            own = [t[0, :, : sample.answer].transpose(0, 1) for t in (q, k, v)]
            x = token_vectors(*own, torch.arange(sample.answer), turns.get(ctx.layer))
            with torch.inference_mode(False), torch.enable_grad():
                x, wanted = x.clone(), wanted.clone()  # what inference mode made cannot be learned from
                learner = learners.get(ctx.layer)
                if learner is None:
                    learner = learners[ctx.layer] = _Learner(x.shape[1], wanted.shape[1], ctx.layer, settings, x.device)
                losses.append(learner.step(x, wanted, settings.rate_at(step, steps)))

        observe(model, sample.ids, look)
        curve.append(sum(losses) / len(losses))
        tick(curve[-1])
    layers = {i: tuple(w.detach().cpu().bfloat16() for w in learners[i].weights) for i in sorted(learners)}
    return Heads(layers, model_id(model), digest([s.ids for s in samples]), date.today().isoformat()), curve


def read_samples(path: str, tokenizer, length: int) -> list[Sample]:
    """The pairs of a JSONL file (``-`` is stdin) as token ids, start token first where there is one.

    Args:
        length: tokens of a pair at most: longer ones lose the beginning of their prompt, so that a question stays; 0 for all.
    """
    try:
        lines = (sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"data {path} cannot be read ({error}); give a UTF-8 file, one JSON object a line") from error
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            pair = json.loads(line)
            texts = [pair[key] for key in ("prompt", "answer")]
        except (ValueError, KeyError, TypeError):
            texts = []
        require(len(texts) == 2 and all(isinstance(text, str) for text in texts),
                f'line {number} of {path} is not a pair; each line is {{"prompt": text, "answer": text}}')
        prompt, answer = (tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts)
        require(len(prompt) > 0 and len(answer) > 0, f"line {number} of {path} has an empty prompt or answer; leave it out")
        room = length - len(start) - len(answer) if length else len(prompt)
        require(room > 0,
                f"line {number} of {path} has an answer of {len(answer)} tokens, which leaves no room in --length {length}")
        prompt = start + prompt[-room:]
        samples.append(Sample(torch.tensor([prompt + answer]), len(prompt)))
    return samples


def write_curve(path: Path, curve: Sequence[float]) -> None:
    """CSV of step and loss, the loss a mean over the steps since the line before."""
    stride = -(-len(curve) // _POINTS)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss"))
        for i in range(0, len(curve), stride):
            piece = curve[i : i + stride]
            writer.writerow((i + len(piece), f"{sum(piece) / len(piece):.5g}"))


def run(model, samples: Sequence[Sample], settings: Training, out: Path) -> str:
    """Train with a progress bar, write the heads to ``out`` and the loss curve beside it; a sentence about both."""
    with tqdm(total=settings.steps or len(samples), unit="step", mininterval=5, file=sys.stderr) as bar:

        def tick(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        heads, curve = train(model, samples, settings, tick)
    heads.write(out)
    write_curve(out.with_suffix(".csv"), curve)
    tenth = max(1, len(curve) // 10)
    first, last = (sum(piece) / tenth for piece in (curve[:tenth], curve[-tenth:]))
    return f"{out}: heads of {len(heads.layers)} layers for {heads.model}; loss {first:.4g} -> {last:.4g} in {len(curve)} steps"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m kvcache.train_locret", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="local folder or hub id")
    add("--data", required=True, metavar="FILE", help="JSONL, - for stdin")
    add("--out", required=True, metavar="FILE", help="the heads, safetensors; the loss curve lies beside it as .csv")
    add("--length", type=int, default=10240, help="tokens of prompt and answer at most, 0 for all (default: %(default)s)")
    add_device(parser)
    add_settings(parser, Training())
    return parser


def add_settings(parser: argparse.ArgumentParser, usual: Training) -> None:
    """An option for each field of Training."""
    for f in fields(Training):
        value = getattr(usual, f.name)
        parser.add_argument(f"--{f.name}", type=type(value), default=value, help="default: %(default)s")


def settings_of(args: argparse.Namespace) -> Training:
    """What those options say."""
    return Training(**{f.name: getattr(args, f.name) for f in fields(Training)})


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        settings, out = settings_of(args), Path(args.out)
        require(args.length >= 0, f"--length is {args.length}; give a number of tokens, or 0 for all")
        require_writable(out)
        model, tokenizer = load_for(args)
        samples = read_samples(args.data, tokenizer, args.length)
        print(run(model, samples, settings, out))
    except ContractError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
