"""Runs needle cases through a transformers model: dense, then each prefill method or cache, on the same prompts."""

import hashlib
import importlib.metadata
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from . import kv
from .grade import CaseFile, Row, grade
from .haystack import Haystack, NeedleError, Prompt

BUNDLED = Path(__file__).parent / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _content_id(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Method:
    """How the prompt is read and kept: one of ``sparse_attn.PATTERNS``; ``dense`` without more is the model as it was loaded.

    ``dual_chunk`` holds the fields of a ``sparse_attn.DualChunk``; empty leaves distances as they are. With ``profile``, the file
    of a calibrated profile, ``arguments`` only tell the profile's file name and content.

    ``cache`` is one of ``kvcache.METHODS``, empty for the cache that transformers makes, which keeps everything; ``cache_args`` are
    its budget and settings. The ``question`` stands "inside" the prompt that is compressed, or comes "after", as a new turn.
    """

    name: str = "dense"
    arguments: dict[str, object] = field(default_factory=dict)
    dual_chunk: dict[str, object] = field(default_factory=dict)
    profile: Path | None = None
    cache: str = ""
    cache_args: dict[str, object] = field(default_factory=dict)
    question: str = "inside"

    @classmethod
    def calibrated(cls, path: Path, dual_chunk: dict[str, object] | None = None) -> "Method":
        """The method of a profile; raises NeedleError unless the file holds one."""
        from sparse_attn.profile import load as load_profile

        try:
            name = load_profile(path).method
        except ValueError as error:
            raise NeedleError(f"--profile: {error}") from error
        arguments = {"profile": path.name, "sha256": _content_id(path)}
        return cls(name, arguments, dual_chunk or {}, path)

    def row(self) -> Row:
        """What a case's line says about the method; what is not used is not mentioned, as in the lines of earlier versions."""
        row = {"prefill": self.name, "prefill_args": self.arguments}
        row |= {"dual_chunk": self.dual_chunk} if self.dual_chunk else {}
        row |= {"cache": self.cache, "cache_args": self.cache_args} if self.cache else {}
        read = [self.cache_args[name] for name in ("path", "profile") if name in self.cache_args]
        row |= {"cache_file": _content_id(Path(read[0]))} if read else {}
        return row | ({"question": self.question} if self.cache or self.question != "inside" else {})

    def check(self) -> None:
        """Raise NeedleError unless the package knows the name and accepts the arguments."""
        self._check_cache()
        if self.name == "dense" and self.arguments:
            raise NeedleError(f"dense takes no arguments, got {json.dumps(self.arguments)}; drop --prefill-args")
        if self.plain:
            return
        import sparse_attn

        try:
            sparse_attn.SparseAttnConfig(dual_chunk=self.dual_chunk or None)
        except ValueError as error:
            raise NeedleError(f"--dual-chunk {json.dumps(self.dual_chunk)}: {error}") from error
        if self.profile:
            return  # whose arguments were checked when it was loaded
        if self.name not in sparse_attn.PATTERNS:
            known = ", ".join(sorted({"dense", *sparse_attn.PATTERNS}))
            raise NeedleError(f"prefill method {self.name!r} is not known; use one of {known}")
        pattern = sparse_attn.PATTERNS[self.name]
        names = [entry.name for entry in fields(pattern)]
        for name in self.arguments:
            if name not in names:
                raise NeedleError(f"{self.name} has no argument {name!r}; use one of {', '.join(names)}")
        try:
            pattern(**self.arguments)
        except (ValueError, TypeError) as error:
            raise NeedleError(f"{self.name} refuses {json.dumps(self.arguments)}: {error}") from error

    def _check_cache(self) -> None:
        if not self.cache:
            return
        from kvcache.config import as_config

        if self.dual_chunk:
            raise NeedleError("--dual-chunk moves keys that an evicting cache has let go of; leave it or --cache out")
        settings = dict(self.cache_args)
        try:
            as_config(self.cache, settings.pop("budget", None), **settings)
        except ValueError as error:
            raise NeedleError(f"--cache {self.cache} {json.dumps(self.cache_args)}: {error}") from error

    @property
    def plain(self) -> bool:
        """Is this the model as it was loaded?"""
        return self.name == "dense" and not self.dual_chunk and not self.cache

    def require_model(self, model: PreTrainedModel) -> None:
        """Raise NeedleError if the profile was made for another model, or the cache does not fit this one."""
        option = f"--profile {self.profile}" if self.profile else f"--cache {self.cache}"
        if self.profile or self.cache:
            try:
                with self.applied(model):
                    self.make_cache(model, 1)
            except ValueError as error:
                raise NeedleError(f"{option}: {error}") from error

    def make_cache(self, model: PreTrainedModel, compressed: int) -> Cache | None:
        """An empty cache, None for transformers' own; ``compressed`` tokens are read before an ``evict="prompt"`` may evict."""
        if not self.cache:
            return None
        import kvcache

        settings = {"prompt_length": compressed} if self.cache_args.get("evict") == "prompt" else {}
        settings |= self.cache_args
        return kvcache.make_cache(model, self.cache, settings.pop("budget", None), **settings)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[Callable[[], float]]:
        """Run the model with this method inside the block; yields a function that returns the density so far."""
        if self.plain:
            yield lambda: 1.0
            return
        import sparse_attn

        how = {"profile": self.profile} if self.profile else {"prefill": {"name": self.name, **self.arguments}}
        try:
            with sparse_attn.patch(model, **how, dense_below=0, dual_chunk=self.dual_chunk or None) as handle:
                yield lambda: handle.report().density
        except sparse_attn.ContractError as error:
            raise NeedleError(str(error)) from error


@dataclass(frozen=True)
class Case:
    task: str
    length: int
    depth: float
    seed: int


@dataclass(frozen=True)
class Settings:
    """What every line of one run shares; part of a case's identity, so a changed setting is measured afresh."""

    model: str
    weights: str
    haystack: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    chunk: int | None


KEY = (*(f.name for f in fields(Case)), "prefill", "prefill_args", *(f.name for f in fields(Settings)))


def pick_dtype(name: str, device: str) -> torch.dtype:
    """``auto`` is bfloat16 where it is fast: on an accelerator, or on a CPU with matrix units for it."""
    if name != "auto":
        return DTYPES[name]
    fast = device != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load(model: str, device: str, dtype: torch.dtype, trust: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a local path or a hub id.

    Raises:
        NeedleError: if nothing can be loaded from there.
    """
    if not Path(model).exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise NeedleError(f"model path {model} does not exist; give a folder with config.json or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise NeedleError(f"model {model} cannot be loaded ({reason}); give a folder with config.json or a hub id") from error
    return loaded.to(device).eval(), tokenizer


_ENDS = 1 << 20  # bytes of each end of a file that its identity is read from


def weights_id(model: str) -> str:
    """Changes when the files of a local model change, the same wherever they lie; empty for a hub id.

    The ends of a file stand for the whole: a checkpoint may have hundreds of gigabytes. Profiles and retaining heads are no part
    of the model.
    """
    folder = Path(model)
    if not folder.is_dir():
        return ""
    beside = ("profile_", "locret")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and not p.name.startswith(beside))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()[:12]


def make_haystack(tokenizer: PreTrainedTokenizerBase, text: str | None) -> Haystack:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Haystack(lambda piece: tokenizer.encode(piece, add_special_tokens=False), start, text)


def machine() -> Row:
    """What the figures depend on besides the settings."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {**versions, "python": sys.version.split()[0], "commit": commit.stdout.strip() or None}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the process so far, not this case alone
    return kib / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def attention_clock(model: PreTrainedModel) -> Iterator[Callable[[], float]]:
    """Time the attention function that the model calls inside the block, choosing blocks included; yields seconds so far."""
    name, spent, device = model.config.get_text_config()._attn_implementation, [0.0], model.device
    inner = ALL_ATTENTION_FUNCTIONS.get(name)

    def timed(*args, **kwargs):
        began = _clock(device)
        try:
            return inner(*args, **kwargs)
        finally:
            spent[0] += _clock(device) - began

    if inner is None:  # eager attention is a function of the modeling file
        yield lambda: float("nan")
        return
    AttentionInterface.register(name, timed)
    try:
        yield lambda: spent[0]
    finally:
        AttentionInterface.register(name, inner)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, prompts: Sequence[Prompt], method: Method, stop: Sequence[int], chunk: int | None = None
) -> tuple[list[list[int]], Row]:
    """Greedy answers to prompts of one length, and what reading and writing cost.

    Returns:
        Token ids per prompt, and density, prefill_s, attention_s (its share spent in attention), decode_s, decode_steps, peak_mib, and what
        the cache held (``kv.figures``).
    """
    ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    steps = max(prompt.answer_tokens for prompt in prompts)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    turns = _turns(prompts, method.question)
    pieces = [piece for turn in ids.split(turns, dim=1) for piece in turn.split(chunk or ids.shape[1], dim=1)]
    with method.applied(model) as density:
        began, cache = _clock(model.device), method.make_cache(model, turns[0])
        with attention_clock(model) as attention:
            for piece in pieces:
                out = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        read = _clock(model.device)
        figures: Row = {"density": density(), "attention_s": attention()}
        resumed = _clock(model.device)
        written = [token]
        ended = torch.isin(token, torch.tensor(stop, device=token.device))
        while len(written) < steps and not ended.all():
            out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            written.append(token)
            ended |= torch.isin(token, torch.tensor(stop, device=token.device))
        figures |= {"prefill_s": read - began, "decode_s": _clock(model.device) - resumed, "decode_steps": len(written) - 1}
    figures |= {"peak_mib": _peak_mib(model.device), **kv.figures(cache, len(prompts), turns, chunk)}
    return [_until_stop(row, stop) for row in torch.cat(written, 1).tolist()], figures


def _turns(prompts: Sequence[Prompt], question: str) -> list[int]:
    """Tokens of each turn: the whole prompt, or its text and then its question."""
    n = len(prompts[0].ids)
    if question == "inside":
        return [n]
    lengths = {prompt.question_tokens for prompt in prompts}
    if len(lengths) > 1:
        said = " and ".join(map(str, sorted(lengths)))
        raise NeedleError(f"questions of {said} tokens cannot come after their texts in one batch; use batches of 1")
    return [n - lengths.pop(), prompts[0].question_tokens]


def _until_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]


def stop_tokens(model: PreTrainedModel) -> list[int]:
    stop = model.generation_config.eos_token_id
    if stop is None:
        return []
    return stop if isinstance(stop, list) else [stop]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    batches: Sequence[Sequence[Case]],
    methods: Sequence[Method],
    settings: Settings,
    file: CaseFile,
    tick: Callable[[Row], None],
) -> list[Row]:
    """Every case with every method, dense and sparse in turn on the same prompt; returns one row per pair.

    Cases already in ``file`` are taken from it. Seconds are those of the batch a case ran in.
    """
    rows, done, stop, here = [], file.done(), stop_tokens(model), machine()
    for batch in batches:
        prompts: list[Prompt] | None = None
        for method in methods:
            how = method.row()
            keys = [file.key({**asdict(case), **how, **asdict(settings)}) for case in batch]
            if not all(key in done for key in keys):
                if prompts is None:
                    prompts = [haystack.prompt(**asdict(case)) for case in batch]
                written, figures = answer(model, prompts, method, stop, settings.chunk)
                for key, case, prompt, ids in zip(keys, batch, prompts, written):
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    found = {"correct": grade(text, prompt.expected), "answer": text, "expected": list(prompt.expected)}
                    done[key] = {**asdict(case), **how, **found, **figures, **asdict(settings), **here}
                    file.add(done[key])
            for key in keys:
                rows.append(done[key])
                tick(done[key])
    return rows
