"""The commands that measure caches which keep everything and read little."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import retrieval  # noqa: E402


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_long_answer_stays_that_of_the_dense_model_whatever_reads(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert retrieval.main(["replay", "--prompt", "300", "--generate", "150", "--json", str(out), "--threads", "1"]) == 0
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
