"""How to feed this machine: tries numbers of loader processes, with and without a cache, and recommends the flags.

    python benchmarks/loader.py --data_path ~/pictures --arch resnet8bn_w64 --image_size 64 --out_dim 4096

takes the flags of main_cplearn.py and runs some steps of that training with each setting; nothing is saved.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import synchronize

import main_cplearn
from cplearn import errors
from cplearn.data import augmentations, loaders
from cplearn.data.pixels import SMALL, CacheOptions, Pixels, open_pixels
from cplearn.distributed import launch
from cplearn.flags import ArgumentParser, positive
from cplearn.host import available_memory, usable_cores
from cplearn.methods import build_method
from cplearn.precision import autocast, choose_precision
from cplearn.text import format_table
from cplearn.training.optimizer import build_optimizer

NEAR = 1.03  # within this factor of the fastest, the setting with fewer processes is taken


class Trial:
    """A training that can be fed in several ways."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.dataset, self.views = main_cplearn.find_images(args)
        self.method = build_method(args).to(device)
        self.optimizer = build_optimizer(self.method, args)

    def step(self, batch: loaders.Batch) -> None:
        images = augmentations.color_views(batch.crops, batch.params, self.views, self.device)
        with autocast(self.device, self.args.precision):
            output = self.method(images)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimizer.step()

    def measure(self, pixels: Pixels, workers: int, steps: int) -> tuple[float, float]:
        """Return images per second, and the share of the time that waited for images, after two steps of warm-up."""
        loader = loaders.train_loader(
            pixels, self.views, batch_size=self.args.batch_size_per_gpu, seed=0, num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        done, waited, start = 0, 0.0, 0.0
        while done < steps + 2:
            batches = iter(loader)
            for _ in range(min(len(loader), steps + 2 - done)):
                if done == 2:
                    synchronize(self.device)
                    waited, start = 0.0, time.perf_counter()
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                self.step(batch)
                done += 1
            loader.batch_sampler.epoch += 1
        synchronize(self.device)
        seconds = time.perf_counter() - start
        loader.stop()
        return steps * self.args.batch_size_per_gpu / seconds, waited / seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Try the settings, print them, and recommend one."""
    parser = ArgumentParser(prog="benchmarks/loader.py", description=__doc__)
    parser.add_argument("--steps", type=positive(int), default=10, help="Timed steps of each setting")
    own, rest = parser.parse_known_args(argv)
    args = main_cplearn.parse_args(rest)
    device = launch.init(args.dist_url, args.device)
    choose_precision(args, device)
    trial = Trial(args, device)
    expected = Pixels(trial.dataset, trial.views).expected_bytes()
    kinds = ["none"] + (["ram"] if expected < available_memory() // 2 else [])
    print(f"{len(trial.dataset):,} images, about {expected / 1e9:.2f} GB decoded, {usable_cores()} cores, {device}\n")
    numbers = sorted({0, 1, *(n for n in (2, 4, 8, 16, 32) if n < usable_cores())})
    tried = []
    for kind in kinds:
        pixels = open_pixels(trial.dataset, trial.views, CacheOptions(kind, args.cache_dir, max(numbers)))
        for workers in numbers:
            rate, wait = trial.measure(pixels, workers, own.steps)
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
