"""Caches that evict on needles: the runner's --cache and --question, the table of caches, and what a cache costs."""

import json
import re

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import cache_cost, caches  # noqa: E402
from benchmarks.needle import grade, kv, runner  # noqa: E402
from benchmarks.needle.__main__ import main  # noqa: E402
from benchmarks.needle.haystack import NeedleError  # noqa: E402
from kvcache import METHODS, READERS, RETRIEVING  # noqa: E402

BUDGET, TOKENS = 256, 2048


@pytest.fixture(scope="module")
def shipped():
    return runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)


@pytest.fixture(scope="module")
def prompts(shipped):
    haystack = runner.make_haystack(shipped[1], None)
    return [haystack.prompt(task, TOKENS, 0.5, seed) for task in ("single", "multikey") for seed in range(2)]


def cached(name: str, question: str = "inside", **settings) -> runner.Method:
    return runner.Method(cache=name, cache_args={"budget": BUDGET, **settings}, question=question)


def answered(shipped, prompt, method, chunk=None) -> tuple[float, dict]:
    (ids,), figures = runner.answer(shipped[0], [prompt], method, runner.stop_tokens(shipped[0]), chunk)
    return grade.grade(shipped[1].decode(ids), prompt.expected), figures


def run(folder, *options) -> list[dict]:
    file = folder / "cases.jsonl"
    assert main([*options, "--threads", "1", "--json", str(file), "--plot", str(folder / "map.png")]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


# what is read, and when


def test_a_prompt_ends_in_its_question(shipped, prompts):
    for prompt in prompts:
        question = shipped[1].decode(prompt.ids[-prompt.question_tokens :])
        assert question.strip().startswith("Question:") and prompt.needle[0][1] <= TOKENS - prompt.question_tokens


def test_a_cache_that_forgets_the_needle_answers_wrong(shipped, prompts):
    for prompt in prompts:
        assert answered(shipped, prompt, runner.Method())[0] == 1
        assert answered(shipped, prompt, cached("snapkv"))[0] == 1
        assert answered(shipped, prompt, cached("streaming"))[0] == 0


def test_a_question_that_comes_after_cannot_bring_back_what_it_would_have_kept(shipped, prompts):
    for prompt in prompts:
        assert answered(shipped, prompt, runner.Method(question="after"))[0] == 1
        assert answered(shipped, prompt, cached("snapkv", "inside"))[0] == 1
        assert answered(shipped, prompt, cached("snapkv", "after"))[0] == 0


@pytest.mark.parametrize("name, settings", [
    ("quest", {}), ("landmarks", dict(outliers=2)), ("double_sparsity", dict(recent=16)), ("token_select", dict(sinks=8, recent=32)),
    ("infllm", dict(page=16, sinks=16, recent=32)), ("quickllama", dict(page=16, sinks=16, recent=32, question=16)),
    ("lrqk", dict(rank=16, recent=32)),
])
def test_what_keeps_everything_and_reads_a_sixteenth_answers_questions_that_come_after(shipped, prompts, name, settings):
    method = runner.Method(cache=name, cache_args={"budget": TOKENS // 16, "dense_layers": [], **settings}, question="after")
    for prompt in prompts:
        assert answered(shipped, prompt, method, 512)[0] == 1


@pytest.mark.parametrize("settings, chunk", [({}, None), ({}, 300), ({"evict": "prompt"}, None), ({"evict": "prompt"}, 300)])
def test_the_question_comes_once_the_text_was_evicted(shipped, prompts, settings, chunk):
    calls, prompt = [], prompts[0]
    text = TOKENS - prompt.question_tokens

    def note(module, args, kwargs):
        cache = kwargs["past_key_values"]
        calls.append((kwargs["input_ids"].shape[1], cache.report().tokens, cache.get_seq_length()))

    hook = shipped[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        answered(shipped, prompt, cached("snapkv", "after", **settings), chunk)
    finally:
        hook.remove()
    reading = [call for call in calls if call[0] > 1]
    assert reading[-1] == (prompt.question_tokens, BUDGET, text)
    assert sum(n for n, _, _ in reading[:-1]) == text and max(n for n, _, _ in reading) == (chunk or text)
    if chunk and not settings:
        assert all(kept == BUDGET for _, kept, _ in reading[1:]), "every chunk evicts"


def test_prompts_of_one_batch_are_cut_where_their_question_begins_or_not_at_all(shipped, prompts):
    short = runner.Prompt(**{**vars(prompts[0]), "question_tokens": 5})
    with pytest.raises(NeedleError, match="questions of 5 and .* tokens cannot come after their texts in one batch"):
        runner.answer(shipped[0], [prompts[0], short], cached("snapkv", "after"), [])


# what is held


def test_bytes_are_counted_whatever_the_cache(shipped, prompts):
    n = prompts[0]
    layers, per_token = 2, 2 * (2 * 64 * 4)  # KV heads x (keys and values of 64 floats)
    _, whole = answered(shipped, n, runner.Method())
    new = whole["kept_tokens"] - TOKENS
    assert 0 < new < n.answer_tokens and whole["kv_formula"] == kv.ALL
    assert whole["kv_bytes"] == whole["kv_peak_bytes"] == layers * per_token * (TOKENS + new)
    assert whole["kv_formula_bytes"] == layers * per_token * TOKENS
    _, chunked = answered(shipped, n, cached("streaming"), 128)
    own = per_token + 2 * 8  # and each head's position and score
    assert chunked["kept_tokens"] == BUDGET and chunked["kv_formula"] == kv.CHUNKED
    assert chunked["kv_formula_bytes"] == layers * own * (BUDGET + 128)
    assert layers * own * BUDGET <= chunked["kv_bytes"] <= chunked["kv_peak_bytes"] <= 1.2 * chunked["kv_formula_bytes"]
    _, once = answered(shipped, n, cached("streaming"))
    assert once["kv_formula"] == kv.ONE_PIECE and once["kv_formula_bytes"] == own * (BUDGET + TOKENS)
    assert once["kv_peak_bytes"] > chunked["kv_peak_bytes"] and once["kv_bytes"] <= 1.1 * chunked["kv_bytes"]
    _, late = answered(shipped, n, cached("streaming", evict="prompt"), 128)
    assert late["kv_formula"] == kv.ALL and late["kv_formula_bytes"] == layers * own * TOKENS


# the command


def test_caches_are_recorded_and_measured_beside_one_that_keeps_everything(tmp_path, capsys):
    options = ["--lengths", "1024", "--depths", "1", "--tasks", "single", "--cache", "snapkv", "--cache", "streaming",
               "--cache-args", '{"budget": 256, "window": 32}', "--cache-args", '{"budget": 128}', "--chunk", "512"]
    rows = run(tmp_path, *options, "--prefill", "xattention")
    assert [(row["prefill"], row.get("cache"), row.get("cache_args"), row.get("question")) for row in rows] == [
        ("dense", None, None, None), ("xattention", "snapkv", {"budget": 256, "window": 32}, "inside"),
        ("xattention", "streaming", {"budget": 128}, "inside")]
    assert set("kept_tokens kv_bytes kv_peak_bytes kv_formula_bytes kv_formula".split()) <= set(rows[0])
    assert "streaming(budget=128)" in grade.method_name(rows[2])
    assert "peak KV MiB" in capsys.readouterr().out
    assert run(tmp_path, *options, "--prefill", "xattention") == rows, "all were there already"
    after = run(tmp_path, *options, "--question", "after")[3:]
    assert [(row["prefill"], row.get("cache"), row["question"]) for row in after] == [
        ("dense", None, "after"), ("dense", "snapkv", "after"), ("dense", "streaming", "after")]
    assert all(line["speedup"] is not None for line in grade.summary(rows + after))


def test_lines_written_before_there_were_caches_are_found_again(tmp_path):
    options = ["--lengths", "1024", "--depths", "1", "--tasks", "single"]
    (row,) = run(tmp_path, *options)
    before = {key: value for key, value in row.items() if not key.startswith(("kv_", "kept_"))}
    (tmp_path / "cases.jsonl").write_text(json.dumps(before) + "\n")
    assert run(tmp_path, *options) == [before]
    rows = run(tmp_path, *options, "--cache", "streaming", "--cache-args", '{"budget": 128}')
    assert rows[0] == before and [row.get("cache") for row in rows[1:]] == ["streaming"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cache", "snapvk"], "--cache snapvk {}: 'snapvk': no such cache policy; there are"),
        (["--cache", "snapkv"], "--cache snapkv {}: how many tokens may stay"),
        (["--cache", "snapkv", "--cache-args", '{"budget": 512, "windw": 3}'], "snapkv has no argument 'windw'; it has"),
        (["--cache", "snapkv", "--cache-args", '{"budget": 16}'], "a budget of 16 tokens has no room for the"),
        (["--cache", "snapkv", "--cache-args", "512"], "--cache-args '512' is not an object; give one such as"),
        (["--cache-args", '{"budget": 512}'], "--cache-args has no --cache to apply to"),
        (["--cache", "snapkv", *["--cache-args", '{"budget": 512}'] * 2], "--cache-args came 2 times for 1 --cache"),
        (["--cache", "tova", "--cache-args", '{"budget": 512}', "--prefill", "xattention", "--prefill", "auto"],
         "--cache goes with one --prefill or --profile, got 2"),
        (["--cache", "tova", "--cache-args", '{"budget": 512}', "--dual-chunk", '{"chunk": 512, "local": 128}'],
         "--dual-chunk moves keys that an evicting cache has let go of"),
        (["--question", "after", "--batch-size", "2"], "--question after came with --batch-size 2"),
        (["--question", "before"], "invalid choice: 'before'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2_and_writes_nothing(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["--json", "cases.jsonl", "--plot", "map.png", *options])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and len(error.splitlines()) == 1 and re.search(sentence, error), error
    assert list(tmp_path.iterdir()) == []


# the table of caches


def row(cache, question, budget, correct, length=1024, task="single", **more) -> dict:
    how = {"cache": cache, "cache_args": {"budget": budget, **more}} if cache else {}
    size = (budget or length) * 2**20
    held = dict(kept_tokens=float(budget or length), kv_bytes=size, kv_peak_bytes=2 * size, kv_formula_bytes=2 * size)
    return dict(task=task, length=length, correct=correct, question=question, **held, **how)


def test_tables_say_accuracy_by_budget_and_how_much_smaller():
    rows = [row(None, "inside", None, 1), row("tova", "inside", 128, 1), row("tova", "inside", 128, 0),
            row("tova", "inside", 256, 1), row("tova", "after", 128, 0, task="multikey"), row("tova", "inside", 128, 1, evict="prompt")]
    text = caches.markdown(rows)
    assert "| everything | inside | 1.00 / - | 1.00 / - |" in text and "| tova | inside | 0.50 / - | 1.00 / - |" in text
    assert "| tova (evict=prompt) | inside | 1.00 / - |  |" in text and "| tova | after | - / 0.00 |  |" in text
    assert "| 128 | 128 | 128.00 | 8.0x | 256.00 | 256.00 | 8.0x |" in text and "| 128, evict=prompt | 128 | 128.00 |" in text
    assert "| tova | 0.50 | 1.00 | 0.00 |" in caches.compact(rows)


def test_methods_that_read_a_file_of_the_model_are_in_the_table_where_there_is_one(tmp_path):
    found = [method for method in caches.methods([], [512], ["inside"], runner.BUNDLED) if method.cache]
    assert {method.cache for method in found} == set(METHODS) - {*READERS, *RETRIEVING}
    (duo,), (locret,) = ([method for method in found if method.cache == name] for name in ("duo", "locret"))
    assert set(duo.cache_args) == {"profile"} and locret.cache_args["budget"] == 512
    for method in (duo, locret):
        assert re.fullmatch("[0-9a-f]{12}", method.row()["cache_file"])
    others = {method.cache for method in caches.methods([], [512], ["inside"], tmp_path) if method.cache}
    assert others == set(METHODS) - {"duo", "locret", *READERS, *RETRIEVING}


def test_one_command_runs_caches_beside_everything_and_goes_on_from_its_file(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    command = ["--caches", "streaming,duo", "--budgets", "128", "--lengths", "800", "--depths", "1", "--tasks", "single",
               "--chunk", "256", "--threads", "1", "--json", str(file)]
    assert caches.main(command) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r.get("cache"), r.get("question", "inside"), r["correct"]) for r in rows] == [
        (None, "inside", 1), ("streaming", "inside", 0), ("duo", "inside", 1),
        (None, "after", 1), ("streaming", "after", 0), ("duo", "after", 1)]
    assert caches.main(command) == 0
    assert len(file.read_text().splitlines()) == 6
    assert "| everything | 1.00 | 1.00 |" in capsys.readouterr().out
    assert "## 800 tokens" in (tmp_path / "rows.md").read_text()


@pytest.mark.parametrize("options, sentence", [
    (["--caches", "snapvk"], "--caches names 'snapvk'; there are"),
    (["--caches", "duo", "--model", "/no/such/model"], "which needs profile_duo.json beside the model; it is not in /no/such/model"),
    (["--questions", "before"], "--questions names 'before'; use inside,after"),
    (["--budgets", "2"], "has no room for"),
    (["--chunk", "0"], "--chunk is 0"),
    (["--lengths", "1024,2048", "--depths", "1,2,3"], "gives 3 numbers for 2 lengths"),
])
def test_a_wrong_table_is_refused_in_a_sentence(options, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        caches.main([*options, "--json", str(tmp_path / "rows.jsonl")])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and len(error.splitlines()) == 1 and sentence in error, error
    assert list(tmp_path.iterdir()) == []


# what a cache costs

SMALL = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "fp32", "--threads", "1", "--reps", "2"]


def test_memory_is_that_of_the_cache_and_time_that_of_a_token(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert cache_cost.main(["--tokens", "4096", "--chunk", "256", "--layers", "3", "--budget", "512", "--context", "2048", *SMALL,
                            "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    alone, whole, small = [r for r in rows if r["benchmark"] == "memory"]
    assert (alone["what"], whole["what"], small["what"]) == ("model alone", "everything", "snapkv")
    assert whole["kv_peak_bytes"] == 3 * 2 * 2 * 32 * 4 * 4096 and whole["of_formula"] == 1
    assert 0.9 < small["of_formula"] < 1.1
    assert whole["above_model_mib"] > small["above_model_mib"] and small["smaller_by"] > 1
    decoded = {r["what"] for r in rows if r["benchmark"] == "decode"}
    assert decoded == {"attention", *(f"step, {name}" for name in cache_cost.STEPS)}
    uneven = [r for r in rows if r["benchmark"] == "ragged"]
    assert [sum(r["lengths"]) for r in uneven] == [2 * 512] * 2 and all(r["baselines"]["uniform"]["ratio"] > 0 for r in uneven)
    out = capsys.readouterr().out
    assert "budget 512" in out and "one token, one layer" in out


def test_heads_of_a_ragged_layer_attend_over_as_many_tokens_as_they_keep():
    import argparse

    args = argparse.Namespace(heads=4, kv_heads=2, head_dim=32, dtype="fp32", budget=100)
    counts = torch.tensor([[40, 160]])
    layer = cache_cost.Layer(args, "streaming", 160, counts)
    assert layer.core.store.lengths.tolist() == [[41, 161]]
    for head, n in ((0, 40), (1, 160)):
        k, v = (torch.cat([old[0, head, :n], new[0, head]]) for old, new in ((layer.k, layer.k_new), (layer.v, layer.v_new)))
        q = layer.q[0, 2 * head : 2 * head + 2, 0]
        expected = (q @ k.T * layer.ctx.scale).softmax(-1) @ v
        assert torch.allclose(layer.attend()[0, 2 * head : 2 * head + 2, 0], expected, atol=1e-5)


def test_a_wrong_measurement_is_refused_in_a_sentence(capsys):
    for options, sentence in ((["speed"], "part 'speed' is not known"), (["--cache", "x"], "--cache 'x' is not known"),
                              (["--layers", "0"], "--layers is 0"), (["--heads", "3"], "is not a multiple of --kv-heads")):
        with pytest.raises(SystemExit) as exit_:
            cache_cost.main(options)
        assert exit_.value.code == 2 and sentence in capsys.readouterr().err
