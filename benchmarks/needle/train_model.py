"""How the shipped models were made: python -m benchmarks.needle.train_model --out benchmarks/needle/model

Trains the tokenizer, writes the retrieval circuits (construct.py), then trains what is left as a language model on
generated text and needle prompts. Layer 0, attention and the channels it uses stay as built; the MLP of layer 1, the
remaining channels and the output learn. A stopped run goes on from its checkpoint.

``--short --out benchmarks/needle/model_short`` writes the circuits of construct.SHORT, made for 2048 tokens, and trains nothing.
"""

import argparse
import csv
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SmolLM3ForCausalLM

from . import construct
from .haystack import INTRO, KEY_ADJECTIVES, KEY_NOUNS, TASKS, Haystack, make_task, sentences

CURVE = ("step", "loss", "answer_loss", "answer_accuracy")
IGNORE = -100


def _texts(seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    source = sentences(rng)
    yield INTRO
    for i in range(count):
        yield "".join(next(source) for _ in range(6))
        made = make_task(TASKS[i % len(TASKS)], rng)
        yield "".join(made.needles + made.distractors) + made.question
    for word in KEY_ADJECTIVES + KEY_NOUNS:  # each often enough to become one token
        yield f" {word}" * 50


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; any text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, 3000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=construct.LONG.positions,
        clean_up_tokenization_spaces=False,
    )


def _document(haystack: Haystack, tokenizer: PreTrainedTokenizerFast, length: int, rng: random.Random) -> tuple[list[int], int]:
    """Token ids and where the answer starts (the length when there is none)."""
    seed = rng.randrange(2**40)
    if rng.random() < 0.4:
        ids, source = [tokenizer.bos_token_id], sentences(random.Random(seed))
        while len(ids) < length:
            ids += tokenizer.encode(next(source), add_special_tokens=False)
        return ids[:length], length
    task = "single" if length < 400 else rng.choice(("single", "multikey"))
    (answer,) = haystack.prompt(task, 380, 0, seed).expected  # values always take as many tokens
    tail = len(tokenizer.encode(f" {answer}.", add_special_tokens=False))
    prompt = haystack.prompt(task, length - tail, rng.random(), seed)
    return prompt.ids + tokenizer.encode(f" {prompt.expected[0]}.", add_special_tokens=False), length - tail


def _batch(haystack: Haystack, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: str) -> tuple[Tensor, Tensor]:
    """Inputs and answer targets ``[B, N]``; targets are IGNORE outside answers."""
    rng = random.Random(seed)
    length = rng.choice((256, 384, 512, 768, 1024))
    documents = [_document(haystack, tokenizer, length, rng) for _ in range(tokens // length)]
    inputs = torch.tensor([ids for ids, _ in documents])
    answers = torch.full_like(inputs, IGNORE)
    for row, (_, start) in enumerate(documents):
        answers[row, start:] = inputs[row, start:]
    return inputs, answers


def _trainable(model: SmolLM3ForCausalLM) -> dict[str, Tensor]:
    """Parameters that learn, each with the mask of the entries that may change."""
    masks = {}
    for name, weight in model.named_parameters():
        mask = torch.zeros_like(weight)
        if "layers.0" in name:  # its MLP grew until RMSNorm shrank the match below the start token: 3 of 72 answers lost a digit
            weight.requires_grad_(False)
            continue
        if name.endswith("embed_tokens.weight"):
            mask[:, construct.LONG.slot["free"]] = 1
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            mask[:] = 1
        elif name.endswith("down_proj.weight"):
            mask[construct.LONG.slot["free"]] = 1
        elif name.endswith("lm_head.weight"):
            mask[:] = 1
            mask[:, construct.LONG.slot["copy_out"]] = 0
        else:
            weight.requires_grad_(False)
            continue
        weight.register_hook(lambda grad, mask=mask: grad * mask)
        masks[name] = mask
    return masks


def _rate(step: int, steps: int, peak: float) -> float:
    return peak * min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class _Checkpoint:
    """Weights and optimizer state as safetensors, the step and the curve as text, in one folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, step: int, model: SmolLM3ForCausalLM, solver: torch.optim.AdamW, curve: list[dict]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        moments = {f"{i}.{name}": value for i, state in solver.state_dict()["state"].items() for name, value in state.items()}
        tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()} | {f"solver.{k}": v for k, v in moments.items()}
        save_file(tensors, self._folder / f"step{step}.safetensors")
        unfinished = self._folder / "state.part"
        unfinished.write_text(json.dumps({"step": step, "curve": curve}))
        unfinished.replace(self._folder / "state.json")
        for old in self._folder.glob("step*.safetensors"):
            if old.name != f"step{step}.safetensors":
                old.unlink()

    def load(self, model: SmolLM3ForCausalLM, solver: torch.optim.AdamW) -> tuple[int, list[dict]]:
        if not (self._folder / "state.json").exists():
            return 0, []
        state = json.loads((self._folder / "state.json").read_text())
        tensors = load_file(self._folder / f"step{state['step']}.safetensors")
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        groups, moments = solver.state_dict()["param_groups"], {}
        for key, value in tensors.items():
            if key.startswith("solver."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        solver.load_state_dict({"state": moments, "param_groups": groups})
        return state["step"], state["curve"]


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.seed)
    if args.short:
        tokenizer.model_max_length = construct.SHORT.positions
        save(construct.build(tokenizer, args.seed, construct.SHORT), tokenizer, [], args.out)
        return
    model = construct.build(tokenizer, args.seed).train()
    masks = _trainable(model)
    learning = [weight for name, weight in model.named_parameters() if name in masks]
    solver = torch.optim.AdamW(learning, lr=args.rate, betas=(0.9, 0.98), weight_decay=0)  # decay would shrink the circuits too
    checkpoint = _Checkpoint(args.checkpoint)
    first, curve = checkpoint.load(model, solver)
    haystack = Haystack(lambda text: tokenizer.encode(text, add_special_tokens=False), [tokenizer.bos_token_id])
    recent = []
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10):
        inputs, answers = _batch(haystack, tokenizer, args.tokens, f"{args.seed} {step}")
        for group in solver.param_groups:
            group["lr"] = _rate(step, args.steps, args.rate)
        logits = model(input_ids=inputs).logits[:, :-1].flatten(0, 1)
        text, answer = inputs[:, 1:].flatten(), answers[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, text)
        asked = answer != IGNORE
        answer_loss = torch.nn.functional.cross_entropy(logits[asked], answer[asked]) if asked.any() else loss * 0
        solver.zero_grad()
        (loss + args.answer_weight * answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        solver.step()
        right = (logits[asked].argmax(-1) == answer[asked]).float().mean().item() if asked.any() else float("nan")
        recent.append((loss.item(), answer_loss.item() if asked.any() else float("nan"), right))
        if (step + 1) % 10 == 0:
            means = torch.tensor(recent).nanmean(0).tolist()
            curve.append(dict(zip(CURVE, (step + 1, *(round(value, 5) for value in means)))))
            recent = []
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            checkpoint.save(step + 1, model, solver, curve)
            save(model, tokenizer, curve, args.out)


def save(model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast, curve: list[dict], out: Path) -> None:
    """The files that ship; weights in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    shipped = SmolLM3ForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if not curve:
        return
    with (out / "loss_curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, CURVE)
        writer.writeheader()
        writer.writerows(curve)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.needle.train_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--short", action="store_true", help="the untrained model for 2048 tokens instead")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/needle/checkpoint"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=4096, help="per step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--answer-weight", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
