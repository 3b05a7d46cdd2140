"""TODO cplearn.flags."""

import argparse
import math
import os
import shlex

from cplearn.errors import UserError

# --- flags ---------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse with printed defaults, no abbreviations, and `@file` arguments (one or more a line, # comments)."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"a recipe's line cannot be read ({error}): {arg_line}") from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a default only where there is one to print."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS, []) else super()._get_help_string(action)


def bool_flag(text: str) -> bool:
    """DINO's boolean values: `--use_fp16 true`, `1`, `on`, or `false`, `0`, `off`."""
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


# --- output --------------------------------------------------------------------------------------


def check_finite(args: argparse.Namespace) -> None:
    """Raises `UserError` for a flag that is NaN or infinite, which float() accepts."""
    for name, value in vars(args).items():
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, float) and not math.isfinite(x):
                raise UserError(f"--{name} {x} is not a finite number")


def expand_paths(args: argparse.Namespace, *names: str) -> None:
    """`~` in paths, also where the shell left it (--data_path=~/x)."""
    for name in names:
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
