"""What the evaluations share: flags, the result line, two processes against one."""

import shutil

import pytest
from helpers import eval_flags, last_result, run_in_processes, train, write_images

import eval_cluster
import eval_collapse
import eval_knn
import eval_linear
from cplearn import checkpoints
from cplearn.errors import UserError


def test_scripts_read_everything_from_the_checkpoint(run, tmp_path, image_folder):
    metrics = eval_knn.main(eval_flags(run, tmp_path, "--nb_knn", "3", "5000"))
    assert set(metrics) == {"knn3_top1", "knn3_top5", "knn48_top1", "knn48_top5"}
    record = last_result(tmp_path)
    assert record["metrics"] == metrics and record["split"] == "val" and record["epoch"] == 2 and record["seed"] == 0
    assert record["flags"]["data_path"] == str(image_folder) and record["flags"]["arch"] == "resnet8_w8"
    assert record["flags"]["method"] == "cplearn" and record["commit"]
    rows = eval_cluster.main(eval_flags(run, tmp_path, "--out_csv", str(tmp_path / "codes.csv")))
    assert set(rows) == {"codes", "codes_shuffled", "random_codes", "kmeans", "singletons"}
    lines = (tmp_path / "codes.csv").read_text().splitlines()
    assert lines[0] == "image,class,code" and len(lines) == 13 and lines[1].startswith("ant/000.jpg,ant,")
    assert len({line.split(",")[2] for line in lines[1:]}) == rows["codes"]["used_codes"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--arch", "vit_small"], "--arch vit_small, .* resnet8_w8"),
        (["--dataset", "mnist"], "--dataset mnist"),
        (["--load_features", "/tmp"], "--load_features"),
        (["--data_path", "/nowhere"], "/nowhere"),
        (["--checkpoint_key", "foo"], "--checkpoint_key foo"),
        (["--checkpoint_key", "teacher"], "--checkpoint_key teacher"),
        (["--dataset", "digits", "--data_path", "."], "--dataset digits"),
        (["--output_dir", ""], "--output_dir ''"),
        (["--image_size", "2"], "--image_size 2: --arch resnet8_w8"),
        (["--image_size", "20000"], "--image_size 20000"),
        (["--output_dir", "/proc/x"], "--output_dir /proc/x"),
    ],
)
def test_wrong_flags(run, tmp_path, more, named):
    with pytest.raises(UserError, match=named):
        eval_knn.main(eval_flags(run, tmp_path, *more))


@pytest.mark.parametrize("arch", ["vit_tiny", "timm:test_vit"])
def test_a_vit_takes_whole_patches(tmp_path, arch):
    train(tmp_path, "--arch", arch, "--patch_size", "16", "--max_steps", "1")
    with pytest.raises(UserError, match="--image_size 33"):
        eval_knn.main(eval_flags(tmp_path, tmp_path, "--image_size", "33"))


def test_the_network_of_bare_weights_has_to_be_there(run, tmp_path):
    weights = checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth"))
    checkpoints.write(tmp_path / "bare.pth", {"student": weights})
    common = ["--pretrained_weights", str(tmp_path / "bare.pth"), "--arch", "resnet8_w8", "--nb_knn", "3",
              "--num_workers", "0", "--device", "cpu"]  # fmt: skip
    eval_knn.main([*common, "--checkpoint_key", "student"])
    with pytest.raises(UserError, match="--checkpoint_key teacher|bare.pth"):
        eval_knn.main([*common, "--checkpoint_key", "teacher"])


@pytest.mark.parametrize("script", [eval_cluster, eval_collapse])
def test_a_folder_without_val_is_told_of_the_train_split(run, tmp_path, image_folder, script):
    shutil.copytree(image_folder / "train", tmp_path / "data" / "train")
    with pytest.raises(UserError, match="data .*--split train"):
        script.main(eval_flags(run, tmp_path, "--data_path", str(tmp_path / "data")))


def test_class_folders_without_splits_are_evaluated_whole(run, tmp_path, image_folder, capsys):
    data, kept = tmp_path / "pictures", tmp_path / "kept"
    data.symlink_to(image_folder / "train")  # beside which lies no val
    flags = eval_flags(run, tmp_path, "--data_path", str(data))
    rows = eval_cluster.main([*flags, "--kmeans_redo", "1", "--shuffles", "1", "--dump_features", str(kept)])
    assert rows["singletons"]["used_codes"] == 48 and last_result(tmp_path)["split"] == "all"
    assert f"{data} has no train/ and no val/: all of its images are used\n" in capsys.readouterr().out

    metrics = eval_knn.main([*flags, "--nb_knn", "5", "100"])
    assert set(metrics) == {"knn5_top1", "knn5_top5", "knn47_top1", "knn47_top5"}  # of 48, less the image itself
    assert "each image is classified by all others" in capsys.readouterr().out and metrics["knn5_top1"] < 1
    assert last_result(tmp_path)["split"] == "all"
    again = ["--load_features", str(kept), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert eval_knn.main([*again, "--nb_knn", "5", "100"]) == metrics
    assert eval_cluster.main([*again, "--kmeans_redo", "1", "--shuffles", "1"]) == rows
    for given in (flags, again):
        with pytest.raises(UserError, match="eval_linear.py"):
            eval_linear.main([*given, "--augment", "false"])


def test_a_flat_folder_has_codes_but_no_classes(run, tmp_path, capsys):
    write_images(tmp_path / "flat", 9)
    flags = eval_flags(run, tmp_path, "--data_path", str(tmp_path / "flat"))
    assert list(eval_cluster.main(flags)) == ["codes"]
    assert "9 images, no classes" in capsys.readouterr().out
    eval_cluster.main([*flags, "--random_init", "--split", "train"])
    with pytest.raises(UserError, match="eval_knn.py needs labels"):
        eval_knn.main(flags)
    with pytest.raises(UserError, match="flat .* eval_linear.py"):
        eval_linear.main(flags)


def test_the_rank_that_a_launcher_adds_is_in_no_result(run, tmp_path):
    eval_knn.main(eval_flags(run, tmp_path, "--nb_knn", "3", "--local-rank=0"))
    assert "local_rank" not in last_result(tmp_path)["flags"]
    with pytest.raises(UserError, match="--pretrained_weights"):  # which is asked for
        eval_knn.main([])


def _evaluate(rank, run, out):
    common = ["--pretrained_weights", f"{run}/checkpoint.pth", "--output_dir", out, "--num_workers", "0",
              "--device", "cpu"]  # fmt: skip
    knn = eval_knn.main([*common, "--nb_knn", "5"])
    cluster = eval_cluster.main(common)
    linear = eval_linear.main([*common, "--epochs", "3", "--augment", "true", "--batch_size_per_gpu", "10"])
    cached = eval_linear.main([*common, "--epochs", "3", "--augment", "false", "--batch_size_per_gpu", "10"])
    return {"knn": knn, "cluster": cluster, "linear": linear, "cached": cached}


@pytest.mark.dist
def test_two_processes_evaluate_like_one(run, tmp_path):
    first, second = run_in_processes(tmp_path, _evaluate, str(run), str(tmp_path / "two"))
    one = eval_flags(run, tmp_path / "one")
    assert first["knn"] == eval_knn.main([*one, "--nb_knn", "5"]) and second["knn"] == {}
    assert first["cluster"]["codes"] == eval_cluster.main(one)["codes"]
    # 48 images: the last of three batches has 8, or 4 in each process.
    for name, augment in (("linear", "true"), ("cached", "false")):
        whole = eval_linear.main([*one, "--epochs", "3", "--augment", augment, "--batch_size_per_gpu", "20"])
        assert first[name] == pytest.approx(whole) and second[name] == first[name]
    assert len((tmp_path / "two" / "results.jsonl").read_text().splitlines()) == 4  # one writer
