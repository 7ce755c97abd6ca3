"""Caches in the long run: later turns, tokens taken back, layers unlike the others, and requests that are over."""

import gc
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_cache import PROMPT, SETTINGS, _inference, assert_close, cache_of, generate, prompt  # noqa: E402
from test_transformers import TINY, tiny, tokens  # noqa: E402

import kvcache  # noqa: E402
import sparse_attn  # noqa: E402
from sparse_attn import ContractError  # noqa: E402

assert _inference  # a fixture of every test here


def test_layers_without_positions_are_not_rolled():
    model, ids = tiny("SmolLM3"), tokens(1, 60)
    with sparse_attn.patch(model, prefill="dense"):
        cache = kvcache.make_cache(model, "streaming", 24, roll=True)
        generate(model, cache, ids, torch.ones_like(ids))
    rolled, plain = (layer.core.store for layer in cache.layers)
    assert rolled.k_true is not None and plain.k_true is None


def sharing():
    """A small model two of whose layers read what others stored."""
    torch.manual_seed(0)
    sizes = TINY | dict(num_hidden_layers=6, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=24,
                        hidden_size_per_layer_input=16, vocab_size_per_layer_input=128, laurel_rank=8, altup_num_inputs=2,
                        activation_sparsity_pattern=[0.0] * 6)
    config = transformers.Gemma3nTextConfig(**sizes)
    return transformers.Gemma3nForCausalLM._from_config(config, attn_implementation="eager").eval()


def test_layers_that_others_read_from_keep_everything():
    model, (ids, mask) = sharing(), prompt(1)
    expected = generate(model, None, ids, mask)[1]
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", 400)
        assert_close(generate(model, cache, ids, mask)[1], expected)
    assert [type(layer).__name__ for layer in cache.layers[1::2]] == ["KVPolicyLayer", "DynamicLayer", "DummyLayer"]


@pytest.mark.parametrize("name", ["heavy_hitter", "snapkv"])
def test_assisted_decoding_keeps_the_budget_in_later_turns(name):
    model, drafts = tiny("Llama"), dict(prompt_lookup_num_tokens=4)
    ids, more = tokens(1, 12).repeat(1, 7), tokens(1, 200)
    generated = {"heavy_hitter": 4, "snapkv": 16}[name]
    with sparse_attn.patch(model, prefill="dense"):
        for way in ({}, drafts):
            cache = cache_of(model, name, 40)
            first, _ = generate(model, cache, ids, torch.ones_like(ids), **drafts)
            both = torch.cat([first, more], 1)
            generate(model, cache, both, torch.ones_like(both), **way)
            assert cache.report().tokens <= 40 + generated
        assert cache.layers[0].record_past
        cache.layers[0].record_past = False  # as transformers does where it is done with a cache


def test_what_was_taken_back_does_not_vote():
    model, (ids, _) = tiny("Llama"), prompt(3)
    last = []
    with sparse_attn.patch(model, prefill="dense"):
        for taken_back in (ids[1:2, :6], ids[2:, :6]):
            cache = cache_of(model, "snapkv", 40, evict="prompt")
            kvcache.prefill(model, ids[:1], cache, 24)
            kvcache.prefill(model, taken_back, cache, 24)
            cache.crop(-6)
            kvcache.prefill(model, ids[1:2, 40:45], cache, 24)
            last.append(model(ids[:1, :1], past_key_values=cache).logits)
    assert torch.equal(*last)


def test_a_last_chunk_of_one_token_belongs_to_a_prompt_of_known_length():
    model, (ids, _) = tiny("Llama"), prompt(1)
    with sparse_attn.patch(model, prefill="dense"):
        for name in ("snapkv", "heavy_hitter"):
            whole = generate(model, cache_of(model, name, 40), ids, torch.ones_like(ids))[1]
            cache = cache_of(model, name, 40, evict="prompt", prompt_length=PROMPT)
            assert_close(generate(model, cache, ids, torch.ones_like(ids), prefill_chunk_size=PROMPT // 3)[1], whole)


def test_prefill_knows_that_a_last_chunk_of_one_token_is_of_the_prompt():
    model, (ids, _) = tiny("Llama"), prompt(1)
    with sparse_attn.patch(model, prefill="dense"):
        caches = [cache_of(model, "snapkv", 40, evict="prompt") for _ in range(2)]
        for cache, chunk in zip(caches, (PROMPT, PROMPT // 3)):
            kvcache.prefill(model, ids, cache, chunk)
        assert_close(*(model(ids[:, :1], past_key_values=cache).logits for cache in caches))
        assert [cache.report().tokens for cache in caches] == [41, 41]
        one = cache_of(model, "snapkv", 40)
        kvcache.prefill(model, ids, one, 1)
        assert one.report().tokens == 40
        model(ids[:, :1], past_key_values=one)
        assert one.report().tokens == 41


def test_a_small_share_keeps_what_is_protected():
    model, (ids, _) = tiny("Llama"), prompt(1)
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", 0.01, sinks=2)
        kvcache.prefill(model, ids, cache, 24)
    store = cache.layers[1].core.store
    assert cache.report().tokens == 10 and sorted(store.positions[:10].tolist()) == [0, 1, *range(PROMPT - 8, PROMPT)]


def test_a_crop_that_one_layer_refuses_changes_none():
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "snapkv", {"name": "table", "layers": (200, 40)})
        kvcache.prefill(model, ids, cache, 24, mask)
        for layers in (cache, cache.fork()):
            with pytest.raises(ContractError, match="layer 1 last evicted 0 tokens ago"):
                layers.crop(-3)
            assert [layer.core.n_columns for layer in layers.layers] == [PROMPT, PROMPT]
        cache = cache_of(model, "snapkv", 400)
        kvcache.prefill(model, ids, cache, 24, mask)
        with pytest.raises(ContractError, match="only the last 55 are real ones in every sequence"):
            cache.crop(-56)
        cache.crop(-55)
        assert [layer.core.n_seen.tolist() for layer in cache.layers] == [[33, 14, 0]] * 2
        short = cache_of(model, "snapkv", 400)
        kvcache.prefill(model, ids[:, :33], short, 24, mask[:, :33])
        found, expected = (kvcache.prefill(model, ids[:, 33:], some, 24, mask) for some in (cache, short))
        assert_close(found, expected)


def test_a_cache_that_nobody_names_is_gone_at_once():
    model, (ids, _) = tiny("Llama"), prompt(1)
    gc.disable()
    try:
        with sparse_attn.patch(model, prefill="dense", kv_cache={"name": "snapkv", "budget": 40, **SETTINGS["snapkv"]}):
            for run in (model, lambda ids: model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)):
                out = run(ids)
                fork = getattr(out.past_key_values, "kv_cache", out.past_key_values).fork()
                held = [weakref.ref(cache.layers[0].core.store.k) for cache in (out.past_key_values, fork)]
                del out, fork
                assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


# -- a forward that fails half way ----------------------------------------------------------------------------------------


def fail_once(module) -> None:
    """The next forward of a module runs out of memory."""

    def fails(*_):
        handle.remove()
        raise torch.OutOfMemoryError("out of memory")

    handle = module.register_forward_pre_hook(fails)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["mlp", "o_proj", "attention"])
@pytest.mark.parametrize("name", ["snapkv", "quest", "shadowkv"])
def test_a_forward_without_memory_can_be_repeated(name, part, layer, monkeypatch):
    model, ids = tiny("Llama"), tokens(2, PROMPT)
    settings = dict(evict="prompt") if name == "snapkv" else {}
    with sparse_attn.patch(model, prefill="dense"):
        cache, whole = (cache_of(model, name, 400 if name == "snapkv" else 40, **settings) for _ in range(2))
        for each in (cache, whole):
            kvcache.prefill(model, ids[:, :40], each, 20)
        before = cache.report()
        block = model.model.layers[layer]
        if part == "attention":
            fail_in_attention(monkeypatch, calls=layer + 1)
        else:
            fail_once(block.mlp if part == "mlp" else block.self_attn.o_proj)
        with pytest.raises(torch.OutOfMemoryError):
            kvcache.prefill(model, ids[:, 40:], cache, 64)
        if (part, layer) not in [("mlp", 1), ("o_proj", 1)]:  # where the last layer was read, the whole text is here
            with pytest.raises(ContractError, match="failed half way"):
                kvcache.prefill(model, ids[:, 40:], cache, 16)
            assert cache.recover() == 40
        else:
            cache.crop(-(PROMPT - 40))
        assert cache.report().tokens == before.tokens and cache.get_seq_length() == 40
        assert cache.recover() == 40
        mine, expected = (kvcache.prefill(model, ids[:, 40:], each, 16) for each in (cache, whole))
        assert_close(mine, expected)
        assert_close(*(model(ids[:, :1], past_key_values=each).logits for each in (cache, whole)))


def fail_in_attention(monkeypatch, calls: int) -> None:
    real, left = sparse_attn.hf.attend_kept, [calls]

    def attend(*args):
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)

    monkeypatch.setattr(sparse_attn.hf, "attend_kept", attend)


def test_what_an_evicted_layer_saw_cannot_be_repeated():
    model, ids = tiny("Llama"), tokens(1, 80)
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, "knorm", 40)
        kvcache.prefill(model, ids[:, :40], cache, 20)
        fail_once(model.model.layers[0].mlp)
        with pytest.raises(torch.OutOfMemoryError):
            kvcache.prefill(model, ids[:, 40:], cache, 20)
        with pytest.raises(ContractError, match="what it dropped cannot come back"):
            cache.recover()
        cache.reset()
        kvcache.prefill(model, ids, cache, 20)
