"""Locret: scores are those computed by hand, nothing that comes later changes them, and heads learn what an answer will look at."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from test_transformers import tiny, tokens  # noqa: E402

import kvcache  # noqa: E402
import sparse_attn  # noqa: E402
from benchmarks.needle import runner  # noqa: E402
from benchmarks.needle import train_locret as needles  # noqa: E402
from kvcache import train_locret  # noqa: E402
from kvcache.policies.locret import Locret  # noqa: E402
from kvcache.retaining import Heads  # noqa: E402
from kvcache.train_locret import Sample, Training, labels, read_samples, train  # noqa: E402
from kvcache.types import Seen  # noqa: E402
from sparse_attn import ContractError  # noqa: E402
from sparse_attn.hf import model_id  # noqa: E402

SHIPPED = runner.BUNDLED / "locret.safetensors"
HIDDEN, N = 5, 88


def random_heads(model, layers=None, hidden: int = HIDDEN) -> Heads:
    of, generator = model_id(model), torch.Generator().manual_seed(3)
    inputs = (of.heads + 2 * of.kv_heads) * of.head_dim

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    numbers = range(of.layers) if layers is None else layers
    layers = {i: (normal(hidden, inputs) * inputs**-0.5, normal(of.kv_heads, hidden)) for i in numbers}
    return Heads(layers, of, "data", "2026-01-01")


def written(heads: Heads, folder) -> str:
    path = folder / "heads.safetensors"
    heads.write(path)
    return str(path)


def by_hand(x: list[float], w1: torch.Tensor, w2: torch.Tensor) -> list[float]:
    """Scores of one token in Python's floats."""
    inside = [math.fsum(a * b for a, b in zip(row, x)) for row in w1.tolist()]
    inside = [h / (1 + math.exp(-h)) for h in inside]
    return [math.fsum(a * b for a, b in zip(row, inside)) for row in w2.tolist()]


# -- scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2, 4096])
def test_scores_are_those_computed_by_hand_and_old_ones_stay(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("kvcache.policies.locret._TOKENS", at_once)
    batch, heads, kv_heads, dim, n_q = 2, 4, 2, 3, 5
    first, last, old = [2, 0], [5, 4], [3, 1]
    new = [stop - start for start, stop in zip(first, last)]
    model = replace(model_id(tiny("Llama")), heads=heads, kv_heads=kv_heads, head_dim=dim, layers=2)
    w1, w2 = torch.randn(HIDDEN, (heads + 2 * kv_heads) * dim), torch.randn(kv_heads, HIDDEN)
    policy = Locret(written(Heads({1: (w1, w2)}, model, "data", "2026-01-01"), tmp_path))
    q = torch.randn(batch, heads, n_q, dim)
    lengths = torch.tensor([[old[b] + new[b] + h for h in range(kv_heads)] for b in range(batch)])  # the second head holds one more
    starts = (lengths + 2).flatten().cumsum(0).view_as(lengths) - lengths - 1
    k, v = (torch.full((int((lengths + 2).sum()), dim), math.nan) for _ in range(2))
    state = torch.full((len(k),), 7.0)
    for start, length in zip(starts.flatten().tolist(), lengths.flatten().tolist()):
        k[start : start + length], v[start : start + length] = torch.randn(2, length, dim)
    seen = Seen(k, v, starts, lengths, torch.zeros(len(k), dtype=torch.int32), state, torch.tensor([9, 8]), torch.tensor(new), q=q,
                q_first=torch.tensor(first, dtype=torch.int32), q_last=torch.tensor(last, dtype=torch.int32), layer=1, n_layers=2)
    got, new_rows = policy.observe(seen), []
    for b in range(batch):
        for i in range(new[b]):
            rows = [int(starts[b, h] + lengths[b, h]) - new[b] + i for h in range(kv_heads)]
            x = [*q[b, :, first[b] + i].flatten().tolist(), *k[rows].flatten().tolist(), *v[rows].flatten().tolist()]
            want = torch.tensor(by_hand(x, w1, w2), dtype=torch.float64)
            assert torch.allclose(got[rows].double(), want, rtol=0, atol=1e-5)
            new_rows += rows
    assert torch.equal(policy.rank(seen, got), got)
    untouched = torch.ones(len(k), dtype=torch.bool).index_fill(0, torch.tensor(new_rows), False)
    assert torch.equal(got[untouched], state[untouched]) and torch.equal(state, torch.full_like(state, 7.0))


def states(cache) -> list[torch.Tensor]:
    """What each layer's runs hold as scores, ``[Hkv, N]`` by position, nan where a token is gone; one sequence."""
    found = []
    for layer in cache.layers:
        store = layer.core.store
        table = torch.full((store.starts.shape[1], int(layer.core.n_seen)), math.nan)
        for h, (start, length) in enumerate(zip(store.starts[0].tolist(), store.lengths[0].tolist())):
            rows = slice(start, start + length)
            table[h, store.positions[rows].long()] = store.state[rows]
        found.append(table)
    return found


@pytest.mark.parametrize("chunk", [N, 24, 1])
@pytest.mark.parametrize("family", ["Llama", "SmolLM3", "Glm4"])  # RoPE; none in layer 1; on half of the channels, interleaved
def test_a_cache_scores_projections_before_rotation(tmp_path, family, chunk):
    model, ids = tiny(family), tokens(1, N)
    path = written(random_heads(model), tmp_path)
    heads, seen = Heads.read(path), {}

    def note(key, out):
        seen[key] = out[0].detach().double()

    projections = {(i, name): getattr(layer.self_attn, name) for i, layer in enumerate(model.model.layers)
                   for name in ("q_proj", "k_proj", "v_proj")}
    hooks = [module.register_forward_hook(lambda _, __, out, key=key: note(key, out)) for key, module in projections.items()]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    cache = kvcache.make_cache(model, "locret", 400, path=path, recent=8)
    with sparse_attn.patch(model, prefill="dense"):
        kvcache.prefill(model, ids, cache, chunk)
    for i, found in enumerate(states(cache)):
        w1, w2 = (w.double() for w in heads.layers[i])
        x = torch.cat([seen[i, name] for name in ("q_proj", "k_proj", "v_proj")], -1)
        want = (torch.nn.functional.silu(x @ w1.T) @ w2.T).T
        assert torch.allclose(found.double(), want, rtol=0, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize("chunk", [8, 24])
def test_a_prompt_in_chunks_keeps_what_it_keeps_in_one_piece(tmp_path, chunk):
    model, ids = tiny("Llama"), tokens(1, N)
    path = written(random_heads(model), tmp_path)
    kept = []
    for size in (N, chunk):
        cache = kvcache.LocretCache(model, 30, path=path, stabilizers=8)
        with sparse_attn.patch(model, prefill="dense"):
            kvcache.prefill(model, ids, cache, size)
        kept.append(states(cache)[0])  # what upper layers compute depends on what attention could still read
    assert torch.equal(kept[0].isnan(), kept[1].isnan()) and int((~kept[0].isnan()).sum()) == 2 * 30
    assert torch.allclose(kept[0], kept[1], rtol=0, atol=1e-4, equal_nan=True)
    assert not kept[0][:, [*range(4), *range(N - 8, N)]].isnan().any()
    rest = states(cache)[0][:, 4 : N - 8]
    assert (rest.isnan().any(1) & ~rest.isnan().all(1)).all()


@pytest.mark.parametrize("chunk", [None, 24])
def test_a_padded_row_is_like_the_row_alone(tmp_path, chunk):
    model, ids, mask = tiny("SmolLM3"), tokens(3, N), torch.ones(3, N, dtype=torch.long)
    path, pads = written(random_heads(model), tmp_path), (0, 24, 33)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0

    def logits(rows: slice, columns: slice):
        cache = kvcache.make_cache(model, "locret", 30, path=path, stabilizers=8)
        out = model.generate(ids[rows, columns], attention_mask=mask[rows, columns], past_key_values=cache, max_new_tokens=12,
                             do_sample=False, output_logits=True, return_dict_in_generate=True, prefill_chunk_size=chunk)
        assert max(row.most for row in cache.report().layers) == 30  # also after an answer
        return torch.stack(out.logits, 1)

    with sparse_attn.patch(model, prefill="dense"):
        together = logits(slice(None), slice(None))
        for row, pad in enumerate(pads):
            if chunk is None or pad % chunk == 0:  # else the row alone would be cut elsewhere
                alone = logits(slice(row, row + 1), slice(pad, None))[0]
                assert (together[row] - alone).abs().max() <= 2e-4


def test_the_config_has_a_json_form(tmp_path):
    config = kvcache.config.as_config("locret", 100, path=written(random_heads(tiny("Llama")), tmp_path), stabilizers=50)
    assert (config.sinks, config.recent) == (4, 50)
    assert kvcache.CacheConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# -- files ----------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(tmp_path):
    heads = random_heads(tiny("Llama"))
    back = Heads.read(written(heads, tmp_path))
    assert (back.model, back.data, back.date) == (heads.model, heads.data, heads.date)
    assert back.layers.keys() == heads.layers.keys()
    assert all(torch.equal(a, b) for i in heads.layers for a, b in zip(heads.layers[i], back.layers[i]))


def test_a_wrong_file_is_refused_in_one_sentence(tmp_path):
    heads, path = random_heads(tiny("Llama")), tmp_path / "heads.safetensors"
    heads.write(path)
    header = {"version": "1", "data": "", "date": "", "model": json.dumps(vars(heads.model))}
    w1, w2 = heads.layers[0]
    good = {"layers.0.w1": w1, "layers.0.w2": w2}
    cases = [
        (None, None, "cannot be read"),
        (good, None, "header lacks 'version'"),
        (good, header | {"version": "9"}, "have version 9 but this package reads 1"),
        ({"layers.0.w1": w1}, header, "do not fit together"),
        ({"layers.0.w1": w1, "layers.0.w2": w2[:, 1:].contiguous()}, header, "do not fit together"),
        (good | {"other": w1.clone()}, header, "holds tensors that are no retaining heads"),
        ({}, header, "or none"),
        (good, header | {"model": "{}"}, "does not say which model"),
    ]
    for tensors, metadata, sentence in cases:
        if tensors is None:
            torch.save(good, path)
        else:
            save_file(tensors, path, metadata=metadata)
        with pytest.raises(ContractError, match=sentence) as error:
            Locret(str(path))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ContractError, match="cannot be read"):
        Locret(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(ContractError, match="stabilizers=-1"):
        Locret(str(path), stabilizers=-1)


def test_heads_of_another_model_are_refused(tmp_path):
    model, other = tiny("Llama"), tiny("Llama", num_key_value_heads=4)
    path = written(random_heads(other), tmp_path)
    with pytest.raises(ContractError, match="trained for .* 4 heads on 4 of 16.* but this model is .* 4 heads on 2 of 16"):
        kvcache.make_cache(model, "locret", 100, path=path, stabilizers=50)
    lying = replace(random_heads(other), model=model_id(model))
    cache = kvcache.make_cache(model, "locret", 100, path=written(lying, tmp_path), stabilizers=50)
    with sparse_attn.patch(model, prefill="dense"), pytest.raises(ContractError, match="takes 192 channels and scores 4 key heads"):
        kvcache.prefill(model, tokens(1, N), cache, N)
    cache = kvcache.make_cache(model, "locret", 100, path=written(random_heads(model, [0]), tmp_path), stabilizers=50)
    with sparse_attn.patch(model, prefill="dense"), pytest.raises(ContractError, match="no retaining head for layer 1, only for 0"):
        kvcache.prefill(model, tokens(1, N), cache, N)
    with pytest.raises(ContractError, match="Locret needs the model, not its config"):
        kvcache.KVCache(model.config, kvcache.config.as_config("locret", 100, path=path, stabilizers=50))


def test_heads_for_other_weights_are_used_with_a_warning(tmp_path):
    heads = random_heads(tiny("Llama"))
    path = written(replace(heads, model=replace(heads.model, weights="another")), tmp_path)
    with pytest.warns(UserWarning, match="trained for other weights"):
        kvcache.make_cache(tiny("Llama"), "locret", 100, path=path, stabilizers=50)


# -- training -------------------------------------------------------------------------------------------------------------


def test_labels_are_the_largest_logits_from_the_answer():
    q, k, answer, scale = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), 6, 0.3
    got = labels(q, k, answer, scale)
    assert got.shape == (6, 2)
    for j in range(answer):
        for h in range(2):
            # the token at 8 predicts nothing, the one at 5 predicts the answer's first
            want = max(float(q[0, 2 * h + g, t].double() @ k[0, h, j].double()) * scale for g in range(2) for t in (5, 6, 7))
            assert got[j, h].item() == pytest.approx(want, abs=1e-5)


def samples(count: int = 6) -> list[Sample]:
    ids = torch.randint(1, 64, (count, 1, 60), generator=torch.Generator().manual_seed(1))
    return [Sample(x, 50 + i) for i, x in enumerate(ids)]


def test_training_lowers_the_loss_is_repeatable_and_leaves_the_model_alone():
    model, settings = tiny("SmolLM3"), Training(hidden=16, steps=40, rate=2e-2, warmup=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[float] = []
    heads, curve = train(model, samples(), settings, seen.append)
    assert len(curve) == 40 and seen == curve
    assert sum(curve[-6:]) < 0.6 * sum(curve[:6])
    again, same_curve = train(model, samples(), settings)
    assert same_curve == curve and again.data == heads.data
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(heads.layers[i], again.layers[i]))
    assert train(model, samples(), replace(settings, seed=1))[1] != curve
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert heads.model == model_id(model)


def test_the_rate_rises_and_falls():
    settings = Training(rate=3.0, warmup=0.5)
    assert [settings.rate_at(step, 6) for step in range(6)] == pytest.approx([1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
    assert Training(rate=3.0, warmup=0.0).rate_at(0, 6) == 3.0


def test_samples_need_a_prompt_and_an_answer():
    ids = torch.ones(1, 10, dtype=torch.long)
    for wrong in ([], [Sample(ids, 0)], [Sample(ids, 10)]):
        with pytest.raises(ContractError, match="no sample|needs a prompt and an answer"):
            train(tiny("Llama"), wrong, Training())
    for name, value in dict(hidden=0, steps=-1, rate=0.0, warmup=2.0, smooth=-1.0, clip=0.0).items():
        with pytest.raises(ContractError, match=name):
            Training(**{name: value})


def test_the_command_line_ends_in_a_usable_file(tmp_path, capsys):
    data, out = tmp_path / "pairs.jsonl", tmp_path / "heads.safetensors"
    data.write_text("".join(json.dumps({"prompt": f"The code of the amber falcon is {i}. What is it?", "answer": f" {i}."}) + "\n"
                            for i in range(1000, 1003)))
    arguments = ["--model", str(runner.BUNDLED), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert train_locret.main([*arguments, "--hidden", "8", "--steps", "5"]) == 0
    assert "heads of 2 layers" in capsys.readouterr().out
    assert Locret(out).heads.layers[1][0].shape == (8, 640)
    with out.with_suffix(".csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("12345")
    wrong = [
        (["--warmup", "3"], r"train_locret: warmup=3\.0 is outside"),
        (["--length", "4"], "leaves no room in --length 4"),
        (["--out", str(tmp_path / "no" / "heads")], "cannot write"),
        (["--data", str(tmp_path / "no.jsonl")], "cannot be read"),
    ]
    for extra, sentence in wrong:
        with pytest.raises(SystemExit) as end:
            train_locret.main([*arguments, *extra])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and re.search(sentence, message)
    for line in ("[]", '{"prompt": "a"}', '{"prompt": 1, "answer": "b"}', "x", '{"prompt": "a", "answer": ""}'):
        data.write_text(line + "\n")
        with pytest.raises(ContractError, match="line 1"):
            read_samples(str(data), transformers.AutoTokenizer.from_pretrained(runner.BUNDLED), 0)


def test_a_long_pair_keeps_its_end(tmp_path):
    tokenizer, data = transformers.AutoTokenizer.from_pretrained(runner.BUNDLED), tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "1 2 3 4 5 6 7 8", "answer": "9."}))
    whole, cut = (read_samples(str(data), tokenizer, length)[0] for length in (0, 9))
    assert cut.ids.shape == (1, 9) and cut.answer == 9 - (whole.ids.shape[1] - whole.answer)
    assert cut.ids[0, 0] == tokenizer.bos_token_id and torch.equal(cut.ids[0, 1:], whole.ids[0, -8:])


# -- the heads that ship --------------------------------------------------------------------------------------------------


def test_needle_answers_hold_every_wanted_value():
    tokenizer = transformers.AutoTokenizer.from_pretrained(runner.BUNDLED)
    haystack = runner.make_haystack(tokenizer, None)
    for task in needles.TASKS:
        sample = needles.sample(haystack, tokenizer, task, 700, 0.4, 5)
        prompt = haystack.prompt(task, 700, 0.4, 5)
        answer = tokenizer.decode(sample.ids[0, sample.answer :])
        assert sample.answer == 700 and all(value in answer for value in prompt.expected)
        assert "  " not in tokenizer.decode(sample.ids[0, sample.answer - 3 : sample.answer + 3])


def test_shipped_heads_keep_needles_before_the_question_is_known():
    model, tokenizer = runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)
    prompt = runner.make_haystack(tokenizer, None).prompt("multikey", 3000, 0.3, 0)
    (start, stop), found = prompt.needle[0], {}
    for name, settings in {"locret": dict(path=str(SHIPPED)), "random": {}}.items():
        cache = kvcache.make_cache(model, name, 384, recent=160, **settings)
        with sparse_attn.patch(model, prefill="dense"):
            kvcache.prefill(model, torch.tensor([prompt.ids[:2800]]), cache, 512)  # the question comes behind
        store = cache.layers[1].core.store
        runs = [slice(s, s + n) for s, n in zip(store.starts[0].tolist(), store.lengths[0].tolist())]
        kept = [set(store.positions[rows].tolist()) for rows in runs]
        wanted = set(range(start + 12, stop))  # the value and what stands before
        found[name] = min(len(run & wanted) for run in kept) / len(wanted)
    assert found["locret"] == 1.0 and found["random"] < 0.5
