"""The GPU benchmark's parts and the processes that they run in: what fails, what dies, what does not fit, and bad input."""

import os
import sys
import time

import pytest
from test_bench_gpu import bench

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bars, runner
from benchmarks.gpu.units import Bench, Unit


def in_process(units: list[Unit], of: Bench) -> tuple[int, runner.Outcome]:
    """What the parent makes of the reports of a part."""
    class Part(runner.Part):
        def units(self, bench):
            return units

    part, reports, outcome = Part("p", "", "", 1), [], runner.Outcome()
    status = runner.run_units(part, of, 0, reports.append)
    runner.settle(part, reports, outcome)
    return status, outcome


def fail():
    raise ValueError("no")


def test_a_failing_unit_stops_no_other():
    status, outcome = in_process([Unit("a", fail), Unit("b", lambda: "not here"), Unit("c", lambda: None)], bench())
    assert (status, outcome.done, outcome.failed) == (0, 2, ["p: a: ValueError: no"])
    assert outcome.noted == {"not here": ["p: b"]}
    assert outcome.lines() == ["left out: not here (p: b)", "FAILED: p: a: ValueError: no",
                               "2 units done, 1 failed, 1 left something out, 0 entries did not fit"]


def test_a_lost_gpu_ends_the_process():
    of = bench()
    of.machine.lost = lambda error: True
    status, outcome = in_process([Unit("a", fail), Unit("b", fail)], of)
    assert status == runner.LOST and outcome.failed == ["p: a: ValueError: no"]


def test_what_does_not_fit_is_listed():
    of = bench()
    of.until = time.monotonic() - 1
    assert in_process([Unit("a", fail), Unit("b", fail)], of)[1].unfinished == ["p: a", "p: b"]


CHILD = """
import json, os, signal, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
def report(**said):
    with open(words["--report"], "a") as file:
        file.write(json.dumps(said) + "\\n")
units = {units}
for at in range(int(words["--start"]), len(units), int(words["--step"])):
    report(at=at, of=len(units), unit=units[at])
    if units[at] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if units[at] == "lost":
        report(at=at, failed="gone")
        sys.exit(3)
    if units[at] == "hangs":
        time.sleep(60)
    report(at=at, note=None)
report(at=len(units), end=True)
"""


def parented(units: list[str], tmp_path, seconds=60.0) -> runner.Outcome:
    outcome = runner.Outcome()
    child = [sys.executable, "-S", "-c", CHILD.format(units=units)]
    runner.run_part(runner.Part("p", "", "", 1), seconds, child, tmp_path, outcome)
    return outcome


def test_processes_side_by_side_share_the_units(tmp_path):
    outcome = runner.Outcome()
    child = [sys.executable, "-S", "-c", CHILD.format(units=["fine", "fine", "fine", "dies", "fine"])]
    for start in range(2):
        runner.run_part(runner.Part("p", "", "", 1), 60, child, tmp_path, outcome, start, 2)
    assert outcome.done == 4 and len(outcome.failed) == 1


def test_a_part_goes_on_behind_the_unit_that_took_its_process(tmp_path):
    outcome = parented(["fine", "dies", "lost", "fine"], tmp_path)
    assert outcome.done == 2 and len(outcome.failed) == 2 and not outcome.unfinished
    assert outcome.failed[0] == "p: dies: ended its process with status -9" and outcome.failed[1] == "p: lost: gone"


def test_a_unit_that_hangs_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "STALL_S", 1.0)
    outcome = parented(["hangs", "fine"], tmp_path)
    assert outcome.done == 1 and outcome.failed[0].startswith("p: hangs: was killed after ")


def test_a_part_that_takes_too_long_is_killed_and_the_rest_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    outcome = parented(["fine", "hangs", "fine", "fine"], tmp_path, seconds=1.0)
    assert outcome.done == 1 and not outcome.failed
    assert outcome.unfinished == ["p: hangs: was killed when the time of its part was over", "p: 2 more units"]


def test_a_process_that_does_not_start_is_a_failure(tmp_path):
    outcome = runner.Outcome()
    runner.run_part(runner.Part("p", "", "", 1), 30, [sys.executable, "-S", "-c", "raise SystemExit(7)"], tmp_path, outcome)
    assert outcome.failed == ["p: its process ended with status 7 before a unit began"]


def test_a_process_that_has_no_time_to_start_did_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.2)
    outcome = runner.Outcome()
    slow = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    runner.run_part(runner.Part("p", "", "", 1), 0.2, slow, tmp_path, outcome)
    assert not outcome.failed
    assert outcome.unfinished == ["p: its process was killed when the time of its part was over before a unit began"]


def test_time_is_shared_and_what_never_began_is_listed(tmp_path, monkeypatch, capsys):
    shares = []
    monkeypatch.setattr(runner, "run_part", lambda part, seconds, *rest: shares.append((part.name, seconds, rest[-2:])))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    runner.run([part.name for part in runner.PARTS], 500, [], tmp_path)
    assert [at for name, _, at in shares if name == "check"] == [(0, 3), (1, 3), (2, 3)]
    assert len(shares) == len(runner.PARTS) + 2 and shares[-1][1] == pytest.approx(500, abs=5) and shares[0][1] < 150
    assert runner.run(["model"], 1, [], tmp_path).unfinished == ["model: the whole part"]
    assert "== suite: " in capsys.readouterr().out


def test_a_subset_runs_from_end_to_end(tmp_path, capsys):
    assert command.main(["--rehearse", "--only", "ceilings", "--results", str(tmp_path), "--commit", "abc"]) == 0
    said = capsys.readouterr().out
    assert "2 units done, 0 failed, 0 left something out, 0 entries did not fit" in said
    assert said.count("| not measured |") == len(bars.BARS)
    (file,) = tmp_path.iterdir()
    assert [row["op"] for row in bars.read(file)] == ["mm", "copy", "copy from pinned"] and bars.read(file)[0]["commit"] == "abc"


def test_something_that_failed_is_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_part", lambda part, seconds, child, folder, outcome, *at: outcome.failed.append("x"))
    assert command.main(["--rehearse", "--only", "check", "--results", str(tmp_path)]) == 1


def test_every_part_is_listed_and_has_units(capsys):
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [part.name for part in runner.PARTS]
    assert all(part.units(bench()) for part in runner.PARTS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "speed"], "part 'speed' is not known; use some of build, check"),
        (["--limit", "0"], "--limit is 0; give the seconds"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--rehearse", "--results", "no/such/folder"], "cannot write --results no/such/folder"),
        (["table", "no/such/file"], "cannot read no/such/file"),
        (["table", os.devnull], "holds no line of this benchmark"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and len(error.strip().splitlines()) == 1
