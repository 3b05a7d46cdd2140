"""What a ViT looks at: per head the attention of the CLS token in the last block (as DINO's script of this name).

python visualize_attention.py --pretrained_weights output/run/checkpoint.pth --images photo.jpg --image_size 480
python visualize_attention.py --pretrained_weights CHECKPOINT --images ~/photos --sample 8 --threshold 0.6 --pca
"""

import argparse
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cplearn import errors
from cplearn.data import color, sources
from cplearn.data.datasets import ImageDataset
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.features import cli
from cplearn.host import git_commit
from cplearn.load import Model
from cplearn.pictures import attention
from cplearn.pictures import attention_figures as figures
from cplearn.text import printable
from utils import ArgumentParser, expand_paths, format_table, positive

MOST = 1000  # images that are drawn without being asked for by number
FILE_SIDE = 480  # pixels of a picture's longer side at least; more if the network sees more


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="visualize_attention.py", description=__doc__)
    g = cli.add_weights_flags(parser)
    g.add_argument("--random_init", action="store_true", help="Draw the same network at random initialization: what a picture has to be compared with")
    g = parser.add_argument_group("images")
    g.add_argument("--images", default=None, help="A folder of images (with its sub-folders), or one image")
    g.add_argument("--sample", type=positive(int), default=None, help="Draw so many of them, chosen at random by --seed (default: all)")
    g.add_argument("--keep_aspect", action="store_true", help="Show the network whole images, --image_size being their shorter side (default: the square that evaluations cut)")
    g = parser.add_argument_group("pictures")
    g.add_argument("--threshold", type=_share, default=None, help="Draw masks too: the fewest patches that hold this share of the attention (DINO draws 0.6)")
    g.add_argument("--pca", action="store_true", help="Color patch tokens by their first three principal components over all images given")
    g.add_argument("--pca_foreground", action="store_true", help="The same of the foreground alone: patches on the attended side of the first component")
    g.add_argument("--tile", type=_tile, default=160, help="Pixels of a picture in the sheet")
    g.add_argument("--save_maps", action="store_true", help="Write attention.npz, too")
    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", default=None, help="Where pictures go (default: attention/ beside the weights)")
    cli.add_run_flags(g)
    # fmt: on
    return parser


def _share(text: str) -> float:
    value = positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def _tile(text: str) -> int:
    value = positive(int)(text)
    if not 32 <= value <= 2048:
        raise argparse.ArgumentTypeError(f"{text} must be at least 32 and at most 2048")
    return value


class Chosen(NamedTuple):
    """An image to draw."""

    index: int  # in the data set
    name: str
    folder: str
    view: attention.View


def choose(dataset: ImageDataset, args: argparse.Namespace) -> ImageDataset:
    """Return the images to draw. Raises `UserError` if there are too many to mean all of them."""
    if args.sample is not None:
        return sources.Sample(dataset, args.sample, args.seed)
    if len(dataset) > MOST:
        raise UserError(
            f"--images {printable(args.images)} holds {len(dataset):,} images: add --sample 16, for instance"
        )
    return dataset


def check_images(dataset: ImageDataset, model: Model, keep_aspect: bool) -> list[Chosen]:
    """Decode every image once and plan its view. Raises `LocalError` for one that cannot be read, `UserError` for one
    that is too long."""
    patch = attention.patch_of(model.backbone)
    found = []
    for i in range(len(dataset)):
        size = dataset.read(i)[0].size
        name = str(dataset.names[i])
        try:
            view = attention.plan_view(size, model.image_size, patch, keep_aspect=keep_aspect)
        except UserError as error:
            raise UserError(f"{printable(name)}: {error}") from None
        found.append(Chosen(i, name, figures.folder_name(i + 1, name), view))
    return found


def check_network(model: Model, keep_aspect: bool, device: torch.device) -> int:
    """Return the number of heads. Raises `UserError` for a network without such attention, or one for squares only."""
    attention.check_attention(model.backbone, model.arch)
    height = width = model.image_size
    if keep_aspect:
        width += attention.patch_of(model.backbone)[1]
    try:
        return attention.last_block(model.backbone, torch.zeros(1, 3, height, width, device=device), model.arch).heads
    except (RuntimeError, AssertionError) as error:  # the square it has taken already
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--keep_aspect: --arch {model.arch} takes square images only: leave it out ({reason})"
        ) from None


class Pass:
    """Image by image, for they may have different shapes: what the network makes of each."""

    def __init__(self, model: Model, dataset, chosen: list[Chosen], device: torch.device):
        self.model, self.dataset, self.chosen, self.device = model, dataset, chosen, device

    def __iter__(self) -> Iterator[tuple[Chosen, Image.Image, attention.LastBlock]]:
        for one in tqdm(self.chosen, unit="image", leave=False, disable=None):  # None: quiet without a terminal
            image = self.dataset.read(one.index)[0]
            x = color.network_input(one.view.pixels(image)[None], self.device)
            seen = attention.last_block(self.model.backbone, x, self.model.arch)
            yield one, image, attention.LastBlock(*(part[0].cpu() for part in seen))


def draw(images: Pass, out: figures.OutputFolder, args: argparse.Namespace, pages: list[str]) -> list[dict]:
    """Write all pictures and sheets; return the numbers of each image."""
    colors, records, maps = None, [], {}
    if args.pca or args.pca_foreground:
        colors = attention.PatchColors(lambda: (seen for *_, seen in images), foreground=args.pca_foreground)
    sheet = figures.Sheet(args.tile, title(images.model), args.threshold)
    for one, image, seen in images:
        named = figures.by_name(seen.attention * tokens_of(seen))
        whole = figures.Seen(
            one.name,
            figures.photo_of(image, one.view, max(FILE_SIDE, one.view.width, one.view.height)),
            named,
            {k: attention.mass_mask(x, args.threshold) for k, x in named.items()} if args.threshold else None,
            colors.of(seen.tokens) if colors else None,
        )
        for name, picture in figures.pictures(whole).items():
            out.picture(f"{one.folder}/{name}.png", picture)
        sheet.add(dataclasses.replace(whole, photo=figures.photo_of(image, one.view, args.tile)))
        records.append({"image": printable(one.name), "folder": one.folder, **numbers(seen)})
        if args.save_maps:
            maps[one.name] = seen
        if len(records) % figures.ROWS == 0 or len(records) == len(images.chosen):
            out.picture(pages[(len(records) - 1) // figures.ROWS], sheet.draw())
            sheet.rows = []
    if args.save_maps:
        out.write("attention.npz", packed(maps, args.keep_aspect))
    return records


def tokens_of(seen: attention.LastBlock) -> int:
    """Return how many tokens share the attention."""
    return seen.attention[0].numel() + seen.prefix.shape[-1]


def title(model: Model) -> str:
    """Return what a sheet is of, in one line."""
    trained = "random initialization" if model.random_init else f"{printable(Path(model.weights).name)}"
    epochs = f", epoch {model.epoch}" if model.epoch is not None and not model.random_init else ""
    patch = "x".join(str(x) for x in sorted(set(attention.patch_of(model.backbone))))
    return f"{model.arch}, patches of {patch} px, images of {model.image_size} px, {trained}{epochs}"


def numbers(seen: attention.LastBlock) -> dict[str, list[float]]:
    """Return for each head: the attention that goes to patches, the share of patches that hold half of that, and the
    largest as a multiple of an even share."""
    return {
        "on_patches": seen.attention.sum((1, 2)).tolist(),
        "patches_of_half": attention.mass_mask(seen.attention, 0.5).double().mean((1, 2)).tolist(),
        "largest": (seen.attention.amax((1, 2)) * tokens_of(seen)).tolist(),
    }


def report(records: list[dict], heads: int) -> None:
    """Print the mean of the numbers over images, for each head."""
    rows = []
    for i in range(heads):
        means = [float(np.mean([r[k][i] for r in records])) for k in ("on_patches", "patches_of_half", "largest")]
        rows.append((f"head {i + 1}", *means))
    print(format_table(rows, ("", "on patches", "patches with half of it", "largest (1: evenly spread)")))


def packed(maps: dict[str, attention.LastBlock], keep_aspect: bool) -> bytes:
    """Return attention.npz: names (n,), attention (n, heads, h, w) and prefix (n, heads, p), which together sum to 1.

    With --keep_aspect shapes differ: attention_0, attention_1 ... (heads, h, w) instead of attention.
    """
    seen = list(maps.values())
    arrays = {"names": np.array([printable(name) for name in maps])}
    arrays["prefix"] = torch.stack([x.prefix for x in seen]).numpy()
    if keep_aspect:
        arrays |= {f"attention_{i}": x.attention.numpy() for i, x in enumerate(seen)}
    else:
        arrays["attention"] = torch.stack([x.attention for x in seen]).numpy()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Draw; return the numbers of each image on rank 0, [] elsewhere."""
    args = get_args_parser().parse_args(argv)
    if not args.images:
        raise UserError("--images is missing: give a folder of images, or one image")
    expand_paths(args, "images", "output_dir")
    device = launch.init(args.dist_url, args.device)
    if not collectives.is_main():  # one process is enough for pictures
        return []
    dataset = choose(sources.open_images(args.images), args)
    model = cli.open_network(args, device)
    heads = check_network(model, args.keep_aspect, device)
    chosen = check_images(dataset, model, args.keep_aspect)
    count = -(-len(chosen) // figures.ROWS)
    pages = ["sheet.png"] if count == 1 else [f"sheet_{k + 1:02}.png" for k in range(count)]
    names = figures.picture_names(heads, args.threshold is not None, args.pca or args.pca_foreground)
    planned = [*pages, *(f"{one.folder}/{name}.png" for one in chosen for name in names)]
    folder = args.output_dir or str(Path(args.pretrained_weights).parent / "attention")
    out = figures.OutputFolder(folder, [*planned, *(["attention.npz"] if args.save_maps else [])])
    out.open()
    records = draw(Pass(model, dataset, chosen, device), out, args, pages)
    record = {"arch": model.arch, **model.source(), "image_size": model.image_size, "commit": git_commit()}
    out.close({**record, "flags": vars(args), "images": records})
    report(records, heads)
    print(
        f"Wrote {', '.join(pages)} and the pictures of {len(chosen)} image{'s' * (len(chosen) > 1)} to {printable(folder)}"
    )
    return records


if __name__ == "__main__":
    errors.run_script(main)
