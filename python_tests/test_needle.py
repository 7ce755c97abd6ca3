"""The needle runner and the retrieval model that ships with it."""

import json
import random
import re

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.needle import grade, runner  # noqa: E402
from benchmarks.needle.__main__ import main  # noqa: E402
from benchmarks.needle.haystack import TASKS, Haystack, NeedleError, sentences  # noqa: E402


@pytest.fixture(scope="module")
def shipped():
    return runner.load(str(runner.BUNDLED), "cpu", torch.float32, trust=False)


@pytest.fixture(scope="module")
def haystack(shipped):
    return runner.make_haystack(shipped[1], None)


def _answers(shipped, prompts):
    model, tokenizer = shipped
    ids, _ = runner.answer(model, prompts, runner.Method(), runner.stop_tokens(model))
    return [tokenizer.decode(row) for row in ids]


def _accuracy(shipped, prompts):
    return sum(grade.grade(a, p.expected) for a, p in zip(_answers(shipped, prompts), prompts)) / len(prompts)


def _run(tmp_path, *options):
    return main([*options, "--json", str(tmp_path / "cases.jsonl"), "--plot", str(tmp_path / "map.png")])


# text


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [701, 1024, 2048])
def test_a_prompt_has_exactly_the_asked_length(haystack, shipped, task, length):
    for depth in (0, 0.3, 1):
        prompt = haystack.prompt(task, length, depth, seed=7)
        assert len(prompt.ids) == length
        text = shipped[1].decode(prompt.ids)
        for value in prompt.expected:
            assert value in text
        for start, stop in prompt.needle:
            assert shipped[1].decode(prompt.ids[start:stop]).endswith(".")


def test_the_same_seed_makes_the_same_prompt_and_another_seed_another(haystack):
    assert haystack.prompt("multikey", 1024, 0.5, 3) == haystack.prompt("multikey", 1024, 0.5, 3)
    assert haystack.prompt("multikey", 1024, 0.5, 3) != haystack.prompt("multikey", 1024, 0.5, 4)


def test_depth_moves_the_needle_from_start_to_end(haystack):
    starts = [haystack.prompt("single", 4096, depth, 1).needle[0][0] / 4096 for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert starts == sorted(starts) and starts[0] < 0.05 and starts[-1] > 0.9


def test_long_word_for_word_repeats_are_rare():
    source = sentences(random.Random(0))
    words = "".join(next(source) for _ in range(4000)).split()
    runs = [" ".join(words[i : i + 12]) for i in range(len(words) - 12)]
    assert len(set(runs)) > 0.99 * len(runs)


def test_own_text_fills_the_haystack_however_short_it_is(shipped):
    prompt = runner.make_haystack(shipped[1], "One sentence. Another, with Grüße and 漢字!").prompt("single", 1024, 0.5, 0)
    assert len(prompt.ids) == 1024 and "漢字" in shipped[1].decode(prompt.ids)
    with pytest.raises(NeedleError, match="holds no text"):
        runner.make_haystack(shipped[1], " \n ")


def test_prompts_work_for_a_tokenizer_without_a_start_token():
    words: dict[str, int] = {}
    plain = Haystack(lambda text: [words.setdefault(word, len(words)) for word in text.split()], [])
    assert len(plain.prompt("multiquery", 600, 0.5, 0).ids) == 600


def test_a_length_below_the_needles_is_refused_with_the_least_that_works(haystack):
    with pytest.raises(NeedleError, match=r"length 100 is below the \d+ tokens that task multikey needs") as error:
        haystack.prompt("multikey", 100, 0.5, 0)
    least = int(str(error.value).split("below the ")[1].split()[0])
    assert len(haystack.prompt("multikey", least, 0.5, 0).ids) == least


# grading


@pytest.mark.parametrize(
    ("answer", "expected", "share"),
    [
        (" 4821. The baker", ["4821"], 1),
        (" 48213.", ["4821"], 0),
        (" 1111, or maybe 4821.", ["4821"], 0),
        (" 4821, 1111 and 2222", ["1111", "4821"], 1),
        (" 4821.", ["1111", "4821"], 0.5),
        ("", ["4821"], 0),
        (" ALPHA and BRAVO.", ["ALPHA", "BRAVO"], 1),
        (" ALPHA, CEDAR, BRAVO.", ["ALPHA", "BRAVO"], 0.5),
    ],
)
def test_grade_is_the_share_of_values_among_the_first_ones_given(answer, expected, share):
    assert grade.grade(answer, expected) == share


# the model


def test_the_tokenizer_writes_any_text_and_digits_one_by_one(shipped):
    text = "The code is 4821: naïve Ελληνικά 漢字 \t🙂\n"
    ids = shipped[1].encode(text, add_special_tokens=False)
    assert shipped[1].decode(ids) == text
    assert len(shipped[1].encode("4821", add_special_tokens=False)) == 4


def test_the_model_loads_with_the_auto_classes_and_shares_its_key_heads(shipped):
    model, tokenizer = shipped
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 131072
    assert len(tokenizer) == model.config.vocab_size and tokenizer.bos_token_id is not None
    assert sum(path.stat().st_size for path in runner.BUNDLED.iterdir()) < 8 * 2**20


@pytest.mark.parametrize("task", ["single", "multikey"])
@pytest.mark.parametrize("length", [1024, 2048])
def test_the_model_finds_the_needle(shipped, haystack, task, length):
    assert _accuracy(shipped, [haystack.prompt(task, length, i / 7, i) for i in range(8)]) == 1


def test_the_prompts_last_row_has_to_find_the_needle(shipped, haystack):
    """Decoding is dense: were the first token of an answer the same for all, a prefill blind to the needle would pass."""
    model, tokenizer = shipped
    blind = runner.Method("a_shape", {"sink_tokens": 64, "recent_tokens": 256})
    for seed in range(4):
        prompt = haystack.prompt("single", 2048, 0.5, seed)
        with torch.no_grad():
            token = model(torch.tensor([prompt.ids]), logits_to_keep=1).logits[0, -1].argmax()
        assert tokenizer.decode([int(token)]) == prompt.expected[0][0]
        (ids,), _ = runner.answer(model, [prompt], blind, runner.stop_tokens(model))
        assert not grade.grade(tokenizer.decode(ids), prompt.expected)


@pytest.mark.parametrize("task", ["single", "multikey"])
def test_the_model_cannot_answer_once_the_needle_is_hidden(shipped, haystack, task):
    """The model must look: the needle's block becomes haystack, everything else stays."""
    prompts = [haystack.prompt(task, 1024, i / 7, i) for i in range(8)]
    for prompt in prompts:
        (start, stop), filler = prompt.needle[0], haystack.prompt("single", 1024, 1, 99).ids[40:200]
        prompt.ids[start:stop] = filler[: stop - start]
    assert _accuracy(shipped, prompts) == 0


def test_the_model_cannot_answer_once_attention_skips_the_needle(shipped, haystack):
    model, tokenizer = shipped
    for seed in range(4):
        prompt = haystack.prompt("single", 1024, 0.4, seed)
        ids, seen = torch.tensor([prompt.ids]), torch.ones(1, 1024, dtype=torch.long)
        seen[:, slice(*prompt.needle[0])] = 0
        positions = torch.arange(1024)[None]
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=True, logits_to_keep=1)
            text = []
            for step in range(prompt.answer_tokens):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                text.append(token.item())
                seen = torch.cat([seen, torch.ones(1, 1, dtype=torch.long)], 1)
                out = model(input_ids=token, attention_mask=seen, position_ids=torch.tensor([[1024 + step]]),
                            past_key_values=out.past_key_values, use_cache=True)  # fmt: skip
        assert grade.grade(tokenizer.decode(text), prompt.expected) == 0


def test_a_prompt_read_in_chunks_or_in_a_batch_gets_the_same_answer(shipped, haystack):
    model, _ = shipped
    prompts = [haystack.prompt("multikey", 1024, depth, 5) for depth in (0.2, 0.8)]
    alone = [runner.answer(model, [prompt], runner.Method(), [])[0][0] for prompt in prompts]
    together, _ = runner.answer(model, prompts, runner.Method(), [])
    chunked, _ = runner.answer(model, prompts, runner.Method(), [], chunk=300)
    assert together == alone and chunked == alone


# the model made for 2048 tokens


@pytest.fixture(scope="module")
def short():
    return runner.load(str(runner.BUNDLED.parent / "model_short"), "cpu", torch.float32, trust=False)


DUAL = runner.Method(dual_chunk={"chunk": 2048, "local": 256})


def _right(short, prompt, method):
    (ids,), _ = runner.answer(short[0], [prompt], method, runner.stop_tokens(short[0]))
    return grade.grade(short[1].decode(ids), prompt.expected)


def test_the_short_model_rotates_in_both_layers_and_is_small(short):
    model, _ = short
    assert model.config.max_position_embeddings == 2048 and all(layer.self_attn.use_rope for layer in model.model.layers)
    assert sum(path.stat().st_size for path in (runner.BUNDLED.parent / "model_short").iterdir()) < 3 * 2**20


def test_the_short_model_answers_up_to_its_length_with_and_without_dual_chunks(short, haystack):
    for task, depth in (("single", 0), ("multikey", 0.4)):
        prompt = haystack.prompt(task, 2048, depth, 1)
        assert _right(short, prompt, runner.Method()) == 1 and _right(short, prompt, DUAL) == 1


def test_dual_chunks_answer_at_four_times_the_length_where_plain_attention_cannot(short, haystack):
    prompt = haystack.prompt("single", 8192, 0.25, 0)
    assert _right(short, prompt, runner.Method()) == 0
    assert _right(short, prompt, DUAL) == 1


# the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    assert _run(folder, "--lengths", "1024", "--depths", "2", "--threads", "1") == 0
    return folder


def test_the_command_writes_a_line_per_case_and_a_heat_map(finished):
    rows = [json.loads(line) for line in (finished / "cases.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and (finished / "map.png").read_bytes().startswith(b"\x89PNG")
    wanted = "task length depth seed prefill prefill_args model correct answer expected density prefill_s decode_s peak_mib"
    for row in rows:
        assert set(wanted.split()) <= set(row)
        assert row["prefill"] == "dense" and row["density"] == 1 and row["correct"] == 1 and row["model"] == "bundled"


def test_a_killed_run_goes_on_after_a_torn_last_line(finished, tmp_path, capsys):
    lines = (finished / "cases.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cases.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    assert _run(tmp_path, "--lengths", "1024", "--depths", "2", "--threads", "1") == 0
    after = (tmp_path / "cases.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:3] == lines[:3] and len(after) == 4
    first, second = json.loads(lines[3]), json.loads(after[3])
    assert [first[n] for n in ("task", "depth", "answer")] == [second[n] for n in ("task", "depth", "answer")]
    assert "3 of 4 cases were already in the JSON file" in capsys.readouterr().out


def test_another_setting_is_measured_afresh(finished, tmp_path):
    (tmp_path / "cases.jsonl").write_bytes((finished / "cases.jsonl").read_bytes())
    assert _run(tmp_path, "--lengths", "1024", "--depths", "2", "--threads", "1", "--chunk", "512") == 0
    assert len((tmp_path / "cases.jsonl").read_bytes().splitlines()) == 8


def test_xattention_answers_as_dense_does_and_reads_less(tmp_path):
    pytest.importorskip("sparse_attn")
    options = ("--lengths", "2048", "--depths", "3", "--tasks", "multikey", "--prefill", "xattention", "--threads", "1")
    assert _run(tmp_path, *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    sparse = [row for row in rows if row["prefill"] == "xattention"]
    assert len(sparse) == 3 and all(row["correct"] == 1 and row["density"] < 0.7 for row in sparse)


def test_a_profile_is_run_and_recorded_by_its_content(tmp_path, shipped, capsys):
    profile = runner.BUNDLED / "profile_xattention.json"
    options = ("--lengths", "2048", "--depths", "1", "--tasks", "single", "--no-baseline", "--threads", "1")
    assert _run(tmp_path, *options, "--profile", str(profile)) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert row["correct"] == 1 and row["density"] < 0.5 and row["prefill"] == "xattention"
    assert row["prefill_args"]["profile"] == profile.name and re.fullmatch("[0-9a-f]{12}", row["prefill_args"]["sha256"])
    other = json.loads(profile.read_text())
    other["model"]["weights"] = "0" * 12
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        _run(tmp_path, *options, "--profile", str(tmp_path / "other.json"))
    assert "other.json: the profile was made for other weights of model" in capsys.readouterr().err
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 1


def test_a_profile_or_heads_beside_a_model_are_no_part_of_its_identity(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = runner.weights_id(str(tmp_path))
    for name in ("profile_duo.json", "locret.safetensors"):
        (tmp_path / name).write_text("{}")
    assert runner.weights_id(str(tmp_path)) == before
    (tmp_path / "tokenizer.json").write_text("{}")
    assert runner.weights_id(str(tmp_path)) != before


def test_dual_chunks_are_recorded_and_measured_beside_the_plain_baseline(tmp_path):
    dual = {"chunk": 512, "local": 160}
    options = ("--lengths", "1024", "--depths", "1", "--tasks", "single", "--threads", "1", "--dual-chunk", json.dumps(dual))
    assert _run(tmp_path, *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [row.get("dual_chunk") for row in rows] == [None, dual] and all(row["correct"] == 1 for row in rows)
    assert [row["method"] for row in grade.summary(rows)] == ["dense", "dense + dual_chunk(chunk=512, local=160)"]
    assert _run(tmp_path, *options) == 0
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 2, "both were there already"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prefill", "xatention"], "prefill method 'xatention' is not known; use one of"),
        (["--prefill", "xattention", "--prefill-args", '{"treshold": 1}'], "xattention has no argument 'treshold'; use one of"),
        (["--prefill", "xattention", "--prefill-args", '{"threshold": 2}'], r"threshold=2 is outside \[0, 1\]"),
        (["--prefill", "xattention", "--prefill-args", '{"stride": 7}'], "block=128 is not a multiple of stride=7"),
        (["--prefill", "xattention", "--prefill-args", "{"], "'{' is not JSON"),
        (["--prefill", "xattention", "--prefill-args", "3"], "'3' is not an object"),
        (["--dual-chunk", "[2048]"], r"--dual-chunk '\[2048\]' is not an object; give one such as"),
        (["--dual-chunk", "{}"], "--dual-chunk {} holds nothing"),
        (["--dual-chunk", '{"chunk": 2048}'], r"--dual-chunk .*: dual_chunk takes chunk, local, .* must be given; got chunk"),
        (["--dual-chunk", '{"chunk": 64, "local": 64}'], "--dual-chunk .*: local=64 is more than half of chunk=64"),
        (["--prefill-args", "{}"], "has no --prefill to apply to"),
        (["--profile", "/no/such/profile"], "--profile: profile /no/such/profile cannot be read"),
        (["--no-baseline"], "nothing to run"),
        (["--model", "/no/such/model"], "model path /no/such/model does not exist; give a folder"),
        (["--lengths", "64"], r"length 64 is below the \d+ tokens that task"),
        (["--lengths", "1k"], "--lengths is '1k'; give whole numbers"),
        (["--tasks", "single,haystack"], "task 'haystack' is not known; use one of single"),
        (["--depths", "0"], "--depths is 0; give 1 or more"),
        (["--chunk", "0"], "--chunk is 0; give 1 or more"),
        (["--dtype", "int8"], "dtype 'int8' is not known; use one of auto"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--haystack", "/no/such/text"], "cannot read --haystack /no/such/text"),
        (["--json", "/no/such/folder/cases.jsonl"], "cannot write /no/such/folder/cases.jsonl; give a file"),
        (["--plot", "/no/such/folder/map.png"], "cannot write /no/such/folder/map.png; give a file"),
        (["--plot", "map.jpeg"], r"map.jpeg does not end in .png"),
        (["--depths", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2_and_writes_nothing(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["--json", "cases.jsonl", "--plot", "map.png", *options])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert len(error.splitlines()) == 1
    assert re.search(sentence, error)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, capsys):
    for text in ("my notes\n", "my notes", '{"other": 1}\n'):
        (tmp_path / "cases.jsonl").write_text(text)
        with pytest.raises(SystemExit):
            _run(tmp_path, "--lengths", "1024")
        assert "is not a case of this runner" in capsys.readouterr().err
        assert (tmp_path / "cases.jsonl").read_text() == text
