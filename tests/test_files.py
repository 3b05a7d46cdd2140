"""JSON lines in a file that a kill has cut short."""

from cplearn.files import append_json_line, read_json_lines


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path):
    path = tmp_path / "log.txt"
    assert read_json_lines(path) == []
    append_json_line(path, {"a": 1})
    with open(path, "a") as f:
        f.write('{"b": ')
    append_json_line(path, {"c": float("inf")})
    append_json_line(path, {"d": "ü"})
    assert read_json_lines(path) == [{"a": 1}, {"c": None}, {"d": "ü"}]
    assert path.read_text().count("\n") == 4
