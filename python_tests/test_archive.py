"""Caches whose old pages leave the device: every page read again is the page that left."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from test_cache import NEW, PADS, assert_close, generate, prompt
from test_quest import AllPages
from test_tiers import open_files
from test_transformers import FAMILIES, tiny, tokens

import kvcache
import sparse_attn
from kvcache.config import CacheConfig
from kvcache.tiers import Disk, TierError
from sparse_attn import ContractError

TIERS = [("device", "host"), ("device", "disk"), ("device", {"name": "host", "bytes": 20_000}, "disk")]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def spread(model, tiers=TIERS[0], page: int = 4, **settings):
    """A cache that reads all pages, most of them from elsewhere."""
    return kvcache.KVCache(model, CacheConfig(None, None, decode=AllPages(2 * page, page), tiers=tiers, **settings))


def archived(cache) -> int:
    return sum(int(layer.core.archive.tokens.sum()) for layer in cache.layers if layer.core.archive is not None and layer.core.archive.pages is not None)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Llama4", "DeepseekV3", "Mistral")])
def test_every_family_is_dense_when_all_pages_are_read(family):
    model, (ids, mask) = tiny(family), prompt()
    expected, logits = generate(model, None, ids, mask)
    with sparse_attn.patch(model, prefill="dense"):
        cache = spread(model)
        found, mine = generate(model, cache, ids, mask, prefill_chunk_size=32)
    assert torch.equal(found, expected)
    assert_close(mine, logits)
    assert sum(cache.report().tiers.values()) > 0 and cache.report().hit_rate > 0


@pytest.mark.parametrize("tiers", TIERS, ids=["host", "disk", "both"])
def test_where_pages_lie_changes_nothing(tiers, tmp_path):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        settings = dict(decode="quest", budget=24, page=4, dense_layers=())
        expected = generate(model, kvcache.make_cache(model, **settings), ids, mask, prefill_chunk_size=30)[1]
        cache = kvcache.make_cache(model, **settings, tiers=tiers)
        assert_close(generate(model, cache, ids, mask, prefill_chunk_size=30)[1], expected)
        held = cache.report().tiers
        assert [name for name, n in held.items() if n] == [t if isinstance(t, str) else t["name"] for t in tiers[1:]]
        assert held["host"] <= 20_000 or tiers == TIERS[0]
        for row, pad in enumerate(PADS):
            alone = kvcache.make_cache(model, **settings, tiers=tiers)
            assert_close(expected[row : row + 1], generate(model, alone, ids[row : row + 1, pad:], mask[row : row + 1, pad:])[1])


def test_beams_drafts_forks_and_crops():
    model, ids = tiny("Llama"), tokens(1, 12).repeat(1, 7)
    whole = torch.ones_like(ids)
    with sparse_attn.patch(model, prefill="dense"):
        want = generate(model, None, ids, whole, new=24)[0]
        assert torch.equal(generate(model, spread(model), ids, whole, new=24)[0], want)
        assert torch.equal(generate(model, spread(model), ids, whole, new=24, prompt_lookup_num_tokens=4)[0], want)
        ids, mask = prompt()
        beams = dict(attention_mask=mask, num_beams=3, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(model.generate(ids, past_key_values=spread(model), **beams), model.generate(ids, **beams))
        cache = spread(model)
        kvcache.prefill(model, ids[:1], cache, 24)
        fork = cache.fork()
        want = model(ids[:1, :1], past_key_values=fork).logits
        for token in range(12):
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-12)  # more than the device has
        assert_close(model(ids[:1, :1], past_key_values=cache).logits, want)
        held = cache.report().tiers["host"]
        del fork
        gc.collect()
        assert cache.report().tiers["host"] <= held
        cache.reset()
        assert cache.report().n_bytes == 0 and sum(cache.report().tiers.values()) == 0


def test_a_second_turn_reads_what_has_left():
    model, ids = tiny("Llama"), tokens(2, 150)
    whole = torch.ones_like(ids)
    with sparse_attn.patch(model, prefill="dense"):
        expected = generate(model, None, ids, whole)[1]
        cache = spread(model, page=16)
        generate(model, cache, ids[:, :60], whole[:, :60])
        cache.crop(-(cache.get_seq_length() - 60))
        assert archived(cache) > 0
        assert_close(generate(model, cache, ids, whole)[1], expected)
        cache = spread(model)
        kvcache.prefill(model, ids, cache, 9)  # as few queries as a draft, all of which read everything
        plain = spread(model, ("device",))
        assert_close(model(ids[:, :1], past_key_values=cache).logits, model(ids[:, :1], past_key_values=plain).logits * 0 +
                     model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_first_evict_then_retrieve_then_evict_again(name):
    model, (ids, mask), settings = tiny("Llama"), prompt(), dict(window=8, kernel=3)
    more = torch.cat([ids, ids[:, :40]], 1), torch.cat([mask, torch.ones_like(mask[:, :40])], 1)
    with sparse_attn.patch(model, prefill="dense"):
        found = []
        for tiers in (("device",), ("device", "host")):
            cache = kvcache.make_cache(model, name, 40, decode=AllPages(64, 4), tiers=tiers, **settings)
            first = generate(model, cache, ids, mask, new=80)[1]
            moved = archived(cache)
            cache.crop(-(cache.get_seq_length() - ids.shape[1]))
            found.append((first, generate(model, cache, *more)[1]))
        assert moved > 0
        for one, two in zip(*found):
            assert_close(two, one)


def test_a_saved_cache_holds_what_had_left(tmp_path):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        settings = dict(decode="quest", budget=24, page=4, dense_layers=(), tiers=("device", "host"))
        cache = kvcache.make_cache(model, **settings)
        kvcache.prefill(model, ids, cache, 24, mask)
        assert archived(cache) > 0
        cache.save(tmp_path / "saved", model=model)
        again = kvcache.load(tmp_path / "saved", model)
        assert archived(again) > 0 and again.kept == cache.kept
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = dict(attention_mask=longer, position_ids=longer.cumsum(1)[:, -1:] - 1)
        assert_close(model(ids[:, :1], past_key_values=again, **step).logits, model(ids[:, :1], past_key_values=cache, **step).logits)


def test_a_full_last_tier_says_so_and_loses_nothing():
    model, ids = tiny("Llama"), tokens(1, 400)
    with sparse_attn.patch(model, prefill="dense"):
        cache = spread(model, ("device", {"name": "host", "bytes": 30_000}))
        with pytest.raises(ContractError, match="host"):
            kvcache.prefill(model, ids, cache, 64)
        assert cache.report().tiers["host"] <= 30_000
        cache.reset()
        kvcache.prefill(model, ids[:, :40], cache, 20)


def test_a_lost_page_stops_the_cache_until_it_is_reset(tmp_path):
    model, (ids, _) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        cache = spread(model, ("device", Disk(folder=tmp_path)))
        kvcache.prefill(model, ids[:1], cache, 24)
        expected = model(ids[:1, :1], past_key_values=cache.fork()).logits
        (file,) = open_files(tmp_path)
        os.truncate(f"/proc/self/fd/{file}", 0)
        with pytest.raises(TierError, match="was truncated, and a page is lost"):
            model(ids[:1, :1], past_key_values=cache)
        with pytest.raises(ContractError, match="failed half way"):
            model(ids[:1, :1], past_key_values=cache)
        cache.reset()
        kvcache.prefill(model, ids[:1], cache, 24)
        assert torch.equal(model(ids[:1, :1], past_key_values=cache).logits, expected)


def test_outliers_keep_their_keys_where_the_others_become_factors():
    model, ids = tiny("Llama", max_position_embeddings=1024), tokens(2, 400)
    with sparse_attn.patch(model, prefill="dense"):
        settings = dict(budget=120, page=8, outliers=4, recent=8, dense_layers=())
        plain = kvcache.make_cache(model, decode="landmarks", tiers=("device", "host"), **settings)
        cache = kvcache.make_cache(model, decode="shadowkv", rank=1, **settings)
        for each in (plain, cache):
            kvcache.prefill(model, ids, each, 200)
        step = model(ids[:, :1], past_key_values=cache).logits
        archive, core = cache.layers[0].core.archive, cache.layers[0].core
        odd = core.config.decode.exact(core.digest, archive.pages)
        assert odd.shape == (2, 2, 4) and bool((odd >= 0).all())
        wanted = torch.cat([odd, torch.full_like(odd[..., :1], 3)], 2)  # and one that is not
        assert not bool((odd == 3).any())
        for fetched in (lambda a: a, lambda a: a.copy(kvcache.store.Meter())):
            region, whole = fetched(archive).fetch(wanted).wait(), plain.layers[0].core.archive.fetch(wanted).wait()
            rows = [r.k[r.starts[..., None] + torch.arange(8)] for r in (region, whole)]
            assert torch.equal(rows[0][:, :, :4], rows[1][:, :, :4])
            assert (rows[0][:, :, 4] - rows[1][:, :, 4]).abs().max() > 0.1
        piece = next(iter(archive.parts()))
        first = [int(p) for p in odd[0, 0]]
        whole = next(iter(plain.layers[0].core.archive.parts()))
        for p in first:
            assert torch.equal(piece.k[0, 0, 8 * p : 8 * p + 8], whole.k[0, 0, 8 * p : 8 * p + 8])
        assert step.isfinite().all()
        for layer in cache.layers:
            layer.reorder_cache(torch.tensor([1, 1]))
        cache.reset()
        plain.reset()
        assert sum(cache.report().tiers.values()) == sum(plain.report().tiers.values()) == 0


@pytest.mark.parametrize("arguments, sentence", [
    (dict(decode="quest", tiers=("host",)), "must begin with the device"),
    (dict(policy="snapkv", budget=64, tiers=("device", "host")), "without decode= would bring every page back"),
    (dict(decode="quest", codec="zip"), "'zip': no such codec"),
])
def test_bad_settings_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ContractError, match=sentence):
        kvcache.make_cache(tiny("Llama"), **arguments)


def test_a_process_may_end_with_pages_elsewhere():
    done = subprocess.run([sys.executable, "-c", """
import torch
from test_archive import generate, kvcache, prompt, sparse_attn, tiny
model, (ids, mask) = tiny("Llama"), prompt()
with torch.no_grad(), sparse_attn.patch(model, prefill="dense"):
    for _ in range(2):
        cache = kvcache.make_cache(model, decode="quest", budget=24, page=4, dense_layers=(), tiers=("device", "host"))
        generate(model, cache, ids, mask, prefill_chunk_size=30)
"""], env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
