"""The commands that measure caches which keep everything and read little."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from test_transformers import tiny, tokens  # noqa: E402

import kvcache  # noqa: E402
import sparse_attn  # noqa: E402
from benchmarks import retrieval  # noqa: E402


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_long_answer_stays_that_of_the_dense_model_whatever_reads(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert retrieval.main(["replay", "--prompt", "1200", "--generate", "100", "--json", str(out), "--threads", "1"]) == 0
    found = rows(out)
    assert {row["cache"] for row in found} == set(retrieval.METHODS)
    for row in found:
        assert row["max_error"] <= 4 * row["dense_max_error"] and row["logits_std"] > 0.1, row
        assert row["moved"] > 0 or len(row["tiers"]) == 1 or row["cache"] in ("infllm", "quickllama"), row  # these keep 512 tokens at hand


def test_needles_tell_what_is_held_and_read(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["needle", "--lengths", "1024", "--depths", "1", "--tasks", "single", "--methods", "quest", "--budgets", "256", "--json", str(out),
             "--threads", "1"]
    assert retrieval.main(words) == 0
    everything, quest = rows(out)
    assert everything["correct"] == quest["correct"] == 1.0
    assert 0 < quest["step_bytes"] < quest["dense_step_bytes"] and quest["decode_steps"] > 0
    assert "| quest | 256 | 1.00 |" in out.with_suffix(".md").read_text()


def test_low_rank_keys_take_less_of_the_device(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert retrieval.main(["shadow", "--tokens", "4096", "--rank", "32", "--budget", "512", "--reps", "2", "--json", str(out), "--threads", "1"]) == 0
    (row,) = rows(out)
    assert row["smaller_by"] > 3 and row["host_mib"] > 0 and 0 < row["hit_rate"] < 1


@pytest.mark.parametrize("words, sentence", [
    (["needle", "--methods", "guess"], "--methods names 'guess'"),
    (["needle", "--methods", "quest", "--budgets", "8"], "budget=8"),
    (["disk", "--cache", "guess"], "invalid choice"),
])
def test_bad_input_is_one_sentence_and_status_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        retrieval.main(words)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


# bytes of a digest per token and KV head of 16 float32 channels (kvcache.md 25.6), and settings that leave something to choose
DIGESTS = {
    "quest": (2 * 64 / 16, {}),
    "landmarks": ((64 + 4) / 8, {"outliers": 8}),
    "double_sparsity": (4 * 4, {"width": 4}),
    "token_select": (64, {"sinks": 4, "recent": 64}),
    "infllm": (64 / 64, {"page": 64, "sinks": 64, "recent": 128}),
    "quickllama": (64 / 64, {"page": 64, "sinks": 64, "recent": 128}),
    "lrqk": (4 * 4, {"rank": 4}),
    "shadowkv": ((64 + 4) / 8, {"outliers": 8, "rank": 8}),
}


@pytest.mark.parametrize("name", retrieval.METHODS)
def test_bytes_are_those_of_the_formula(name):
    heads, budget, n = 2, 640, 3000
    digest, settings = DIGESTS[name]
    model, ids = tiny("Llama", max_position_embeddings=4096), tokens(1, n)
    tiers = ("device",) if name == "token_select" else ("device", "host")
    with sparse_attn.patch(model, prefill="dense"), torch.inference_mode():
        cache = kvcache.make_cache(model, decode=name, budget=budget, dense_layers=(), tiers=tiers, **settings)
        model(input_ids=ids, past_key_values=cache)
        for token in range(3):
            model(input_ids=ids[:, token, None], past_key_values=cache)
    report, n, row = cache.report(), n + 3, 2 * 16 * 4
    for layer in report.layers:
        assert layer.step_bytes == pytest.approx(heads * (digest * n + budget * row), rel=0.05)
        assert layer.dense_step_bytes == heads * n * row
    if len(tiers) > 1:
        here = int(cache.layers[0].core.store.lengths.max())
        pages = sum(report.tiers.values()) / len(report.layers)
        factors = (n - here) * 8 * 4 + 8 * heads * 64 if name == "shadowkv" else 0
        outliers = heads * settings.get("outliers", 0) * 8 * row / 2  # whose keys stay as they are
        assert pages == ((n - here) * heads * row / 2 + outliers if name == "shadowkv" else (n - here) * heads * row)
        formula = heads * (digest * n + budget * row + here * (row + 8)) + factors
        assert all(0.95 * formula < layer.n_bytes < 1.1 * formula for layer in report.layers)
