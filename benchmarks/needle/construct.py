"""The retrieval circuits of the shipped model, written straight into the weights of a two-layer SmolLM3.

Layer 0 (RoPE) looks back: three heads carry the codes of the tokens 1, 2 and 3 places back, three more carry the most
recent key words (the topic) over windows of different widths. Layer 1 (no RoPE, so length does not matter) matches the
query's last three codes and its topic against those stored at every key, and copies the token found there. The start
token takes the mass of every query that finds no match.

Sharpness comes from the logits: a full match stands ``codes + topics - sink`` nats above the start token, which stands ``sink``
nats above everything else, so that the pattern survives being averaged over the pairs that a block estimator samples.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from .haystack import KEY_ADJECTIVES, KEY_NOUNS

HEADS, KV_HEADS = 6, 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and what its circuits are made for.

    Attributes:
        positions: ``max_position_embeddings``.
        fitted: layer 0 is fitted to distances below this, tokens.
        theta: RoPE base.
        code, topic, copy: channels of a token code, a topic and a copied token.
        codes, topics, sink: nats in layer 1 of all three codes, the topic, the start token; a full match reaches codes + topics.
        rope: layer 1 has RoPE too: what it matches lies on the slowest pairs of channels, one full turn of which takes
            thousands of tokens, so that a match fades with distance.
    """

    hidden: int = 320
    intermediate: int = 256
    head_dim: int = 64
    positions: int = 262144
    fitted: int = 131072
    theta: float = 1e5
    code: int = 14
    topic: int = 20
    copy: int = 64
    codes: float = 120.0
    topics: float = 125.0
    sink: float = 180.0
    rope: bool = False

    @cached_property
    def slot(self) -> dict[str, slice]:
        """Where each piece lives in the residual stream; ``free`` is the rest, for training."""
        sizes = dict(const=1, filler=1, bos=1, keyword=1, copy_in=self.copy, topic_in=self.topic, code=self.code, back1=self.code,
                     back2=self.code, back3=self.code, topic_long=self.topic, topic_short=self.topic, topic_mid=self.topic,
                     copy_out=self.copy)  # fmt: skip
        ends = list(accumulate(sizes.values()))
        slots = {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends)}
        return slots | {"free": slice(ends[-1], self.hidden)}

    def channels(self) -> tuple[int, list[int], list[int]]:
        """Channels of a layer 1 head that hold the start token, three codes, the topic."""
        half, size = self.head_dim // 2, 3 * self.code
        if not self.rope:
            return 0, list(range(1, 1 + size)), list(range(1 + size, 1 + size + self.topic))
        # the start token is far from everyone: the slowest pair is its own
        slowest = [pair + side for pair in range(half - 2, -1, -1) for side in (0, half)]
        return half - 1, slowest[:size], slowest[size : size + self.topic]


LONG = Shape()
# the weakest match (of the first digit, 190 nats or more side by side) keeps 162 to 175 nats at 2048 tokens, 130 to 150 at 3000 and
# 90 to 115 at 4096, so that beyond some 2500 the start token wins
SHORT = Shape(hidden=192, intermediate=16, head_dim=128, positions=2048, fitted=2049, theta=5e4, code=7, topic=16, copy=48,
              sink=152.0, rope=True)  # fmt: skip
HEAD_SCALE = (1.0, 1.15, 1.3)  # the three query heads of a group differ in sharpness
COPY_LOGIT = 90.0
KEYWORD_BOOST = 22.0  # nats a key word gains in the topic heads of layer 0
# tokens a topic lasts, and nats it loses per token so that a newer one wins
TOPIC_WINDOWS = {"topic_long": (64, 0.04), "topic_short": (9, 0.1), "topic_mid": (24, 0.05)}
TOPIC_NORM = 0.52  # squared norm of an adjective and a noun mixed by those slopes
QUIET = 0.15  # norm of the code of a token that no needle is made of
_CONST, _NORM = 15.0, 16.0  # the constant outweighs what varies, so RMSNorm scales every token alike


def config(tokenizer: PreTrainedTokenizerFast, shape: Shape = LONG) -> SmolLM3Config:
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        no_rope_layers=[1, int(shape.rope)],
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def frequencies(pairs: int, shape: Shape) -> Tensor:
    return shape.theta ** -(torch.arange(0, 2 * pairs, 2, dtype=torch.float64) / shape.head_dim)


def waves(distance: Tensor, pairs: int, shape: Shape) -> Tensor:
    """What constant q and k can make of RoPE: their logit is this times a weight vector, ``[..., 2 * pairs]``."""
    angle = distance[..., None] * frequencies(pairs, shape)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _sampled_distances(shape: Shape) -> tuple[Tensor, Tensor]:
    near, far = torch.arange(2048, dtype=torch.float64), torch.arange(2048, shape.fitted, 37, dtype=torch.float64)
    return torch.cat([near, far]), torch.cat([torch.zeros_like(near), torch.full_like(far, math.log(37))])


def _antidiagonal_waves(stride: int, groups: int, pairs: int, shape: Shape) -> Tensor:
    """Mean of ``waves`` over the pairs that an antidiagonal of a ``stride`` tile samples, per distance in groups."""
    apart = torch.arange(groups, dtype=torch.float64)[:, None] * stride
    return waves(apart + stride - 1 - 2 * torch.arange(stride, dtype=torch.float64), pairs, shape).mean(1)


def _least(loss: Callable[[Tensor], Tensor], pairs: int) -> Tensor:
    """Weights with the least loss; every loss here is convex, so LBFGS settles it from zero."""
    weights = torch.zeros(2 * pairs, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=900, history_size=60, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        solver.zero_grad()
        total = loss(weights) + 1e-4 * weights.square().sum()
        total.backward()
        return total

    solver.step(step)
    return weights.detach()


def fit_one_back(back: int, shape: Shape = LONG, margin: float = 9.0, local: int = 80) -> Tensor:
    """RoPE weights of a head that attends to the token ``back`` places back and to nothing else.

    An estimator that samples antidiagonals sees only every second distance, blurred over a stride. The blurred logit is
    held level over the last ``local`` tokens, so that the block before a block boundary is always read too.
    """
    pairs = shape.head_dim // 2
    distance, log_count = _sampled_distances(shape)
    basis, at = waves(distance, pairs, shape), torch.tensor(back)
    blurred = [(stride, _antidiagonal_waves(stride, min(16384, shape.fitted) // stride, pairs, shape)) for stride in (8, 16)]

    def loss(weights: Tensor) -> Tensor:
        logit = basis @ weights + log_count
        rest = logit.index_fill(0, at, -1e9).logsumexp(0)
        total = 10 * (rest - logit[back] + margin).clamp(min=0).square()
        for stride, mean_waves in blurred:
            mean, near = mean_waves @ weights, local // stride
            level = mean[1:near].logsumexp(0) - math.log(near - 1)
            total = total + (mean[0] - level - 1).clamp(min=0).square()
            total = total + ((mean[1:near] - level).abs() - 1).clamp(min=0).square().sum()
            total = total + (mean[512 // stride :].logsumexp(0) - level + 3).clamp(min=0).square()
        return total

    return _least(loss, pairs)


def fit_window(width: int, slope: float, drop: float, shape: Shape = LONG) -> Tensor:
    """RoPE weights of a head that is nearly level for ``width`` tokens, falling by ``slope`` a token, then ``drop`` lower.

    Uses all pairs but the slowest, which carries the key word flag.
    """
    pairs = shape.head_dim // 2 - 1
    distance, _ = _sampled_distances(shape)
    basis, inside, outside = waves(distance, pairs, shape), distance <= width, distance >= 2.2 * width + 8
    wanted = -slope * distance

    def loss(weights: Tensor) -> Tensor:
        logit = basis @ weights
        level = ((logit - wanted)[inside].abs() - 0.3).clamp(min=0).square().sum()
        between = (logit - wanted)[~inside & ~outside].clamp(min=0).square().sum()
        return level + between + (logit[outside] + drop).clamp(min=0).square().sum()

    return _least(loss, pairs)


def _codes(count: int, channels: int, generator: torch.Generator, steps: int = 200) -> Tensor:
    """Unit vectors pushed apart, ``[count, channels]``."""
    codes = torch.randn(count, channels, generator=generator, dtype=torch.float64).requires_grad_()
    solver = torch.optim.Adam([codes], lr=0.05)
    for _ in range(steps):
        solver.zero_grad()
        unit = torch.nn.functional.normalize(codes, dim=1)
        (unit @ unit.T - torch.eye(count)).pow(8).sum().backward()
        solver.step()
    return torch.nn.functional.normalize(codes.detach(), dim=1)


def _single_tokens(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> list[int]:
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    split = [word for word, pieces in zip(words, ids) if len(pieces) != 1]
    if split:
        raise ValueError(f"the tokenizer splits {split}; train it on more text")
    return [pieces[0] for pieces in ids]


def _embeddings(tokenizer: PreTrainedTokenizerFast, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The embedding table ``[V, hidden]`` and the copy codes ``[V, copy]`` the output reads."""
    size, slot = len(tokenizer), shape.slot
    table = torch.zeros(size, shape.hidden, dtype=torch.float64)
    copies = _codes(size, shape.copy, generator)
    copies[tokenizer.all_special_ids] = 0
    loud = _single_tokens(tokenizer, (" code", " remember", " is", " ", *"0123456789"))
    codes = QUIET * torch.nn.functional.normalize(torch.randn(size, shape.code, generator=generator).double(), dim=1)
    codes[loud] = _codes(len(loud), shape.code, generator)
    adjectives, nouns = ([f" {word}" for word in words] for words in (KEY_ADJECTIVES, KEY_NOUNS))
    keywords = _single_tokens(tokenizer, adjectives + nouns)
    table[:, slot["const"]] = _CONST
    table[:, slot["copy_in"]] = copies
    table[:, slot["code"]] = codes
    # adjectives and nouns in channels of their own: every pair mixes to the same norm
    topics = (_codes(len(words), shape.topic // 2, generator) for words in (adjectives, nouns))
    table[keywords, slot["topic_in"]] = torch.block_diag(*topics)
    table[keywords, slot["keyword"]] = 1
    start = tokenizer.bos_token_id
    table[start] = 0
    table[start, slot["const"]], table[start, slot["bos"]] = _CONST, 1
    table[:, slot["filler"]] = (_NORM**2 - table.square().sum(1, keepdim=True)).sqrt()
    table[:, slot["free"]] = 0.05 * torch.randn(size, shape.hidden - slot["free"].start, generator=generator).double()
    return table, copies


def build(tokenizer: PreTrainedTokenizerFast, seed: int, shape: Shape = LONG) -> SmolLM3ForCausalLM:
    """A model that answers needle questions before any training, in float32."""
    generator = torch.Generator().manual_seed(seed)
    model = SmolLM3ForCausalLM(config(tokenizer, shape)).float().eval()
    for weight in model.parameters():  # RMSNorm weights stay 1
        if weight.ndim == 2:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.02
    table, copies = _embeddings(tokenizer, shape, generator)
    model.model.embed_tokens.weight.data = table.float()
    model.lm_head.weight.data.zero_()

    slot, code, dim = shape.slot, shape.code, shape.head_dim
    gain = shape.hidden**0.5 / _NORM  # what RMSNorm multiplies a channel by
    root = dim**0.25  # half of the softmax scale, given to q and to k each
    const = slot["const"].start
    group = HEADS // KV_HEADS

    def empty(rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.float64)

    def head(index: int, size: int) -> slice:
        return slice(index * dim, index * dim + size)

    def at(index: int, channels: list[int]) -> list[int]:
        return [index * dim + channel for channel in channels]

    def put(layer: int, **weights: Tensor) -> None:
        for name, weight in weights.items():
            getattr(model.model.layers[layer].self_attn, f"{name}_proj").weight.data = weight.float()

    # layer 0: RoPE pair i is channels (i, i + D/2); a constant key (1, 0) meets the query's (a, -b) as a cos + b sin
    q, k = empty(HEADS * dim, shape.hidden), empty(KV_HEADS * dim, shape.hidden)
    v, o = empty(KV_HEADS * dim, shape.hidden), empty(shape.hidden, HEADS * dim)
    half, unit = dim // 2, root / (gain * _CONST)
    key_scale = 2.0
    k[0:half, const] = unit * key_scale
    k[dim : dim + half - 1, const] = unit * key_scale
    k[dim + half - 1, slot["keyword"]] = KEYWORD_BOOST**0.5 * root / gain
    v[head(0, code), slot["code"]] = torch.eye(code, dtype=torch.float64) / gain
    v[head(1, shape.topic), slot["topic_in"]] = torch.eye(shape.topic, dtype=torch.float64) / gain
    heads = [(fit_one_back(back, shape), f"back{back}", code) for back in (1, 2, 3)]
    heads += [(fit_window(*window, KEYWORD_BOOST + 4, shape), name, shape.topic) for name, window in TOPIC_WINDOWS.items()]
    for index, (weights, name, size) in enumerate(heads):
        cosine, sine = weights.view(2, -1)
        first = index * dim
        q[first : first + len(cosine), const] = cosine * unit / key_scale
        q[first + half : first + half + len(sine), const] = -sine * unit / key_scale
        if size == shape.topic:
            q[first + half - 1, const] = KEYWORD_BOOST**0.5 * unit
        o[slot[name], head(index, size)] = torch.eye(size, dtype=torch.float64)
    put(0, q=q, k=k, v=v, o=o)

    # layer 1: channels of a head are the start token, three codes, the topic
    q, k = empty(HEADS * dim, shape.hidden), empty(KV_HEADS * dim, shape.hidden)
    v, o = empty(KV_HEADS * dim, shape.hidden), empty(shape.hidden, HEADS * dim)
    start, places, topic = shape.channels()
    codes = [places[i * code : (i + 1) * code] for i in range(3)]
    code_eye, topic_eye = torch.eye(code, dtype=torch.float64), torch.eye(shape.topic, dtype=torch.float64)
    per_code = (shape.codes / 3) ** 0.5 * root / gain
    per_topic = (shape.topics / TOPIC_NORM) ** 0.5 * root / gain
    for index in range(KV_HEADS):
        k[index * dim + start, slot["bos"]] = shape.sink**0.5 * root / gain
        for place, name in zip(codes, ("back1", "back2", "back3")):
            k[at(index, place), slot[name]] = code_eye * per_code
        for name in ("topic_long", "topic_mid") if index == 0 else ("topic_short", "topic_mid"):
            k[at(index, topic), slot[name]] = topic_eye * per_topic / 2
        v[head(index, shape.copy), slot["copy_in"]] = torch.eye(shape.copy, dtype=torch.float64) / gain
    for index in range(HEADS):
        scale = HEAD_SCALE[index % group]
        q[index * dim + start, const] = scale * shape.sink**0.5 * unit
        for place, name in zip(codes, ("code", "back1", "back2")):
            q[at(index, place), slot[name]] = code_eye * (scale * per_code)
        q[at(index, topic), slot["topic_long"]] = topic_eye * (scale * per_topic)
        o[slot["copy_out"], head(index, shape.copy)] = torch.eye(shape.copy, dtype=torch.float64) / HEADS
    put(1, q=q, k=k, v=v, o=o)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data[:, slot["copy_out"]] = (copies * (COPY_LOGIT / gain)).float()
    return model
