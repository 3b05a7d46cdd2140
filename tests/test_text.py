"""Tables and durations as text."""

import os
import sys

import pytest

from cplearn.text import LastingStream, csv_rows, format_duration, format_table


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1.0 min"), (3599, "60.0 min"), (5400, "1.5 h")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_a_table_is_also_markdown():
    assert format_table([("a", 0.5), ("longer", None)], ("name", "value")).splitlines() == [
        "| name   |  value |",
        "|--------|-------:|",
        "| a      | 0.5000 |",
        "| longer |        |",
    ]


def test_cells_that_a_spreadsheet_would_run():
    rows = [("=1+1", "+a", "-b", "@c", "\td"), ("-0.5", "+1e3", "plain", -0.5, None)]
    assert csv_rows(rows) == [["'=1+1", "'+a", "'-b", "'@c", "'\td"], ["-0.5", "+1e3", "plain", -0.5, None]]


def test_a_stream_outlives_its_reader():
    reader, writer = os.pipe()
    with open(writer, "w", buffering=1) as pipe:
        stream = LastingStream(pipe)
        print("read", file=stream)
        assert os.read(reader, 10) == b"read\n"
        os.close(reader)
        for _ in range(3):
            print("lost", file=stream, flush=True)
        assert not stream.isatty() and sys.stdout is not stream
