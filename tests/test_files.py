"""Files: lines after a cut, whole or not there, ours or not."""

import json
import os
from contextlib import nullcontext

import pytest

from cplearn.errors import UserError, WriteError
from cplearn.files import (
    append_json_line,
    check_output_dir,
    check_replaceable,
    read_json,
    read_json_lines,
    read_text,
    reading,
    replaceable,
    write_text,
    written,
)


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


def test_a_file_is_replaced_whole_or_stays_as_it_is(tmp_path):
    write_text(tmp_path / "x", "one")
    with pytest.raises(KeyError), written(tmp_path / "x") as f:
        f.write(b"tw")
        raise KeyError
    assert (tmp_path / "x").read_text() == "one" and os.listdir(tmp_path) == ["x"]
    with pytest.raises(WriteError, match=f"{tmp_path}/gone"):
        write_text(tmp_path / "gone" / "x", "two")
    assert read_json(tmp_path / "none") == {} and read_json_lines(tmp_path / "none") == []


def test_an_output_that_is_not_ours_is_not_replaceable(tmp_path):
    path, mark = tmp_path / "x", b"made by us"
    assert replaceable(path, mark)
    for content, ours in ((b"...made by us...", True), (b"mine", False), (b"made by us" + bytes(10**6), True),
                          (bytes(10**6) + b"made by us", True), (b"", False)):  # fmt: skip
        path.write_bytes(content)
        assert replaceable(path, mark) == ours
        with nullcontext() if ours else pytest.raises(UserError, match=f"--out {path}"):
            check_replaceable(path, mark, "--out")
    (tmp_path / "link").symlink_to(path)
    assert not replaceable(tmp_path / "link", mark)


def test_whatever_goes_wrong_while_a_file_of_ours_is_read_means_that_it_is_damaged(tmp_path):
    for error in (KeyError("x"), RecursionError(), PermissionError(13, "Permission denied")):
        with pytest.raises(UserError, match=str(tmp_path)), reading(tmp_path):
            raise error
    for error in (FileNotFoundError(), WriteError("known")):
        with pytest.raises(type(error)), reading(tmp_path):
            raise error


@pytest.mark.parametrize("path", ["/proc/none", "/dev/null/none"])
def test_a_folder_that_cannot_be_written_is_named(path):
    with pytest.raises(UserError, match=f"--output_dir {path}"):
        check_output_dir(path)


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
