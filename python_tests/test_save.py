"""A save is whole or not there, whatever goes wrong at any step, and no byte of it can change unseen."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from kvcache import save as saving
from kvcache.save import Saved, write
from sparse_attn import ContractError
from sparse_attn.errors import warn_once

STEPS = ("open", "write", "fsync", "rename", "mkdir")  # of module os: whatever a save changes on disk


@pytest.fixture(autouse=True)
def every_warning_again():
    warn_once.cache_clear()


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def put(folder, number: int, **settings) -> None:
    """A save of three files whose content is ``number``."""
    tensors = ({"x": torch.full((50, 4), float(number)), "n": torch.tensor(number)} for _ in range(2))
    write(folder, {"number": number}, ((f"layer_{i:03}", {"number": number}, t) for i, t in enumerate(tensors)), **settings)


def number_in(folder) -> int | None:
    """The number of a save, None if there is none; every piece must say the same."""
    if not os.path.exists(folder) and not saving._before(Path(folder).resolve()).exists():
        return None
    saved = Saved.open(folder)
    found = {saved.head["number"], *(facts["number"] for facts in saved.facts.values())}
    for name in saved.facts:
        tensors = saved.tensors(name)
        found |= {int(tensors["n"]), *map(int, tensors["x"].unique())}
    assert len(found) == 1 and len(saved.facts) == 2
    return found.pop()


def test_only_the_owner_can_read_a_save_and_nothing_else_is_left(tmp_path):
    old = os.umask(0)
    try:
        put(tmp_path / "kv", 1)
    finally:
        os.umask(old)
    assert os.listdir(tmp_path) == ["kv"]
    assert sorted(os.listdir(tmp_path / "kv")) == ["layer_000.safetensors", "layer_001.safetensors", "manifest.json"]
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kv").iterdir()} == {0o600}


def test_no_byte_of_a_save_can_change_unseen(tmp_path):
    write(tmp_path / "kv", {"head": [1, 2.5]}, [("layer_000", {"n": 1}, {"x": torch.arange(6)})])
    for path in (tmp_path / "kv").iterdir():
        whole = path.read_bytes()
        for at in range(0, len(whole), 3):
            flip(path, at)
            with pytest.raises(ContractError):
                Saved.open(tmp_path / "kv").tensors("layer_000")
            path.write_bytes(whole)


def steps_of(monkeypatch, at) -> list[str]:
    """Call ``at(count)`` before each step that a save takes on disk; the names of the steps so far."""
    taken: list[str] = []

    def watched(name, real):
        def step(*args, **kwargs):
            taken.append(name)
            at(len(taken))
            return real(*args, **kwargs)

        return step

    for name in STEPS:
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    return taken


def failing(monkeypatch, first: int, last: float, code: int = errno.ENOSPC) -> list[str]:
    def at(count):
        if first <= count <= last:
            raise OSError(code, os.strerror(code))

    return steps_of(monkeypatch, at)


def n_steps(folder, **settings) -> int:
    with pytest.MonkeyPatch.context() as patched:
        taken = failing(patched, 0, -1)
        put(folder, 2, **settings)
    assert set(taken) == set(STEPS)
    return len(taken)


def test_everything_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    taken = steps_of(monkeypatch, lambda count: None)
    put(tmp_path / "kv", 1)
    lock, folder, files, names = ["open"], ["mkdir"], ["open", "write", "fsync"] * 3, ["open", "fsync"]
    assert taken == lock + folder + files + names + ["rename"] + names


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "from then on"])
def test_a_save_that_fails_at_any_step_leaves_what_was_there(tmp_path, overwrite, for_good):
    folder, old = tmp_path / "kv", 1 if overwrite else None
    if overwrite:
        put(folder, 1)
    steps = n_steps(folder, overwrite=overwrite)
    told = 0
    for step in range(1, steps + 1):
        shutil.rmtree(folder)
        if overwrite:
            put(folder, 1)
        with pytest.MonkeyPatch.context() as patched:
            failing(patched, step, steps + 99 if for_good else step)
            try:
                put(folder, 2, overwrite=overwrite)
            except ContractError as error:
                told += 1
                assert "cannot be saved" in str(error) and "No space left on device" in str(error) and "there is room" in str(error)
                failed = True
            else:
                failed = False  # what is left to do is cleaning up
        found = number_in(folder)
        assert found == (old if failed else 2) or (for_good and found == 2)
        if not for_good and failed:
            assert os.listdir(tmp_path) == (["kv"] if overwrite else [])
        put(folder, 3, overwrite=True)
        assert os.listdir(tmp_path) == ["kv"] and number_in(folder) == 3
    assert told >= steps - 4


def test_a_killed_save_leaves_what_was_there_and_the_next_one_cleans_up(tmp_path):
    """Another process kills itself with SIGKILL before each step in turn."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import pytest, torch
        torch.set_num_threads(1)
        from test_save import number_in, put, steps_of
        folder, kills, seen = sys.argv[1], 0, set()
        while True:
            put(folder, 1, overwrite=True)
            assert os.listdir(os.path.dirname(folder)) == ["kv"]
            child = os.fork()
            if not child:
                steps_of(pytest.MonkeyPatch(), lambda count: count > kills and os.kill(os.getpid(), signal.SIGKILL))
                put(folder, 2, overwrite=True)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if not status:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            beside = os.listdir(os.path.dirname(folder))
            seen |= {{name.partition("-")[0] for name in beside}}
            assert number_in(folder) in (1, 2)
        assert kills >= 12 and seen == {{"kv", ".kv.lock", ".kv.saving", ".kv.before"}}, (kills, seen)
        assert number_in(folder) == 2
        print("kills", kills)
    """)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "kv")], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("kills")


def test_between_the_two_renames_the_older_save_is_read_with_a_warning(tmp_path):
    put(tmp_path / "kv", 1)
    os.rename(tmp_path / "kv", tmp_path / ".kv.before")
    with pytest.warns(UserWarning, match="was cut off while it replaced an older one; this is the older one"):
        assert number_in(tmp_path / "kv") == 1
    with pytest.raises(ContractError, match="exists already"):
        put(tmp_path / "kv", 2)
    assert os.listdir(tmp_path) == ["kv"] and number_in(tmp_path / "kv") == 1


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path):
    put(tmp_path / "kv", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        with pytest.raises(ContractError, match=r"cannot be saved to .*File too large.*see that there is room"):
            put(tmp_path / "kv", 2, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["kv"] and number_in(tmp_path / "kv") == 1


def test_a_disk_that_takes_a_few_bytes_at_a_time(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7]))
    put(tmp_path / "kv", 1)
    assert number_in(tmp_path / "kv") == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOLCK])
def test_a_folder_that_cannot_be_written(tmp_path, code):
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ContractError, match=os.strerror(code)):
        failing(patched, 1, 99, code)
        put(tmp_path / "kv", 1)
    assert os.listdir(tmp_path) == []


def test_something_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for folder, settings, sentence in [
        ("file", {}, "is a file; give a folder"),
        ("file", dict(overwrite=True), "is a file; give a folder"),
        ("file/kv", {}, "because .*file is no folder"),
        ("nowhere/kv", {}, "because .*nowhere is no folder; make that one first"),
        ("empty", {}, "exists already; pass overwrite=True"),
        ("notes", {}, "exists already; pass overwrite=True"),
        ("notes", dict(overwrite=True), "holds 'thesis.txt', which no save wrote"),
        ("x" * 300, {}, "File name too long"),
    ]:
        with pytest.raises(ContractError, match=sentence):
            put(tmp_path / folder, 1, **settings)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    put(tmp_path / "empty", 1, overwrite=True)
    (tmp_path / "link").symlink_to("empty")
    put(tmp_path / "link", 2, overwrite=True)
    assert number_in(tmp_path / "empty") == number_in(tmp_path / "link") == 2 and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "link", "notes"]


def test_of_two_processes_one_wins_whole_and_the_other_is_told(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from kvcache.save import write
        def pieces():
            for i in range(2):
                yield f"layer_{{i:03}}", {{"number": 1}}, {{"x": torch.ones(50, 4), "n": torch.tensor(1)}}
                if not i:
                    print("in the middle", flush=True)
                    sys.stdin.readline()
        write(sys.argv[1], {{"number": 1}}, pieces())
    """)
    piped = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "kv")], **piped) as other:
        assert other.stdout.readline() == "in the middle\n"
        for settings in ({}, dict(overwrite=True)):
            with pytest.raises(ContractError, match="another save to .* is under way; wait"):
                put(tmp_path / "kv", 2, **settings)
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait(60) == 0
    assert os.listdir(tmp_path) == ["kv"] and number_in(tmp_path / "kv") == 1


def test_a_lock_that_was_taken_away_meanwhile_is_no_lock(tmp_path, monkeypatch):
    real = saving.fcntl.flock

    def late(file, how):  # who saved before is done, and a third may come
        (tmp_path / ".kv.lock").unlink()
        real(file, how)

    monkeypatch.setattr(saving.fcntl, "flock", late)
    with pytest.raises(ContractError, match="another save to .* is under way"):
        put(tmp_path / "kv", 1)
    assert os.listdir(tmp_path) == []


def test_many_at_once_leave_one_whole_save(tmp_path):
    told, won = [], []

    def work(number):
        for _ in range(10):
            try:
                put(tmp_path / "kv", number, overwrite=True)
                won.append(number)
            except ContractError as error:
                told.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) + len(won) == 40 and won and all("is under way" in sentence for sentence in told)
    assert os.listdir(tmp_path) == ["kv"] and number_in(tmp_path / "kv") in won
