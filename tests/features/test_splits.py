"""Features from a checkpoint: their order, what is kept of them, wrong data, weights of other kinds."""

import copy
import hashlib
import json
import shutil
import time

import pytest
import torch
from helpers import SMALL, eval_flags, last_result, write_images

import eval_cluster
import eval_knn
import eval_linear
import main_cplearn
from cplearn import backbones, checkpoints
from cplearn.errors import UserError, WorkerError
from cplearn.features.splits import extract_features
from cplearn.load import load_model


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
    model = load_model(args, torch.device("cpu"))
    assert args == before and model.network is None and model.epoch == 2 and not model.backbone.training
    assert model.flags() == {"arch": "resnet8_w8", "patch_size": 16, "image_size": 16, "dataset": "folder",
                             "data_path": str(image_folder), "class_list": None, "method": "cplearn"}  # fmt: skip
    assert model.weights_sha256 == hashlib.sha256((run / "checkpoint.pth").read_bytes()).hexdigest()
    reads, load = [], checkpoints.load_file_and_hash
    monkeypatch.setattr(checkpoints, "load_file_and_hash", lambda *a: reads.append(a) or load(*a))
    eval_linear.main(eval_flags(run, tmp_path, "--epochs", "1", "--augment", "false"))
    assert len(reads) == 1 and last_result(tmp_path)["weights_sha256"] == model.weights_sha256


def test_random_init_is_the_run_before_training(run, tmp_path):
    args = json.loads((run / "args.json").read_text())["args"]
    eval_cluster.main(eval_flags(run, tmp_path, "--random_init", "--dump_features", str(tmp_path)))
    random = checkpoints.load(tmp_path / "features_val_last1.pth")["features"]
    assert last_result(tmp_path)["random_init"] is True
    torch.manual_seed(1)
    untrained = backbones.build_backbone("resnet8_w8", patch_size=16, image_size=32).eval()
    trained = checkpoints.load(run / "checkpoint.pth")["model"]
    assert random.shape == (12, 8) and args["seed"] == 0
    checkpoints.load_into(
        untrained, checkpoints.backbone_weights({"format": checkpoints.FORMAT, "model": trained}), "x"
    )
    eval_cluster.main(eval_flags(run, tmp_path, "--dump_features", str(tmp_path)))
    assert not torch.allclose(random, checkpoints.load(tmp_path / "features_val_last1.pth")["features"])


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


def test_kept_features_of_two_models_do_not_mix(run, tmp_path, image_folder):
    other = tmp_path / "other"
    main_cplearn.main(
        [*SMALL, "--epochs", "2", "--data_path", str(image_folder), "--seed", "5", "--output_dir", str(other)]
    )
    kept = ["--dump_features", str(tmp_path / "f")]
    eval_knn.main(eval_flags(run, tmp_path, *kept))
    eval_cluster.main(eval_flags(other, tmp_path, *kept))  # replaces those of val only
    with pytest.raises(UserError, match="train and val are of different weights"):
        eval_knn.main(["--load_features", str(tmp_path / "f"), "--device", "cpu"])
    with pytest.raises(UserError, match="--random_init cannot change kept features"):
        eval_knn.main(["--load_features", str(tmp_path / "f"), "--random_init"])
    with pytest.raises(UserError, match="holds kept features or a linear probe"):
        eval_knn.main(["--pretrained_weights", str(tmp_path / "f" / "features_val_last1.pth"), "--device", "cpu"])


def test_kept_features_of_two_data_sets_do_not_mix(run, tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "copy")
    kept = ["--dump_features", str(tmp_path / "f")]
    eval_knn.main(eval_flags(run, tmp_path, *kept))
    compared = last_result(tmp_path)
    assert compared["train_data_hash"].startswith("48 images ") and compared["data_hash"].startswith("12 images ")
    eval_cluster.main(eval_flags(run, tmp_path, "--data_path", str(tmp_path / "copy"), *kept))  # those of val only
    with pytest.raises(UserError, match="train and val are of different data: extract both again"):
        eval_knn.main(["--load_features", str(tmp_path / "f"), "--device", "cpu"])


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
    model = load_model(args, torch.device("cpu"))
    dataset = model.images("val")
    read = type(dataset).read
    monkeypatch.setattr(
        type(dataset), "read", lambda self, i, *more: time.sleep(1000) if i == 2 else read(self, i, *more)
    )
    with pytest.raises(WorkerError, match="002.jpg"):
        extract_features(model, dataset, args, torch.device("cpu"))


def test_images_larger_than_any_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="--image_size 20000 is more than any image may have"):
        eval_knn.main(eval_flags(run, tmp_path, "--image_size", "20000"))
