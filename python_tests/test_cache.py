"""Caches that evict, inside transformers models: exact where nothing has to go, right where something does, and no larger than said."""

import json
import os
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_transformers import FAMILIES, TINY, tiny, tokens  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

import kvcache  # noqa: E402
import sparse_attn  # noqa: E402
from kvcache.config import METHODS, CacheConfig  # noqa: E402
from sparse_attn import ContractError  # noqa: E402

PROMPT, NEW, PADS = 88, 10, (0, 19, 33)
# what a method needs besides a budget to make sense on a prompt of PROMPT tokens
SETTINGS = {
    "snapkv": dict(window=8, kernel=3),
    "pyramidkv": dict(window=8, kernel=3, beta=4),
    "adakv": dict(window=8, kernel=3),
    "chunkkv": dict(inner="tova", chunk=4),
    "heavy_hitter": dict(recent=8),
    "quest": dict(dense_layers=()),
    "landmarks": dict(dense_layers=(), page=4, outliers=2, recent=8),
    "double_sparsity": dict(dense_layers=(), width=4, recent=8),
    "token_select": dict(dense_layers=(), sinks=4, recent=8),
    "infllm": dict(dense_layers=(), page=4, sinks=4, recent=8),
    "quickllama": dict(dense_layers=(), page=4, sinks=4, recent=8, question=8),
    "lrqk": dict(dense_layers=(), rank=4, recent=8),
    "shadowkv": dict(dense_layers=(), page=4, outliers=2, recent=8, rank=32),
    "duo": dict(full=((False, True), (True, True)), sink=4, recent=12),
}
SCORE_FREE = ["streaming", "knorm", "keydiff", "random"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def cache_of(model, name: str, budget, **settings):
    if name == "duo":
        budget = None
    return kvcache.make_cache(model, name, budget, **SETTINGS.get(name, {}) | settings)


def prompt(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.long)
    for row, pad in enumerate(PADS):
        mask[row, :pad] = 0
    return ids[:rows], mask[:rows]


def generate(model, cache, ids, mask, new: int = NEW, **settings):
    """Sequences and the logits of each step, greedy."""
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, output_logits=True,
                         return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits, 1)


def assert_close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-4) -> None:
    """Logits of float32 models: peaked attention turns rounding of 1e-6 into 1e-5 or so, a wrong key into 1e-1 and more."""
    assert a.shape == b.shape and (a - b).abs().max() <= atol, f"largest difference {(a - b).abs().max():.2e}"


# -- nothing has to go ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("duo", "locret")])
def test_a_budget_that_holds_everything_is_dense(name, chunk):
    model, (ids, mask) = tiny("Llama"), prompt()
    expected, logits = generate(model, None, ids, mask)
    with sparse_attn.patch(model, prefill="dense"):
        found, mine = generate(model, cache_of(model, name, 400), ids, mask, prefill_chunk_size=chunk)
    assert torch.equal(found, expected)
    assert_close(mine, logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Llama4", "DeepseekV3", "Mistral")])
def test_every_family_is_dense_when_nothing_has_to_go(family):
    model, (ids, mask) = tiny(family), prompt()
    expected, logits = generate(model, None, ids, mask)
    with sparse_attn.patch(model, prefill="dense"):
        found, mine = generate(model, cache_of(model, "adakv", 400), ids, mask, prefill_chunk_size=32)
    assert torch.equal(found, expected)
    assert_close(mine, logits)


def test_latents_are_evicted_by_scores_that_need_no_queries():
    model, (ids, mask) = tiny("DeepseekV3"), prompt()
    expected, logits = generate(model, None, ids, mask)
    found, mine = generate(model, cache_of(model, "streaming", 400, attention_mask=mask), ids, mask)
    assert torch.equal(found, expected)
    assert_close(mine, logits)
    cache = cache_of(model, "knorm", 40, attention_mask=mask)
    generate(model, cache, ids, mask)
    assert max(row.most for row in cache.report().layers) <= 40 + NEW
    with pytest.raises(ContractError, match="latents"):
        generate(model, cache_of(model, "streaming", 40), ids, mask)
    with sparse_attn.patch(model, prefill="dense"), pytest.raises(ContractError, match="latents that have none"):
        generate(model, cache_of(model, "snapkv", 40, attention_mask=mask), ids, mask)


# -- something does ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "locret"])
def test_a_padded_row_is_evicted_like_the_row_alone(name, chunk):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        together = generate(model, cache_of(model, name, 40), ids, mask, prefill_chunk_size=chunk)[1]
        for row, pad in enumerate(PADS):
            if chunk and pad % chunk:
                continue  # the row alone would be cut elsewhere
            alone = generate(model, cache_of(model, name, 40), ids[row : row + 1, pad:], mask[row : row + 1, pad:], prefill_chunk_size=chunk)[1]
            assert_close(together[row : row + 1], alone)


class Replay:
    """An independent run of an evicting cache: everything stays in memory, and what was evicted is masked.

    ``evict(probabilities [B, H, Nq, N], visible [B, Hkv, N], state)`` returns the tokens that stay, by brute force.
    """

    def __init__(self, evict):
        self.evict, self.visible, self.state = evict, {}, {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        (batch, heads, n_q, _), (_, kv_heads, n_k, _) = query.shape, key.shape
        layer, group = module.layer_idx, heads // kv_heads
        seen = torch.ones(batch, kv_heads, n_k, dtype=torch.bool)
        if layer in self.visible:
            seen[..., : self.visible[layer].shape[2]] = self.visible[layer]
        causal = torch.arange(n_k) <= torch.arange(n_k - n_q, n_k)[:, None]
        allowed = seen.repeat_interleave(group, 1)[:, :, None] & causal
        logits = (query.double() @ key.double().repeat_interleave(group, 1).mT * scaling).masked_fill(~allowed, float("-inf"))
        p = logits.softmax(-1)
        self.visible[layer] = self.evict(p, seen, self.state.setdefault(layer, {}))
        return (p @ value.double().repeat_interleave(group, 1)).transpose(1, 2).to(query.dtype), None


def kept_of(score: torch.Tensor, seen: torch.Tensor, budget: int, sinks: int, recent: int) -> torch.Tensor:
    n = score.shape[-1]
    score = score.masked_fill(~seen, float("-inf"))
    score[..., :sinks] = score[..., n - recent :] = float("inf")
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return torch.zeros_like(seen).scatter_(-1, order, True) & seen


def h2o(budget: int, sinks: int, recent: int):
    def evict(p, seen, state):
        group = p.shape[1] // seen.shape[1]
        mass = p.unflatten(1, (-1, group)).sum((2, 3))
        before = state.get("mass", mass.new_zeros(*mass.shape[:2], 0))
        state["mass"] = mass + torch.nn.functional.pad(before, (0, mass.shape[2] - before.shape[2]))
        return kept_of(state["mass"], seen, budget, sinks, recent)

    return evict


def snapkv(budget: int, window: int, kernel: int):
    def evict(p, seen, state):
        if p.shape[2] == 1:
            return seen
        n, group = p.shape[3], p.shape[1] // seen.shape[1]
        score = torch.zeros(seen.shape, dtype=torch.float64)
        for b in range(seen.shape[0]):
            for h in range(seen.shape[1]):
                kept = seen[b, h].nonzero()[:, 0]
                before = kept[kept < n - window].tolist()  # neighbours are those in the cache
                for head in range(h * group, (h + 1) * group):
                    mass = p[b, head, -window:].sum(0)
                    for i, token in enumerate(before):
                        near = before[max(0, i - kernel // 2) : i + kernel // 2 + 1]
                        score[b, h, token] += mass[near].mean() / group
        return kept_of(score, seen, budget, 0, window)

    return evict


def replayed(model, evict, ids, chunk):
    name = "replay"
    AttentionInterface.register(name, Replay(evict))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return generate(model, DynamicCache(config=model.config), ids, torch.ones_like(ids), prefill_chunk_size=chunk)


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Glm4"])
@pytest.mark.parametrize("name", ["heavy_hitter", "snapkv"])
def test_eviction_equals_a_replay_that_masks(name, family, chunk):
    model, (ids, _) = tiny(family), prompt(1)
    evict = h2o(40, 4, 8) if name == "heavy_hitter" else snapkv(40, 8, 3)
    settings = dict(sinks=4, recent=8, normalize="sum") if name == "heavy_hitter" else dict(sinks=0, window=8, kernel=3)
    expected, logits = replayed(model, evict, ids, chunk)
    with sparse_attn.patch(model, prefill="dense"):
        cache = kvcache.make_cache(model, name, 40, **settings)
        found, mine = generate(model, cache, ids, torch.ones_like(ids), prefill_chunk_size=chunk)
    assert torch.equal(found, expected)
    assert_close(mine, logits)
    assert cache.report().tokens == 40 + (NEW - 1 if name == "snapkv" else 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("name", SCORE_FREE)
def test_scores_without_queries_work_under_any_attention(name, chunk, attention):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, cache_of(model, name, 40), ids, mask, prefill_chunk_size=chunk)[1]
    model.set_attn_implementation(attention)
    found = generate(model, cache_of(model, name, 40, attention_mask=mask), ids, mask, prefill_chunk_size=chunk)[1]
    assert_close(found, expected)


def test_sparse_prefill_and_eviction_go_together():
    model, (ids, mask) = tiny("Llama"), prompt()
    cut = dict(prefill=sparse_attn.XAttention(threshold=1.0, block=16, stride=4), dense_below=0)
    with sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, cache_of(model, "snapkv", 40), ids, mask, prefill_chunk_size=24)[1]
    with sparse_attn.patch(model, **cut) as handle:
        found = generate(model, cache_of(model, "snapkv", 40), ids, mask, prefill_chunk_size=24)[1]
        assert handle.report().layers[0].sparse_calls > 0
    assert_close(found, expected)


def test_evicting_once_the_prompt_is_complete_is_the_same_however_it_was_cut():
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        for name in ("snapkv", "heavy_hitter", "adakv"):
            whole = generate(model, cache_of(model, name, 40), ids, mask)[1]
            for settings in (dict(), dict(prompt_length=PROMPT)):
                for chunk in (5, 24):
                    cache = cache_of(model, name, 40, evict="prompt", **settings)
                    assert_close(generate(model, cache, ids, mask, prefill_chunk_size=chunk)[1], whole)


# -- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, chunk", [("snapkv", 64), ("snapkv", 512), ("streaming", 64), ("adakv", 64), ("heavy_hitter", 64)])
def test_peak_bytes_are_those_of_budget_and_chunk(name, chunk):
    budget, layers = 256, 10
    model = tiny("Llama", num_hidden_layers=layers, max_position_embeddings=4096)
    ids = tokens(2, 1500)
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, name, budget)
        generate(model, cache, ids, torch.ones_like(ids), new=3, prefill_chunk_size=chunk)
    report = cache.report()
    per_token = layers * 2 * (2 * 16 * 4 + 4 + 4)  # layers x KV heads x (keys, values, position, score), float32
    assert report.token_bytes == per_token
    assert report.peak_bytes <= 1.05 * report.formula(budget + chunk, batch=2)
    assert report.n_bytes <= 1.05 * report.formula(budget + 8, batch=2)
    assert report.n_bytes == sum(row.n_bytes for row in report.layers)


def test_a_prompt_in_one_piece_is_held_whole_in_one_layer_only():
    model, ids = tiny("Llama", num_hidden_layers=10, max_position_embeddings=4096), tokens(1, 1500)
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", 128)
        generate(model, cache, ids, torch.ones_like(ids), new=3)
    one = cache.report().token_bytes / 10
    assert cache.report().peak_bytes <= 1.05 * (10 * 128 + 1500) * one


def test_many_requests_leave_nothing_behind():
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "heavy_hitter", 40)
        expected = generate(model, cache, ids, mask)[1]
        held = cache.report().n_bytes
        for _ in range(5):
            cache.reset()
            assert cache.report().n_bytes == 0 and cache.get_seq_length() == 0
            assert torch.equal(generate(model, cache, ids, mask)[1], expected)
            assert cache.report().n_bytes == held


# -- ways of generating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["streaming", "snapkv", "adakv", "heavy_hitter"])
def test_beams_follow_their_cache(name):
    model, (ids, mask) = tiny("Llama"), prompt()
    expected = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, max_new_tokens=NEW, do_sample=False)
    with sparse_attn.patch(model, prefill="dense"):
        whole = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, max_new_tokens=NEW, do_sample=False,
                               past_key_values=cache_of(model, name, 400))
        one = model.generate(ids, attention_mask=mask, num_beams=1, max_new_tokens=NEW, do_sample=False,
                             past_key_values=cache_of(model, name, 40))
        alike = model.generate(ids.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0), max_new_tokens=NEW, do_sample=False,
                               past_key_values=cache_of(model, name, 40))
    assert torch.equal(whole, expected)
    assert torch.equal(alike[::2], one) and torch.equal(alike[1::2], one)


@pytest.mark.parametrize("name", ["streaming", "snapkv", "adakv", "heavy_hitter"])
def test_prompt_lookup_writes_what_greedy_decoding_writes(name):
    model = tiny("Llama")
    ids = tokens(1, 12).repeat(1, 7)  # so that drafts are found, some of them right
    with sparse_attn.patch(model, prefill="dense"):
        written = [generate(model, cache_of(model, name, 400), ids, torch.ones_like(ids), new=24, **draft)[0]
                   for draft in ({}, dict(prompt_lookup_num_tokens=4))]
        assert torch.equal(*written)
        # the prompt comes in one forward with the first draft, so a budget is kept from there on
        cache = cache_of(model, name, 40)
        generate(model, cache, ids, torch.ones_like(ids), new=24, prompt_lookup_num_tokens=4)
    generated = 24 if name in ("snapkv", "adakv") else 4
    assert cache.report().tokens <= 40 + generated and cache.get_seq_length() >= ids.shape[1] + 23


def test_a_second_turn_reads_what_the_first_one_left():
    model, (ids, _) = tiny("Llama"), prompt(1)
    more = tokens(1, 30).flip(1)
    for name in ("streaming", "heavy_hitter", "snapkv"):
        with sparse_attn.patch(model, prefill="dense"):
            cache = cache_of(model, name, 40)
            first, _ = generate(model, cache, ids, torch.ones_like(ids))
            both = torch.cat([first, more], 1)
            found, logits = generate(model, cache, both, torch.ones_like(both))
            again = cache_of(model, name, 40)
            kvcache.prefill(model, ids, again, PROMPT)
            for token in first[:, PROMPT:-1].split(1, 1):
                model(token, past_key_values=again)
            rest = both[:, first.shape[1] - 1 :]
            assert_close(kvcache.prefill(model, rest, again, 1000), logits[:, 0])
        assert cache.report().layers[0].seen == found.shape[1] - 1


def test_a_cache_filled_in_inference_mode_serves_outside_it():
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        for name in ("heavy_hitter", "adakv"):
            expected = generate(model, cache_of(model, name, 40), ids, mask)[1]
            with torch.inference_mode():
                cache = cache_of(model, name, 40)
                kvcache.prefill(model, ids[:, :-1], cache, 1000, mask[:, :-1])
            cache = cache.fork()
            found = generate(model, cache, ids, mask)[1]
            assert found.shape == expected.shape and cache.get_seq_length() == PROMPT + NEW - 1


def test_taking_back_tokens_and_forking():
    model, (ids, _) = tiny("Llama"), prompt(1)
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", 40)
        kvcache.prefill(model, ids, cache, 24)
        fork = cache.fork()
        expected = model(ids[:, :1], past_key_values=fork).logits
        for token in (3, 4, 5):
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(torch.tensor(-3))  # what transformers 5.17 passes
        assert type(cache.get_seq_length()) is int
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, expected)
        assert fork.report().layers == cache.report().layers
        held = cache.get_seq_length()
        with pytest.raises(ContractError, match="what it dropped cannot come back"):
            cache.crop(-2)
        assert cache.get_seq_length() == held
        with pytest.raises(ContractError, match="names a length"):
            cache.crop(5)


def test_patch_gives_every_fresh_cache_a_policy_and_undo_takes_it_back():
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, cache_of(model, "snapkv", 40), ids, mask)[1]
    with sparse_attn.patch(model, prefill="dense", kv_cache={"name": "snapkv", "budget": 40, **SETTINGS["snapkv"]}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
        assert_close(torch.stack(out.logits, 1), expected)
        assert out.past_key_values.kv_cache.report().tokens == 40 + NEW - 1
        assert isinstance(model(ids[:1]).past_key_values, kvcache.KVCache)
        assert model(ids[:1], use_cache=False).past_key_values is None
    assert type(model(ids[:1]).past_key_values) is DynamicCache


def test_hybrid_layers_keep_their_own_classes():
    model = tiny("Gemma3")
    cache = cache_of(model, "snapkv", 40)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "KVPolicyLayer"]


def test_rolled_keys_stand_side_by_side():
    model, ids = tiny("Llama"), tokens(1, 60)
    with sparse_attn.patch(model, prefill="dense"):
        cache = kvcache.make_cache(model, "streaming", 24, roll=True)
        kvcache.prefill(model, ids, cache, 16)
        for token in range(5, 15):
            model(torch.tensor([[token]]), past_key_values=cache)
        plain = kvcache.make_cache(model, "streaming", 24)
        kvcache.prefill(model, ids, plain, 16)
    turn = cache.layers[0].core._turn
    store = cache.layers[0].core.store
    run = slice(int(store.starts[0, 1]), int(store.starts[0, 1] + store.lengths[0, 1]))
    at = store.positions[run].long()
    assert sorted(at.tolist()) == [0, 1, 2, 3, *range(50, 70)]
    to = torch.where(at < 4, at + 46, at)
    assert_close(store.k[run], turn(store.k_true[run][None, None], at, to)[0, 0], 1e-6)
    assert not torch.allclose(store.k[run], store.k_true[run])


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, sentence", [
    (dict(policy="snapkv", budget=16), "budget"),
    (dict(policy="streaming", budget=2), "budget"),
    (dict(policy="streaming", budget=-5), "-5"),
    (dict(policy="streaming", budget=64, sinks=-1), "sinks=-1 must be"),
    (dict(policy="streaming", budget=64, recent=2.5), "recent=2.5 must be"),
    (dict(policy="sinkhole", budget=64), "no such cache policy"),
    (dict(policy="streaming", budget=None), "how many tokens may stay"),
    (dict(policy="streaming", budget="many"), "must be tokens per KV head"),
    (dict(policy="snapkv", budget=256, window=8, recent=4), "less than the policy's window"),
    (dict(policy="snapkv", budget=256, evict="never"), "evict='never' is not known"),
    (dict(policy="snapkv", budget=256, prompt_length=90), "only with evict='prompt'"),
    (dict(policy="snapkv", budget=256, evict="prompt", prompt_length=True), "prompt_length=True must be"),
    (dict(policy="streaming", budget=256, roll="yes"), "roll='yes' must be"),
    (dict(policy="tova", budget={"name": "per_head", "tokens": 64}), "one set of tokens for all heads, which PerHead does not"),
    (dict(policy="chunkkv", inner="tova", budget={"name": "per_head", "tokens": 64}), "one set of tokens for all heads"),
    (dict(policy="snapkv", budget={"name": "table", "layers": (64, 64, 64)}, window=8), "3 layers but the model has 2"),
])
def test_bad_settings_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ContractError, match=sentence):
        kvcache.make_cache(tiny("Llama"), **arguments)


def test_who_needs_queries_says_so_under_an_attention_that_does_not_show_them():
    model, (ids, mask) = tiny("Llama"), prompt()
    cache = cache_of(model, "snapkv", 40)
    with pytest.raises(ContractError, match="does not show them; call sparse_attn.patch"):
        generate(model, cache, ids, mask)
    assert cache.get_seq_length() == 0 and cache.report().n_bytes == 0
    with pytest.raises(ContractError, match="may be padded"):
        generate(model, cache_of(model, "streaming", 40), ids, mask)
    generate(model, cache_of(model, "streaming", 40), ids[:1], mask[:1])
    with sparse_attn.patch(model, prefill="dense"):
        generate(model, cache, ids, mask)
        with pytest.raises(ContractError, match="holds 3 sequences but 1 came"):
            model(ids[:1], past_key_values=cache)
        assert cache.get_seq_length() == PROMPT + NEW - 1
        with pytest.raises(ContractError, match="chunk=0"):
            kvcache.prefill(model, ids, cache, 0)


def test_an_attention_that_reads_by_the_mask_is_refused_where_the_mask_says_something_else():
    model, (ids, mask) = tiny("Llama"), prompt()
    model.set_attn_implementation("sdpa")
    for wrong, budget, why in ((mask.flip(1), 400, "not all on the left"), (mask, 0.5, "keeps a share of its own length")):
        cache = cache_of(model, "streaming", budget, attention_mask=wrong)
        with pytest.raises(ContractError, match=why):
            model(ids, attention_mask=wrong, past_key_values=cache)
        assert cache.report().n_bytes == 0
    generate(model, cache_of(model, "streaming", 0.5), ids[:1], mask[:1])


def test_a_refused_forward_leaves_the_cache_as_it_was():
    model, (ids, mask) = tiny("Llama"), prompt()
    hole = mask.clone()
    hole[0, 40] = 0
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", 40)
        with pytest.raises(ContractError, match="are not one run"):
            model(ids, attention_mask=hole, past_key_values=cache)
        with torch.enable_grad(), pytest.raises(ContractError, match="requires grad"):
            model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert_close(generate(model, cache, ids, mask)[1], generate(model, cache_of(model, "snapkv", 40), ids, mask)[1])
    cache = cache_of(model, "streaming", 40, attention_mask=mask)
    with pytest.raises(ContractError, match="3 rows but 6 sequences came"):
        generate(model, cache, ids, mask, num_beams=2)
    assert cache.get_seq_length() == 0 and cache.report().n_bytes == 0


def test_a_forward_that_failed_half_way_is_noticed():
    model, (ids, _) = tiny("Llama"), prompt(1)
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", 40)
        cache.layers[0].update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16))
        model(ids, use_cache=False)  # nothing to do with it
        with pytest.raises(ContractError, match="never looked at the last tokens"):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
        with model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ContractError, match="layers have seen different texts"):
            model(ids[:, :1], past_key_values=cache)
        assert [layer.core.n_columns for layer in cache.layers] == [PROMPT + 1, PROMPT]


def test_kv_cache_without_the_other_package_says_which_import_is_missing():
    code = "import sparse_attn.handle as h; h.cache_installer(None, 'snapkv')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "import kvcache first" in done.stderr


def test_what_is_no_policy_no_budget_or_no_model_is_told_in_a_sentence():
    with pytest.raises(ContractError, match="takes a policy and a budget, got 'snapkv' and 256"):
        CacheConfig("snapkv", 256)
    with pytest.raises(ContractError, match="made for a transformers model or its config, got str"):
        kvcache.make_cache("meta/llama", "snapkv", 256)


def test_a_config_equals_its_json():
    for name in METHODS:
        if name in ("duo", "locret"):
            continue
        config = kvcache.config.as_config(name, 128, **SETTINGS.get(name, {}))
        assert CacheConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TINY  # shared with test_transformers
