"Files written whole or not at all, and one writer for a directory."
import errno
import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from evoprune_nb.machine import lock as lock_module
from evoprune_nb.machine.files import read_json, replace_file, sha256_file, write_json, write_text, written_whole
from evoprune_nb.machine.lock import DirectoryBusy, DirectoryLock, contents


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"n": 1})
    with pytest.raises(KeyboardInterrupt), replace_file(path) as scratch:
        scratch.write_text('{"n"')
        raise KeyboardInterrupt
    assert read_json(path) == {"n": 1} and os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("name", ["state.json", "state.json.tmp"])
def test_a_symlink_is_replaced_and_its_target_left_alone(tmp_path, name):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    write_text(tmp_path / "run" / "state.json", "new")
    assert target.read_text() == "mine" and (tmp_path / "run" / "state.json").read_text() == "new"
    assert not (tmp_path / "run" / "state.json").is_symlink()


@pytest.mark.parametrize("name", ["writer.lock", "writer.json", "driver.lock"])
def test_a_lock_that_is_a_symlink_empties_nothing(tmp_path, name):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    try:
        with DirectoryLock(tmp_path / "run"):
            pass
    except OSError:  # refusing is fine, too
        pass
    assert target.read_text() == "mine"


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe", b"[1]", b""])
def test_a_damaged_json_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_json(tmp_path / "config.json")


def test_the_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "large").write_bytes(os.urandom((1 << 20) + 7))
    expected = subprocess.run(["sha256sum", tmp_path / "large"], capture_output=True, text=True, check=True).stdout.split()[0]
    assert sha256_file(tmp_path / "large") == expected


def test_a_directory_appears_when_all_of_it_is_written(tmp_path):
    with pytest.raises(OSError), written_whole(tmp_path / "checkpoint") as scratch:
        write_json(scratch / "config.json", {})
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_leave_its_note_is_free_again(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock_module, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        DirectoryLock(tmp_path).__enter__()
    monkeypatch.undo()
    with DirectoryLock(tmp_path):
        pass


def test_a_killed_holder_frees_the_directory_and_its_scratch_files_go(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from evoprune_nb.machine.files import replace_file
        from evoprune_nb.machine.lock import DirectoryLock
        with DirectoryLock(sys.argv[1]), replace_file(sys.argv[1] + "/state.json") as scratch:
            scratch.write_text("half")
            print("there", flush=True)
            time.sleep(60)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "there\n"
        with pytest.raises(DirectoryBusy, match=rf"being written by process {child.pid} on \S+ since 20\d\d"):
            DirectoryLock(tmp_path).__enter__()
    finally:
        child.kill()
        child.wait()
    assert contents(tmp_path) == [] and len(list(tmp_path.glob(".*.tmp"))) == 1
    with DirectoryLock(tmp_path):
        assert json.loads((tmp_path / "writer.json").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / "writer.json").exists()


def test_a_lock_waits_for_a_holder_about_to_leave_and_for_no_other(tmp_path):
    "A short visit of another thread refuses nobody; a holder who stays does, and is left alone."
    entered, leave = threading.Event(), threading.Event()

    def visit():
        with DirectoryLock(tmp_path):
            entered.set()
            leave.wait(30)

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert entered.wait(30)
    with pytest.raises(DirectoryBusy, match="by this process since"):
        DirectoryLock(tmp_path, wait=0.1).__enter__()
    threading.Timer(0.2, leave.set).start()
    with DirectoryLock(tmp_path, wait=30):
        assert leave.is_set()
    visitor.join()
