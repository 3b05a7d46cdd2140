"""Atomic writing, safe loading, strict keys."""

import os
import pickle
from argparse import Namespace

import pytest
import torch

import checkpoints
from resnet import ResNet8
from utils import UserError


class Attack:
    """Unpickled without care, it would create the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_round_trip(tmp_path):
    state = {"args": {"lr": 0.1, "scale": [0.4, 1.0], "path": None}, "model": {"w": torch.arange(3.0)}}
    checkpoints.save(tmp_path / "c.pth", state)
    loaded = checkpoints.load(tmp_path / "c.pth")
    assert loaded["args"] == state["args"] and torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert os.listdir(tmp_path) == ["c.pth"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pth"
    checkpoints.save(path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle|lambda"):
        checkpoints.save(path, {"epoch": 2, "bad": lambda: 0})
    assert checkpoints.load(path)["epoch"] == 1 and os.listdir(tmp_path) == ["c.pth"]


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, kind):
    path, witness = tmp_path / "c.pth", tmp_path / "executed"
    content = {"model": {"w": torch.zeros(2)}, "args": Attack(witness)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="is refused") as error:
        checkpoints.load_file(path)
    assert not witness.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "c.pth"
    checkpoints.save(path, {"model": {"w": torch.randn(2000)}})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: keep if isinstance(keep, int) else int(size * keep)])
    with pytest.raises(UserError) as error:
        checkpoints.load(path)
    assert "c.pth" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load_file(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        checkpoints.load_file(tmp_path / "list.pth")
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="not written by main_cplearn.py"):
        checkpoints.load(tmp_path / "plain.pth")


def test_backbone_weights_of_each_kind_of_file():
    weights = ResNet8(4).state_dict()
    zeros = {k: torch.zeros_like(v) for k, v in weights.items()}
    ours = {
        "format": checkpoints.FORMAT,
        "model": {f"backbone.{k}": v for k, v in weights.items()} | {"head.linear.weight": 0},
    }
    dino = {
        "teacher": {f"backbone.{k}": v for k, v in weights.items()} | {"head.mlp.0.weight": torch.zeros(1)},
        "student": {f"module.backbone.{k}": v for k, v in zeros.items()} | {"module.head.mlp.0.weight": torch.zeros(1)},
    }
    timm_file = weights | {"head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    for state in (ours, dino, timm_file, {"state_dict": weights}):
        found = checkpoints.backbone_weights(state)
        assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)
    assert checkpoints.backbone_weights(dino, "student")["blocks.0.conv1.weight"].abs().sum() == 0


def test_a_dino_checkpoint_with_its_namespace_loads_safely(tmp_path):
    """DINO saves its argparse.Namespace: data, and the only class that is let through."""
    weights = ResNet8(4).state_dict()
    state = {
        "teacher": {f"backbone.{k}": v for k, v in weights.items()},
        "args": Namespace(arch="x", lr=0.1),
        "epoch": 3,
    }
    torch.save(state, tmp_path / "dino.pth")
    found = checkpoints.backbone_weights(checkpoints.load_file(tmp_path / "dino.pth", checkpoints.DINO_CLASSES))
    assert all(torch.equal(found[k], weights[k]) for k in weights)


def test_keys_that_do_not_fit_are_named():
    model = ResNet8(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = model.state_dict() | {"extra": torch.zeros(1), "blocks.0.conv1.weight": torch.zeros(8, 3, 3, 3)}
    del weights["blocks.1.conv1.bias"]
    with pytest.raises(UserError) as error:
        checkpoints.load_into(model, weights, "c.pth")
    text = str(error.value)
    assert "1 keys missing (blocks.1.conv1.bias)" in text and "1 unknown keys (extra)" in text
    assert "blocks.0.conv1.weight (8, 3, 3, 3) instead of (4, 3, 3, 3)" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing half loaded
