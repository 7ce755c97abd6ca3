"""Part ``model``: a model of random weights shaped like Llama-3.1-8B, plain and reading a tenth: what a user waits for.

The Amdahl bound says how much faster the whole could become if only attention got cheaper, by exactly the density. It takes the
attention of the plain model from SDPA alone, timed at the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

import kvcache
import sparse_attn
from sparse_attn.patterns import XAttention

from ..cases import DTYPES, Shape, top_k_for
from ..decode import SHARE
from .units import Bench, Unit

DENSITY = 0.1
_WARM = 512  # tokens of the first, untimed prompt
_ALONE = 5  # repeats of attention alone


class Subject:
    """The model, and what a prompt and the tokens behind it cost."""

    def __init__(self, bench: Bench):
        self.bench = bench

    @functools.cached_property
    def model(self):
        from transformers import AutoModelForCausalLM, LlamaConfig

        s, longest = self.bench.sizes, max(self.bench.sizes.lengths)
        config = LlamaConfig(num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
                             tie_word_embeddings=False, max_position_embeddings=longest + s.decoded + 1, **s.model)
        with torch.device(self.bench.machine.device):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[s.dtype]).eval()

    def generate(self, n: int, cache) -> tuple[float, float]:
        """Seconds to the first token of a prompt of ``n``, and for each token behind it."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config) if cache is None else cache
        ids = torch.randint(0, self.model.config.vocab_size, (1, n), device=self.bench.machine.device)
        last = []

        def step(ids) -> None:
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            last[:] = [logits[:, -1:].argmax(-1)]

        first = self.bench.machine.seconds(lambda: step(ids))
        step(last[0])
        count = self.bench.sizes.decoded
        behind = self.bench.machine.seconds(lambda: [step(last[0]) for _ in range(count)]) / count
        return first, behind

    def attention_alone(self, n: int, n_q: int) -> float:
        """Seconds that SDPA takes over all layers, for ``n_q`` queries over ``n`` keys."""
        shape = self.bench.shape(n)
        q, k, v = shape.tensors
        q = q[:, :, -n_q:]

        def call() -> None:
            scaled_dot_product_attention(q, k, v, is_causal=n_q > 1, scale=shape.scale, enable_gqa=True)

        call()
        times = sorted(self.bench.machine.seconds(call) for _ in range(_ALONE))
        return times[_ALONE // 2] * self.model.config.num_hidden_layers

    @functools.cache
    def plain(self, n: int) -> tuple[float, float]:
        """``timed`` without any of ours."""
        return self.timed(n)

    def timed(self, n: int, pattern=None, cache_args: dict | None = None) -> tuple[float, float]:
        """``generate`` after a short prompt of the same kind, with a method of prefill and a cache, or plain."""
        def once(tokens: int) -> tuple[float, float]:
            cache = kvcache.make_cache(self.model, **cache_args) if cache_args else None
            return self.generate(tokens, cache)

        with torch.inference_mode():
            if pattern is None:
                once(min(n, _WARM))
                return once(n)
            with sparse_attn.patch(self.model, prefill=pattern, dense_below=0):
                once(min(n, _WARM))
                return once(n)


def amdahl(whole: float, attention: float, share: float) -> float:
    """How many times faster ``whole`` becomes when the ``attention`` in it costs only a ``share``.

    Example:
        >>> amdahl(10.0, 8.0, 0.25)
        2.5
    """
    return whole / (whole - attention * (1 - share))


def prompts(bench: Bench, subject: Subject, n: int, quest: bool) -> str | None:
    """A prompt read plainly and at a density; or at that density into a cache of which a token reads 1/16."""
    shape = Shape(n, bench.sizes.heads, bench.sizes.kv_heads, bench.sizes.head_dim, bench.sizes.block, bench.sizes.dtype)
    pattern = XAttention(stride=16, block=shape.block, top_k=top_k_for(shape, DENSITY))
    plain = subject.plain(n)
    attention = [min(subject.attention_alone(n, n_q), 0.99 * whole) for n_q, whole in zip((n, 1), plain)]
    if quest:
        budget = max(n // SHARE, 32)
        found = subject.timed(n, pattern, {"decode": "quest", "budget": budget, "dense_layers": ()})
        share = budget / n
    else:
        found, share = subject.timed(n, pattern), 1.0
    of = "0.1 of the blocks" + (f", quest 1/{SHARE}" if quest else "")
    fields = {"op": "model", "backend": "transformers", **{key: value for key, value in shape.fields().items() if key != "block"}}
    for what, old, new, cost, left in zip(("first token", "next token"), plain, found, attention, (DENSITY, share)):
        if not quest:
            bench.record([old * 1e6], **fields, of=f"plain, {what}", remark=f"attention alone {cost / old:.0%}")
        bound = amdahl(old, cost, left)
        row = bench.record([new * 1e6], "plain", [old * 1e6], **fields, of=f"{of}, {what}", amdahl=round(bound, 3),
                           remark=f"Amdahl bound {bound:.2f}x")
        bench.say(f"   {what} at {n} tokens, {of}: {new * 1e3:.1f} ms, plain {old * 1e3:.1f} ms: {row['ratio']:.2f}x, "
                  f"Amdahl bound {bound:.2f}x")
    return None


def units(bench: Bench) -> Iterator[Unit]:
    subject = Subject(bench)
    for quest in (False, True):
        for n in bench.sizes.lengths:
            yield Unit(f"{n} tokens{', quest' if quest else ''}", lambda n=n, quest=quest: prompts(bench, subject, n, quest))
