"""The GPU benchmark, rehearsed on the CPU: what it finds and what it writes."""

import functools
import json
import math
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, bars, build, ceilings, checks, decode, gather, machine, model, sanitize, selection
from benchmarks.gpu import suite, xattention
from benchmarks.gpu.units import TINY, Bench
from sparse_attn.ops import OPS, page_score, registry, select_blocks

ROOT = Path(__file__).parent.parent
FIELDS = {"benchmark", "op", "backend", "us", "reps", "baseline", "baseline_us", "ratio", "device", "features", "versions",
          "commit"}
TIMED = {"ceilings": ceilings, "attention": attention, "decode": decode, "selection": selection, "xattention": xattention,
         "gather": gather, "model": model}  # fmt: skip


class Few(machine.StandIn):
    """The stand-in with one backend, and its emulated twins where they were built."""

    def backends(self, op):
        return [name for name in super().backends(op) if name in ("cpu_generic", "cuda_emulated")]


class Planted(machine.StandIn):
    """The stand-in with the backend that a test plants."""

    def backends(self, op):
        return [name for name in op.names if name == "planted"]


def bench(of=None, path=None) -> Bench:
    of = of or Few()
    return Bench(of, TINY, measure.Lines(path, of.stamp), say=lambda line: None)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Every timing part, tiny."""
    file = tmp_path_factory.mktemp("gpu") / "lines.jsonl"
    torch.manual_seed(0)
    with torch.inference_mode():
        for part in TIMED.values():
            for unit in part.units(bench(path=file)):
                unit.run()
    return file


# -- checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", list(OPS))
def test_every_op_is_checked_on_every_backend_and_dtype(op):
    units = [unit for unit in checks.units(bench()) if unit.name.split()[0] == op]
    backends = Few().backends(OPS[op])
    assert len(units) == max(1, 3 * len(backends))
    said = [unit.run() for unit in units]
    assert backends or said == ["has no GPU backend: torch computes it"]
    assert all(sentence is None or not backends or sentence.startswith("refused: ") for sentence in said)


def wrong_value(op, *args):
    return op.reference(*args) * 1.01


def last_element_unwritten(op, *args):
    found = op.reference(*args)
    given = torch.empty_like(found)
    given[:-1] = found[:-1]
    return given


def remembers(op, *args, seen={}):
    return seen.setdefault(args[0].data_ptr(), op.reference(*args))


def last_slot_wrong(op, *args):
    counts, indices = op.reference(*args)
    return counts, torch.cat([indices[..., :-1], indices[..., -1:] + 1], -1)


@pytest.mark.parametrize(
    ("op", "broken", "sentence"),
    [
        (page_score, wrong_value, "a plain call: output 0 is off by"),
        (page_score, last_element_unwritten, "1 elements are NaN"),
        (page_score, remembers, "a replayed graph, other inputs: output 0 is off by"),
        (select_blocks, last_slot_wrong, "a plain call: output 1 differs from the reference"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_backend_is_found(op, broken, sentence, monkeypatch):
    planted = registry.Backend("planted", functools.partial(broken, op), lambda *args: None)
    monkeypatch.setattr(op, "backends", [*op.backends, planted])
    monkeypatch.setattr(op, "_settled", {})
    with pytest.raises(AssertionError, match=sentence):
        checks.check(bench(Planted()), op, "planted", torch.bfloat16)


def test_a_backend_that_reads_too_early_is_found(monkeypatch):
    """The stand-in of a stream: what is brought late was not there when the kernel ran."""
    class Early(Planted):
        def late(self, bring, call):
            result = call()
            bring()
            return result

    monkeypatch.setattr(page_score, "backends", [registry.Backend("planted", page_score.reference, lambda *args: None)])
    monkeypatch.setattr(page_score, "_settled", {})
    assert checks.check(bench(Planted()), page_score, "planted", torch.float32) is None
    with pytest.raises(AssertionError, match="on another stream, inputs late: output 0 is off by"):
        checks.check(bench(Early()), page_score, "planted", torch.float32)


def test_arguments_keep_strides_and_shared_memory():
    x = torch.randn(4, 6)
    args = x.mT[1:], x[:2, ::2], 3, torch.zeros(2).expand(5, 2)
    placed = checks.Placed(args, torch.device("cpu"))
    for mine, theirs in zip(placed.args, args):
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
    assert placed.args[0].data_ptr() != x.data_ptr() and placed.args[2] == 3
    assert placed.args[0].untyped_storage().data_ptr() == placed.args[1].untyped_storage().data_ptr()
    placed.poison()
    assert placed.args[0].isnan().all() and placed.args[3].isnan().all()
    other = torch.randn(4, 6)
    placed.bringer((other.mT[1:], other[:2, ::2], 3, torch.ones(2).expand(5, 2)))()
    assert torch.equal(placed.args[1], other[:2, ::2]) and (placed.args[3] == 1).all()


def test_selection_and_attention_are_checked_together():
    for waits in (True, False):
        assert checks.check_path(bench(), waits) is None


# -- lines ----------------------------------------------------------------------------------------------------------------


def test_every_line_says_what_where_and_how_fast(lines):
    rows = bars.read(lines)
    assert len(rows) == len(lines.read_text().splitlines())
    for row in rows:
        assert not FIELDS - set(row), row
        assert row["benchmark"] == "gpu" and row["us"] == sorted(row["us"]) and row["us"][0] > 0
        assert (row["baseline"] is None) == (row["ratio"] is None) == (row["baseline_us"] is None)
        assert row["versions"]["torch"] == torch.__version__
        for rate, amount, unit in (("tflops", "flop", 1e6), ("gbps", "bytes", 1e3)):
            assert rate not in row or math.isclose(row[rate], row[amount] / row["us"][1] / unit, abs_tol=1e-3)
    found = Counter(row["op"] for row in rows)
    ours = {name: found.pop(name) for name in ("block_sparse_attention", "paged_attention", "gather_pages") if name in found}
    assert found == {"mm": 1, "copy": 1, "copy from pinned": 1, "sdpa": 2, "sdpa decode": 6, "select": 3, "xattention": 2,
                     "model": 6}  # fmt: skip
    assert ours["block_sparse_attention"] % 3 == ours["paged_attention"] % 6 == 0
    assert ("gather_pages" in ours) == ("gather_pages" in OPS)


def test_every_bar_has_a_line_and_every_line_its_verdict(lines):
    rows = [row for row in bars.read(lines) if "bar" in row]
    expected = set(bars.BARS) - {"dense triton", "dense cuda"} - (set() if "gather_pages" in OPS else {"gather"})
    assert {row["bar"] for row in rows} == expected
    for row in rows:
        assert row["reached"] == bars.BARS[row["bar"]].reached(row["value"]) and row["bound"] == bars.BARS[row["bar"]].bound
    shares = [row for row in rows if row["bar"] == "proportional"]
    assert {row["wanted_density"] for row in shares} == {0.1, 0.05}


def test_bars_are_held_on_the_right_side():
    assert bars.BARS["dense cuda"].reached(0.85) and not bars.BARS["dense cuda"].reached(0.84)
    assert bars.BARS["proportional"].reached(1.25) and not bars.BARS["proportional"].reached(1.26)


def test_the_table_shows_bars_beside_ratios_and_the_newest_line(lines, tmp_path, capsys):
    row = {**bars.read(lines)[0], "op": "block_sparse_attention", "backend": "triton", "N": 7, **bars.mark("dense triton", 0.5)}
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (row, {**row, **bars.mark("dense triton", 0.7)})))
    assert command.main(["table", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "| block_sparse_attention triton 7 tokens " in shown and "| 0.700 | >= 0.65 | yes |" in shown and "0.500" not in shown
    assert shown.count("| not measured |") == len(bars.BARS) - 1


def test_no_gate_no_time(monkeypatch):
    """A wrong kernel is not timed, and the part says so."""
    exact = OPS["block_sparse_attention"].reference

    def twisted(*args):
        out, lse = exact(*args)
        return out * 1.1, lse

    monkeypatch.setattr(OPS["block_sparse_attention"], "backends", [registry.Backend("planted", twisted, lambda *args: None)])
    monkeypatch.setattr(OPS["block_sparse_attention"], "_settled", {})
    of = bench(Planted())
    with pytest.raises(attention.kernels.GateError, match="planted is not timed: block_sparse_attention at 256 tokens is off by"):
        attention.timed(of, 256)
    assert {row["op"] for row in of.lines.rows} == {"sdpa"}


def test_structured_inputs_are_sparse():
    shape = bench().shape(2048)
    q, k, _ = xattention.structured(shape)
    score = OPS["antidiagonal_score"](q, k, 64, 64, 16, shape.scale)
    counts, _ = select_blocks(score, torch.full((shape.heads,), 0.9, dtype=torch.float64), None, 64, 64, 2048, 2048)
    assert counts.sum() / counts.shape[1] < 0.5 * 32 * 33 / 2


# -- the machine ----------------------------------------------------------------------------------------------------------


def test_every_call_to_cuda_is_one_that_torch_has(monkeypatch):
    """The GPU's side with torch.cuda replaced by recorders: its lines run, and every name that they use exists."""
    asked, clock = [], iter(range(1, 10**6))

    class Recorder:
        def __init__(self, *args, **named):
            pass

        def __getattr__(self, name):
            return lambda *args, **named: next(clock) * 1e-3 if name == "elapsed_time" else asked.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    for name in ("Stream", "Event", "stream", "CUDAGraph", "graph", "current_stream"):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, Recorder)
    for name in ("synchronize", "_sleep", "set_sync_debug_mode", "empty_cache"):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: asked.append((name, *args)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    gpu = machine.Gpu()
    assert gpu.file == "nvidia_h100_80gb_hbm3.jsonl"
    assert gpu.stamp("abc")["features"] == ["sm_90"] and gpu.stamp("abc")["commit"] == "abc"
    assert not any(name.startswith("cpu_") or name.endswith("_emulated") for op in OPS.values() for name in gpu.backends(op))
    with gpu.quiet():
        assert ("set_sync_debug_mode", "error") in asked
    assert asked[-1] == ("set_sync_debug_mode", "default")
    order = []
    assert gpu.late(lambda: order.append("bring"), lambda: order.append("call") or 5) == 5 and order == ["bring", "call"]
    result, replay = gpu.capture(lambda: order.append("call") or 7)
    replay()
    assert result == 7 and order[2:] == ["call"] * 3
    gpu.device = torch.device("cpu")  # for the memory that is flushed
    times = gpu.rounds({"a": lambda: None, "b": lambda: None}, reps=3)
    assert [len(us) for us in times.values()] == [3, 3] and all(t > 0 for t in times["a"])
    assert not gpu.lost(RuntimeError()) and gpu.pinned(torch.ones(1)) == 1 and gpu.seconds(lambda: None) >= 0
    gpu.free()

    def broken(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert gpu.lost(RuntimeError())


def test_without_a_gpu_one_sentence_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, sentence in ((None, "needs a CUDA build of torch, got"), ("13.0", "needs an NVIDIA GPU and its driver")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert command.main([]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"gpu: {sentence}") and len(said.err.splitlines()) == 1 and not said.out


# -- the other parts ------------------------------------------------------------------------------------------------------


def test_the_build_says_what_setup_said(monkeypatch):
    said = "sparse_attn: compiled csrc/cpu/page_score.cpp for generic\nsparse_attn: no nvcc was found; going on without\n"
    done = subprocess.CompletedProcess([], 0, "", said)
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **named: done)
    assert build.compile_libraries(bench()) == "sparse_attn: no nvcc was found; going on without"
    done.returncode = 1
    with pytest.raises(RuntimeError, match="setup.py failed: .* going on without"):
        build.compile_libraries(bench())
    assert build.describe(bench()) is None


def test_what_the_sanitizer_finds_is_a_failure(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path=None: None)
    assert "neither on the PATH nor beside nvcc" in sanitize.watch(bench(), "memcheck")
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path=None: str(tool))
    refused, found = "refused: page_score cannot run", "========= Invalid __global__ write of 4"
    for text, status in (("refused: None", 0), (refused, 0), (found, 9)):
        tool.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        tool.chmod(0o755)
        if status:
            with pytest.raises(RuntimeError, match=f"racecheck found something .status 9.: {found}"):
                sanitize.watch(bench(), "racecheck")
        else:
            assert sanitize.watch(bench(), "racecheck") == (None if text.endswith("None") else text)
    tool.write_text("#!/bin/sh\nexec sleep 9\n")
    of = bench()
    of.until = time.monotonic()
    assert sanitize.watch(of, "memcheck") == "memcheck was not over when the time of its part was"


def test_the_sanitizer_watches_every_op():
    assert "cannot run" in (checks.small(bench()) or "cannot run")


ASKS = """
import pytest, torch
from benchmarks.gpu.checks import plain_args
from sparse_attn.errors import ContractError
from sparse_attn.ops import page_score, use_backend

@pytest.mark.parametrize("backend", page_score.names)
def test_right(backend):
    args = plain_args("page_score", torch.float32, 0)
    with use_backend(backend):
        torch.testing.assert_close(page_score(*args), page_score.reference(*args))

@pytest.mark.parametrize("backend", page_score.names)
def test_values(backend):
    with pytest.raises(ContractError):
        pass
"""


def test_tests_of_the_ops_run_on_the_machine(tmp_path):
    """The plugin adds the backend that pytest is told to choose; what wants a sentence about a value is passed over."""
    assert {path.stem for path in suite.files()} >= {"test_page_score", "test_ops"}
    of, said, file = bench(), [], tmp_path / "test_it.py"
    of.say = said.append
    file.write_text(ASKS)
    assert suite.run(of, [file]) == "1 tests skipped" and said == ["   1 passed, 0 failed, 1 skipped"]


def test_what_the_tests_of_the_ops_said_is_told():
    fine, skipped, failed = ({"test": f"f.py::t{i}", "outcome": outcome, "said": "assert 1 == 2"}
                             for i, outcome in enumerate(("passed", "skipped", "failed")))
    assert suite.judged(bench(), [fine], False, 0, "") is None and suite.judged(bench(), [], False, 5, "") is None
    assert suite.judged(bench(), [fine, skipped], False, 0, "") == "1 tests skipped"
    assert suite.judged(bench(), [fine], True, -9, "") == "the time was over after 1 tests"
    with pytest.raises(AssertionError, match="1 of 2 tests fail: t2: assert 1 == 2"):
        suite.judged(bench(), [fine, failed], False, 1, "")
    with pytest.raises(RuntimeError, match="pytest ended with status 4: no such file"):
        suite.judged(bench(), [], False, 4, "no such file")


def test_results_of_a_proxy_come_back():
    """In place as well as returned."""
    before = {name: list(OPS[name].backends) for name in ("move_rows", "page_score")}
    try:
        for name in before:
            suite.add(OPS[name], "cpu_generic", machine.StandIn())
            args = checks.plain_args(name, torch.float32, 0)
            proxy = OPS[name].backends[-1]
            assert proxy.name == "cpu_generic_on_gpu" and proxy.why_not(*args) is None
            mine, theirs = ([arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args] for _ in range(2))
            ways = (mine, proxy.run), (theirs, OPS[name].reference)
            ours, reference = (checks.outputs(OPS[name], a, run(*a)) for a, run in ways)
            torch.testing.assert_close(ours, reference)
    finally:
        for name, backends in before.items():
            OPS[name].backends[:] = backends


def test_amdahl_is_the_limit_of_cheaper_attention():
    assert model.amdahl(10, 5, 1) == 1 and model.amdahl(10, 5, 0) == 2
