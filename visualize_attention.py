"""What a ViT looks at: per head the attention of the CLS token in the last block (as DINO's script of this name).

python visualize_attention.py --pretrained_weights output/run/checkpoint.pth --images photo.jpg --image_size 480
python visualize_attention.py --pretrained_weights CHECKPOINT --images ~/photos --sample 8 --threshold 0.6 --pca
"""

import argparse
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cplearn import errors
from cplearn.data import color, sources
from cplearn.data.augmentations import LONGEST
from cplearn.data.datasets import ImageDataset
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.features import cli
from cplearn.files import check_output_dir, check_replaceable, replaceable, write_bytes, write_text
from cplearn.host import git_commit
from cplearn.load import Model
from cplearn.pictures import attention
from cplearn.pictures import attention_figures as figures
from cplearn.pictures.style import png_mark, save_picture
from cplearn.text import printable
from utils import ArgumentParser, expand_paths, format_table, positive

MOST = 1000  # images that are drawn without being asked for by number
FILE_SIDE = 480  # pixels of a picture's longer side at least; more if the network sees more, or the sheet shows more
SOFTWARE, RECORD, MAPS = "visualize_attention.py", "attention.json", "attention.npz"
MARKS = {".png": png_mark(SOFTWARE), ".json": b'"script": "visualize_attention"', ".npz": SOFTWARE.encode()}
EARLIER = ("sheet.png", "sheet_[0-9]*.png", "[0-9]*_*/*.png", MAPS)  # what an earlier call may have left


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="visualize_attention.py", description=__doc__)
    g = cli.add_weights_flags(parser)
    g.add_argument("--random_init", action="store_true", help="Draw the same network at random initialization: what a picture has to be compared with")
    g = parser.add_argument_group("images")
    g.add_argument("--images", default=None, help="A folder of images (with its sub-folders), or one image")
    g.add_argument("--image_column", default=None, help="Where a row of parquet or a sample of a tar has several images: the column's name, or the name's ending (left.jpg)")
    g.add_argument("--sample", type=positive(int), default=None, help="Draw so many of them, chosen at random by --seed (default: all)")
    g.add_argument("--keep_aspect", action="store_true", help="Show the network whole images, --image_size being their shorter side (default: the square that evaluations cut)")
    g = parser.add_argument_group("pictures")
    g.add_argument("--threshold", type=_between(float, 0, 1), default=None, help="Draw masks too: the fewest patches that hold this share of the attention (DINO draws 0.6)")
    g.add_argument("--pca", action="store_true", help="Color patch tokens by their first three principal components over all images given")
    g.add_argument("--pca_foreground", action="store_true", help="The same of the foreground alone: patches on the attended side of the first component")
    g.add_argument("--tile", type=_between(int, 32, 2048), default=160, help="Pixels of a picture in the sheet")
    g.add_argument("--save_maps", action="store_true", help="Write attention.npz, too")
    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", default=None, help="Where pictures go (default: attention/ beside the weights)")
    cli.add_run_flags(g)
    # fmt: on
    return parser


def _between(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = positive(kind)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and at most {high}")
        return value

    return parse


def choose(dataset: ImageDataset, args: argparse.Namespace) -> ImageDataset:
    """Return the images to draw. Raises `UserError` if there are too many to mean all of them."""
    if args.sample is not None:
        return sources.Sample(dataset, args.sample, args.seed)
    if len(dataset) > MOST:
        raise UserError(
            f"--images {printable(args.images)} holds {len(dataset):,} images: add --sample 16, for instance"
        )
    return dataset


def check_images(dataset: ImageDataset, keep_aspect: bool) -> None:
    """Decode every image once.

    Raises `LocalError` for one that cannot be read, `UserError` for one that is too long to be shown whole.
    """
    for i, name in enumerate(dataset.names):
        size = dataset.read(i)[0].size
        if keep_aspect and max(size) > LONGEST * min(size):
            raise UserError(
                f"--keep_aspect: {printable(name)} has {size[0]} x {size[1]} pixels, more than {LONGEST} to 1: leave "
                "the flag out, or take the image away"
            )


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


# --- what is drawn ----------------------------------------------------------------------------------------


class Looks:
    """A network's look at each image, one after the other, as they may have different shapes; again at each pass."""

    def __init__(self, model: Model, dataset: ImageDataset, args: argparse.Namespace, device: torch.device):
        self.model, self.dataset, self.keep_aspect, self.device = model, dataset, args.keep_aspect, device

    def __iter__(self) -> Iterator[tuple[Image.Image, attention.View, attention.LastBlock]]:
        patch = attention.patch_of(self.model.backbone)
        for i in tqdm(range(len(self.dataset)), unit="image", leave=False, disable=None):  # quiet without a terminal
            image = self.dataset.read(i)[0]
            view = attention.view_of(image, self.model.image_size, patch, keep_aspect=self.keep_aspect)
            x = color.network_input(view.pixels[None], self.device)
            last = attention.last_block(self.model.backbone, x, self.model.arch)
            yield image, view, attention.LastBlock(*(part[0].cpu() for part in last))


def draw(looks: Looks, folder: Path, args: argparse.Namespace) -> list[dict]:
    """Write all pictures and sheets; return the numbers of each image."""
    colors, records, maps, rows = None, [], [], []
    if args.pca or args.pca_foreground:
        colors = attention.PatchColors(lambda: (last for *_, last in looks), foreground=args.pca_foreground)
    sheets = figures.sheet_names(len(looks.dataset))
    for i, (image, view, last) in enumerate(looks):
        name = str(looks.dataset.names[i])
        shares = figures.by_name(last.attention * tokens_of(last))
        seen = figures.Seen(
            printable(name),
            figures.photo_of(image, view.region, max(FILE_SIDE, args.tile, *view.pixels.shape[1:])),
            shares,
            {key: attention.mass_mask(x, args.threshold) for key, x in shares.items() if args.threshold},
            colors.of(last.tokens) if colors else None,
        )
        pictures, own = figures.pictures(seen), figures.folder_name(i + 1, name)
        (folder / own).mkdir(exist_ok=True)
        for key, picture in pictures.items():
            save_picture(picture, folder / own / f"{key}.png", SOFTWARE)
        rows += figures.sheet_rows(seen, pictures, args.tile, args.threshold)
        if (i + 1) % figures.ROWS == 0 or i + 1 == len(looks.dataset):
            sheet = figures.draw(rows, list(pictures), args.tile, args.threshold, title(looks.model))
            save_picture(sheet, folder / sheets[i // figures.ROWS], SOFTWARE)
            rows = []
        records.append({"image": seen.name, "folder": own, **numbers(last)})
        maps += [last] * args.save_maps
    if args.save_maps:
        write_bytes(folder / MAPS, packed(looks.dataset.names, maps, args.keep_aspect))
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


def packed(names: Sequence[str], maps: list[attention.LastBlock], keep_aspect: bool) -> bytes:
    """Return attention.npz: names (n,), attention (n, heads, h, w) and prefix (n, heads, p), which together sum to 1.

    With --keep_aspect shapes differ: attention_0, attention_1 ... (heads, h, w) instead of attention.
    """
    arrays = {"names": np.array([printable(name) for name in names])}
    arrays["prefix"] = torch.stack([x.prefix for x in maps]).numpy()
    if keep_aspect:
        arrays |= {f"attention_{i}": x.attention.numpy() for i, x in enumerate(maps)}
    else:
        arrays["attention"] = torch.stack([x.attention for x in maps]).numpy()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = MARKS[".npz"]
    return content.getvalue()


# --- files ------------------------------------------------------------------------------------------------


def files_of(folder: Path, dataset: ImageDataset, heads: int, args: argparse.Namespace) -> list[Path]:
    """Return all files that are going to be written."""
    names = figures.picture_names(heads, args.threshold is not None, args.pca or args.pca_foreground)
    folders = [folder / figures.folder_name(i + 1, str(name)) for i, name in enumerate(dataset.names)]
    files = [RECORD, *figures.sheet_names(len(folders)), *([MAPS] if args.save_maps else [])]
    return [*(folder / name for name in files), *(own / f"{name}.png" for own in folders for name in names)]


def remove_others(folder: Path, written: list[Path]) -> None:
    """Remove what an earlier call wrote and this one did not."""
    for path in {path for pattern in EARLIER for path in folder.glob(pattern)} - set(written):
        if replaceable(path, MARKS[path.suffix]):
            path.unlink()


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Draw; return the numbers of each image on rank 0, [] elsewhere."""
    args = get_args_parser().parse_args(argv)
    if not args.images:
        raise UserError("--images is missing: give a folder of images, or one image")
    expand_paths(args, "images", "output_dir")
    device = launch.init(args.dist_url, args.device)
    if not collectives.is_main():  # one process is enough for pictures
        return []
    dataset = choose(sources.open_images(args.images, image_column=args.image_column), args)
    model = cli.open_network(args, device)
    heads = check_network(model, args.keep_aspect, device)
    check_images(dataset, args.keep_aspect)
    folder = Path(args.output_dir or Path(args.pretrained_weights).parent / "attention")
    files = files_of(folder, dataset, heads, args)
    for path in files:
        check_replaceable(path, MARKS[path.suffix], "--output_dir")
    check_output_dir(str(folder))
    records = draw(Looks(model, dataset, args, device), folder, args)
    remove_others(folder, files)
    record = {"script": "visualize_attention", "arch": model.arch, **model.source(), "image_size": model.image_size}
    record |= {"commit": git_commit(), "flags": vars(args), "images": records}
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    report(records, heads)
    pictures = f"the pictures of {len(records)} image{'s' * (len(records) > 1)}"
    print(f"Wrote {', '.join(figures.sheet_names(len(records)))} and {pictures} to {printable(folder)}")
    return records


if __name__ == "__main__":
    errors.run_script(main)
