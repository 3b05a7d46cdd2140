"""The demo's whole path, cut short: table, plots, logs."""

import pytest
from PIL import Image

import demo


@pytest.mark.slow
def test_demo_trains_evaluates_and_draws(tmp_path, capsys):
    rows = demo.main(["--output_dir", str(tmp_path), "--max_steps", "3"])
    said = capsys.readouterr().out
    assert "| 20-NN top-1" in said and "random init" in said
    assert set(rows) == {"trained", "random"} and rows["trained"] != rows["random"]
    assert 0.3 < rows["random"]["20-NN top-1"] < 1
    for name in ("losses", "verdict", "code_usage", "confusion", "collapse/spectrum", "collapse/matrices"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] > 500 and len(image.convert("RGB").getcolors(10**6)) > 20
    assert (tmp_path / "log.txt").exists() and "singletons" in (tmp_path / "eval_random.txt").read_text()
    assert demo.main(["--output_dir", str(tmp_path), "--max_steps", "3"]) == rows  # a second run evaluates again
