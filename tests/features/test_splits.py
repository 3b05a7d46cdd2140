"""Features from a checkpoint: their order, what is kept of them, wrong data, weights of other kinds."""

import argparse
import copy
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import SMALL, eval_flags, last_result, write_images

import eval_cluster
import eval_knn
import eval_linear
import main_cplearn
from cplearn import checkpoints, random_streams, tensor_files
from cplearn.data.augmentations import eval_pixels
from cplearn.data.color import network_input
from cplearn.data.datasets import Folder
from cplearn.errors import UserError, WorkerError
from cplearn.features.cli import request_of
from cplearn.features.splits import extract_features
from cplearn.load import load_model
from cplearn.methods import build_method


def test_features_do_not_depend_on_batch_size_and_come_in_order(run, tmp_path):
    found = []
    for batch in ("1", "5", "12"):
        folder = tmp_path / batch
        eval_cluster.main(eval_flags(run, folder, "--batch_size_per_gpu", batch, "--dump_features", str(folder)))
        found.append(checkpoints.load(folder / "features_val_last1.pth"))
    for other in found[1:]:
        torch.testing.assert_close(found[0]["features"], other["features"], rtol=1e-4, atol=1e-6)
        assert torch.equal(found[0]["codes"], other["codes"])
    assert found[0]["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_model_says_what_the_file_completed_and_leaves_the_flags_alone(run, tmp_path, image_folder, monkeypatch):
    args = eval_knn.get_args_parser().parse_args(eval_flags(run, tmp_path, "--image_size", "16"))
    before = copy.deepcopy(args)
    model = load_model(request_of(args, "digits"), torch.device("cpu"))
    assert args == before and model.network is None and model.epoch == 2 and not model.backbone.training
    assert model.flags() == {"arch": "resnet8_w8", "patch_size": 16, "image_size": 16, "dataset": "folder",
                             "data_path": str(image_folder), "class_list": None, "image_column": None,
                             "method": "cplearn"}  # fmt: skip
    assert model.weights_sha256 == hashlib.sha256((run / "checkpoint.pth").read_bytes()).hexdigest()
    reads, load = [], tensor_files.load_file_and_hash
    monkeypatch.setattr(tensor_files, "load_file_and_hash", lambda *a: reads.append(a) or load(*a))
    eval_linear.main(eval_flags(run, tmp_path, "--epochs", "1", "--augment", "false"))
    assert len(reads) == 1 and last_result(tmp_path)["weights_sha256"] == model.weights_sha256


def test_random_init_is_the_run_before_training(run, tmp_path):
    eval_cluster.main(eval_flags(run, tmp_path, "--random_init", "--dump_features", str(tmp_path)))
    random = checkpoints.load(tmp_path / "features_val_last1.pth")["features"]
    assert last_result(tmp_path)["random_init"] is True and random.shape == (12, 8)
    args = json.loads((run / "args.json").read_text())["args"]
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, args["seed"])
    untrained = build_method(argparse.Namespace(**args)).eval()
    pixels = [eval_pixels(Folder(Path(args["data_path"]) / "val")[i][0], 32) for i in range(12)]
    with torch.no_grad():
        expected = untrained.backbone(network_input(torch.stack(pixels), torch.device("cpu")))
    torch.testing.assert_close(random, expected, rtol=1e-4, atol=1e-6)


def test_dumped_features_give_the_same_results_without_images(run, tmp_path):
    first = eval_knn.main(eval_flags(run, tmp_path, "--nb_knn", "3", "--dump_features", str(tmp_path / "f")))
    again = eval_knn.main(["--load_features", str(tmp_path / "f"), "--nb_knn", "3", "--device", "cpu"])
    assert first == again and (tmp_path / "f" / "results.jsonl").exists()
    with pytest.raises(UserError, match="has no features_train_last4.pth"):
        eval_linear.main(["--load_features", str(tmp_path / "f"), "--n_last_blocks", "4", "--device", "cpu"])


def test_class_list_comes_from_the_checkpoint(tmp_path, image_folder):
    (tmp_path / "list.txt").write_text("ant\ncat\n")
    main_cplearn.main([*SMALL, "--data_path", str(image_folder), "--class_list", str(tmp_path / "list.txt"),
                       "--epochs", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    common = ["--pretrained_weights", str(tmp_path / "checkpoint.pth"), "--num_workers", "0", "--device", "cpu"]
    for more, images in (([], 8), (["--data_path", str(image_folder)], 8), (["--class_list", ""], 12)):
        out = tmp_path / f"f{images}{len(more)}"
        eval_cluster.main([*common, *more, "--dump_features", str(out)])
        assert len(checkpoints.load(out / "features_val_last1.pth")["labels"]) == images


def test_plain_backbone_weights(run, tmp_path, image_folder):
    weights = checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth"))
    torch.save(weights, tmp_path / "plain.pth")
    common = ["--pretrained_weights", str(tmp_path / "plain.pth"), "--data_path", str(image_folder), "--image_size",
              "32", "--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path)]  # fmt: skip
    with pytest.raises(UserError, match="does not say its architecture"):
        eval_knn.main(common)
    got = eval_knn.main([*common, "--arch", "resnet8_w8", "--nb_knn", "5"])
    assert got == eval_knn.main(eval_flags(run, tmp_path, "--nb_knn", "5"))
    assert set(eval_cluster.main([*common, "--arch", "resnet8_w8"])) == {"kmeans", "singletons"}
    with pytest.raises(UserError, match="needs a checkpoint with a head"):
        eval_cluster.main([*common, "--arch", "resnet8_w8", "--out_csv", str(tmp_path / "x.csv")])


def test_images_without_classes(run, tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / "flat" / split, 6)
    common = eval_flags(run, tmp_path, "--data_path", str(tmp_path / "flat"))
    with pytest.raises(UserError, match="eval_knn.py needs labels"):
        eval_knn.main(common)
    rows = eval_cluster.main(common)
    assert set(rows) == {"codes"} and "No labels" in capsys.readouterr().out


def test_kept_features_of_two_models_or_data_sets_do_not_mix(run, tmp_path, image_folder):
    other, kept = tmp_path / "other", tmp_path / "f"
    main_cplearn.main(
        [*SMALL, "--epochs", "2", "--data_path", str(image_folder), "--seed", "5", "--output_dir", str(other)]
    )
    shutil.copytree(image_folder, tmp_path / "copy")
    eval_knn.main(eval_flags(run, tmp_path, "--dump_features", str(kept)))
    record = last_result(tmp_path)
    assert record["train_data_hash"].startswith("48 images ") and record["data_hash"].startswith("12 images ")
    for weights, more, named in ((other, [], "weights"), (run, ["--data_path", str(tmp_path / "copy")], "data")):
        eval_cluster.main(eval_flags(weights, tmp_path, *more, "--dump_features", str(kept)))  # those of val only
        with pytest.raises(UserError, match=f"{kept}: train and val .* {named}"):
            eval_knn.main(["--load_features", str(kept), "--device", "cpu"])
    with pytest.raises(UserError, match="--random_init"):
        eval_knn.main(["--load_features", str(kept), "--random_init"])
    with pytest.raises(UserError, match="kept features"):
        eval_knn.main(["--pretrained_weights", str(kept / "features_val_last1.pth"), "--device", "cpu"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features", lambda x: x[:-1]),
        ("features", lambda x: x.double()),
        ("features", lambda x: x * float("nan")),
        ("labels", lambda x: x[:, None]),
        ("labels", lambda x: x.float()),
        ("labels", lambda x: x + 1),
        ("labels", lambda x: None),
        ("codes", lambda x: x + 40),
        ("codes", lambda x: x[:-1]),
        ("out_dim", lambda x: None),
        ("names", lambda x: None),
        ("source", lambda x: 0.5),
    ],
)
def test_kept_features_that_would_give_wrong_numbers_are_refused(tmp_path, name, change):
    labels = torch.arange(3).repeat(4)
    state = dict(features=torch.randn(12, 5), labels=labels, codes=labels + 7, names=[""] * 12, classes=["a", "b", "c"],
                 out_dim=10, arch="resnet8", source={"weights": "none"})  # fmt: skip
    path = tmp_path / "features_val_last1.pth"
    checkpoints.save(path, state | {name: change(state[name])})
    with pytest.raises(UserError, match=f"{path}.* --dump_features"):
        eval_cluster.main(["--load_features", str(tmp_path), "--device", "cpu"])


def test_wrong_data_is_noticed_before_anything_is_extracted(run, tmp_path, image_folder, capsys):
    for split, names in (("train", ("ant", "bee")), ("val", ("ant",))):
        for name in names:
            write_images(tmp_path / "less" / split / name, 2)
    write_images(tmp_path / "less" / "val" / "cow", 2)
    with pytest.raises(UserError, match="the classes of train and val differ: bee, cow"):
        eval_knn.main(eval_flags(run, tmp_path, "--data_path", str(tmp_path / "less")))
    with pytest.raises(UserError, match="--dump_features /proc/x cannot be written"):
        eval_knn.main(eval_flags(run, tmp_path, "--dump_features", "/proc/x"))
    with pytest.raises(UserError, match="--out_csv"):
        eval_cluster.main(eval_flags(run, tmp_path, "--out_csv", "/proc/x/codes.csv"))
    assert "Extracting" not in capsys.readouterr().out


def test_an_image_that_hangs_ends_an_evaluation_as_it_ends_a_training(run, tmp_path, monkeypatch):
    write_images(tmp_path / "data" / "val", 4)
    args = eval_knn.get_args_parser().parse_args(eval_flags(run, tmp_path, "--data_path", str(tmp_path / "data")))
    args.num_workers, args.worker_timeout = 1, 6.0
    model = load_model(request_of(args, "digits"), torch.device("cpu"))
    dataset = model.images("val")
    read = type(dataset).read
    monkeypatch.setattr(
        type(dataset), "read", lambda self, i, *more: time.sleep(1000) if i == 2 else read(self, i, *more)
    )
    with pytest.raises(WorkerError, match="002.jpg") as error:
        extract_features(model, dataset, args, torch.device("cpu"))
    assert error.value.exit_code == 5


def test_features_in_bf16_are_near_those_in_float32_and_say_so(run, tmp_path):
    kept = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        eval_knn.main(
            eval_flags(run, tmp_path, "--nb_knn", "3", "--precision", precision, "--dump_features", str(folder))
        )
        kept[precision] = checkpoints.load(folder / "features_val_last1.pth")
        assert last_result(tmp_path).get("precision", "fp32") == precision
    exact, rounded = (kept[precision]["features"] for precision in ("fp32", "bf16"))
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.02 and rounded.dtype == torch.float32
