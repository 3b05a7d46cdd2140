"""`benchmarks/loader.py`: every setting is tried, and one recommended."""

import loader
from helpers import SMALL

from cplearn.host import usable_cores


def test_every_setting_is_tried(image_folder, capsys):
    loader.main(["--steps", "1", *SMALL, "--data_path", str(image_folder)])
    said = capsys.readouterr().out
    kinds = [line.split()[1] for line in said.splitlines() if line.startswith(("| none", "| ram"))]
    numbers = {0, 1, *(n for n in (2, 4, 8, 16, 32) if n < usable_cores())}
    assert [kinds.count(kind) for kind in ("none", "ram")] == [len(numbers)] * 2
    assert "Recommended: --num_workers " in said
