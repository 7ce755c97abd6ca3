"""The benchmark command line, its JSON lines, and the status table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_attn.__main__ as status_table
from benchmarks import cases, kernels, measure
from sparse_attn.ops import OPS, block_sparse_attention
from sparse_attn.ops import registry
from sparse_attn.types import BlockIndex

TINY = ["--n", "256", "--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--block", "32", "--reps", "2", "--threads", "1"]
FIELDS = {"op", "backend", "B", "H", "Hkv", "N", "D", "block", "dtype", "us", "reps", "peak_mib", "baseline", "baseline_us", "ratio",
          "device", "features", "threads", "versions", "commit"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    """The lines of one tiny run over every op."""
    file = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    before, (kernels.MM_SIZE, kernels.OVERHEAD_CALLS) = (kernels.MM_SIZE, kernels.OVERHEAD_CALLS), (64, 3)
    threads = torch.get_num_threads()
    try:
        assert kernels.main([*TINY, "--density", "1,0.6", "--baseline", "sdpa,mm", "--json", str(file)]) == 0
    finally:
        kernels.MM_SIZE, kernels.OVERHEAD_CALLS = before
        torch.set_num_threads(threads)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_line_says_what_where_and_how_fast(lines):
    for line in lines:
        assert not FIELDS - set(line), line
        assert line["us"] == sorted(line["us"]) and line["us"][0] > 0
        assert line["ratio"] > 0 and len(line["baseline_us"]) == 3
        assert line["threads"] == 1 and line["versions"]["torch"] == torch.__version__


def test_every_op_is_measured_against_every_baseline_that_applies(lines):
    assert {line["op"] for line in lines} == set(kernels.PLANS)
    attention = [line for line in lines if line["op"] == "block_sparse_attention" and not line["out"]]
    assert {(line["wanted_density"], line["baseline"]) for line in attention} == {
        (d, b) for d in (1.0, 0.6) for b in ("sdpa", "mm")}
    assert {line["of"] for line in lines if line["op"] == "overhead"} == set(OPS)


def test_density_and_errors_are_measured_not_copied(lines):
    for line in lines:
        if line["op"] in ("block_sparse_attention", "xattention"):
            assert abs(line["density"] - line["wanted_density"]) < 0.06
            assert 0 < line["rms_error"] < 0.02 and 0 < line["rms_error_q4"] < 0.02
            assert math.isclose(line["error_ratio"], line["rms_error"] / line["baseline_rms_error"])


def test_operations_of_a_full_list_are_those_of_causal_attention(lines):
    dense = next(line for line in lines if line["op"] == "block_sparse_attention" and line["density"] == 1)
    assert dense["flop"] == 4 * 64 * 4 * (256 * 257 // 2)


def test_a_wrong_kernel_is_not_timed(tmp_path, capsys, monkeypatch):
    exact = block_sparse_attention.reference

    def twisted(*args):
        out, lse = exact(*args)
        return out * 1.1, lse

    monkeypatch.setattr(block_sparse_attention, "backends", [registry.Backend("twisted", twisted, lambda *args: None)])
    monkeypatch.setattr(block_sparse_attention, "_settled", {})  # what ran these shapes before
    file = tmp_path / "lines.jsonl"
    assert kernels.main(["block_sparse_attention", *TINY, "--density", "1", "--json", str(file)]) == 1
    assert "fix the kernel before timing it" in capsys.readouterr().err
    assert file.read_text() == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["matmul"], "op 'matmul' is not known; use one of block_sparse_attention"),
        (["--density", "0"], "--density 0.0 is outside (0, 1]"),
        (["--density", "1.5"], "--density 1.5 is outside (0, 1]"),
        (["--density", "half"], "--density is 'half'; give numbers"),
        (["--n", "0"], "--n is 0; give 1 or more"),
        (["--n", "8k"], "--n is '8k'; give numbers"),
        (["--reps", "0"], "--reps is 0; give 1 or more"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4"),
        (["--block", "24"], "--block 24 is not a multiple of stride 16"),
        (["--dtype", "int8"], "dtype 'int8' is not known; use one of bf16, fp16, fp32"),
        (["--backend", "cutlass"], "cutlass: no such backend; there are"),
        (["--baseline", "sdpa,blas"], "baseline 'blas' is not known; use one of sdpa, flex, mm"),
        (["--json", "no/such/folder/lines.jsonl"], "cannot write --json no/such/folder/lines.jsonl"),
        (["--speed=9"], "unrecognized arguments: --speed=9"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error and len(error.strip().splitlines()) == 1


def test_a_baseline_that_cannot_run_is_left_out_with_its_sentence(capsys):
    def broken():
        raise RuntimeError("no compiler here")

    entry = kernels.Entry("op", lambda: None, {}, against={"flex": kernels.Baseline("flex", broken)})
    calls, _, _ = kernels.warm_up([entry], None)
    assert list(calls) == ["op"] and not entry.against
    assert "flex cannot run here and is left out: RuntimeError: no compiler here" in capsys.readouterr().err


def test_flex_gets_the_same_blocks_and_tests_positions_only_on_the_diagonal():
    index = cases.random_lists(cases.Shape(n=256, heads=4, kv_heads=2, head_dim=64, block=32), 0.5)
    mask = kernels.block_mask(index)
    assert torch.equal(mask.to_dense().bool(), index.to_mask())
    assert (mask.kv_num_blocks == 1).all() and torch.equal(mask.full_kv_num_blocks + 1, index.counts)
    assert torch.equal(mask.kv_indices[..., 0], torch.arange(8).expand(1, 4, -1).int())


@pytest.mark.parametrize("n", [1, 97, 256])
def test_pairs_are_counted_one_by_one(n):
    shape = cases.Shape(n=n, heads=2, kv_heads=1, head_dim=8, block=32)
    index = cases.random_lists(shape, 0.5)
    seen = index.to_mask()[0].repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :n, :n]
    assert cases.visible_pairs(index) == int(seen.tril().sum())


def test_random_lists_differ_between_heads_and_keep_the_diagonal():
    index = cases.random_lists(cases.Shape(n=2048, heads=4, kv_heads=1, block=64), 0.3)
    mask = index.to_mask()[0]
    assert mask.diagonal(dim1=1, dim2=2).all() and not mask.triu(1).any()
    assert (mask[0] != mask[1]).any() and isinstance(index, BlockIndex)


def test_rounds_alternate():
    order: list[str] = []
    measure.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, reps=3)
    assert order == ["a", "b"] * 3


def test_peak_memory_sees_what_a_call_touches_and_forgets_it():
    small = measure.peak_mib(lambda: None)
    if small is None:
        pytest.skip("this kernel cannot reset the peak of resident memory")
    large = measure.peak_mib(lambda: torch.ones(64 * 2**20 // 4))
    assert large - small > 48
    assert measure.peak_mib(lambda: None) < large - 48


def test_status_table_has_a_row_for_every_op():
    root = Path(__file__).parent.parent
    shown = subprocess.run([sys.executable, "-m", "sparse_attn"], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and "CPU:" in lines[0] and "libraries:" in lines[0]
    heading = next(i for i, line in enumerate(lines) if line.split() == ["op", "would", "run", "refused"])
    for name in OPS:
        assert any(line.startswith(name) for line in lines[heading + 1 :]), name


def test_status_json_agrees_with_explain(capsys):
    assert status_table.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {v["op"] for v in found["ops"]} == set(OPS)
    for v in found["ops"]:
        args = status_table.typical(v["op"], getattr(torch, v["dtype"]), v["device"])
        refused = {name: why for name, why in OPS[v["op"]].explain(*args).items() if why}
        assert v["would_run"] == OPS[v["op"]].chosen(*args) and v["refused"] == refused


def test_status_separates_dtypes_that_differ():
    rows = [dict(op="o", dtype=d, device="cpu", would_run=w, refused=r) for d, w, r in (("bfloat16", "a", {}), ("float32", "b", {"a": "no"}))]
    assert status_table._merged(rows) == [("o bfloat16", "a", ""), ("o float32", "b", "a: no")]
    assert status_table._merged([rows[0], {**rows[0], "dtype": "float32"}]) == [("o", "a", "")]


def test_status_obeys_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "reference")
    assert status_table.main([]) == 0
    assert "reference" in capsys.readouterr().out.splitlines()[-1].split()
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "cutlass")
    with pytest.raises(SystemExit) as stopped:
        status_table.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("SPARSE_ATTN_BACKEND=cutlass: no such backend; there are cpu_")
