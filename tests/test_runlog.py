"""A run directory says when it is damaged, in words that name the file; it holds what any text can hold."""
import json
import random

import pytest
from helpers import by, made_up, short_config, small_pools

from evoprune_nb.history import History
from evoprune_nb.machine.files import write_json
from evoprune_nb.runlog import EventLog, decode_event, encode_event, read_events, read_settings, read_state, write_settings, write_state
from evoprune_nb.search import Search


def search_in(run_dir, small, config=None) -> Search:
    return Search(run_dir, *small, small_pools(), config or short_config(), by(made_up))


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    "A finished run."
    run_dir = tmp_path_factory.mktemp("runlog") / "run"
    search_in(run_dir, small).run(progress=False)
    return run_dir


def copy_of(run, copy):
    copy.mkdir()
    for name in ("config.json", "events.jsonl", "state.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    return copy


def flipped(content: bytes, n: int, seed: int = 0) -> list[bytes]:
    "Copies with one flipped bit each, at n random places."
    rng = random.Random(seed)
    places = [(rng.randrange(len(content)), rng.randrange(8)) for _ in range(n)]
    return [content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :] for at, bit in places]


def test_flipped_bits_in_the_settings_are_noticed(small, run, tmp_path):
    "Every flipped bit of config.json is one `ValueError` that names the file, for readers and for searches, and nothing is written."
    copy, log = copy_of(run, tmp_path / "run"), (run / "events.jsonl").read_bytes()
    settings = read_settings(run)
    for content in flipped((run / "config.json").read_bytes(), 200):
        (copy / "config.json").write_bytes(content)
        for opened in (read_settings, History, lambda run_dir: search_in(run_dir, small)):
            with pytest.raises(ValueError, match=r"run/config.json is damaged"):
                opened(copy)
        assert (copy / "events.jsonl").read_bytes() == log
    assert read_settings(run) == settings and "sha256" not in settings


def test_settings_of_version_0_1_have_no_hash(small, run, tmp_path):
    "They open as they are; what is no JSON any more, or no search's, is still said clearly."
    copy = copy_of(run, tmp_path / "run")
    settings = read_settings(run)
    (copy / "config.json").write_text(json.dumps(settings))
    assert History(copy).finished and search_in(copy, small).finished
    for content in flipped(json.dumps(settings).encode(), 100):
        (copy / "config.json").write_bytes(content)
        try:
            History(copy)
        except ValueError as error:
            assert str(copy) in str(error)
    (copy / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="config.json is damaged"):
        History(copy)


def test_flipped_bits_in_the_log_are_noticed(small, run, tmp_path):
    "Every flipped bit that changes an event is one `ValueError` that names file and byte, and the way out; the others change nothing."
    copy, expected = copy_of(run, tmp_path / "run"), read_events(run / "events.jsonl")[0]
    noticed = 0
    for content in flipped((run / "events.jsonl").read_bytes(), 300):
        (copy / "events.jsonl").write_bytes(content)
        try:
            rows, _ = read_events(copy / "events.jsonl")
        except ValueError as error:
            noticed += 1
            assert "run/events.jsonl is damaged: the line at byte" in str(error) and "cut it off at" in str(error)
        else:  # in the name of the checksum, or the last newline
            assert [{key: row.get(key) for key in kept} for row, kept in zip(rows, expected)] == expected[: len(rows)] and len(rows) >= len(expected) - 1
    assert noticed > 270


def test_flipped_bits_in_the_state_do_no_harm(run, tmp_path):
    "A damaged state.json is as good as none: the history goes by the events."
    copy = copy_of(run, tmp_path / "run")
    contents = [b"", b"[]", b'{"status": "rvnning"}', b'{"status": "running", "pid": "x"}', *flipped((run / "state.json").read_bytes(), 100)]
    for content in contents:
        (copy / "state.json").write_bytes(content)
        assert read_state(copy) is None or read_state(copy)["status"] in ("finished", "running")
        assert History(copy).finished


def test_events_of_version_0_1_are_read(run, tmp_path):
    "Without checksums, and mixed with those that have one."
    rows, _ = read_events(run / "events.jsonl")
    lines = [json.dumps(row).encode() + b"\n" if i < 7 else encode_event(row) for i, row in enumerate(rows)]
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines))
    assert read_events(tmp_path / "events.jsonl") == (rows, sum(map(len, lines)))
    assert read_events(tmp_path / "events.jsonl", len(lines[0]))[0] == rows[1:]


@pytest.mark.parametrize("text", ["$\\frac{$", '", "crc": "00000000"}', "a\u2028b", "\x00", "smile \U0001f600"])
def test_any_note_can_be_kept(small, tmp_path, text):
    "It comes back as it was; the run is resumed, and its frames can be encoded."
    search = search_in(tmp_path / "run", small)
    search.send({"command": "note", "text": text})
    search.step()
    kept = History(tmp_path / "run").notes.text[0]
    assert kept == text and kept in History(tmp_path / "run").commands.to_html(escape=False).encode().decode()
    winner = search_in(tmp_path / "run", small).run(progress=False)
    assert winner == search_in(tmp_path / "plain", small).run(progress=False)


@pytest.mark.parametrize("text", ["half a \ud83d smile", "\udc80"])
def test_a_note_that_is_no_text_is_refused_or_mended(small, tmp_path, text):
    "Sent, a lone surrogate is an error; by whatever way it comes into the log, it is written as U+FFFD."
    search = search_in(tmp_path / "run", small)
    with pytest.raises(ValueError):
        search.send({"command": "note", "text": text})
    with search.driving():
        row = search.log.record("remark", {"text": text})
    assert row["text"] == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert read_events(tmp_path / "run" / "events.jsonl")[0][-1] == row


def test_surrogates_in_a_log_of_version_0_1(tmp_path):
    "They are read as U+FFFD."
    assert decode_event(b'{"event": "command", "command": {"text": "\\ud83d"}}')["command"] == {"text": "\ufffd"}


def test_a_state_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    "When the disk is full, an old state does not stay as if it was the present one."
    write_state(tmp_path, "running")
    monkeypatch.setattr("evoprune_nb.runlog.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_state(tmp_path, "failed")
    assert read_state(tmp_path) is None


def test_a_log_that_cannot_be_appended_to(tmp_path, monkeypatch):
    "Half a line that a full disk has left is cut off by the next start; what was whole is played back."
    log = EventLog(tmp_path / "events.jsonl")
    log.event("throw", {"n": 0})
    with open(log.path, "ab") as file:
        file.write(encode_event({"event": "throw", "n": 1})[:9])
    again = EventLog(log.path)
    assert [row["n"] for row in again.recorded] == [0] and log.path.stat().st_size == again.size


def test_settings_are_written_whole(tmp_path):
    "And tuples come back as lists, as JSON has them."
    write_settings(tmp_path, {"config": {"stages": (1, 2)}, "fingerprints": {}, "space": {}})
    assert read_settings(tmp_path)["config"] == {"stages": [1, 2]}
    write_json(tmp_path / "config.json", {"config": {}, "sha256": None})
    with pytest.raises(ValueError, match="is not of a search: it lacks fingerprints, space"):
        read_settings(tmp_path)


def test_a_newer_format_is_refused(small, run, tmp_path):
    "What a later version writes is not guessed at, and not called damaged."
    copy = copy_of(run, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    assert settings["format"] == 2
    for newer in (3, "3", None, True):
        write_json(copy / "config.json", settings | {"format": newer, "sha256": "another hash"})
        for opened in (read_settings, History, lambda run_dir: search_in(run_dir, small)):
            with pytest.raises(ValueError, match=f"config.json has format {newer!r}, this version of evoprune_nb reads formats up to 2; update"):
                opened(copy)


def test_a_log_that_is_a_link_is_refused(small, run, tmp_path):
    "A run directory from somebody else may link its log to any file: nothing is cut off or appended there."
    copy, target = copy_of(run, tmp_path / "copy"), tmp_path / "precious"
    target.write_text("a line without an end")
    (copy / "events.jsonl").unlink()
    (copy / "events.jsonl").symlink_to(target)
    with pytest.raises(ValueError, match="events.jsonl is a link"):
        search_in(copy, small).run(progress=False)
    assert target.read_text() == "a line without an end"
