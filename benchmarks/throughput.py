"""From the JPEG to the step: images per second against named peers, in one run, interleaved; medians and ratios.

    python benchmarks/throughput.py views --data_path PHOTOS            # crops and colors, one core
    python benchmarks/throughput.py cifar --data_path CIFAR_FOLDER      # small images, with a cache
    python benchmarks/throughput.py step                                # whole training steps
    python benchmarks/throughput.py evaluation --data_path PHOTOS       # k-NN search, extraction of features

PHOTOS is a folder of full-size images. The peers:

    DINO's transforms     torchvision's transforms on Pillow images, image by image, as DINO's code composes them
    DINO step             timm's ViT as student and EMA teacher, lightly's DINO head and loss, AdamW
    plain step            the same network in PyTorch as it comes, the plain form of the loss by autograd, Adam
    torchvision           ImageFolder and v2 transforms, image by image
    plain loop            Pillow and torchvision one image at a time; a product and a top-k for each block of images
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import CPU, compare, machine
from steps import TrainingStep, dino_step, plain_step

from cplearn import backbones, errors
from cplearn.data import augmentations, color, datasets, loaders, sources, workers
from cplearn.data.pixels import CacheOptions, Pixels, open_pixels
from cplearn.flags import ArgumentParser, positive
from cplearn.metrics.knn import knn
from cplearn.text import format_table


def rate_rows(name: str, count: int, peer: float, ours: dict[str, tuple[float, float]]) -> list[tuple[str, ...]]:
    """Return rows of images per second, of what `compare` measured on so many images."""
    return [(f"{name}{kind}", f"{count / peer:.0f}", f"{count / t:.0f}", f"{ratio:.1f}")
            for kind, (t, ratio) in ours.items()]  # fmt: skip


def time_rows(form: str, name: str, peer: float, ours: dict[str, tuple[float, float]]) -> list[tuple[str, ...]]:
    """Return rows of seconds, in this format, of what `compare` measured."""
    return [(f"{name}{kind}", format(peer, form), format(t, form), f"{ratio:.2f}") for kind, (t, ratio) in ours.items()]


# --- views --------------------------------------------------------------------------------------------------


def _sometimes(p: float, change: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    """Return what changes an image with probability p."""
    return lambda image: change(image) if random.random() < p else image


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def dino_transforms(n_local: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    """Return DINO's pipeline of one image: crops, flips and colors by torchvision and Pillow."""
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    colors = [
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
    ]
    last = [T.ToTensor(), T.Normalize(color.MEAN, color.STD)]

    def view(size, scale, blur, solarize):
        crop = T.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
        return T.Compose([crop, *colors, _sometimes(blur, _blur), _sometimes(solarize, ImageOps.solarize), *last])

    scale = (0.4, 1.0) if n_local else (0.14, 1.0)
    views = [view(224, scale, 1.0, 0.0), view(224, scale, 0.1, 0.2), *[view(96, (0.05, 0.4), 0.5, 0.0)] * n_local]
    return lambda image: [transform(image) for transform in views]


def bench_views(args: argparse.Namespace) -> None:
    """Crops, and crops with colors, of full-size photos on one core."""
    torch.set_num_threads(1)
    rows = []
    for n_local in (8, 0):
        views = augmentations.build_views(
            "dino", size=224, local_size=96, n_local=n_local, global_scale=(0.4, 1.0) if n_local else (0.14, 1.0),
            local_scale=(0.05, 0.4),
        )  # fmt: skip
        dataset = sources.build_dataset("folder", args.data_path, "train")
        source = loaders.ViewDataset(Pixels(dataset, views), views, seed=0)
        items = [(0, i) for i in range(min(args.images, len(dataset)))]
        dino = dino_transforms(n_local)

        def worker(source=source, items=items):
            return source.__getitems__(items)

        def both(worker=worker, views=views):
            batch = worker()
            augmentations.color_views(batch.crops, batch.params, views, CPU)

        def peer(dino=dino, dataset=dataset, items=items):
            for _, i in items:
                dino(dataset[i][0])

        measured = compare({"crops": worker, "crops and colors": both}, peer, args.repeats)
        rows += rate_rows(f"2 + {n_local}, ", len(items), *measured)
    print(format_table(rows, ("views, one core", "DINO's transforms, images/s", "here, images/s", "ratio")))


# --- small images -------------------------------------------------------------------------------------------


def bench_cifar(args: argparse.Namespace) -> None:
    """Two views of small JPEG files, loaded and colored on one core, decoded each time and from a cache."""
    from torchvision import datasets as tv
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    root = sources.find_split(Path(args.data_path), "train").root
    dataset, peer_data = datasets.Folder(root), tv.ImageFolder(str(root))
    views = augmentations.build_views(
        "cifar_strong", size=32, local_size=14, n_local=0, global_scale=(0.14, 1.0), local_scale=(0.05, 0.4)
    )
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(32, (0.14, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(color.MEAN, color.STD),
        ]
    )
    count = min(args.images * 16, len(dataset))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    batches = [[(0, i) for i in chosen[k : k + 64]] for k in range(0, count, 64)]

    def load(pixels: Pixels) -> Callable[[], None]:
        source = loaders.ViewDataset(pixels, views, seed=0)

        def run():
            for items in batches:
                batch = source.__getitems__(items)
                augmentations.color_views(batch.crops, batch.params, views, CPU)

        return run

    def peer():
        for items in batches:
            images = [peer_data[i][0] for _, i in items]
            for _ in views:
                torch.stack([transform(image) for image in images])

    start = time.perf_counter()
    cached = open_pixels(dataset, views, CacheOptions("ram", "", 0))
    made = time.perf_counter() - start
    ours = {"decoded each time": load(Pixels(dataset, views)), "cached": load(cached)}
    rows = rate_rows("", count, *compare(ours, peer, args.repeats))
    print(format_table(rows, ("two views of 32 pixels, one core", "torchvision, images/s", "here, images/s", "ratio")))
    print(f"\nMaking the cache of {len(dataset):,} images took {made:.1f} s.")


# --- steps --------------------------------------------------------------------------------------------------


def bench_step(args: argparse.Namespace) -> None:
    """Whole steps: ViT-S/16 at 224 pixels against DINO; small convolutional networks against plain PyTorch."""
    n, rows = args.n, []
    vit = ("--arch", "vit_small", "--image_size", "224", "--local_crops_number", "0", "--batch_size_per_gpu", str(n))
    for c in (131072, 1024):
        names = ("fp32", "bf16") if args.bf16 else ("fp32",)
        ours = {name: TrainingStep([*vit, "--out_dim", str(c), "--precision", name], CPU) for name in names}
        measured = compare(ours, dino_step(c, n, 224, CPU), args.repeats)
        size = f"ViT-S/16, 224 pixels, {n} images, 2 + 0, c = {c:,}, "
        rows += [(name, "DINO step, fp32", *row) for name, *row in time_rows(".2f", size, *measured)]
    for arch in ("timm:resnet10t", "resnet8"):
        flags = ("--arch", arch, "--image_size", "32", "--out_dim", "16384", "--optimizer", "adam")
        measured = compare({"": TrainingStep(flags, CPU)}, plain_step(arch, 16384, 64, 32, CPU), args.repeats)
        name = f"{arch}, 32 pixels, 64 images, c = 16,384"
        rows += [(name, "plain step", *row) for name, *row in time_rows(".2f", name, *measured)]
    print(format_table(rows, ("step", "peer", "peer, s", "here, s", "ratio")))


# --- evaluation ---------------------------------------------------------------------------------------------


def bench_evaluation(args: argparse.Namespace) -> None:
    """The k-NN search of ImageNet-100's size, and features of photos."""
    generator = torch.Generator().manual_seed(0)
    train, test = (nn.functional.normalize(torch.randn(n, 384, generator=generator)) for n in (126_689, 5_000))

    labels = torch.randint(0, 100, (126_689,), generator=generator)

    def plain_search():
        hits = 0
        for block, truth in zip(test.split(100), labels[:5_000].split(100), strict=True):
            cosine, neighbor = (block @ train.T).topk(200)
            votes = torch.zeros(len(block), 100).scatter_add_(1, labels[neighbor], (cosine / 0.07).exp())
            hits += (votes.argmax(1) == truth).sum()

    def search():
        knn(train, labels, test, labels[:5_000], ks=(10, 20, 100, 200), temperature=0.07)

    repeats = max(1, args.repeats // 2)
    name = "k-NN of 5,000 among 126,689 x 384, k up to 200"
    rows = time_rows(".1f", name, *compare({"": search}, plain_search, repeats))
    from torchvision import transforms as T

    dataset = sources.build_dataset("folder", args.data_path, "train")
    backbone = backbones.build_backbone("vit_small", patch_size=16, image_size=224).eval()
    transform = T.Compose([T.Resize(256, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(),
                           T.Normalize(color.MEAN, color.STD)])  # fmt: skip
    chosen = [i % len(dataset) for i in range(args.images)]

    @torch.inference_mode()
    def plain_extraction():
        for i in chosen:
            backbone(transform(dataset[i][0])[None])

    @torch.inference_mode()
    def extraction():
        view = torch.utils.data.Subset(loaders.EvalDataset(dataset, augmentations.eval_view(224)), chosen)
        for pixels, _, _ in torch.utils.data.DataLoader(view, 32, num_workers=workers.default_workers(None)):
            backbone(color.network_input(pixels, pixels.device))

    name = f"features of {args.images} photos, ViT-S/16, 224 pixels"
    rows += time_rows(".1f", name, *compare({"": extraction}, plain_extraction, repeats))
    print(format_table(rows, ("evaluation", "plain loop, s", "here, s", "ratio")))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark."""
    kinds = {"views": bench_views, "cifar": bench_cifar, "step": bench_step, "evaluation": bench_evaluation}
    parser = ArgumentParser(prog="benchmarks/throughput.py", description=__doc__)
    parser.add_argument("what", choices=tuple(kinds))
    parser.add_argument("--data_path", default=None, help="Folder of images")
    parser.add_argument("--images", type=positive(int), default=64, help="Images per measurement")
    parser.add_argument("--repeats", type=positive(int), default=9)
    parser.add_argument("--n", type=positive(int), default=8, help="Images of a ViT step")
    parser.add_argument("--bf16", action="store_true", help="Also time bf16 steps (slow where the CPU emulates it)")
    args = parser.parse_args(argv)
    if args.data_path is None and args.what != "step":
        parser.error(f"{args.what} needs --data_path: a folder of images")
    print(f"{machine()}, medians\n")
    kinds[args.what](args)


if __name__ == "__main__":
    errors.run_script(main)
