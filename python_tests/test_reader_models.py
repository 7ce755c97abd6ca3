"""Every way to read less by name, in models: against dense, alone and in batches, drafted, forked, saved, and with keys elsewhere."""

import pytest
import torch

import kvcache
import sparse_attn
from sparse_attn import ContractError

transformers = pytest.importorskip("transformers")

from test_cache import NEW, PADS, assert_close, generate, prompt  # noqa: E402
from test_readers import ROWS, every_reader  # noqa: E402
from test_transformers import tiny, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def cache_of(model, name: str, reader: dict | None = None, **more):
    return kvcache.make_cache(model, decode={"name": name, **ROWS[name].settings, "dense_layers": (), **(reader or {})}, **more)


@every_reader
def test_decoding_with_everything_in_the_budget_is_dense(name):
    model, (ids, mask) = tiny("Llama"), prompt()
    expected, logits = generate(model, None, ids, mask)
    with sparse_attn.patch(model, prefill="dense"):
        found, mine = generate(model, cache_of(model, name, reader=dict(budget=400)), ids, mask, prefill_chunk_size=32)
    assert torch.equal(found, expected)
    assert_close(mine, logits)


@every_reader
def test_a_padded_batch_decodes_as_its_rows_alone_and_reads_less(name):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, name)
        together = generate(model, cache, ids, mask)[1]
        for row, pad in enumerate(PADS):
            alone = generate(model, cache_of(model, name), ids[row : row + 1, pad:], mask[row : row + 1, pad:])[1]
            assert_close(together[row : row + 1], alone)
        longer = cache_of(model, name)
        generate(model, longer, tokens(1, 300), torch.ones(1, 300, dtype=torch.long), new=3)
        report = longer.report()
        assert 0 < report.step_bytes < report.dense_step_bytes * (1.5 if name == "token_select" else 0.8)


@every_reader
def test_beams_drafts_and_forks(name):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        beams = dict(attention_mask=mask, num_beams=3, max_new_tokens=NEW, do_sample=False)
        whole = model.generate(ids, past_key_values=cache_of(model, name, reader=dict(budget=400)), **beams)
        assert torch.equal(whole, model.generate(ids, **beams))
        generate(model, cache_of(model, name), ids[:1].repeat(1, 3), mask[:1].repeat(1, 3), prompt_lookup_num_tokens=4)
        cache = cache_of(model, name)
        kvcache.prefill(model, ids[:1], cache, 24)
        fork = cache.fork()
        for token in (3, 4, 5):
            steps = [model(torch.tensor([[token]]), past_key_values=each).logits for each in (cache, fork)]
            assert torch.equal(*steps)
        assert fork.meter.now == fork.report().n_bytes
        cache.crop(-3)
        model(torch.tensor([[3]]), past_key_values=cache)


@every_reader
def test_a_loaded_cache_goes_on_bit_for_bit(name, tmp_path):
    model, (ids, mask) = tiny("Llama"), prompt()
    with sparse_attn.patch(model, prefill="dense"):
        cache = cache_of(model, name)
        generate(model, cache, ids, mask, new=4, prefill_chunk_size=24)
        cache.save(tmp_path / "saved", model=model)
        again = kvcache.load(tmp_path / "saved", model)
        assert again.kept == cache.kept
        mask = torch.nn.functional.pad(mask, (0, 3), value=1)
        for token in (3, 4, 5):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = dict(attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1)
            both = [model(torch.full((3, 1), token), past_key_values=each, **step).logits for each in (cache, again)]
            assert torch.equal(*both)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "token_select"])
def test_keys_that_have_left_the_device_are_found_as_if_they_were_there(name):
    model, ids = tiny("Llama"), tokens(2, 300)
    with sparse_attn.patch(model, prefill="dense"):
        caches = [cache_of(model, name, tiers=tiers) for tiers in (("device",), ("device", "host"))]
        found = [generate(model, cache, ids, torch.ones_like(ids), prefill_chunk_size=100) for cache in caches]
    assert sum(caches[1].report().tiers.values()) > 0
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def test_keys_that_are_all_scored_stay_on_the_device():
    with pytest.raises(ContractError, match="scores every key exactly, so keys cannot leave the device"):
        cache_of(tiny("Llama"), "token_select", tiers=("device", "host"))
