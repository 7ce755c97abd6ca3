"""The retrieval circuits of the shipped model, written straight into the weights of a two-layer SmolLM3.

Layer 0 (RoPE) looks back: three heads carry the codes of the tokens 1, 2 and 3 places back, three more carry the most
recent key words (the topic) over windows of different widths. Layer 1 (no RoPE, so length does not matter) matches the
query's last three codes and its topic against those stored at every key, and copies the token found there. The start
token takes the mass of every query that finds no match.

Sharpness comes from the logits: a full match stands ``MATCH - SINK`` nats above the start token, which stands ``SINK``
nats above everything else, so that the pattern survives being averaged over the pairs that a block estimator samples.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from .haystack import KEY_ADJECTIVES, KEY_NOUNS

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
MAX_POSITIONS = 262144
ROPE_THETA = 1e5
CODE, TOPIC, COPY = 14, 20, 64  # channels of a token code, a topic and a copied token

# nats in layer 1: all three codes, the topic, the start token; a full match reaches CODES + TOPICS
CODES, TOPICS, SINK = 120.0, 125.0, 180.0
MATCH = CODES + TOPICS
HEAD_SCALE = (1.0, 1.15, 1.3)  # the three query heads of a group differ in sharpness
COPY_LOGIT = 90.0
KEYWORD_BOOST = 22.0  # nats a key word gains in the topic heads of layer 0
# tokens a topic lasts, and nats it loses per token so that a newer one wins
TOPIC_WINDOWS = {"topic_long": (64, 0.04), "topic_short": (9, 0.1), "topic_mid": (24, 0.05)}
TOPIC_NORM = 0.52  # squared norm of an adjective and a noun mixed by those slopes
QUIET = 0.15  # norm of the code of a token that no needle is made of

# residual stream: where each piece lives; the rest is free for training
_SIZES = dict(const=1, filler=1, bos=1, keyword=1, copy_in=COPY, topic_in=TOPIC, code=CODE, back1=CODE, back2=CODE,
              back3=CODE, topic_long=TOPIC, topic_short=TOPIC, topic_mid=TOPIC, copy_out=COPY)  # fmt: skip
HIDDEN, INTERMEDIATE = 320, 256
SLOT: dict[str, slice] = {}
_at = 0
for _name, _size in _SIZES.items():
    SLOT[_name] = slice(_at, _at + _size)
    _at += _size
FREE = slice(_at, HIDDEN)
_CONST, _NORM = 15.0, 16.0  # the constant outweighs what varies, so RMSNorm scales every token alike


def config(tokenizer: PreTrainedTokenizerFast) -> SmolLM3Config:
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        no_rope_layers=[1, 0],
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def frequencies(pairs: int = HEAD_DIM // 2) -> Tensor:
    return ROPE_THETA ** -(torch.arange(0, 2 * pairs, 2, dtype=torch.float64) / HEAD_DIM)


def waves(distance: Tensor, pairs: int) -> Tensor:
    """What constant q and k can make of RoPE: their logit is this times a weight vector, ``[..., 2 * pairs]``."""
    angle = distance[..., None] * frequencies(pairs)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _sampled_distances() -> tuple[Tensor, Tensor]:
    near, far = torch.arange(2048, dtype=torch.float64), torch.arange(2048, 131072, 37, dtype=torch.float64)
    return torch.cat([near, far]), torch.cat([torch.zeros_like(near), torch.full_like(far, math.log(37))])


def _antidiagonal_waves(stride: int, groups: int, pairs: int) -> Tensor:
    """Mean of ``waves`` over the pairs that an antidiagonal of a ``stride`` tile samples, per distance in groups."""
    apart = torch.arange(groups, dtype=torch.float64)[:, None] * stride
    return waves(apart + stride - 1 - 2 * torch.arange(stride, dtype=torch.float64), pairs).mean(1)


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


def fit_one_back(back: int, margin: float = 9.0, local: int = 80) -> Tensor:
    """RoPE weights of a head that attends to the token ``back`` places back and to nothing else.

    An estimator that samples antidiagonals sees only every second distance, blurred over a stride. The blurred logit is
    held level over the last ``local`` tokens, so that the block before a block boundary is always read too.
    """
    pairs = HEAD_DIM // 2
    distance, log_count = _sampled_distances()
    basis, at = waves(distance, pairs), torch.tensor(back)
    blurred = [(stride, _antidiagonal_waves(stride, 16384 // stride, pairs)) for stride in (8, 16)]

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


def fit_window(width: int, slope: float, drop: float) -> Tensor:
    """RoPE weights of a head that is nearly level for ``width`` tokens, falling by ``slope`` a token, then ``drop`` lower.

    Uses all pairs but the slowest, which carries the key word flag.
    """
    pairs = HEAD_DIM // 2 - 1
    distance, _ = _sampled_distances()
    basis, inside, outside = waves(distance, pairs), distance <= width, distance >= 2.2 * width + 8
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


def _embeddings(tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The embedding table ``[V, HIDDEN]`` and the copy codes ``[V, COPY]`` the output reads."""
    size = len(tokenizer)
    table = torch.zeros(size, HIDDEN, dtype=torch.float64)
    copies = _codes(size, COPY, generator)
    copies[tokenizer.all_special_ids] = 0
    loud = _single_tokens(tokenizer, (" code", " remember", " is", " ", *"0123456789"))
    codes = QUIET * torch.nn.functional.normalize(torch.randn(size, CODE, generator=generator).double(), dim=1)
    codes[loud] = _codes(len(loud), CODE, generator)
    adjectives, nouns = ([f" {word}" for word in words] for words in (KEY_ADJECTIVES, KEY_NOUNS))
    keywords = _single_tokens(tokenizer, adjectives + nouns)
    table[:, SLOT["const"]] = _CONST
    table[:, SLOT["copy_in"]] = copies
    table[:, SLOT["code"]] = codes
    # adjectives and nouns in channels of their own: every pair mixes to the same norm
    topics = (_codes(len(words), TOPIC // 2, generator) for words in (adjectives, nouns))
    table[keywords, SLOT["topic_in"]] = torch.block_diag(*topics)
    table[keywords, SLOT["keyword"]] = 1
    start = tokenizer.bos_token_id
    table[start] = 0
    table[start, SLOT["const"]], table[start, SLOT["bos"]] = _CONST, 1
    table[:, SLOT["filler"]] = (_NORM**2 - table.square().sum(1, keepdim=True)).sqrt()
    table[:, FREE] = 0.05 * torch.randn(size, HIDDEN - FREE.start, generator=generator).double()
    return table, copies


def build(tokenizer: PreTrainedTokenizerFast, seed: int) -> SmolLM3ForCausalLM:
    """A model that answers needle questions before any training, in float32."""
    generator = torch.Generator().manual_seed(seed)
    model = SmolLM3ForCausalLM(config(tokenizer)).float().eval()
    for weight in model.parameters():  # RMSNorm weights stay 1
        if weight.ndim == 2:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.02
    table, copies = _embeddings(tokenizer, generator)
    model.model.embed_tokens.weight.data = table.float()
    model.lm_head.weight.data.zero_()

    gain = HIDDEN**0.5 / _NORM  # what RMSNorm multiplies a channel by
    root = HEAD_DIM**0.25  # half of the softmax scale, given to q and to k each
    const = SLOT["const"].start
    group = HEADS // KV_HEADS

    def empty(rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.float64)

    def head(index: int, channels: slice = slice(0, HEAD_DIM)) -> slice:
        return slice(index * HEAD_DIM + channels.start, index * HEAD_DIM + channels.stop)

    def put(layer: int, **weights: Tensor) -> None:
        for name, weight in weights.items():
            getattr(model.model.layers[layer].self_attn, f"{name}_proj").weight.data = weight.float()

    # layer 0: RoPE pair i is channels (i, i + D/2); a constant key (1, 0) meets the query's (a, -b) as a cos + b sin
    q, k = empty(HEADS * HEAD_DIM, HIDDEN), empty(KV_HEADS * HEAD_DIM, HIDDEN)
    v, o = empty(KV_HEADS * HEAD_DIM, HIDDEN), empty(HIDDEN, HEADS * HEAD_DIM)
    half, unit = HEAD_DIM // 2, root / (gain * _CONST)
    key_scale = 2.0
    k[0:half, const] = unit * key_scale
    k[HEAD_DIM : HEAD_DIM + half - 1, const] = unit * key_scale
    k[HEAD_DIM + half - 1, SLOT["keyword"]] = KEYWORD_BOOST**0.5 * root / gain
    v[head(0, slice(0, CODE)), SLOT["code"]] = torch.eye(CODE, dtype=torch.float64) / gain
    v[head(1, slice(0, TOPIC)), SLOT["topic_in"]] = torch.eye(TOPIC, dtype=torch.float64) / gain
    heads = [(fit_one_back(back), f"back{back}", CODE) for back in (1, 2, 3)]
    heads += [(fit_window(*shape, drop=KEYWORD_BOOST + 4), name, TOPIC) for name, shape in TOPIC_WINDOWS.items()]
    for index, (weights, name, size) in enumerate(heads):
        cosine, sine = weights.view(2, -1)
        at = index * HEAD_DIM
        q[at : at + len(cosine), const] = cosine * unit / key_scale
        q[at + half : at + half + len(sine), const] = -sine * unit / key_scale
        if size == TOPIC:
            q[at + half - 1, const] = KEYWORD_BOOST**0.5 * unit
        o[SLOT[name], head(index, slice(0, size))] = torch.eye(size, dtype=torch.float64)
    put(0, q=q, k=k, v=v, o=o)

    # layer 1: channels of a head are the start token, three codes, the topic
    q, k = empty(HEADS * HEAD_DIM, HIDDEN), empty(KV_HEADS * HEAD_DIM, HIDDEN)
    v, o = empty(KV_HEADS * HEAD_DIM, HIDDEN), empty(HIDDEN, HEADS * HEAD_DIM)
    codes = [slice(1 + i * CODE, 1 + (i + 1) * CODE) for i in range(3)]
    topic = slice(codes[-1].stop, codes[-1].stop + TOPIC)
    code_eye, topic_eye = torch.eye(CODE, dtype=torch.float64), torch.eye(TOPIC, dtype=torch.float64)
    per_code = (CODES / 3) ** 0.5 * root / gain
    per_topic = (TOPICS / TOPIC_NORM) ** 0.5 * root / gain
    for index in range(KV_HEADS):
        k[head(index, slice(0, 1)), SLOT["bos"]] = SINK**0.5 * root / gain
        for place, name in zip(codes, ("back1", "back2", "back3")):
            k[head(index, place), SLOT[name]] = code_eye * per_code
        for name in ("topic_long", "topic_mid") if index == 0 else ("topic_short", "topic_mid"):
            k[head(index, topic), SLOT[name]] = topic_eye * per_topic / 2
        v[head(index), SLOT["copy_in"]] = torch.eye(COPY, dtype=torch.float64) / gain
    for index in range(HEADS):
        scale = HEAD_SCALE[index % group]
        q[head(index, slice(0, 1)), const] = scale * SINK**0.5 * unit
        for place, name in zip(codes, ("code", "back1", "back2")):
            q[head(index, place), SLOT[name]] = code_eye * (scale * per_code)
        q[head(index, topic), SLOT["topic_long"]] = topic_eye * (scale * per_topic)
        o[SLOT["copy_out"], head(index)] = torch.eye(COPY, dtype=torch.float64) / HEADS
    put(1, q=q, k=k, v=v, o=o)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data[:, SLOT["copy_out"]] = (copies * (COPY_LOGIT / gain)).float()
    return model
