"""How to feed this machine: tries numbers of loader processes, with and without a cache, and recommends the flags.

    python benchmarks/loader.py --data_path ~/pictures --arch resnet8bn_w64 --image_size 64 --out_dim 4096

takes the flags of main_cplearn.py and runs some steps of that training with each setting; nothing is saved.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import synchronize
from steps import TrainingStep

import main_cplearn
from cplearn import errors
from cplearn.data import augmentations, loaders
from cplearn.data.pixels import SMALL, CacheOptions, Pixels, open_pixels
from cplearn.distributed import launch
from cplearn.flags import ArgumentParser, positive
from cplearn.host import available_memory, usable_cores
from cplearn.precision import choose_precision
from cplearn.text import format_table

NEAR = 1.03  # within this factor of the fastest, the setting with fewer processes is taken


def endless(loader: torch.utils.data.DataLoader) -> Iterator[loaders.Batch]:
    """Yield batches of one epoch after the other."""
    while True:
        yield from loader
        loader.batch_sampler.epoch += 1


def measure(step: TrainingStep, pixels: Pixels, views: list, workers: int, steps: int) -> tuple[float, float]:
    """Return images per second, and the share of the time that waited for images, after two steps of warm-up."""
    n = step.args.batch_size_per_gpu
    loader = loaders.train_loader(
        pixels, views, batch_size=n, seed=0, num_workers=workers, pin_memory=step.device.type == "cuda"
    )
    batches, waited, start = endless(loader), 0.0, 0.0
    for done in range(steps + 2):
        if done == 2:
            synchronize(step.device)
            waited, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        step.images = augmentations.color_views(batch.crops, batch.params, views, step.device)
        step()
    synchronize(step.device)
    seconds = time.perf_counter() - start
    loader.stop()
    return steps * n / seconds, waited / seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Try the settings, print them, and recommend one."""
    parser = ArgumentParser(prog="benchmarks/loader.py", description=__doc__)
    parser.add_argument("--steps", type=positive(int), default=10, help="Timed steps of each setting")
    own, flags = parser.parse_known_args(argv)
    args = main_cplearn.parse_args(flags)
    device = launch.init(args.dist_url, args.device)
    choose_precision(args, device)
    dataset, views = main_cplearn.find_images(args)
    step = TrainingStep([*flags, "--precision", args.precision], device, images=[])
    expected = Pixels(dataset, views).expected_bytes()
    kinds = ["none"] + (["ram"] if expected < available_memory() // 2 else [])
    print(f"{len(dataset):,} images, about {expected / 1e9:.2f} GB decoded, {usable_cores()} cores, {device}\n")
    numbers = sorted({0, 1, *(n for n in (2, 4, 8, 16, 32) if n < usable_cores())})
    tried = []
    for kind in kinds:
        pixels = open_pixels(dataset, views, CacheOptions(kind, args.cache_dir, max(numbers)))
        for workers in numbers:
            rate, wait = measure(step, pixels, views, workers, own.steps)
            tried.append((rate, -workers, kind, wait))
    rows = [(kind, -workers, f"{rate:.0f}", f"{wait:.0%}") for rate, workers, kind, wait in tried]
    print(format_table(rows, ("--cache", "--num_workers", "images/s", "wait")))
    fastest = max(tried)[0]
    _, workers, kind, _ = max((x for x in tried if x[0] * NEAR >= fastest), key=lambda x: (x[1], x[0]))
    kept = " (the default for so few images)" if kind == "ram" and expected <= SMALL else ""
    if kind == "ram" and expected > SMALL:
        kept = ", or --cache disk to decode them once for all runs"
    print(f"\nRecommended: --num_workers {-workers} --cache {kind}{kept}")


if __name__ == "__main__":
    errors.run_script(main)
