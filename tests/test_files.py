"""Files: lines after a cut, links that lead elsewhere, what never ends."""

import json
import os
import signal

import pytest

from cplearn.errors import UserError, WriteError
from cplearn.files import append_json_line, check_output_dir, read_json, read_json_lines, read_text, write_text


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path):
    path = tmp_path / "log.txt"
    assert read_json_lines(path) == []
    append_json_line(path, {"a": 1})
    with open(path, "a") as f:
        f.write('{"b": ')
    append_json_line(path, {"c": float("inf"), "more": [1.0, [float("nan")]]})
    append_json_line(path, {"d": "ü"})
    assert read_json_lines(path) == [{"a": 1}, {"c": None, "more": [1.0, [None]]}, {"d": "ü"}]
    assert path.read_text().count("\n") == 4


def test_nothing_is_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    for name in ("log.txt", "results.jsonl", "args.json", f".args.json.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(WriteError, match="log.txt is a link or no file, through which nothing is written: remove it"):
        append_json_line(tmp_path / "log.txt", {"a": 1})
    write_text(tmp_path / "args.json", "{}")  # whole files take the link's place
    assert victim.read_text() == "mine\n" and not (tmp_path / "args.json").is_symlink()
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: log.txt is a link"):  # before any work
        check_output_dir(str(tmp_path))


@pytest.fixture
def alarm():
    """Ends a test that would hang."""
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("what", ["pipe", "folder", "zero", "missing"])
def test_what_is_no_file_is_neither_read_nor_written(tmp_path, alarm, what):
    path = tmp_path / "x"
    {"pipe": os.mkfifo, "folder": os.mkdir, "zero": lambda x: x.symlink_to("/dev/zero"), "missing": str}[what](path)
    assert read_json(path) == {} and read_json_lines(path) == []
    with pytest.raises(OSError):
        read_text(path)
    if what == "missing":
        return
    with pytest.raises(WriteError, match="is a link or no|is no regular file"):
        append_json_line(path, {})


def test_content_that_breaks_a_parser(tmp_path):
    path = tmp_path / "x"
    for content in (b"[" * 100_000, b"\xff\xfe{", b"{" + b'"a":{' * 50_000, b"[1]", b"1e999999", b""):
        path.write_bytes(content)
        assert read_json(path) == {}
    path.write_bytes(b'{"a": 1}\n[2]\n' + b"[" * 100_000 + b'\n{"b": "\xff"}\n7\n')
    assert read_json_lines(path) == [{"a": 1}, {"b": "\udcff"}]
    with pytest.raises(OSError, match="too large"):
        read_text(path, limit=100)


def test_names_that_are_not_utf8_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_text(tmp_path / "x", name + "\n")
    assert (tmp_path / "x").read_bytes() == b"caf\xe9\n" and read_text(tmp_path / "x") == name + "\n"
    append_json_line(tmp_path / "y", {"name": name})
    assert read_json_lines(tmp_path / "y") == [{"name": name}] and json.loads((tmp_path / "y").read_text())
