"""Double Sparsity's channels: measured on a model, kept in a file, used by the reader."""

import pytest
import torch

import kvcache
import sparse_attn
from kvcache.cache import CacheLayer
from kvcache.channels import calibrate_channels, read_channels, write_channels
from kvcache.config import CacheConfig
from kvcache.readers import READERS
from kvcache.store import Meter
from sparse_attn import ContractError

transformers = pytest.importorskip("transformers")

from test_cache import generate, prompt  # noqa: E402
from test_readers import layer_of, small, text, told  # noqa: E402
from test_transformers import tiny, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def test_channels_of_a_file_are_used_and_bad_ones_told(tmp_path):
    path = tmp_path / "channels.json"
    write_channels(path, {5: [[1, 5, 6], [0, 9, 15]]})
    core = layer_of(small("double_sparsity", path=str(path)))
    q, k, v = text(100)
    told(core, q, k, v)
    assert core.digest.label.shape[1] == 3 and core.digest.channels[0].tolist() == [[1, 5, 6], [0, 9, 15]]
    start = int(core.digest.starts[0, 1])
    assert torch.equal(core.digest.label[start : start + 100], k[0, 1][:, [0, 9, 15]])
    with pytest.raises(ContractError, match="have none of layer 4; measure this model"):
        CacheLayer(CacheConfig(None, None, decode=small("double_sparsity", path=str(path))), 4, 6, Meter())
    with pytest.raises(ContractError, match="channels are given for 2 KV heads, but the layer has 1"):
        told(layer_of(small("double_sparsity", path=str(path))), q, k[:, :1], v[:, :1])
    with pytest.raises(ContractError, match="channel 15 is given, but keys have 12"):
        told(layer_of(small("double_sparsity", path=str(path))), *(x[..., :12] for x in (q, k, v)))
    for bad, sentence in (("{", "cannot be read"), ("[1]", "cannot be read"), ('{"0": [[2, 1]]}', "layer 0 has no list of asc"),
                          ('{"0": [[1, 2], [3]]}', "cannot be read"), ('{"0": []}', "layer 0 has no list")):
        path.write_text(bad)
        with pytest.raises(ContractError, match=sentence):
            read_channels(path)
    with pytest.raises(ContractError, match="nowhere.json cannot be read"):
        READERS["double_sparsity"](path="nowhere.json")


def test_channels_are_measured_on_texts(tmp_path):
    model = tiny("Llama")
    found = calibrate_channels(model, [tokens(1, 50), tokens(1, 70)], 4)
    assert all(channels == sorted(set(channels)) and len(channels) == 4 for heads in found.values() for channels in heads)
    seen = {}

    def look(q, kv, ctx):
        k = kv.fetch()[0]
        product = (q.unflatten(1, (k.shape[1], -1)) * k[:, :, None]).abs().mean(2)
        seen[ctx.layer] = seen.get(ctx.layer, 0) + product.sum((0, 2))

    for ids in (tokens(1, 50), tokens(1, 70)):
        sparse_attn.hf.observe(model, ids, look)
    assert found == {layer: weight.topk(4).indices.sort().values.tolist() for layer, weight in seen.items()}
    write_channels(tmp_path / "channels.json", found)
    assert read_channels(tmp_path / "channels.json") == found
    with sparse_attn.patch(model, prefill="dense"):
        cache = kvcache.make_cache(model, "double_sparsity", 40, path=str(tmp_path / "channels.json"), recent=8, dense_layers=())
        generate(model, cache, *prompt())
        assert all(layer.core.digest.channels[0].tolist() == found[i] for i, layer in enumerate(cache.layers))
    for arguments, sentence in (((model, []), "there is no text"), ((model, [tokens(1, 9)], 99), "width=99 is not between 1 and")):
        with pytest.raises(ContractError, match=sentence):
            calibrate_channels(*arguments)
