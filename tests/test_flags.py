"""Types of flags, recipes, and errors in one line."""

import pytest

from cplearn.errors import UserError
from cplearn.flags import ArgumentParser, bool_flag, fraction, fraction_below_one, nonnegative, positive


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="test")
    p.add_argument("--count", type=positive(int), default=1)
    p.add_argument("--lr", type=nonnegative(float), default=0.1)
    p.add_argument("--share", type=fraction, default=0.5)
    p.add_argument("--rate", type=fraction_below_one, default=0.5)
    p.add_argument("--half", type=bool_flag, default=False)
    return p


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--count", "0", "--count 0 must be positive"),
        ("--count", "1.5", "--count 1.5 is not a whole number"),
        ("--lr", "-1", "--lr -1 must not be negative"),
        ("--lr", "nan", "--lr nan is not a finite number"),
        ("--lr", "inf", "--lr inf is not a finite number"),
        ("--lr", "fast", "--lr fast is not a number"),
        ("--share", "1.1", "--share 1.1 must lie between 0 and 1"),
        ("--rate", "1", "--rate 1 must be at least 0 and below 1"),
        ("--half", "maybe", "--half 'maybe' is neither true nor false"),
    ],
)
def test_a_value_out_of_range_is_named_in_one_line(flag, value, words):
    with pytest.raises(UserError) as error:
        parser().parse_args([f"{flag}={value}"])
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_values_at_the_limits():
    args = parser().parse_args("--count 1 --lr 0 --share 1 --rate 0 --half on".split())
    assert (args.count, args.lr, args.share, args.rate, args.half) == (1, 0.0, 1.0, 0.0, True)


def test_flags_of_a_recipe_come_before_those_that_follow(tmp_path):
    (tmp_path / "r.txt").write_text("# a comment\n--count 3 --lr 0.5  # two on a line\n\n--half true\n")
    args = parser().parse_args([f"@{tmp_path}/r.txt", "--lr", "0.25"])
    assert (args.count, args.lr, args.half) == (3, 0.25, True)


def test_no_abbreviations():
    with pytest.raises(UserError, match="unrecognized arguments: --cou 3"):
        parser().parse_args(["--cou", "3"])
