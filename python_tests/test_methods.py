"""The side-by-side table of methods, and what choosing costs."""

import json

import pytest
import torch

from benchmarks import methods, selection
from benchmarks.needle import runner


def row(method: str, correct: float, prefill_s: float, density: float, depth: float = 0.0) -> dict:
    return dict(task="single", length=1024, depth=depth, seed=0, prefill=method, prefill_args={}, correct=correct, density=density,
                prefill_s=prefill_s, attention_s=prefill_s / 2)


def test_speedups_are_taken_prompt_by_prompt():
    rows = [row("dense", 1, 4.0, 1.0), row("dense", 1, 8.0, 1.0, 0.5), row("fast", 1, 1.0, 0.1), row("fast", 0, 4.0, 0.3, 0.5)]
    dense, fast = methods.summary(rows)
    assert (dense["method"], dense["prefill_speedup"]) == ("dense", 1.0)
    assert fast["accuracy"] == {"single": 0.5} and fast["density"] == pytest.approx(0.2)
    assert fast["prefill_speedup"] == fast["attention_speedup"] == 3.0  # the median of 4 and 2
    assert "| fast | 0.50 | 0.200 | 3.00x | 3.00x |" in methods.markdown(rows)


def test_one_command_runs_methods_beside_dense_and_goes_on_from_its_file(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    command = ["--methods", "xattention", "--lengths", "600", "--depths", "1", "--tasks", "single", "--threads", "1", "--json", str(file)]
    assert methods.main(command) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["prefill"] for r in rows] == ["dense", "xattention", "xattention"], "the last one by the model's profile"
    assert all(0 < r["attention_s"] < r["prefill_s"] for r in rows), "the clock around attention saw every call"
    assert rows[1]["density"] < 1
    assert methods.main(command) == 0
    assert len(file.read_text().splitlines()) == 3
    assert "600 tokens" in capsys.readouterr().out


def test_the_clock_leaves_the_attention_function_as_it_was():
    model, _ = runner.load(str(runner.BUNDLED), "cpu", torch.float32, False)
    before = runner.ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ZeroDivisionError), runner.attention_clock(model):
        assert runner.ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        1 / 0  # noqa: B018
    assert runner.ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_choosing_is_timed_as_a_share_of_dense_attention(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert selection.main(["xattention", "--n", "256", "--reps", "1", "--threads", "1", "--json", str(file)]) == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["method"] == "xattention" and line["share"] == pytest.approx(line["us"][1] / line["sdpa_us"][1], rel=0.01)


@pytest.mark.parametrize(("command", "sentence"), [
    (["--methods", "magic"], "'magic'; there are"), (["--tasks", "riddle"], "task 'riddle' is not known"),
    (["--methods", "block_rank"], "needs documents"), (["--depths", "1,2"], "gives 2 numbers for 5 lengths"), (["--lengths", "many"], "invalid literal"),
])  # fmt: skip
def test_bad_options_get_a_sentence_and_status_2(command, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        methods.main(command)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
