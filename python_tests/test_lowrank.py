"""Low-rank keys: what is kept equals a truncated decomposition in float64, however the tokens came, for every way to rotate."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_archive import spread
from test_cache import assert_close, generate, prompt
from test_transformers import FAMILIES, tiny, tokens

import kvcache
import sparse_attn
from kvcache.codecs import LowRankKeys
from kvcache.config import CacheConfig, as_config
from kvcache.store import Meter
from sparse_attn import ContractError
from sparse_attn.hf import load, model_rotations, observe
from sparse_attn.rotary import Rotation

ROOT = Path(__file__).parent.parent
HEADS, DIM, PAGE = 2, 16, 8
YARN = dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=64))


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def half_turns(mixed: bool = False) -> Rotation:
    """Pairs (i, i + R); channels mixed: a layout that no table of pairs describes."""
    mix = torch.randperm(DIM, generator=torch.Generator().manual_seed(0))

    def tables(positions):
        angle = positions[..., None] * 10000 ** -(torch.arange(DIM // 2) / (DIM // 2))
        return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def apply(q, k, cos, sin):
        def one(x):
            x = x[..., mix] if mixed else x
            turned = x * cos[:, None] + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin[:, None]
            return turned[..., mix.argsort()] if mixed else turned
        return one(q), one(k)

    return Rotation(tables, apply)


def low_rank_keys(n: int, rank: int, noise: float = 0.0, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """``[HEADS, n, DIM]`` before rotation, of falling importance in ``rank`` directions that the heads share."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(HEADS * DIM, rank, generator=g))[0].T * torch.linspace(3, 0.5, rank)[:, None]
    flat = torch.randn(n, rank, generator=g) @ directions + noise * torch.randn(n, HEADS * DIM, generator=g)
    return flat.view(n, HEADS, DIM).transpose(0, 1).to(dtype)


def rotated(keys: torch.Tensor, rotation: Rotation | None, positions: torch.Tensor) -> torch.Tensor:
    return keys if rotation is None else rotation.move(keys[None], torch.zeros_like(positions), positions)[0]


def made(rank: int, sequences: list[tuple[torch.Tensor, torch.Tensor]], rotation: Rotation | None, piece: int = 1000):
    """The factors of some sequences of (keys, positions), fitted in pieces."""
    factors = LowRankKeys(rank).layer(Meter(), rotation)

    def pieces():
        for b, (k, at) in enumerate(sequences):
            for start in range(0, k.shape[1], piece):
                yield b, k[:, start : start + piece], at[start : start + piece]

    factors.fit(pieces, len(sequences))
    return factors


def everything(factors, b: int) -> torch.Tensor:
    """``[HEADS, n, D]``: all keys of a sequence, as one page."""
    (batch, heads, _, dim), n = factors.basis.shape, int(factors.lengths[b])
    out, pages = torch.empty(heads * n, dim, dtype=factors.factors.dtype), torch.full((batch, heads, 1), -1).int()
    pages[b] = 0
    factors.rebuild(pages, n, out, (torch.arange(heads) * n)[None, :, None].expand(batch, heads, 1))
    return out.view(heads, n, dim)


def counted(factors) -> bool:
    return factors._meter.now == factors.n_bytes


ROTATIONS = {"pairs of halves": half_turns(), "another layout": half_turns(mixed=True), "none": None}
each_rotation = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=list(ROTATIONS))


# -- what is kept -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the lowrank codec does not know")
@each_rotation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_rank_gives_the_keys_back(rotation, dtype):
    at = torch.randperm(9000)[:70]
    k = rotated(torch.randn(HEADS, 70, DIM), rotation, at).to(dtype)
    factors = made(HEADS * DIM, [(k, at)], rotation, piece=32)
    # of bfloat16 keys: factors, basis and keys round once each, and another layout rounds before it rotates
    assert_close(everything(factors, 0).float(), k.float(), 2e-5 if dtype == torch.float32 else 0.05)
    assert abs(float(factors.energy[0]) - 1) < 1e-9 and counted(factors)


@given(rank=st.integers(1, 12), piece=st.sampled_from([1, 7, 64, 1000]), seed=st.integers(0, 20), noise=st.sampled_from([0.0, 0.1]))
def test_the_error_is_the_tail_of_the_singular_values(rank, piece, seed, noise):
    """Un-rotated by hand in float64, decomposed in one go: nothing of the same rank is closer."""
    n = 150
    keys, at, rotation = low_rank_keys(n, 12, noise, seed), torch.arange(5, 5 + n), half_turns()
    k = rotated(keys, rotation, at)
    factors = made(rank, [(k, at)], rotation, piece)
    values = torch.linalg.svdvals(keys.transpose(0, 1).flatten(1).double())
    total, tail = (values**2).sum(), (values[rank:] ** 2).sum()
    error = (everything(factors, 0).double() - k.double()).pow(2).sum()
    assert abs(error - tail) < 1e-4 * total
    assert abs(float(factors.energy[0]) - float(1 - tail / total)) < 1e-5


def test_rounded_factors_cost_as_much_as_a_rounded_key():
    """The claim of the docstring of KeyFactors."""
    at, keys = torch.arange(4000), low_rank_keys(4000, 8)
    k = rotated(keys, half_turns(), at)
    exact, rounded = (everything(made(8, [(k.to(dtype), at)], half_turns()), 0).double()
                      for dtype in (torch.float32, torch.bfloat16))
    scale = exact.pow(2).mean().sqrt()
    assert (rounded - exact).pow(2).mean().sqrt() / scale < 4e-3
    assert (k.bfloat16().double() - k.double()).pow(2).mean().sqrt() / scale > 1e-3


@pytest.mark.filterwarnings("ignore:the lowrank codec does not know")
@each_rotation
@pytest.mark.parametrize("page", [1, PAGE, 64])
def test_chosen_pages_are_those_of_everything(rotation, page):
    lengths = [100, 37, 64]
    sequences = [(rotated(low_rank_keys(n, 20, seed=n), rotation, torch.arange(n) + n), torch.arange(n) + n) for n in lengths]
    factors = made(10, sequences, rotation)
    pages = torch.tensor([[[0, -1, 1], [-1, 0, -1]], [[0, -1, -1], [-1, 0, -1]], [[-1, -1, -1], [-1, -1, 0]]], dtype=torch.int32)
    pages[0, 0, 2] = (lengths[0] - 1) // page  # the open one
    targets = torch.randperm(pages.numel(), generator=torch.Generator().manual_seed(0)).view(pages.shape) * (page + 1)
    out = torch.full((pages.numel() * (page + 1), DIM), 9.0)
    expected = out.clone()
    for (b, h, i), number in ((at, int(pages[tuple(at)])) for at in (pages >= 0).nonzero().tolist()):
        keys = everything(factors, b)[h, number * page : (number + 1) * page]
        expected[int(targets[b, h, i]) :][: len(keys)] = keys
    factors.rebuild(pages, page, out, targets)
    assert_close(out, expected, 1e-5)


def test_a_layout_that_no_table_describes_is_said_once_per_layer():
    with pytest.warns(UserWarning, match="does not know how this model lays out the pairs that rotate"):
        made(4, [(torch.randn(HEADS, 9, DIM), torch.arange(9))], half_turns(mixed=True))


# -- tokens that come later -------------------------------------------------------------------------------------------------


def test_tokens_that_come_later_are_projected_on_the_same_basis():
    n, rank, rotation = 400, 6, half_turns()
    keys, at = low_rank_keys(n, 12), torch.arange(n)
    k = rotated(keys, rotation, at)
    factors = made(rank, [(k[:, :300], at[:300])], rotation)
    for start in range(300, n, 7):
        factors.append(0, k[:, start : start + 7], at[start : start + 7])
        assert counted(factors)
    values, vectors = torch.linalg.eigh((flat := keys.transpose(0, 1).flatten(1).double())[:300].T @ flat[:300])
    projector = vectors[:, -rank:] @ vectors[:, -rank:].T
    expected = rotated((flat @ projector).float().view(n, HEADS, DIM).transpose(0, 1), rotation, at)
    assert_close(everything(factors, 0), expected, 1e-4)
    assert values[0] < values[-1]


def test_a_basis_of_few_tokens_follows_what_comes():
    """The first 3 tokens have other directions than the rest; a third sequence has none at first. What comes before the basis knows
    all directions is kept as well as it was known."""
    n, rank, rotation = 200, 9, half_turns()
    k = rotated(torch.cat([low_rank_keys(3, 3, seed=1), low_rank_keys(n - 3, 6)], 1), rotation, torch.arange(n))
    at = torch.arange(n)
    factors = made(rank, [(k, at), (k[:, :3], at[:3]), (k[:, :0], at[:0])], rotation)
    for b, first in ((1, 3), (2, 0)):
        for start in range(first, n, 3):
            factors.append(b, k[:, start : start + 3], at[start : start + 3])
        assert_close(everything(factors, b)[:, 12:], k[:, 12:], 1e-4)
        assert (everything(factors, b) - k).pow(2).sum() < 0.1 * k.pow(2).sum()
        assert float(factors.energy[b]) > 1 - 1e-6
    assert not factors._grams and counted(factors)


def test_a_basis_of_few_tokens_goes_where_its_sequence_goes():
    k, at = low_rank_keys(100, 6), torch.arange(100)
    factors = made(9, [(low_rank_keys(90, 9, seed=1), at[:90]), (k[:, :3], at[:3])], None)
    twin = factors.copy(Meter())
    factors.select(torch.tensor([1, 1]))
    for rows in (slice(3, 40), slice(40, 100)):
        for found, b in ((twin, 1), (factors, 0), (factors, 1)):
            found.append(b, k[:, rows], at[rows])
    for found, b in ((twin, 1), (factors, 0), (factors, 1)):
        assert_close(everything(found, b)[:, 3:], k[:, 3:], 1e-4)
        assert counted(found)


def test_a_sequence_of_a_batch_equals_it_alone():
    rotation, lengths = half_turns(), [90, 31, 200]
    sequences = [(rotated(low_rank_keys(n, 20, seed=n), rotation, torch.arange(n)), torch.arange(n)) for n in lengths]
    together = made(7, sequences, rotation)
    for b, sequence in enumerate(sequences):
        assert_close(everything(together, b), everything(made(7, [sequence], rotation), 0), 1e-5)


def test_sequences_are_chosen_copied_and_forgotten():
    rotation = half_turns()
    sequences = [(low_rank_keys(n, 20, seed=n), torch.arange(n)) for n in (40, 300, 9)]
    factors, meter = made(7, sequences, rotation), Meter()
    twin, before = factors.copy(meter), [everything(factors, b) for b in range(3)]
    assert meter.now == twin.n_bytes > 0
    factors.select(torch.tensor([2, 0, 2]))
    assert counted(factors)
    for i, b in enumerate((2, 0, 2)):
        assert torch.equal(everything(factors, i), before[b])
        factors.append(i, sequences[b][0] + i, sequences[b][1] + 1000)
    for b in range(3):
        assert torch.equal(everything(twin, b), before[b])
    twin.append(1, *sequences[0])
    assert torch.equal(everything(twin, 0), before[0]) and torch.equal(everything(twin, 1)[:, :300], before[1])
    factors.clear()
    assert factors._meter.now == factors.n_bytes == 0
    factors.fit(lambda: iter([(0, *sequences[0])]), 1)
    assert torch.equal(everything(factors, 0), before[0]) and counted(factors)


# -- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3", "Glm4", "GptOss", "Gemma3", "SmolLM3", "GPTNeoX", "yarn"])
def test_the_pairs_of_every_family_are_found(family):
    """Far from 0 too, and with an attention factor, which the keys keep."""
    model = tiny("Llama" if family == "yarn" else family, **(YARN if family == "yarn" else {}))
    rotations = model_rotations(model, "test")
    assert rotations
    for rotation in rotations.values():
        dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
        pairs = rotation.pairs(dim)
        assert pairs is not None and pairs[0] and pairs[1] == (family == "Glm4")
        x, at = torch.randn(1, 2, 30, dim), torch.randperm(100_000)[:30]
        k = rotation.move(x, torch.zeros_like(at), at)[0]
        factors = LowRankKeys(2 * dim).layer(Meter(), rotation)
        factors.fit(lambda k=k, at=at: iter([(0, k, at)]), 1)
        assert_close(everything(factors, 0), k, 2e-5)


def test_interleaved_pairs_are_told_from_halves():
    def tables(positions):
        angle = (positions[..., None] * 0.3 ** torch.arange(4)).repeat_interleave(2, -1)
        return angle.cos(), angle.sin()

    def apply(q, k, cos, sin):
        def one(x):
            return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None]
        return one(q), one(k)

    assert Rotation(tables, apply, width=8).pairs(DIM) == (4, True)
    assert half_turns().pairs(DIM) == (DIM // 2, False) and half_turns(mixed=True).pairs(DIM) is None


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Llama4", "DeepseekV3", "Mistral")])
def test_a_model_is_dense_at_full_rank_when_all_pages_are_read(family):
    model, (ids, mask) = tiny(family), prompt()
    heads = model.config.num_attention_heads if family == "GPTNeoX" else model.config.num_key_value_heads
    dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    expected, logits = generate(model, None, ids, mask)
    with sparse_attn.patch(model, prefill="dense"):
        cache = spread(model, codec=LowRankKeys(heads * dim))
        found, mine = generate(model, cache, ids, mask, prefill_chunk_size=32)
    assert cache.report().tiers["host"]
    assert torch.equal(found, expected)
    assert_close(mine, logits, 2e-3)


def shadow(model, budget: int = 64, **settings):
    return kvcache.ShadowKVCache(model, budget, page=4, outliers=2, recent=8, dense_layers=(), **settings)


def test_a_cache_of_factors_goes_on_in_a_fork_and_says_that_no_folder_holds_it(tmp_path):
    """Before it generates, it is saved like any other: test_resume."""
    model, ids = tiny("Llama", max_position_embeddings=512), tokens(1, 300)
    with sparse_attn.patch(model, prefill="dense"):
        cache = shadow(model, rank=12)
        kvcache.prefill(model, ids, cache, 64)
        for token in range(70):
            model(torch.tensor([[token]]), past_key_values=cache)
        fork = cache.fork()
        assert all(layer.core.archive._fitted for layer in (*cache.layers, *fork.layers))
        expected, found = (torch.cat([model(torch.tensor([[token]]), past_key_values=c).logits for token in range(20)], 1)
                           for c in (cache, fork))
    assert torch.equal(found, expected)
    with pytest.raises(ContractError, match="layer 0 keeps its older keys as factors since it generated a token"):
        cache.save(tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


def test_factors_take_the_bytes_that_they_should():
    """kvcache.md 25.6: rank numbers per token in place of heads times channels, and the basis once."""
    model, ids, rank = tiny("Llama", max_position_embeddings=2048), tokens(1, 1500), 8
    with sparse_attn.patch(model, prefill="dense"):
        cache = shadow(model, rank=rank)
        kvcache.prefill(model, ids, cache, 256)
        model(ids[:, :1], past_key_values=cache)
        for layer in cache.layers:
            archive, (_, heads, dim) = layer.core.archive, (1, HEADS, DIM)
            tokens_here, angles = int(archive.tokens[0, 0]), (256 + -(-1500 // 256)) * dim
            slots = 2 * archive._k.numel()
            assert archive._factors.n_bytes == (tokens_here * (rank + 1) + heads * dim * rank + angles) * 4
            assert archive.n_bytes == archive._factors.n_bytes + slots * 4


def test_the_model_that_ships_has_few_directions_before_rotation_only():
    """The claim that the method stands on, in the layer that rotates."""
    model, _ = load(str(ROOT / "benchmarks" / "needle" / "model"), "cpu", torch.float32)
    keys, rotations = {}, model_rotations(model, "test")
    ids = torch.randint(1, model.config.vocab_size, (1, 1024), generator=torch.Generator().manual_seed(0))
    observe(model, ids, lambda q, kv, ctx: keys.setdefault(ctx.layer, kv.k[0].clone()))
    for layer, rotation in rotations.items():
        before, after = (LowRankKeys(16).layer(Meter(), turn) for turn in (rotation, None))
        for factors in (before, after):
            factors.fit(lambda layer=layer: iter([(0, keys[layer], torch.arange(1024))]), 1)
        assert float(before.energy) > 0.99 > 0.9 > float(after.energy)


def test_heads_that_kept_different_tokens_are_refused():
    """SnapKV keeps as many of each head, but not the same ones."""
    model, ids = tiny("Llama", max_position_embeddings=512), tokens(1, 300)
    settings = dict(window=8, kernel=3, evict="prompt", tiers=("device", "host"))
    decode = {"name": "quest", "budget": 12, "page": 4, "dense_layers": ()}
    cache = kvcache.make_cache(model, "snapkv", 200, **settings, decode=decode, codec={"name": "lowrank", "rank": 8})
    with sparse_attn.patch(model, prefill="dense"), pytest.raises(ContractError, match="KV heads of a layer hold different tokens"):
        generate(model, cache, ids, torch.ones_like(ids))


# -- bad input --------------------------------------------------------------------------------------------------------------


def test_the_config_equals_its_json_form():
    config = as_config("quest", 32, tiers=("device", "host"), codec="lowrank", rank=24)
    assert config.codec == LowRankKeys(24) and config.to_json()["codec"] == {"name": "lowrank", "rank": 24}
    assert CacheConfig.from_json(config.to_json()) == config


K, AT = torch.randn(HEADS, 20, DIM), torch.arange(20)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: LowRankKeys(0), "rank=0 must be 1 or more"),
    (lambda: LowRankKeys(1.5), "rank=1.5 must be 1 or more"),
    (lambda: made(HEADS * DIM + 1, [(K, AT)], None), "rank=33 is above the 32 channels of all KV heads (2 of 16)"),
    (lambda: made(3, [(K, AT[:-1])], None), "the same tokens for all KV heads, got [2, 20, 16] and [19]"),
    (lambda: made(3, [], None), "there is no token to make a basis from"),
    (lambda: LowRankKeys(3).layer(Meter(), None).append(0, K, AT), "there is no basis yet to append to; fit() comes first"),
    (lambda: LowRankKeys(3).layer(Meter(), None).rebuild(*[None] * 4), "there are no keys yet to rebuild; fit() comes first"),
    (lambda: made(3, [(K, AT)], None).append(1, K, AT), "there is no sequence 1 among the 1 that were fitted"),
    (lambda: made(3, [(K, AT)], None).append(0, K[:1], AT), "k is [1, 20, 16], not [2, n, 16] as it was when the basis was made"),
    (lambda: made(3, [(K, AT)], None).rebuild(torch.full((1, HEADS, 1), 3), PAGE, torch.zeros(99, DIM), torch.zeros(1, HEADS, 1)),
     "sequences have [20] tokens, and pages of 8 were asked for that lie behind them"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(ContractError) as error:
        call()
    assert sentence in str(error.value)
