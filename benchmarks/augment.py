"""Color half of DINO's views: batched on the device, against torchvision's v2 transforms image by image.

    python benchmarks/augment.py [--device cuda]

Prints milliseconds per batch and the ratio, both measured in this run. The peer applies ColorJitter,
RandomGrayscale, GaussianBlur and RandomSolarize with the same probabilities and strengths.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import seconds

from cplearn import errors
from cplearn.data.augmentations import MEAN, STD, View, build_views, color, draw, rng_for
from cplearn.flags import ArgumentParser, positive
from cplearn.text import format_table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both views of DINO's recipe at two sizes and print the table."""
    parser = ArgumentParser(prog="benchmarks/augment.py", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=positive(int), default=5)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows = []
    for size, n in ((32, 64), (224, 16)):
        scales = {"global_scale": (0.4, 1), "local_scale": (0.1, 0.4)}
        views = build_views("dino", size=size, local_size=size, n_local=0, **scales)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
        for index, view in enumerate(views):
            params = default_collate([draw(view, size, size, rng_for(0, 0, i, index)) for i in range(n)])
            peer = torchvision_transform(view)
            ours = milliseconds(lambda x=pixels, p=params, v=view: color(x, p, v), device, args.repeats)
            theirs = milliseconds(lambda x=pixels, t=peer: torch.stack([t(image) for image in x]), device, args.repeats)
            rows.append((f"{n} images, {size} px, view {index + 1}", ours, theirs, ours / theirs))
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {args.repeats} repeats, median")
    print(format_table(rows, ("color half", "batched (ms)", "torchvision v2 (ms)", "ratio")))


def torchvision_transform(view: View) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the peer: the same color transforms of one image."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(*view.jitter)], p=view.jitter_p),
            v2.RandomGrayscale(view.gray_p),
            v2.RandomApply([v2.GaussianBlur(13, view.blur_sigma)], p=view.blur_p),
            v2.RandomSolarize(128 / 255, view.solarize_p),
            v2.Normalize(MEAN, STD),
        ]
    )


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median of single calls after one warm-up."""
    function()
    return 1000 * statistics.median(seconds(function, device) for _ in range(repeats))


if __name__ == "__main__":
    errors.run_script(main)
