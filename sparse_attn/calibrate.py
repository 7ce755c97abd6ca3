"""python -m sparse_attn.calibrate: measure a model on texts and write the profile that patch(model, profile=FILE) uses.

minference finds a pattern for every head, xattention a threshold, duo which key heads retrieve. Each text is prefilled twice:
once to search, once to measure what the profile that was found retains and reads.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import ContractError, require
from .profile import TABLES, Profile
from .search import SEARCHES, Exact, Search

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what a layer without attention of its own gets; duo has none, because its heads are ranked against each other
_NEUTRAL = {"minference": {"name": "dense"}, "xattention": 1.0}


def calibrate(model, texts: Sequence[Tensor], search: Search, tick: Callable[[], None] = lambda: None) -> Profile:
    """The profile of a transformers model.

    Args:
        model: a causal language model; left as it was.
        texts: token ids, int64 ``[1, N]`` each, start token included.
        search: PatternSearch, ThresholdSearch or RetrievalSearch.
        tick: called after each layer of each of the two passes over each text.

    Raises:
        ContractError: if there is no text, or a layer's attention is not one that the method could serve.
    """
    from .hf import model_id, observe

    require(len(texts) > 0, "there is no text to measure; give one or more")
    of, method = model_id(model), next(name for name, cls in SEARCHES.items() if type(search) is cls)
    found: dict[int, list] = {}

    def look(q, kv, ctx):
        earlier = found.setdefault(ctx.layer, [])
        earlier.append(search.see(q, kv, ctx, earlier))
        tick()

    for ids in texts:
        observe(model, ids, look)
    table = [search.entries(found.pop(i)) if i in found else _absent(method, i, of) for i in range(of.layers)]

    def profile(retained, density) -> Profile:
        return Profile(method, of, table, search.arguments(), retained, density, asdict(search), digest(texts),
                       [ids.shape[1] for ids in texts], date.today().isoformat())

    whole = [[1.0] * of.heads] * of.layers
    selector = profile(whole, whole).selector()
    figures: dict[int, list[Tensor]] = {}

    def measure(q, kv, ctx):
        exact, plan = Exact.of(q, kv, ctx), selector.select(q, kv, ctx)
        retained, density = exact.retained(plan, search.first_query(kv.n_tokens)), plan.head_density()
        density = density.repeat_interleave(q.shape[1] // len(density))
        figures.setdefault(ctx.layer, []).append(torch.stack([retained.cpu(), density.cpu()]))
        tick()

    for ids in texts:
        observe(model, ids, measure)
    mean = {i: torch.stack(of_text).mean(0).tolist() for i, of_text in figures.items()}
    rows = [[[round(x, 4) for x in part] for part in mean[i]] if i in mean else (whole[i], whole[i]) for i in range(of.layers)]
    return profile(*zip(*rows))


def _absent(method: str, layer: int, of) -> list:
    require(method in _NEUTRAL,
            f"layer {layer} has no attention of its own, and {method} ranks the heads of all layers; use another method")
    return [_NEUTRAL[method]] * getattr(of, TABLES[method][1])


def digest(texts: Sequence[Tensor]) -> str:
    """Twelve hex digits of token ids."""
    return hashlib.sha256("\n".join(" ".join(map(str, ids.flatten().tolist())) for ids in texts).encode()).hexdigest()[:12]


def read_texts(paths: Sequence[str], tokenizer, length: int) -> list[Tensor]:
    """Token ids of each file (``-`` is stdin): the start token if there is one, then the text's last, ``length`` in all; 0 for all.

    The end is kept because it is what a probe of the last queries sees: a question stays a question.
    """
    texts = []
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for path in paths:
        try:
            text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ContractError(f"text {path} cannot be read ({error}); give a UTF-8 text file") from error
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        room = length - len(start) if length else len(ids)
        require(len(ids) >= max(room, 1), f"text {path} has {len(ids)} tokens but --length is {length or 1}; "
                "give a longer text or a smaller --length")
        texts.append(torch.tensor([start + ids[len(ids) - room :]]))
    return texts


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options ``--device`` and ``--dtype`` that ``load_for`` reads."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES),
                        help="of the model; attention is measured in float32 (default: bfloat16, float32 on a CPU)")


def load_for(args: argparse.Namespace):
    """Model and tokenizer of ``--model``; raises ContractError where the device or the model cannot be used."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ContractError(f"device {args.device!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from error
    from .hf import load

    return load(args.model, args.device, DTYPES[args.dtype or ("float32" if args.device == "cpu" else "bfloat16")])


def require_writable(out: Path) -> None:
    """Raise ContractError unless a file can be written there."""
    require(not out.is_dir() and os.access(out.parent, os.W_OK),
            f"cannot write {out}; give a file in a folder that exists and is writable")


class Parser(argparse.ArgumentParser):
    """Ends with one sentence and no usage on a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.rpartition('.')[2]}: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m sparse_attn.calibrate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="local folder or hub id")
    add("--method", required=True, choices=list(SEARCHES))
    add("--text", required=True, action="append", metavar="FILE", help="UTF-8 text, - for stdin; may be repeated")
    add("--out", required=True, metavar="FILE", help="the profile, JSON")
    add("--length", type=int, default=0, help="use the last so many tokens of each text (default: all)")
    add_device(parser)
    for (name, kind), owners in _options().items():
        help_ = "; ".join(f"{method}: default {default}" for method, default in owners.items())
        add("--" + name.replace("_", "-"), type=kind, help=help_)
    return parser


def _options() -> dict[tuple[str, type], dict[str, object]]:
    """Every setting of a search: its name and type, and the default of each method that has it."""
    found: dict[tuple[str, type], dict[str, object]] = {}
    for method, search in SEARCHES.items():
        for f in fields(search):
            found.setdefault((f.name, type(f.default)), {})[method] = f.default
    return found


def _search(args: argparse.Namespace) -> Search:
    settings = {}
    for (name, _), owners in _options().items():
        value = getattr(args, name)
        if value is not None:
            option = "--" + name.replace("_", "-")
            require(args.method in owners, f"{option} is for {' and '.join(owners)}, not for {args.method}; leave it out")
            settings[name] = value
    return SEARCHES[args.method](**settings)


def _run(args: argparse.Namespace) -> None:
    search = _search(args)
    require(args.length >= 0, f"--length is {args.length}; give a number of tokens, or 0 for the whole text")
    out = Path(args.out)
    require_writable(out)
    model, tokenizer = load_for(args)
    from .hf import model_id

    texts = read_texts(args.text, tokenizer, args.length)
    with tqdm(total=2 * len(texts) * model_id(model).layers, unit="layer", file=sys.stderr) as bar:
        profile = calibrate(model, texts, search, bar.update)
    profile.write(out)
    heads = [x for row in profile.retained for x in row], [x for row in profile.density for x in row]
    retained, density = (sum(x) / len(x) for x in heads)
    print(f"{out}: {args.method} for {profile.model}; retains {retained:.3f} of the mass at density {density:.3f}, "
          f"worst head {min(heads[0]):.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _run(args)
    except ContractError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
