"""Metrics against brute force and the specification's chance levels; the scripts on real runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_in_processes, write_images

import eval_cluster
import eval_knn
import eval_linear
import main_cplearn
from cplearn import backbones, checkpoints
from cplearn.errors import UserError
from cplearn.evaluation.knn import knn

TRAIN = ["--arch", "resnet8_w8", "--image_size", "32", "--out_dim", "40", "--batch_size_per_gpu", "16", "--epochs", "2",
         "--warmup_epochs", "0", "--num_workers", "0", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder):
    """A short run on the image folder."""
    out = tmp_path_factory.mktemp("run")
    main_cplearn.main([*TRAIN, "--data_path", str(image_folder), "--output_dir", str(out)])
    return out


def flags(run, tmp_path, *more):
    return ["--pretrained_weights", str(run / "checkpoint.pth"), "--output_dir", str(tmp_path), "--num_workers", "0",
            "--device", "cpu", *more]  # fmt: skip


def last_result(folder):
    return json.loads((folder / "results.jsonl").read_text().splitlines()[-1])


# --- k-NN ---------------------------------------------------------------------------------------------


def test_knn_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 5, generator=generator) for n in (60, 25))
    train_labels, test_labels = (torch.randint(0, 7, (n,), generator=generator) for n in (60, 25))
    got = knn(train, train_labels, test, test_labels, ks=[1, 9, 200], temperature=0.07)
    assert set(got) == {f"knn{k}_top{t}" for k in (1, 9, 60) for t in (1, 5)}  # 200 is capped at 60
    for k in (1, 9, 60):
        top1 = top5 = 0
        for x, y in zip(test, test_labels.tolist(), strict=True):
            similarity = F.cosine_similarity(x[None], train)
            votes = [0.0] * 7
            for j in similarity.argsort(descending=True)[:k].tolist():
                votes[train_labels[j]] += math.exp(similarity[j].item() / 0.07)
            ranked = sorted(range(7), key=lambda c: -votes[c])
            top1 += ranked[0] == y
            top5 += y in ranked[:5]
        assert got[f"knn{k}_top1"] == pytest.approx(top1 / 25)
        if k >= 9:  # with fewer neighbours than classes the fifth place is a tie of empty votes
            assert got[f"knn{k}_top5"] == pytest.approx(top5 / 25, abs=0.05)


def test_knn_of_separated_classes_is_perfect():
    centres = 10 * torch.eye(4)
    labels = torch.arange(4).repeat(20)
    features = centres[labels] + 0.1 * torch.randn(80, 4)
    assert knn(features, labels, features, labels, ks=[5], temperature=0.07)["knn5_top1"] == 1


# --- clustering ----------------------------------------------------------------------------------------


def test_agreement_written_out():
    labels, codes = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 5, 5, 9, 7, 7])
    table = np.array([[2, 0, 0], [1, 0, 1], [0, 2, 0]]) / 6  # rows classes, columns codes 5, 7, 9
    pc, pk = table.sum(1), table.sum(0)
    outer = np.outer(pc, pk)
    mi = (table[table > 0] * np.log(table[table > 0] / outer[table > 0])).sum()
    entropy = [-(p * np.log(p)).sum() for p in (pc, pk)]
    got = eval_cluster.agreement(codes, labels)
    assert got["nmi"] == pytest.approx(2 * mi / sum(entropy))
    assert got["hungarian"] == pytest.approx(5 / 6)
    assert got["used_codes"] == 3 and got["perplexity"] == pytest.approx(math.exp(entropy[1]))
    assert got["ari"] == pytest.approx(4 / 9)  # 2 agreeing pairs; (2 - 4 * 3/15) / ((4 + 3)/2 - 4 * 3/15)


def test_singletons_and_random_codes_have_the_known_levels():
    """Acceptance check 11, on the shape of the ImageNet-100 validation split."""
    labels = np.repeat(np.arange(100), 50)
    single = eval_cluster.agreement(np.arange(5000), labels)
    assert single["nmi"] == pytest.approx(2 * math.log(100) / (math.log(100) + math.log(5000)), abs=1e-6)
    assert single["nmi"] == pytest.approx(0.7019, abs=1e-4) and single["ami"] == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    for c, expected in ((128, 0.248), (1024, 0.516), (32768, 0.692), (131072, 0.699)):
        got = eval_cluster.agreement(rng.integers(0, c, 5000), labels)
        assert got["nmi"] == pytest.approx(expected, abs=0.005) and got["ami"] == pytest.approx(0, abs=0.01)


def test_cluster_rows_of_a_perfect_head():
    labels = torch.arange(5).repeat(40)
    features = 5 * torch.eye(5)[labels] + 0.1 * torch.randn(200, 5)
    rows = eval_cluster.cluster_metrics(features, labels, labels * 3, 50, seed=0, redo=3, shuffles=3)
    for name in ("codes", "kmeans"):
        assert rows[name]["nmi"] == pytest.approx(1) and rows[name]["hungarian"] == pytest.approx(1)
    assert rows["codes_shuffled"]["used_codes"] == 5 and abs(rows["codes_shuffled"]["ami"]) < 0.05
    assert rows["codes_shuffled"]["nmi"] < rows["codes_shuffled"]["nmi_highest"] < rows["codes"]["nmi"]
    assert rows["random_codes"]["used_codes"] > 40 and abs(rows["random_codes"]["ami"]) < 0.05
    assert rows["singletons"]["perplexity"] == pytest.approx(200)


# --- scripts ---------------------------------------------------------------------------------------------


def test_scripts_read_everything_from_the_checkpoint(run, tmp_path, image_folder):
    metrics = eval_knn.main(flags(run, tmp_path, "--nb_knn", "3", "5000"))
    assert set(metrics) == {"knn3_top1", "knn3_top5", "knn48_top1", "knn48_top5"}
    record = last_result(tmp_path)
    assert record["metrics"] == metrics and record["split"] == "val" and record["epoch"] == 2 and record["seed"] == 0
    assert record["flags"]["data_path"] == str(image_folder) and record["flags"]["arch"] == "resnet8_w8"
    assert record["flags"]["method"] == "cplearn" and record["commit"]
    rows = eval_cluster.main(flags(run, tmp_path, "--out_csv", str(tmp_path / "codes.csv")))
    assert set(rows) == {"codes", "codes_shuffled", "random_codes", "kmeans", "singletons"}
    lines = (tmp_path / "codes.csv").read_text().splitlines()
    assert lines[0] == "image,class,code" and len(lines) == 13 and lines[1].startswith("ant/000.jpg,ant,")
    assert len({line.split(",")[2] for line in lines[1:]}) == rows["codes"]["used_codes"]


def test_features_do_not_depend_on_batch_size_and_come_in_order(run, tmp_path):
    found = []
    for batch in ("1", "5", "12"):
        folder = tmp_path / batch
        eval_cluster.main(flags(run, folder, "--batch_size_per_gpu", batch, "--dump_features", str(folder)))
        found.append(checkpoints.load(folder / "features_val_last1.pth"))
    for other in found[1:]:
        torch.testing.assert_close(found[0]["features"], other["features"], rtol=1e-4, atol=1e-6)
        assert torch.equal(found[0]["codes"], other["codes"])
    assert found[0]["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_random_init_is_the_run_before_training(run, tmp_path):
    args = json.loads((run / "args.json").read_text())["args"]
    eval_cluster.main(flags(run, tmp_path, "--random_init", "--dump_features", str(tmp_path)))
    random = checkpoints.load(tmp_path / "features_val_last1.pth")["features"]
    assert last_result(tmp_path)["random_init"] is True
    torch.manual_seed(1)
    untrained = backbones.build_backbone("resnet8_w8", patch_size=16, image_size=32).eval()
    trained = checkpoints.load(run / "checkpoint.pth")["model"]
    assert random.shape == (12, 8) and args["seed"] == 0
    checkpoints.load_into(
        untrained, checkpoints.backbone_weights({"format": checkpoints.FORMAT, "model": trained}), "x"
    )
    eval_cluster.main(flags(run, tmp_path, "--dump_features", str(tmp_path)))
    assert not torch.allclose(random, checkpoints.load(tmp_path / "features_val_last1.pth")["features"])


def test_dumped_features_give_the_same_results_without_images(run, tmp_path):
    first = eval_knn.main(flags(run, tmp_path, "--nb_knn", "3", "--dump_features", str(tmp_path / "f")))
    again = eval_knn.main(["--load_features", str(tmp_path / "f"), "--nb_knn", "3", "--device", "cpu"])
    assert first == again and (tmp_path / "f" / "results.jsonl").exists()
    with pytest.raises(UserError, match="has no features_train_last4.pth"):
        eval_linear.main(["--load_features", str(tmp_path / "f"), "--n_last_blocks", "4", "--device", "cpu"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_linear_probe_separates_what_is_separable(optimizer, tmp_path):
    labels = torch.arange(3).repeat(30)
    centres = torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]])
    state = dict(features=centres[labels] + 0.05 * torch.randn(90, 2), labels=labels, codes=None, names=[""] * 90,
                 classes=["a", "b", "c"], out_dim=None, arch="resnet8", source={"weights": "none"})  # fmt: skip
    for split in ("train", "val"):
        checkpoints.save(tmp_path / f"features_{split}_last1.pth", state)
    lr = "1" if optimizer == "sgd" else "0.01"
    metrics = eval_linear.main(["--load_features", str(tmp_path), "--optimizer", optimizer, "--lr", lr,
                                "--epochs", "40", "--batch_size_per_gpu", "32", "--device", "cpu"])  # fmt: skip
    assert metrics["linear_last_top1"] > 0.97 and metrics["linear_best_top1"] >= metrics["linear_last_top1"]


@pytest.mark.parametrize("augment", ["true", "false"])
def test_linear_probe_resumes_to_the_same_result(run, tmp_path, augment, monkeypatch):
    common = ["--epochs", "4", "--augment", augment, "--batch_size_per_gpu", "16"]
    whole = eval_linear.main(flags(run, tmp_path / "whole", *common))
    save, calls = checkpoints.save, []

    def dies_after_two(path, state):
        save(path, state)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        eval_linear.main(flags(run, tmp_path / "cut", *common))
    monkeypatch.undo()
    assert eval_linear.main(flags(run, tmp_path / "cut", *common)) == whole
    (a,), (b,) = ((tmp_path / d).glob("linear_*.pth") for d in ("whole", "cut"))
    a, b = checkpoints.load(a), checkpoints.load(b)
    assert a["history"] == b["history"] and len(a["history"]) == 4
    assert all(torch.equal(v, b["classifier"][k]) for k, v in a["classifier"].items())


@pytest.mark.parametrize("augment", ["true", "false"])
def test_a_probe_never_trains_on_other_images_than_asked_for(run, tmp_path, image_folder, augment):
    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data/train/bee/004.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read the image .*bee/004.jpg"):
        eval_linear.main(flags(run, tmp_path / "out", "--epochs", "1", "--augment", augment,
                               "--batch_size_per_gpu", "16",
                               "--data_path", str(tmp_path / "data")))  # fmt: skip


def test_a_finished_probe_is_not_taken_for_another_data_set(run, tmp_path, image_folder):
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            write_images(tmp_path / "noise" / split / name, 4, seed=7)  # the same images in every class
    common = flags(run, tmp_path, "--epochs", "2", "--augment", "false")
    eval_linear.main(common)
    eval_linear.main([*common, "--data_path", str(tmp_path / "noise")])
    eval_linear.main([*common, "--seed", "1"])
    files = [checkpoints.load(p)["classifier"]["1.weight"] for p in tmp_path.glob("linear_*.pth")]
    assert len(files) == 3 and not any(torch.equal(files[i], files[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_class_list_comes_from_the_checkpoint(tmp_path, image_folder):
    (tmp_path / "list.txt").write_text("ant\ncat\n")
    main_cplearn.main([*TRAIN, "--data_path", str(image_folder), "--class_list", str(tmp_path / "list.txt"),
                       "--epochs", "1", "--output_dir", str(tmp_path)])  # fmt: skip
    common = ["--pretrained_weights", str(tmp_path / "checkpoint.pth"), "--num_workers", "0", "--device", "cpu"]
    for more, images in (([], 8), (["--data_path", str(image_folder)], 8), (["--class_list", ""], 12)):
        out = tmp_path / f"f{images}{len(more)}"
        eval_cluster.main([*common, *more, "--dump_features", str(out)])
        assert len(checkpoints.load(out / "features_val_last1.pth")["labels"]) == images


def test_vit_small_probe_takes_four_blocks(tmp_path, image_folder):
    out = tmp_path / "vit"
    common = ["--num_workers", "0", "--device", "cpu"]
    main_cplearn.main(["--data_path", str(image_folder), "--arch", "vit_small", "--image_size", "32", "--out_dim", "64",
                       "--batch_size_per_gpu", "8", "--max_steps", "1", "--output_dir", str(out), *common])  # fmt: skip
    eval_linear.main(
        ["--pretrained_weights", str(out / "checkpoint.pth"), "--epochs", "1", "--augment", "false", *common]
    )
    record = last_result(out)
    assert record["flags"]["n_last_blocks"] == 4 and record["flags"]["standardise"] is False
    state = checkpoints.load(next(out.glob("linear_*.pth")))
    assert state["classifier"]["1.weight"].shape == (3, 1536)


def test_plain_backbone_weights(run, tmp_path, image_folder):
    weights = checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth"))
    torch.save(weights, tmp_path / "plain.pth")
    common = ["--pretrained_weights", str(tmp_path / "plain.pth"), "--data_path", str(image_folder), "--image_size",
              "32", "--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path)]  # fmt: skip
    with pytest.raises(UserError, match="does not say its architecture"):
        eval_knn.main(common)
    got = eval_knn.main([*common, "--arch", "resnet8_w8", "--nb_knn", "5"])
    assert got == eval_knn.main(flags(run, tmp_path, "--nb_knn", "5"))
    assert set(eval_cluster.main([*common, "--arch", "resnet8_w8"])) == {"kmeans", "singletons"}
    with pytest.raises(UserError, match="needs a checkpoint with a head"):
        eval_cluster.main([*common, "--arch", "resnet8_w8", "--out_csv", str(tmp_path / "x.csv")])


def test_images_without_classes(run, tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / "flat" / split, 6)
    common = flags(run, tmp_path, "--data_path", str(tmp_path / "flat"))
    with pytest.raises(UserError, match="eval_knn.py needs labels"):
        eval_knn.main(common)
    rows = eval_cluster.main(common)
    assert set(rows) == {"codes"} and "No class folders" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--arch", "vit_small"], "was trained with resnet8_w8"),
        (["--dataset", "mnist"], "--dataset mnist is unknown"),
        (["--nb_knn", "0"], "must be positive"),
        (["--load_features", "/tmp"], "leave out --pretrained_weights"),
        (["--data_path", "/nowhere"], "/nowhere is not a folder"),
        (["--output_dir", "/proc/x"], "--output_dir /proc/x cannot be written"),
    ],
)
def test_wrong_flags(run, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        eval_knn.main(flags(run, tmp_path, *more))


def test_kept_features_of_two_models_do_not_mix(run, tmp_path, image_folder):
    other = tmp_path / "other"
    main_cplearn.main([*TRAIN, "--data_path", str(image_folder), "--seed", "5", "--output_dir", str(other)])
    kept = ["--dump_features", str(tmp_path / "f")]
    eval_knn.main(flags(run, tmp_path, *kept))
    eval_cluster.main(flags(other, tmp_path, *kept))  # replaces those of val only
    with pytest.raises(UserError, match="train and val come from different weights"):
        eval_knn.main(["--load_features", str(tmp_path / "f"), "--device", "cpu"])
    with pytest.raises(UserError, match="--random_init cannot change kept features"):
        eval_knn.main(["--load_features", str(tmp_path / "f"), "--random_init"])
    with pytest.raises(UserError, match="holds kept features or a linear probe"):
        eval_knn.main(["--pretrained_weights", str(tmp_path / "f" / "features_val_last1.pth"), "--device", "cpu"])


def test_wrong_data_is_noticed_before_anything_is_extracted(run, tmp_path, image_folder, capsys):
    for split, names in (("train", ("ant", "bee")), ("val", ("ant",))):
        for name in names:
            write_images(tmp_path / "less" / split / name, 2)
    write_images(tmp_path / "less" / "val" / "cow", 2)
    with pytest.raises(UserError, match="class folders of train and val differ: bee, cow"):
        eval_knn.main(flags(run, tmp_path, "--data_path", str(tmp_path / "less")))
    with pytest.raises(UserError, match="--dump_features /proc/x cannot be written"):
        eval_knn.main(flags(run, tmp_path, "--dump_features", "/proc/x"))
    with pytest.raises(UserError, match="--out_csv"):
        eval_cluster.main(flags(run, tmp_path, "--out_csv", "/proc/x/codes.csv"))
    assert "Extracting" not in capsys.readouterr().out


def test_blocks_of_a_resnet(run, tmp_path):
    with pytest.raises(UserError, match="--n_last_blocks 4 is for vit_tiny"):
        eval_linear.main(flags(run, tmp_path, "--n_last_blocks", "4", "--augment", "false"))


@pytest.mark.parametrize("script", ["eval_knn", "eval_linear", "eval_cluster"])
def test_weights_are_asked_for(script):
    with pytest.raises(UserError, match="--pretrained_weights is missing"):
        {"eval_knn": eval_knn, "eval_linear": eval_linear, "eval_cluster": eval_cluster}[script].main([])


def _evaluate(rank, run, out):
    common = [
        "--pretrained_weights",
        f"{run}/checkpoint.pth",
        "--output_dir",
        out,
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ]
    knn = eval_knn.main([*common, "--nb_knn", "5"])
    cluster = eval_cluster.main(common)
    linear = eval_linear.main([*common, "--epochs", "3", "--augment", "true", "--batch_size_per_gpu", "8"])
    cached = eval_linear.main([*common, "--epochs", "3", "--augment", "false", "--batch_size_per_gpu", "8"])
    return {"knn": knn, "cluster": cluster, "linear": linear, "cached": cached}


@pytest.mark.dist
def test_two_processes_evaluate_like_one(run, tmp_path):
    first, second = run_in_processes(tmp_path, _evaluate, str(run), str(tmp_path / "two"))
    one = flags(run, tmp_path / "one")
    assert first["knn"] == eval_knn.main([*one, "--nb_knn", "5"]) and second["knn"] == {}
    assert first["cluster"]["codes"] == eval_cluster.main(one)["codes"]
    for name, augment in (("linear", "true"), ("cached", "false")):
        whole = eval_linear.main([*one, "--epochs", "3", "--augment", augment, "--batch_size_per_gpu", "16"])
        assert first[name] == pytest.approx(whole) and second[name] == first[name]
    assert len((tmp_path / "two" / "results.jsonl").read_text().splitlines()) == 4  # one writer


def test_no_script_needs_the_network():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("cplearn/**/*.py")]:
        source = path.read_text()
        assert "torch.hub" not in source and "pretrained=True" not in source and "download=True)" not in source
