"""The analysis of collapse on a real run: figures, files, wrong flags."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, eval_flags, last_result, train, write_images
from PIL import Image

import eval_cluster
import eval_collapse
from cplearn import checkpoints
from cplearn.errors import UserError
from cplearn.metrics.analysis import good_values
from cplearn.pictures.collapse import FIGURES


def test_the_script_draws_and_writes_everything(run, tmp_path, capsys):
    """Labels are no formulas of matplotlib or of a spreadsheet, and no names of files."""
    label, formula = r"_$\bad$/" + "x" * 300, "=1+1 $"
    both = [str(run / "checkpoint.pth"), str(run / "checkpoint_previous.pth")]
    common = eval_flags(run, tmp_path)[2:]
    results = eval_collapse.main(
        ["--checkpoints", *both, "--labels", label, formula, *common, "--components", "2", "20", "--mc_samples", "50"]
    )
    assert list(results) == [label, formula, "random init"]
    printed = capsys.readouterr().out
    assert "mixture of 20: more components than the 12 images" in printed
    assert "codes.png, cosines.png, matrices.png, mixture.png, spectrum.png, tsne.png" in printed
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [x["metrics"]["label"] for x in lines] == list(results) and lines[-1]["random_init"]
    assert lines[0]["metrics"]["images"] == 12 and lines[0]["metrics"]["mixture20_entropy"] is None
    for name in FIGURES:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 10  # something is drawn
        assert (tmp_path / f"{name}.png").stat().st_size < 200_000
    spectrum = (tmp_path / "spectrum.csv").read_text().splitlines()
    assert spectrum[0] == "network,of,index,singular value" and len(spectrum) == 1 + 3 * (8 + 8)
    cosines = np.loadtxt(tmp_path / "cosines_3_random_init_images.csv", delimiter=",")
    assert cosines.shape == (12, 12) and np.allclose(np.diag(cosines), 1)
    blocks = np.loadtxt(tmp_path / "cosines_3_random_init_blocks.csv", delimiter=",")
    assert blocks.shape == (3, 3) and blocks[0, 1] == pytest.approx(cosines[:4, 4:8].mean(), abs=1e-3)  # ant, bee
    for kind in ("embedding", "representation"):
        (path,) = tmp_path.glob(f"matrices_2_*_{kind}.csv")
        assert np.loadtxt(path, delimiter=",").shape == (8, 8)
    for name in ("spectrum", "mixture", "codes", "tsne"):
        table = (tmp_path / f"{name}.csv").read_text()
        assert table.splitlines()[1].startswith(label) and "\n'=1+1 $," in table
    assert len((tmp_path / "tsne.csv").read_text().splitlines()) == 1 + 3 * 12


def test_every_number_has_its_entry_in_the_glossary_and_is_shown_in_80_columns(run, tmp_path, capsys):
    sizes = [str(k) for k in eval_collapse.COMPONENTS]
    flags = [*eval_flags(run, tmp_path), "--split", "train", "--tsne_images", "0", "--components", *sizes]
    eval_collapse.main([*flags, "--mc_samples", "10", "--labels", "trained"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert max(map(len, table)) <= 80 and "trained | random init |" in table[0]
    written = list(last_result(tmp_path)["metrics"])
    shown = [line.split()[1] for line in table[2:]]
    assert shown == [name for name in written if name != "label" and not name.endswith("_fit")]
    for name, line in zip(shown, table[2:], strict=True):
        assert line.split("|")[-2].strip() == good_values(name)

    page = (ROOT / "docs" / "collapse-numbers.md").read_text().partition("## The numbers")[2].partition("\n## ")[0]
    entries = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    explained = [name for entry in entries for name in re.findall(r"`([^`]+)`", entry[0])]
    assert sorted(explained) == sorted(written)
    for first, *_, good in entries:  # as in the printed table
        name = re.findall(r"`([^`]+)`", first)[0]
        if name in shown:
            assert good.removesuffix("|").strip() == (good_values(name) or "-")


def test_mixtures_are_no_larger_than_the_images_allow(capsys):
    assert eval_collapse.choose_components(None, 500) == [10, 20, 50]
    assert eval_collapse.choose_components(None, 48) == [] and "10, 20, 50" in capsys.readouterr().out
    assert eval_collapse.choose_components([30], 12) == [30]  # as asked for


def test_a_folder_without_splits_counts_whole(run, tmp_path, capsys):
    """With class folders, and without; when --data_path names it, and when the checkpoint does."""
    quick = ["--tsne_images", "0", "--components", "--baseline", "false"]
    write_images(tmp_path / "flat", 9)
    shutil.copytree(tmp_path / "flat", tmp_path / "classes" / "a")
    shutil.copytree(tmp_path / "flat", tmp_path / "classes" / "b")
    for name, images in (("flat", 9), ("classes", 18)):
        data = tmp_path / name
        ((_, found),) = eval_collapse.main([*eval_flags(run, tmp_path), *quick, "--data_path", str(data)]).items()
        said = capsys.readouterr().out
        assert said.count(f"{data} has no train/ and no val/: all of its images are used\n") == 1
        assert found["images"] == images
        assert last_result(tmp_path)["split"] == "all" and (tmp_path / "cosines.png").exists()
    train(tmp_path / "run", "--data_path", str(tmp_path / "flat"), "--batch_size_per_gpu", "4", "--max_steps", "2")
    ((_, found),) = eval_collapse.main([*eval_flags(tmp_path / "run", tmp_path), *quick]).items()
    assert found["images"] == 9


def test_weights_without_a_head_are_drawn_by_their_features(run, tmp_path, image_folder):
    weights = checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth"))
    checkpoints.write(tmp_path / "bare.pth", {"state_dict": weights})
    eval_collapse.main(["--pretrained_weights", str(tmp_path / "bare.pth"), "--arch", "resnet8_w8", "--device", "cpu",
                        "--data_path", str(image_folder), "--image_size", "32", "--num_workers", "0", "--components",
                        "--tsne_images", "0", "--labels", "bare"])  # fmt: skip
    drawn = sorted(p.name for p in tmp_path.glob("*.png"))
    assert drawn == ["cosines.png", "matrices.png", "spectrum.png"]
    assert not list(tmp_path.glob("matrices_*embedding.csv"))


def test_class_names_of_any_bytes_are_drawn(run, tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ant").rename(tmp_path / "data" / split / "caf\udce9 $_{ \x1b[31m")
    eval_collapse.main(eval_flags(run, tmp_path, "--data_path", str(tmp_path / "data")))
    assert {"cosines.png", "tsne.png"} <= {path.name for path in tmp_path.glob("*.png")}


def test_wide_tables_are_split_and_long_names_numbered():
    labels = ["a" * 40, *(f"net {k}" for k in range(9))]
    rows = [("embedding_off_diagonal_chance", *map(float, range(10)), "high; 1: collapse"), ("n", *range(10), "")]
    first, *tables = eval_collapse.tables_of_width(rows, labels)
    assert first == f"(1) {'a' * 40}" and "(1)" in tables[0] and len(tables) > 2
    assert max(len(line) for table in tables for line in table.splitlines()) <= 80
    values = [line.split("|")[2:-2] for table in tables for line in table.splitlines()[3:]]
    assert [int(x) for row in values for x in row] == list(range(10))


@pytest.mark.parametrize(
    "more, named",
    [
        (("--labels", "a", "b"), "--labels .*2 .* 1"),
        (("--labels", "random init"), "--labels random init"),
        (("--components", "0"), "--components 0"),
        (("--mc_samples", "1"), "--mc_samples 1"),
        (("--tsne_images", "-1"), "--tsne_images -1"),
        (("--checkpoints", "x.pth"), "--checkpoints and --pretrained_weights"),
        (("--seed", "4294967296"), "--seed 4294967296"),
        (("--pretrained_weights", ""), "--pretrained_weights"),
        (("--pretrained_weights", "/nowhere.pth"), "--pretrained_weights /nowhere.pth"),
    ],
)
def test_wrong_flags_are_refused(run, tmp_path, more, named):
    with pytest.raises(UserError, match=named):
        eval_collapse.main([*eval_flags(run, tmp_path), *more])


def test_only_earlier_figures_are_replaced(run, tmp_path):
    quick = ["--components", "--tsne_images", "0", "--baseline", "false"]
    Image.new("RGB", (9, 9)).save(tmp_path / "codes.png")
    before = (tmp_path / "codes.png").read_bytes()
    with pytest.raises(UserError, match="--output_dir .*codes.png"):
        eval_collapse.main([*eval_flags(run, tmp_path), *quick])
    assert (tmp_path / "codes.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "codes.png").unlink()
    eval_cluster.main([*eval_flags(run, tmp_path), "--out_csv", str(tmp_path / "codes.csv")])
    with pytest.raises(UserError, match="--output_dir .*codes.csv"):
        eval_collapse.main([*eval_flags(run, tmp_path), *quick])
    (tmp_path / "codes.csv").unlink()
    (tmp_path / "tsne.csv").write_text("network,image,x,y\n")  # of an earlier call that drew it
    for _ in range(2):
        ((_, found),) = eval_collapse.main([*eval_flags(run, tmp_path), *quick]).items()
    drawn = ["codes.png", "cosines.png", "matrices.png", "spectrum.png"]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == drawn and not (tmp_path / "tsne.csv").exists()
    assert found["codes_used"] <= 40 and not any("mixture" in k for k in found)


def test_networks_are_named_by_what_tells_them_apart():
    assert eval_collapse.names_of(["/a/b/checkpoint.pth"]) == ["b"]
    assert eval_collapse.names_of(["/a/x/c.pth", "/b/x/c.pth"]) == ["a/x", "b/x"]
    assert eval_collapse.names_of(["/a/x/1.pth", "/a/x/2.pth"]) == ["1: 1.pth", "2: 2.pth"]
