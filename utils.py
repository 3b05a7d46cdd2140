"""What the scripts share, under one short name: arguments, schedules, printed tables. Standard library only.

The package `cplearn` does not import this file: each thing is defined where its import says.
"""

from cplearn.files import check_output_dir
from cplearn.flags import (
    ArgumentParser,
    bool_flag,
    check_unread_path,
    expand_paths,
    expand_recipes,
    fraction,
    fraction_below_one,
    ignore_local_rank,
    nonnegative,
    positive,
    seed_below,
)
from cplearn.schedules import cosine, lr_at
from cplearn.text import format_duration, format_table

__all__ = [
    "ArgumentParser",
    "bool_flag",
    "check_output_dir",
    "check_unread_path",
    "cosine",
    "expand_paths",
    "expand_recipes",
    "format_duration",
    "format_table",
    "fraction",
    "fraction_below_one",
    "ignore_local_rank",
    "lr_at",
    "nonnegative",
    "positive",
    "seed_below",
]
