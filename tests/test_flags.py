"""Types of flags, recipes, and errors in one line."""

import argparse

import pytest

from cplearn.errors import UserError
from cplearn.flags import (
    ArgumentParser,
    bool_flag,
    expand_paths,
    expand_recipes,
    fraction,
    fraction_below_one,
    ignore_local_rank,
    nonnegative,
    positive,
    seed_below,
)


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="test")
    p.add_argument("--count", type=positive(int), default=1)
    p.add_argument("--lr", type=nonnegative(float), default=0.1)
    p.add_argument("--share", type=fraction, default=0.5)
    p.add_argument("--rate", type=fraction_below_one, default=0.5)
    p.add_argument("--half", type=bool_flag, default=False)
    p.add_argument("--seed", type=seed_below(2**31), default=0)
    p.add_argument("--kind", choices=("one", "two"))
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
        ("--count", "1" + "0" * 400, f"--count 1{'0' * 39} must be below 2^63"),
        ("--count", "9" * 5000, "--count 999"),  # int() itself refuses so many digits
        ("--lr", "1e300", "--lr 1e300 must lie between 1e-30 and 1e30"),
        ("--lr", "1e-320", "--lr 1e-320 must lie between 1e-30 and 1e30"),
        ("--seed", "2147483648", "--seed 2147483648 must not be negative, and be below 2147483648"),
        ("--kind", "a\nb", "--kind: invalid choice: 'a\\nb' (choose from"),
        ("--kind", "", "--kind: invalid choice: ''"),
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cou", "3"], "unrecognized arguments: --cou 3: did you mean --count? (--help"),  # no abbreviations
        (
            ["--learning_rate", "3", "--cuont=3"],
            "unrecognized arguments: --learning_rate 3 --cuont=3: did you mean --lr? did you mean --count? (",
        ),  # fmt: skip
        (["--num_labels=3"], "unrecognized arguments: --num_labels=3: leave out --num_labels: classes are counted. ("),
        (["--data_dir=x"], "unrecognized arguments: --data_dir=x (--help"),  # this parser has no --data_path
        (["--zzz", "a\nb"], "unrecognized arguments: --zzz a\\nb (--help lists the flags)"),  # like no flag: no guess
    ],
)
def test_an_unknown_flag_is_one_line(flags, words):
    with pytest.raises(UserError) as error:
        parser().parse_args(flags)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_help_has_the_common_flags_and_help_all_every_one(capsys):
    for flag, shown in (("--help", ["--count"]), ("--help_all", ["--count", "--rate"])):
        short = ArgumentParser(prog="x.py", common=["count"])
        short.add_argument("run", nargs="?")
        for name in ("--count", "--rate"):
            short.add_argument(name, help=f"What {name} means")
        with pytest.raises(SystemExit):
            short.parse_args([flag])
        said = capsys.readouterr().out
        assert said.startswith("usage: python x.py run [flags]\n") and "--help_all" in said
        assert [name for name in ("--count", "--rate") if name in said] == shown
    assert short.parse_args(["--rate", "3"]).rate == "3"


def test_recipes_may_include_others_but_not_themselves(tmp_path):
    (tmp_path / "a.txt").write_text(f"--count 3\n@{tmp_path}/b.txt\n")
    (tmp_path / "b.txt").write_text("\ufeff--lr 0.5\n")  # as some editors begin a file
    assert expand_recipes(["x", f"@{tmp_path}/a.txt"]) == ["x", "--count", "3", "--lr", "0.5"]
    (tmp_path / "b.txt").write_text(f"@{tmp_path}/./a.txt\n")
    with pytest.raises(UserError, match=r"a\.txt includes itself"):
        parser().parse_args([f"@{tmp_path}/a.txt"])
    (tmp_path / "b.txt").write_text("--lr user's\n")
    with pytest.raises(UserError, match="user's"):
        parser().parse_args([f"@{tmp_path}/b.txt"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("folder", "cannot be read (Is a directory)"),
        (b"\x80\x02}q\x00", "is no text file of flags"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "r.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        parser().parse_args([f"@{path}"])
    assert str(error.value).startswith(f"@{path} {words}") and "\n" not in str(error.value)


@pytest.mark.parametrize(("path", "words"), [("", "--place '' is empty"), (" ", "is empty"),
                                             ("x" * 300, "--place x+... is longer than")])  # fmt: skip
def test_paths_that_no_file_can_have(path, words):
    with pytest.raises(UserError, match=words):
        expand_paths(argparse.Namespace(place=path), "place")


def test_the_rank_that_a_launcher_adds_is_ignored_with_a_word(capsys):
    p = parser()
    ignore_local_rank(p)
    for words in (["--local_rank", "1"], ["--local-rank=1"]):
        assert vars(p.parse_args(words)) == vars(parser().parse_args([]))
        assert f"{words[0].split('=')[0]} is ignored: the launcher's LOCAL_RANK" in capsys.readouterr().err
