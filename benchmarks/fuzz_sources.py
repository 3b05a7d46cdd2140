"""Images, caches, features and weights that are damaged or changed under their names (a part of fuzz.py).

Held: refused in one line, or read as they were, or what differs is named (an image that cannot be read; `Identity`).
"""

import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import harness
import hostile
import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import parquet

from cplearn import backbones, checkpoints, tensor_files
from cplearn.data.augmentations import build_views
from cplearn.data.datasets import ImageDataset
from cplearn.data.identity import Identity
from cplearn.data.pixels import CacheOptions, open_pixels
from cplearn.data.sources import build_dataset
from cplearn.errors import LocalError, UserError
from cplearn.features import splits

COUNT = 40
VIEWS = build_views("dino", size=16, local_size=8, n_local=0, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))


def paint(folder: Path) -> list[Path]:
    """Write images of two classes; return their files."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / "train" / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return sorted((folder / "train").rglob("*.png"), key=lambda path: path.name)


def write(kind: str, pictures: list[Path], out: Path) -> str:
    """Write the images as a kind of source below `out`; return the --dataset that reads it."""
    if kind in ("folder", "list", "cache"):
        shutil.copytree(pictures[0].parents[1], out / ("images" if kind == "list" else "train"))
        if kind == "list":
            lines = [f"images/{path.parent.name}/{path.name}\t{path.parent.name}\n" for path in pictures]
            (out / "train.txt").write_text("".join(lines))
    elif kind == "tar":
        for k in range(2):
            with tarfile.open(out / f"train-{k}.tar", "w") as tar:
                for path in pictures[k::2]:
                    tar.add(path, f"{path.parent.name}/{path.name}")
    else:
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
        labels = [int(path.parent.name[-1]) for path in pictures]
        if kind == "parquet":
            parquet.write_table(
                pyarrow.table({"image": rows, "label": labels}), out / "train.parquet", row_group_size=8
            )
        else:
            import datasets

            kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            copy = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=kinds)
            copy.save_to_disk(str(out / "copy"))
            return f"hf:{out}/copy"
    return "folder"


def content(data: ImageDataset) -> list:
    """Return name, label and pixels of every image, None for those that cannot be read."""
    found = []
    for i, name in enumerate(data.names):
        try:
            image, label = data.read(i)
            found.append((str(name), label, image.tobytes()))
        except LocalError:
            found.append((str(name), None, None))
    return found


def try_source(kind: str, pictures: list[Path], out: Path, rng: random.Random) -> str:
    """Damage a file of a source, or put another image in the place of one; return what broke."""
    dataset = write(kind, pictures, out)
    data = build_dataset(dataset, str(out), "train")
    before, was = Identity.of(data).read_sample(data), content(data)
    if kind in ("folder", "list") and rng.random() < 0.3:
        names = sorted(out.rglob("*.png"))
        shutil.copy(*rng.sample(names, 2))  # another image under its name, often as long
    else:
        hostile.damage(rng.choice(sorted(path for path in out.rglob("*") if path.is_file())), rng)
    data = build_dataset(dataset, str(out), "train")
    now = content(data)
    differ = [a for a, b in zip(now, was, strict=False) if a != b and a[2] is not None] or len(now) != len(was)
    text = Identity.of(data).changes(before, data).text
    return "changed in silence" if differ and not text else ""


def try_cache(kind: str, pictures: list[Path], out: Path, rng: random.Random) -> str:
    write(kind, pictures, out)
    data = build_dataset("folder", str(out), "train")
    options = CacheOptions("disk", str(out / "kept"), 0)
    was = [open_pixels(data, VIEWS, options)[i].clone() for i in range(COUNT)]
    (path,) = (out / "kept").glob("*.bin")
    hostile.damage(path, rng)
    again = open_pixels(data, VIEWS, options)
    return "" if all(torch.equal(again[i], x) for i, x in enumerate(was)) else "other pixels"


def try_features(kind: str, pictures: list[Path], out: Path, rng: random.Random) -> str:
    n = COUNT
    torch.manual_seed(rng.randrange(2**31))
    state = {"features": torch.randn(n, 5), "labels": torch.arange(n) % 2, "codes": torch.arange(n) % 7,
             "names": [path.name for path in pictures], "classes": ["class0", "class1"], "out_dim": 7,
             "arch": "resnet8", "source": {"weights": "none"}}  # fmt: skip
    path = splits.CLS.file(str(out), "val")
    checkpoints.save(path, state)
    hostile.damage(path, rng)
    return "" if harness.same(vars(splits._load_features(str(out), "val", splits.CLS)), state) else "other features"


ODD = (torch.ones(3, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.ones(3, device="meta"),
       torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), torch.full((3,), float("nan")))  # fmt: skip


def try_weights(kind: str, pictures: list[Path], out: Path, rng: random.Random) -> str:
    """Weights for --init_from: damaged, one value replaced, or one tensor that is none."""
    torch.manual_seed(0)
    good, path = backbones.build_backbone("resnet8_w8", patch_size=16, image_size=32).state_dict(), out / "weights.pth"
    state = {"teacher": {f"module.backbone.{name}": x for name, x in good.items()}, "epoch": 3, "args": {"arch": "x"}}
    draw = rng.random()
    if draw < 0.4:
        state["teacher"][rng.choice(list(state["teacher"]))] = rng.choice(ODD)
    torch.save(hostile.lie(rng, state) if 0.4 <= draw < 0.8 else state, path)
    if draw >= 0.8:
        hostile.damage(path, rng)
    backbone = backbones.build_backbone("resnet8_w8", patch_size=16, image_size=32)
    checkpoints.load_backbone(backbone, tensor_files.load_file(path, checkpoints.DINO_CLASSES), str(path))
    return "" if harness.same(backbone.state_dict(), good) else "other weights"


TRIES: dict[str, Callable[[str, list[Path], Path, random.Random], str]] = {
    **dict.fromkeys(("folder", "list", "tar", "parquet", "hf"), try_source),
    "cache": try_cache, "features": try_features, "init_from": try_weights,
}  # fmt: skip


def fuzz_sources(place, count: int, rng: random.Random) -> list[tuple]:
    """Try each kind in turn; return part, kind, nothing, and what broke."""
    root = place.root / "sources"
    pictures, results, kinds = paint(root), [], list(TRIES)
    for k in range(count):
        kind, out = kinds[k % len(kinds)], root / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            wrong = TRIES[kind](kind, pictures, out, rng)
        except UserError as error:
            wrong = f"several lines: {error}" if "\n" in str(error) else ""
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[:150]}"
        results.append(("sources", kind, [], wrong))
        if wrong:
            shutil.copytree(out, root / f"kept{k}", symlinks=True)
    return results
