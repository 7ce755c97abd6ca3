"""A duo cache keeps everything in the heads that a profile found to retrieve, and little in the others."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_transformers import tiny  # noqa: E402

import kvcache  # noqa: E402
import sparse_attn  # noqa: E402
from benchmarks.needle import runner  # noqa: E402
from kvcache.config import as_config  # noqa: E402
from sparse_attn import ContractError  # noqa: E402

PROFILE = runner.BUNDLED / "profile_duo.json"


def profile_with(tmp_path, table: list[list[float]], sparsity: float = 0.5):
    """The shipped profile with other gates, for a model of as many layers and KV heads as they have."""
    value, path = json.loads(PROFILE.read_text()), tmp_path / "profile.json"
    layers, heads = len(table), 3 * len(table[0])
    value["model"] |= {"layers": layers, "heads": heads, "kv_heads": len(table[0])}
    value |= {"table": table, "retained": [[1.0] * heads] * layers, "density": [[1.0] * heads] * layers}
    value["arguments"]["sparsity"] = sparsity
    path.write_text(json.dumps(value))
    return path


def test_a_profile_says_which_heads_keep_everything(tmp_path):
    config = as_config("duo", None, profile=PROFILE)
    assert config.budget == kvcache.BUDGETS["duo_heads"](((False, False), (True, True)), 64, 256)
    assert (config.sinks, config.recent) == (64, 256)
    path = profile_with(tmp_path, [[0.1, 0.9, 0.3], [0.2, 0.8, 0.4]], sparsity=0.6)
    config = as_config("duo", None, profile=path, sink=4, recent=28)
    assert config.budget.full == ((False, True, False), (False, True, False))
    assert (config.budget.sink, config.budget.recent, config.sinks, config.recent) == (4, 28, 4, 28)
    assert kvcache.CacheConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_duo_cache_finds_the_needle_with_half_the_heads_kept_short():
    model, tokenizer = runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)
    prompt = runner.make_haystack(tokenizer, None).prompt("multikey", 3000, 0.2, 0)
    cache, dense = kvcache.make_cache(model, "duo", profile=PROFILE), transformers.DynamicCache(config=model.config)
    ids = torch.tensor([prompt.ids])
    with sparse_attn.patch(model, prefill="dense"):
        found, wanted = (kvcache.prefill(model, ids, some, 512) for some in (cache, dense))
    assert [row.most for row in cache.report().layers] == [320, 3000]
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize(("table", "sentence"), [
    ([[0.1, 0.9]] * 3, "3 layers but the model has 2"),
    ([[0.1, 0.9, 0.5, 0.2]] * 2, "4 heads in layer 0, the model 2 KV heads"),
])
def test_a_profile_of_another_model_is_refused(tmp_path, table, sentence):
    with pytest.raises(ContractError, match=sentence):
        kvcache.make_cache(tiny("Llama"), "duo", profile=profile_with(tmp_path, table))


@pytest.mark.parametrize(("settings", "sentence"), [
    (dict(profile=runner.BUNDLED / "profile_xattention.json"), "is for xattention, which does not tell whole heads"),
    (dict(profile="nothing.json"), "profile nothing.json cannot be read"),
    (dict(profile=PROFILE, full=((True, False),)), "leave full out"),
    (dict(profile=PROFILE, sinks=-1), "sinks=-1"),
    (dict(profil=PROFILE), "duo has no argument 'profil'; it has .*full, profile, recent, sink"),
])
def test_bad_settings_are_told_in_a_sentence(settings, sentence):
    with pytest.raises(ContractError, match=sentence):
        as_config("duo", None, **settings)
    with pytest.raises(ContractError, match="not a number of tokens; it takes full, profile"):
        as_config("duo", 1000, profile=PROFILE)
