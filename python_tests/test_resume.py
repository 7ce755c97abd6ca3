"""A cache that was saved and loaded goes on as if it had never been away, or it is told why it cannot."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from test_cache import SETTINGS, cache_of, generate  # noqa: E402
from test_cache_life import sharing  # noqa: E402
from test_locret import random_heads, written  # noqa: E402
from test_save import flip  # noqa: E402
from test_transformers import FAMILIES, tiny, tokens  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

import kvcache  # noqa: E402
import sparse_attn  # noqa: E402
from kvcache import save as saving  # noqa: E402
from kvcache.config import METHODS  # noqa: E402
from kvcache.policies.streaming import Streaming  # noqa: E402
from sparse_attn import ContractError  # noqa: E402
from sparse_attn.errors import warn_once  # noqa: E402
from sparse_attn.kept import Queries  # noqa: E402

PROMPT, ASKED, PADS = 72, 5, (0, 19, 33)


@pytest.fixture(autouse=True)
def _inference():
    warn_once.cache_clear()
    with torch.no_grad():
        yield


def document(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    for row, pad in enumerate(PADS):
        mask[row, :pad] = 0
    return tokens(3, PROMPT)[:rows], mask[:rows]


def asked(ids: torch.Tensor, mask: torch.Tensor, question: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The document and a question behind it, shorter than the windows of ``SETTINGS``."""
    more = tokens(len(ids), PROMPT + 50)[:, PROMPT + 9 * question :][:, :ASKED]
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)


def answers(model, cache, ids, mask, question: int = 0):
    return generate(model, cache, *asked(ids, mask, question))


def prefilled(model, name: str = "snapkv", budget=40, rows: int = 3, **settings):
    ids, mask = document(rows)
    cache = cache_of(model, name, budget, **settings)
    kvcache.prefill(model, ids, cache, 24, mask)
    return cache, ids, mask


def held(cache) -> list[tuple]:
    return [(r.tokens, r.fewest, r.most, r.seen) for r in cache.report().layers]


def one_token(model, cache, mask) -> tuple[torch.Tensor, list[tuple]]:
    """Logits behind one more token, and what the cache then holds."""
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    at = mask.sum(1, keepdim=True) - 1
    return model(tokens(len(mask), 1), attention_mask=mask, position_ids=at, past_key_values=cache).logits, held(cache)


def assert_alike(mine: dict, theirs: dict) -> None:
    """Attributes of two layers, but for the rows, what is made of them, who counts them, which were read last, and what is written
    before it is read.
    """
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"store", "digest", "archive", "read", "_meter", "_turn", "_before"}:
        a, b = mine[name], theirs[name]
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        elif isinstance(a, Queries):
            assert_alike(vars(a), vars(b))
        else:
            assert a == b, name


def assert_goes_on_alike(model, cache, ids, mask, folder) -> None:
    """Bit for bit, twice, with a token or a question, and the folder still is what it was."""
    cache.save(folder, token_ids=ids)
    stayed = cache.fork()
    for _ in range(2):
        loaded = kvcache.load(folder, model, token_ids=ids)
        assert held(loaded) == held(stayed)
        for mine, theirs in zip(loaded.layers, stayed.layers):
            assert_alike(vars(getattr(mine, "core", mine)), vars(getattr(theirs, "core", theirs)))
        a, b = (one_token(model, one.fork(), mask) for one in (loaded, stayed))
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
        assert loaded.report().n_bytes <= stayed.report().n_bytes and loaded.get_seq_length() == stayed.get_seq_length()
        for question in (0, 1):
            twin = loaded.fork() if question == 0 else loaded
            expected = answers(model, stayed.fork(), ids, mask, question)
            assert all(map(torch.equal, answers(model, twin, ids, mask, question), expected))


# -- it goes on -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_bit_for_bit(name, tmp_path):
    model = tiny("Llama")
    settings = dict(path=written(random_heads(model), tmp_path), stabilizers=8) if name == "locret" else {}
    with sparse_attn.patch(model, prefill="dense"):
        assert_goes_on_alike(model, *prefilled(model, name, **settings), tmp_path / "kv")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Llama4", "DeepseekV3", "Mistral")])
def test_every_family_goes_on_bit_for_bit(family, tmp_path):
    model = tiny(family)
    with sparse_attn.patch(model, prefill="dense"):
        assert_goes_on_alike(model, *prefilled(model, "adakv"), tmp_path / "kv")


@pytest.mark.parametrize("settings", [dict(evict="prompt"), dict(evict="prompt", prompt_length=PROMPT), dict(decay=0.5), dict(budget=400),
                                      dict(budget=0.3), dict(name="streaming", roll=True)], ids=str)
def test_every_setting_goes_on_bit_for_bit(settings, tmp_path):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        assert_goes_on_alike(model, *prefilled(model, **settings), tmp_path / "kv")


def test_layers_that_share_what_one_stored_go_on_bit_for_bit(tmp_path):
    model = sharing()
    with sparse_attn.patch(model, prefill="dense"):
        assert_goes_on_alike(model, *prefilled(model, rows=1), tmp_path / "kv")


def test_latents_go_on_with_the_mask_that_the_cache_was_given(tmp_path):
    model = tiny("DeepseekV3")
    assert_goes_on_alike(model, *prefilled(model, "knorm", attention_mask=document()[1]), tmp_path / "kv")


def test_bfloat16_goes_on_bit_for_bit(tmp_path):
    model = tiny("Qwen3").bfloat16()
    with sparse_attn.patch(model, prefill="dense"):
        cache, ids, mask = prefilled(model, "heavy_hitter")
        assert_goes_on_alike(model, cache, ids, mask, tmp_path / "kv")
    assert load_file(tmp_path / "kv" / "layer_000.safetensors")["k"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["heavy_hitter", "tova", "snapkv"])
def test_a_cache_that_has_generated_keeps_the_order_of_its_runs(name, tmp_path):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        cache, ids, mask = prefilled(model, name)
        for token in range(3, 12):
            ids, mask = torch.cat([ids, torch.full((3, 1), token)], 1), torch.cat([mask, torch.ones(3, 1).long()], 1)
            model(ids[:, -1:], attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1, past_key_values=cache)
        assert_goes_on_alike(model, cache, ids, mask, tmp_path / "kv")


def test_drafts_go_on_and_a_draft_in_the_air_is_refused(tmp_path):
    model = tiny("Gemma3")
    with sparse_attn.patch(model, prefill="dense"):
        cache, ids, mask = prefilled(model, "heavy_hitter", rows=1)
        for layer in cache.layers:
            layer.activate_past_recording()
        model(tokens(1, 4), past_key_values=cache)
        with pytest.raises(ContractError, match="may still be taken back"):
            cache.save(tmp_path / "kv")
        assert os.listdir(tmp_path) == []
        cache.crop(-2)
        cache.save(tmp_path / "kv")
        loaded = kvcache.load(tmp_path / "kv", model)
        for one in (cache, loaded):
            model(tokens(1, 4), past_key_values=one)
            one.crop(-3)
        assert torch.equal(*(model(tokens(1, 1), past_key_values=one).logits for one in (cache, loaded)))


def test_what_was_evicted_before_the_save_cannot_be_taken_back(tmp_path):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        cache, ids, _ = prefilled(model, rows=1)
        model(ids[:, :1], past_key_values=cache)
        cache.save(tmp_path / "kv")
        for one in (cache, kvcache.load(tmp_path / "kv", model)):
            one.crop(-1)
            with pytest.raises(ContractError, match="crop takes back 1 tokens, but layer 0 last evicted 0 tokens ago"):
                one.crop(-1)


def test_a_cache_filled_in_inference_mode_serves_outside_it(tmp_path):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        with torch.inference_mode():
            cache, ids, mask = prefilled(model, "heavy_hitter")
            cache.save(tmp_path / "kv")
            loaded = kvcache.load(tmp_path / "kv", model)
        assert torch.equal(*(answers(model, one, ids, mask)[1] for one in (cache.fork(), loaded)))


def test_what_a_loaded_cache_holds_is_its_own(tmp_path):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        cache, ids, mask = prefilled(model)
        cache.save(tmp_path / "kv")
        loaded = kvcache.load(tmp_path / "kv", model)
        for path in (tmp_path / "kv").iterdir():
            path.write_bytes(b"\0" * path.stat().st_size)
        shutil.rmtree(tmp_path / "kv")
        assert torch.equal(*(answers(model, one, ids, mask)[1] for one in (cache.fork(), loaded)))


def test_a_cache_that_patch_installed_is_saved_too(tmp_path):
    model, (ids, _) = tiny("Gemma3"), document(1)
    with sparse_attn.patch(model, prefill="dense", kv_cache={"name": "snapkv", "budget": 40, **SETTINGS["snapkv"]}):
        out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        out.past_key_values.kv_cache.save(tmp_path / "kv", token_ids=out.sequences[:, :-1])
        loaded = kvcache.load(tmp_path / "kv", model, token_ids=out.sequences[:, :-1])
        assert torch.equal(*(model(out.sequences[:, -1:], past_key_values=one).logits for one in (out.past_key_values, loaded)))


# -- it is told what is wrong with a folder -------------------------------------------------------------------------------


def prefilled_save(folder, **settings):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        cache, ids, _ = prefilled(model)
        cache.save(folder, **settings)
    return model, cache, ids


def edited(folder: Path, change, name: str = "layer_001") -> None:
    """Change tensors of a piece as if the save had written them so."""
    path, manifest = folder / f"{name}.safetensors", json.loads((folder / "manifest.json").read_text())
    tensors = load_file(path)
    tensors = {key: t.clone() for key, t in tensors.items()}
    change(tensors, manifest)
    path.unlink()
    save_file(tensors, path)
    rehash(folder, manifest, path)


def rehash(folder: Path, manifest: dict, *paths: Path) -> None:
    del manifest["sha256"]
    for path in paths:
        data = path.read_bytes()
        manifest["files"][path.stem] |= {"bytes": len(data), "sha256": saving.hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": saving._own_hash(manifest)}))


def set_version(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


def lose(name: str):
    return lambda tensors, manifest: tensors.pop(name)


def first_position(tensors, manifest):
    tensors["positions"][1] = tensors["positions"][0]


def late_position(tensors, manifest):
    tensors["positions"][0] = PROMPT


def one_row_less(tensors, manifest):
    tensors["v"] = tensors["v"][:-1].clone()


def other_dtype(tensors, manifest):
    tensors["v"] = tensors["v"].bfloat16()


def other_batch(tensors, manifest):
    tensors["n_seen"] = tensors["n_seen"][:-1].clone()


def other_kind(tensors, manifest):
    manifest["files"]["layer_001"]["facts"]["kind"] = "DynamicSlidingWindowLayer"


DAMAGE = {
    "missing": (shutil.rmtree, "holds no saved cache .*No such file or directory.*cache.save"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "holds no saved cache .*Not a directory"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no saved cache .*manifest.json: No such file"),
    "manifest cut short": (lambda f: os.truncate(f / "manifest.json", 100), "manifest.json was cut short or altered"),
    "manifest is no object": (lambda f: (f / "manifest.json").write_text("[1]"), "holds a list, which no save wrote"),
    "manifest is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "was cut short or altered"),
    "manifest altered": (lambda f: flip(f / "manifest.json", -10), "manifest.json was altered since the save"),
    "unknown version": (set_version, "has version 2 but this package reads 1; save it again"),
    "file missing": (lambda f: (f / "layer_001.safetensors").unlink(), "layer_001.safetensors cannot be read .*No such file"),
    "file cut short": (lambda f: os.truncate(f / "layer_001.safetensors", 999), "was cut short: 999 bytes of"),
    "file empty": (lambda f: os.truncate(f / "layer_000.safetensors", 0), "was cut short: 0 bytes of"),
    "file altered": (lambda f: flip(f / "layer_001.safetensors"), "layer_001.safetensors was altered since the save"),
    "file header altered": (lambda f: flip(f / "layer_000.safetensors", 20), "layer_000.safetensors was altered since the save"),
    "file longer": (lambda f: (f / "layer_000.safetensors").open("ab").write(b"more"), "was altered since the save"),
    "files changed places": (lambda f: shutil.copy(f / "layer_000.safetensors", f / "layer_001.safetensors"), "was altered since"),
    "a tensor missing": (lambda f: edited(f, lose("state")), "layer_001 in .* is no layer of this model .*no rows of state"),
    "counts missing": (lambda f: edited(f, lose("n_seen")), "layer_001 in .* is no layer of this model .*n_seen"),
    "a position twice": (lambda f: edited(f, first_position), "positions are not those of different tokens"),
    "a position not seen": (lambda f: edited(f, late_position), "positions are not those of different tokens"),
    "rows missing": (lambda f: edited(f, one_row_less), r"v is torch.float32 \[\d+, 16\], not torch.float32 of \d+ rows"),
    "another dtype": (lambda f: edited(f, other_dtype), "v is torch.bfloat16 .* not torch.float32"),
    "another batch": (lambda f: edited(f, other_batch), "not those of the runs of 2 sequences"),
    "another kind of layer": (lambda f: edited(f, other_kind), "saved as a DynamicSlidingWindowLayer and is a KVPolicyLayer here"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_save_is_told_in_a_sentence(damage, tmp_path):
    model, _, _ = prefilled_save(tmp_path / "kv")
    harm, sentence = DAMAGE[damage]
    harm(tmp_path / "kv")
    with pytest.raises(ContractError, match=sentence):
        kvcache.load(tmp_path / "kv", model)


def test_a_save_with_the_same_content_written_by_hand_is_read(tmp_path):
    model, _, _ = prefilled_save(tmp_path / "kv")
    edited(tmp_path / "kv", lambda tensors, manifest: None)
    kvcache.load(tmp_path / "kv", model)


def test_another_model_or_text_is_refused(tmp_path):
    model, cache, ids = prefilled_save(tmp_path / "kv", token_ids=document()[0])
    other = tiny("Llama")
    other.model.embed_tokens.weight.data[0, 0] += 1
    for wrong, sentence in [
        (tiny("Llama", num_hidden_layers=3), "made by .*2 layers.* but this model is .*3 layers"),
        (tiny("Qwen3"), r"made by .*\(llama, .* but this model is .*\(qwen3"),
        (other, "made by other weights"),
        (tiny("Llama").bfloat16(), "dtype torch.float32 but this model has torch.bfloat16"),
        (tiny("Llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rotation .* but this model has .*500000"),
    ]:
        with pytest.raises(ContractError, match=sentence):
            kvcache.load(tmp_path / "kv", wrong)
    with pytest.raises(ContractError, match=r"token_ids \[3, 72\] are not those"):
        kvcache.load(tmp_path / "kv", model, token_ids=ids.flip(1))
    kvcache.load(tmp_path / "kv", model, token_ids=ids)
    with pytest.raises(ContractError, match=r"token_ids are \[3, 71\] but the cache has seen \[3, 72\]"):
        cache.save(tmp_path / "more", token_ids=ids[:, 1:])
    cache.save(tmp_path / "more")
    with pytest.raises(ContractError, match="saved without token_ids"):
        kvcache.load(tmp_path / "more", model, token_ids=ids)


def test_a_window_of_another_length_is_another_model(tmp_path):
    model = tiny("Gemma3")
    with sparse_attn.patch(model, prefill="dense"):
        prefilled(model)[0].save(tmp_path / "kv")
    with pytest.raises(ContractError, match="or its window differs"):
        kvcache.load(tmp_path / "kv", tiny("Gemma3", sliding_window=16))


class Recurrent(DynamicLayer):
    """Stands for the layers of transformers whose state we do not know."""


@dataclass(frozen=True)
class MyOwn(Streaming):
    """A policy that no name leads to."""


def test_what_cannot_be_saved_says_so_and_writes_nothing(tmp_path):
    model, (ids, mask) = tiny("Gemma3"), document(1)
    with sparse_attn.patch(model, prefill="dense"):
        with pytest.raises(ContractError, match="the cache is empty"):
            cache_of(model, "snapkv", 40).save(tmp_path / "kv")
        cache = prefilled(model, rows=1)[0]
        cache.layers[0].__class__ = Recurrent
        with pytest.raises(ContractError, match="layer 0 is a Recurrent, and only full and sliding-window attention"):
            cache.save(tmp_path / "kv")
        cache = kvcache.make_cache(model, MyOwn(), 40)
        kvcache.prefill(model, ids, cache, 24)
        with pytest.raises(ContractError, match="MyOwn has no JSON form"):
            cache.save(tmp_path / "kv")
        cache = kvcache.KVCache(model.config, cache_of(model, "streaming", 40).kept)
        kvcache.prefill(model, ids, cache, 24)
        with pytest.raises(ContractError, match="made from a config, or its model is gone; give model="):
            cache.save(tmp_path / "kv")
        cache.layers[0].update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16))
        with pytest.raises(ContractError, match=r"have seen \[72, 77\] tokens, because a forward failed"):
            cache.save(tmp_path / "kv", model=model)
        assert os.listdir(tmp_path) == []
        cache = kvcache.KVCache(model.config, cache_of(model, "streaming", 40).kept)
        kvcache.prefill(model, ids, cache, 24)
        cache.save(tmp_path / "kv", model=model)
        assert torch.equal(*(answers(model, one, ids, mask)[1] for one in (cache, kvcache.load(tmp_path / "kv", model))))


def test_a_forward_that_failed_half_way_is_not_saved(tmp_path):
    model = tiny("Llama")
    with sparse_attn.patch(model, prefill="dense"):
        cache = prefilled(model)[0]
        for layer in cache.layers:
            layer.update(torch.zeros(3, 2, 5, 16), torch.zeros(3, 2, 5, 16))
        with pytest.raises(ContractError, match="attention never looked"):
            cache.save(tmp_path / "kv")
    assert os.listdir(tmp_path) == []
