"""Tables and durations as text."""

import pytest

from cplearn.text import format_duration, format_table


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
