"""Color half of DINO's views: batched on the device, against torchvision's v2 transforms image by image.

    python benchmarks/augment.py [--device cuda]

Prints milliseconds per batch and the ratio, both measured in this run. The peer applies ColorJitter,
RandomGrayscale, GaussianBlur and RandomSolarize with the same probabilities and strengths.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms.v2 as v2
from torch.utils.data import default_collate

from cplearn.data.augmentations import MEAN, STD, build_views, color, draw, rng_for
from cplearn.text import format_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def milliseconds(function, device: str, repeats: int) -> float:
    """Median of single calls after one warm-up."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for size, n in ((32, 64), (224, 16)):
        views = build_views(
            "dino", size=size, local_size=size, n_local=0, global_scale=(0.4, 1), local_scale=(0.1, 0.4)
        )
        pixels = torch.randint(
            0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        pixels = pixels.to(args.device)
        for index, view in enumerate(views):
            params = default_collate([draw(view, size, size, rng_for(0, 0, i, index)) for i in range(n)])
            peer = v2.Compose(
                [
                    v2.ToDtype(torch.float32, scale=True),
                    v2.RandomApply([v2.ColorJitter(*view.jitter)], p=view.jitter_p),
                    v2.RandomGrayscale(view.gray_p),
                    v2.RandomApply([v2.GaussianBlur(13, view.blur_sigma)], p=view.blur_p),
                    v2.RandomSolarize(128 / 255, view.solarize_p),
                    v2.Normalize(MEAN, STD),
                ]
            )
            ours = milliseconds(lambda x=pixels, p=params, v=view: color(x, p, v), args.device, args.repeats)
            theirs = milliseconds(
                lambda x=pixels, t=peer: torch.stack([t(image) for image in x]), args.device, args.repeats
            )
            rows.append((f"{n} images, {size} px, view {index + 1}", ours, theirs, ours / theirs))
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.repeats} repeats, median"
    )
    print(format_table(rows, ("color half", "batched (ms)", "torchvision v2 (ms)", "ratio")))


if __name__ == "__main__":
    main()
