"""ImageNet-100 as a tree of links."""

import os

import pytest
from helpers import write_images

from cplearn.data import datasets, sources
from cplearn.data.datasets import read_class_list
from cplearn.data.imagenet100 import link_imagenet100, main
from cplearn.errors import UserError


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """One image in each of the 100 classes, and in one more."""
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "one", 1, (8, 8))
    for name in [*read_class_list("imagenet100.txt"), "n00000000"]:
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            os.link(root / "one" / "000.jpg", root / split / name / "000.jpg")
    return root


def test_the_imagenet100_tree_is_links_to_the_listed_classes(imagenet, tmp_path, capsys):
    command = ["--imagenet", str(imagenet), "--out", str(tmp_path / "out"), "--allow_incomplete"]
    main(command)
    said = capsys.readouterr().out
    main(command)  # again: nothing to do
    assert capsys.readouterr().out == said
    made = sources.build_dataset("folder", str(tmp_path / "out"), "train")
    listed = sources.build_dataset("folder", str(imagenet), "train", "imagenet100.txt")
    assert len(made) == 100 and list(made.names) == list(listed.names) and made.classes == listed.classes
    assert f"train: 100 classes, {datasets.fingerprint(listed)}" in said
    assert (tmp_path / "out/val" / made.classes[7]).resolve() == imagenet / "val" / made.classes[7]


def test_an_incomplete_imagenet_is_refused_before_a_link_is_made(imagenet, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has 100 images of the 100 classes, the data set 126,689"):
        link_imagenet100(str(imagenet), str(out))
    with pytest.raises(UserError, match="has no train folder"):
        link_imagenet100(str(tmp_path), str(out), incomplete=True)
    assert not out.exists()
    (out / "train" / "n99999999").mkdir(parents=True)
    with pytest.raises(UserError, match="other things in train: n99999999"):
        link_imagenet100(str(imagenet), str(out), incomplete=True)
