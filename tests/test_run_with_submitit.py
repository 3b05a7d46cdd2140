"""The launcher without a cluster: flags, the batch script, wrong input."""

import importlib
import os
import re
import sys

import pytest
import torch
from helpers import run_script

import run_with_submitit
from cplearn import backbones
from cplearn.errors import UserError


def test_no_flag_means_two_things():
    mine = set(run_with_submitit.get_args_parser()._option_string_actions) - {"-h", "--help", "--version"}
    for script in run_with_submitit.SCRIPTS:
        theirs = set(importlib.import_module(script).get_args_parser()._option_string_actions)
        assert not mine & theirs, script


def test_the_batch_script_of_8_gpus(tmp_path):
    out = tmp_path / "in100"
    done = run_script("run_with_submitit.py", "@recipes/imagenet100_cplearn.txt", "--nodes", "2", "--partition", "gpu",
                      "--constraint", "a100", "--account", "vision", "--qos", "long", "--exclude", "n[1-2]",
                      "--sbatch", "reservation=r1", "exclusive", "--comment", "for the paper", "--dry_run",
                      "--output_dir", str(out), "--data_path", str(tmp_path / "imagenet"),
                      "--then", "eval", PATH=f"{os.path.dirname(sys.executable)}:/bin")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    first, *others = done.stdout.split("#!/bin/bash")[1:]
    asked = dict(re.findall(r"#SBATCH --([a-z-]+)=?(.*)", first))
    assert asked == {
        "account": "vision", "comment": "'for the paper'", "constraint": "a100", "cpus-per-task": "10",
        "exclude": "'n[1-2]'", "gpus-per-node": "8", "job-name": "in100", "mem": "320G", "nodes": "2",
        "ntasks-per-node": "8", "open-mode": "append", "output": f"{out}/slurm/%j_0_log.out", "partition": "gpu",
        "qos": "long", "requeue": "", "reservation": "r1", "exclusive": "", "signal": "USR2@120", "time": "2800",
    }  # fmt: skip
    command = re.search(r"# Every process then runs: (.*)", first)[1]
    assert "--class_list imagenet100.txt --arch vit_small" in command  # the recipe, written out
    assert "--device cuda" in command and "--num_workers 10" in command
    names = [re.search(r"job-name=in100-(\S+)", x)[1] for x in others]
    assert names == ["eval_knn", "eval_linear", "eval_cluster", "eval_collapse"]
    assert all("nodes=1\n" in x and "dependency=afterok:JOB" in x and "kill-on-invalid-dep=yes" in x for x in others)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "0"], "--nodes 0"),
        (["--mem", "much"], "--mem much"),
        (["--timeout", "1", "--signal_delay_s", "60"], "--signal_delay_s 60 .*--timeout 1 "),
        (["--max_requeues", "-1"], "--max_requeues -1"),
        (["--local", "--nodes", "2"], "--local .*--nodes 2"),
        (["--local", "--then", "eval"], "--local .*--then"),
        (["--local", "--dependency", "afterok:1"], "--local .*--dependency afterok:1"),
        (["--dependency", "1"], "--dependency 1 "),
        (["--script", "eval_knn", "--then", "eval"], "--then eval .*eval_knn"),
        (["--script", "eval_knn", "--dry_run"], "--pretrained_weights"),
        (["--status", "out", "--lr", "1"], "--status .*--lr 1"),
        (["--status", "/nowhere"], "/nowhere/slurm"),
        (["--dry_run", "--lr", "-1"], "--lr -1"),
        (["--dry_run", "--time", "60"], "--time .*--timeout"),
        (["--dry_run", "--output_dir", "out/%u_%j"], "--output_dir .*out/%u_"),
        (["--dry_run", "--output_dir", " "], "--output_dir '' "),
        (["--sbatch", "Mail=x"], "--sbatch Mail=x"),
        (["--script", "eval_knn", "--pretrained_weights", "/nowhere.pth"], "/nowhere.pth does not exist"),
        (["--script", "eval_knn", "--load_features", "/nowhere"], "--load_features /nowhere does not exist"),
        (["--dry_run", "--arch", "nope"], "--arch nope"),
        (["--dry_run", "--augmentation", "nope"], "--augmentation nope"),
        (["--dry_run", "--image_size", "50"], "--image_size 50"),
        (["--dry_run", "--dataset", "cifar10"], "--dataset cifar10"),
        (["--dry_run", "--data_path", "/data", "--class_list", "/nowhere.txt"], "--class_list /nowhere.txt"),
        (["--dry_run", "--init_from", "/etc/hostname"], "/etc/hostname"),
        (["--dry_run", "--script", "eval_knn", "--pretrained_weights", "/etc/hostname"], "/etc/hostname"),
    ],
)
def test_wrong_flags_before_anything_is_submitted(flags, words):
    with pytest.raises(UserError, match=words):
        run_with_submitit.main(flags)


def test_weights_to_start_from_must_fit(tmp_path, capsys):
    flags = ["--dry_run", "--output_dir", str(tmp_path / "out"), "--out_dim", "40",
             "--init_from", str(tmp_path / "backbone.pth")]  # fmt: skip
    torch.save(backbones.ResNet8(8).state_dict(), tmp_path / "backbone.pth")
    run_with_submitit.main([*flags, "--arch", "resnet8_w8"])
    assert "resnet8_w8" in capsys.readouterr().out
    with pytest.raises(UserError, match="backbone.pth does not fit this model: .* check --arch"):
        run_with_submitit.main([*flags, "--arch", "resnet8_w16"])


def test_without_slurm_the_error_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no Slurm here .* --local, or torchrun --nproc_per_node=8 main_cplearn.py"):
        run_with_submitit.main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_defaults_of_the_site_come_from_sbatchs_variables(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SBATCH_PARTITION", "mine")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    run_with_submitit.main(["--dry_run", "--account", "other", "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "#SBATCH --partition=mine\n" in said and "#SBATCH --account=other\n" in said


def test_evaluations_that_could_not_run_are_refused_before_pre_training(tmp_path, image_folder):
    flat = tmp_path / "pictures"  # beside which lies no val
    flat.symlink_to(image_folder / "train")
    with pytest.raises(UserError, match="--then eval needs a val or test split with classes in --data_path"):
        run_with_submitit.main(["--dry_run", "--then", "eval", "--data_path", str(flat)])
