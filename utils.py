"""What the scripts share, under one short name. Each thing lives in the package: see there."""

from cplearn.files import check_output_dir
from cplearn.flags import ArgumentParser, bool_flag, expand_paths
from cplearn.schedules import cosine, lr_at
from cplearn.text import format_duration, format_table

__all__ = [
    "ArgumentParser",
    "bool_flag",
    "check_output_dir",
    "cosine",
    "expand_paths",
    "format_duration",
    "format_table",
    "lr_at",
]
