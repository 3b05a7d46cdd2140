"""`benchmarks/estimate.py`: what it counts, against the network's formula and the operations that really run."""

import estimate
import pytest
import random_jpegs
import torch
from helpers import ROOT
from steps import flops_per_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_cplearn
from cplearn.errors import UserError
from cplearn.loss import streamed
from cplearn.loss.blockwise import blockwise_loss
from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec

RECIPE = [f"@{ROOT}/recipes/imagenet100_cplearn.txt", "--data_path", "X", "--out_dim", "131072"]


def vit_flops(size: int, width: int = 384, depth: int = 12, patch: int = 16) -> int:
    """Products of a ViT's forward pass, written out: two operations each."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    block = 3 * width * width + width * width + 8 * width * width  # qkv, projection, both layers of the MLP
    return 2 * (patches * 3 * patch**2 * width + depth * (tokens * block + 2 * tokens**2 * width))


def test_work_of_an_image_is_the_formula():
    found = flops_per_image(RECIPE)
    assert found["backbone"] == pytest.approx(3 * (2 * vit_flops(224) + 8 * vit_flops(96)), rel=1e-3)
    assert found["loss"] == 2 * 2 * 10 * 384 * 131072


class CountBytes(TorchDispatchMode):
    """Counts the bytes that operations read and write; views and empty memory cost nothing."""

    FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand",
            "detach", "alias", "as_strided", "unbind", "split", "empty", "new_empty", "empty_like"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.FREE:  # `out=` is written only
            self.bytes += sum(x.nbytes for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize(("views", "store"), [(2, True), (10, True), (10, False)])
def test_bytes_of_the_loss_are_those_of_its_operations(views, store, monkeypatch):
    n, f, c = 16, 32, 32768
    monkeypatch.setattr(streamed, "STORED_LIMIT", 2**40 if store else 0)
    h, dictionary, spec = torch.randn(views, n, f), Dictionary(c, f), LossSpec(0.25)
    with CountBytes() as count:
        blockwise_loss(h, dictionary, spec, with_grad=True, store=store, block=4096)
    assert estimate.loss_bytes(n, views, f, c) == pytest.approx(count.bytes, rel=0.03)


def test_parts_of_a_step():
    args = main_cplearn.parse_args(RECIPE)
    card = estimate.CARDS["a100"]
    one, eight, many = (estimate.estimate(args, RECIPE, card, gpus, 0.25) for gpus in (1, 8, 64))
    assert one.sum_over_ranks == 0 < eight.sum_over_ranks < many.sum_over_ranks
    assert one.backbone == eight.backbone == pytest.approx(64 * 94.0e9 / (312e12 * 0.25), rel=1e-3)
    assert one.seconds < eight.seconds < 8 * one.seconds
    faster = estimate.estimate(args, RECIPE, card, 8, 0.5)
    assert faster.backbone == eight.backbone / 2 and faster.loss == eight.loss


def test_the_table_and_bad_flags(capsys):
    estimate.main([*RECIPE, "--images", "1000000", "--utilization", "0.2"])
    said = capsys.readouterr().out
    assert "8 x a100, 64 images each" in said and "94 GFLOP in the backbone, 2.01 in the loss" in said
    assert "| 20% " in said and "hours for 300 epochs" in said
    with pytest.raises(UserError, match="--images many"):
        estimate.main([*RECIPE, "--images", "many"])
    with pytest.raises(UserError, match="--method swav"):
        estimate.main(["--method", "swav"])


def test_random_jpegs_are_the_same_each_time_and_have_imagenet_100s_names(tmp_path):
    names = random_jpegs.class_names(102)
    assert names[:2] == ["n01558993", "n01692333"] and len(set(names)) == 102
    for k in range(2):
        random_jpegs.main([str(tmp_path / str(k)), "--classes", "2", "--images", "2", "--val_images", "1"])
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.jpg"))
    assert [str(x) for x in files[:2]] == ["train/n01558993/0.jpg", "train/n01558993/1.jpg"] and len(files) == 6
    content = [[(tmp_path / str(k) / x).read_bytes() for x in files] for k in range(2)]
    assert content[0] == content[1] and len(set(content[0])) == 6
    with pytest.raises(UserError, match=str(tmp_path / "0")):
        random_jpegs.main([str(tmp_path / "0")])
