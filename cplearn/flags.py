"""Command-line flags: a parser with one-line errors and recipes, and types that check their range."""

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable

from cplearn.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse with printed defaults, one-line errors, no abbreviations, and `@file` arguments.

    A file holds one or more arguments per line and # comments; of a flag given twice the later value counts.
    """

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"a recipe's line cannot be read ({error}): {arg_line}") from None

    def error(self, message: str):
        """Raise `UserError` with the flag, its value and what is wrong, in one line."""
        match = re.fullmatch(r"argument (?:\S+/)?(--?\w+): (.*)", message, flags=re.DOTALL)
        if match:
            colon = "" if _OUR_WORDS.search(match[2]) else ":"
            message = f"{match[1]}{colon} {match[2]}"
        raise UserError(f"{message} (--help lists the flags)" if "unrecognized" in message else message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a default only where there is one to print."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS, []) else super()._get_help_string(action)


# --- types that check their range ------------------------------------------------------------------------

_OUR_WORDS = re.compile(r" must | is not a | is neither ")


def _type(kind: type, holds: Callable[[float], bool], requirement: str) -> Callable[[str], float]:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole number' if kind is int else 'number'}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} must {requirement}")
        return value

    return parse


def positive(kind: type) -> Callable[[str], float]:
    """Return an argparse type for an int or float above 0."""
    return _type(kind, lambda x: x > 0, "be positive")


def nonnegative(kind: type) -> Callable[[str], float]:
    """Return an argparse type for an int or float of at least 0."""
    return _type(kind, lambda x: x >= 0, "not be negative")


fraction = _type(float, lambda x: 0 <= x <= 1, "lie between 0 and 1")
fraction_below_one = _type(float, lambda x: 0 <= x < 1, "be at least 0 and below 1")


def bool_flag(text: str) -> bool:
    """Parse DINO's boolean values: `--use_fp16 true`, `1`, `on`, or `false`, `0`, `off`."""
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def expand_paths(args: argparse.Namespace, *names: str) -> None:
    """Expand `~` in these flags, also where the shell left it (--data_path=~/x)."""
    for name in names:
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
