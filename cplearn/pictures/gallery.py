"""What the codes of a network stand for: the images that chose each, how surely, how pure it is, what is near it."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cplearn.data import augmentations
from cplearn.data.datasets import ImageDataset
from cplearn.features.splits import Features
from cplearn.methods.base import Method
from cplearn.metrics import collapse

SHUFFLES = 10  # of the labels, for the level of chance
NEAREST = 5  # codes named beside each
TOP_CLASSES = 3  # named for each code


@dataclass(frozen=True)
class Code:
    """One code and what is shown of it."""

    number: int
    count: int  # images that chose it
    certainty: float  # mean over these
    classes: list[tuple[str, int]]  # its largest classes with their images, the largest first; [] without labels
    chance: float | None  # share of the largest class of as many images with shuffled labels
    images: list[int]  # shown ones, from the most to the least certain
    near_vectors: list[tuple[int, float]]  # shown codes by the cosine of their vectors, [] if they have none
    near_images: list[tuple[int, float]]  # by the cosine of their images' mean features, less the mean of all

    @property
    def purity(self) -> float | None:
        return self.classes[0][1] / self.count if self.classes else None


@dataclass(frozen=True)
class Use:
    """How one network uses its codes, in numbers."""

    used: int
    perplexity: float  # exp(entropy) of how often each is chosen
    purity: float | None  # share of the images that are of their code's largest class
    chance: float | None  # the same of shuffled labels: random codes with the same counts


@dataclass(frozen=True)
class Query:
    """An image that was asked for, and the images nearest to it."""

    name: str
    jpeg: bytes
    nearest: list[tuple[int, float]]  # image, cosine of the features


@dataclass
class Gallery:
    """Everything that the page shows. Images are numbers: rows of `data`."""

    data: Features
    certainty: Tensor | None = None  # (n,), None for weights without codes
    certainty_name: str = ""
    use: Use | None = None
    baseline: Use | None = None  # at random initialization
    codes: list[Code] = field(default_factory=list)  # the most used first
    most: list[int] = field(default_factory=list)  # the most certain images, the most certain first
    least: list[int] = field(default_factory=list)  # the least certain images, the least certain first
    queries: list[Query] = field(default_factory=list)
    thumbnails: dict[int, bytes] = field(default_factory=dict)  # JPEG of every image that is shown


# --- numbers --------------------------------------------------------------------------------------------


@torch.inference_mode()
def certainty_of(method: Method, features: Tensor, device: torch.device, rows: int = 1024) -> Tensor:
    """Return how sure a method is of each image's code, see `Method.certainty`. Shape: (n, f) -> float32 (n,)."""
    parts = [method.certainty(method.embed(part.to(device))).float().cpu() for part in features.split(rows)]
    return torch.cat(parts)


def largest_classes(codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many images each used code has, and how many of them are of its largest class.

    Shape: int (n,), int (n,) from 0 -> int (used,), int (used,), by the number of the code.
    """
    _, index, counts = np.unique(codes, return_inverse=True, return_counts=True)
    width = labels.max() + 1
    pairs, sizes = np.unique(index * width + labels, return_counts=True)
    largest = np.zeros(len(counts), dtype=np.int64)
    np.maximum.at(largest, pairs // width, sizes)
    return counts, largest


def chance_level(codes: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the expected images of the largest class of each used code if labels had nothing to do with codes.

    The mean over `SHUFFLES` permutations of the labels. Shape: int (n,), int (n,) -> float (used,).
    """
    rng = np.random.default_rng(seed)
    return np.mean([largest_classes(codes, rng.permutation(labels))[1] for _ in range(SHUFFLES)], axis=0)


def measure_use(data: Features, seed: int) -> Use:
    """Return how many codes are used, how evenly, and how pure they are beside chance."""
    used, perplexity = collapse.code_usage(data.codes)
    if not data.classes:
        return Use(used, perplexity, None, None)
    codes, labels = data.codes.numpy(), data.labels.numpy()
    purity = largest_classes(codes, labels)[1].sum() / len(codes)
    return Use(used, perplexity, float(purity), float(chance_level(codes, labels, seed).sum() / len(codes)))


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return `count` items, evenly spaced from the first to the last of them; all of them if they are fewer."""
    if count >= len(items):
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def nearest(queries: Tensor, rows: Tensor, count: int, *, itself: bool = False) -> list[list[tuple[int, float]]]:
    """Return the nearest rows of each query by cosine, the nearest first.

    `itself`: queries are the rows, and none is near itself. Shape: (q, d), (n, d) -> q lists of (row, cosine).
    """
    cosines = F.normalize(queries.float().cpu(), dim=1) @ F.normalize(rows.float().cpu(), dim=1).T
    if itself:
        cosines.fill_diagonal_(-torch.inf)
    values, index = cosines.topk(min(count, len(rows) - itself), dim=1)
    return [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(index, values, strict=True)]


# --- what is shown --------------------------------------------------------------------------------------


def describe_codes(
    data: Features,
    certainty: Tensor,
    vectors_of: Callable[[Tensor], Tensor | None],
    *,
    count: int,
    per_code: int,
    seed: int,
) -> list[Code]:
    """Return the most used codes (the lower number first where they are used alike), the most used first.

    Images of a code are evenly spaced by certainty, so that the page does not flatter. `vectors_of`: codes to their
    vectors (or None), as `Method.code_vectors`, which is asked only for the codes that are returned.
    """
    codes = data.codes.numpy()
    used, counts = np.unique(codes, return_counts=True)
    chance = dict(zip(used, chance_level(codes, data.labels.numpy(), seed), strict=True)) if data.classes else {}
    shown = used[np.argsort(-counts, kind="stable")[:count]]
    order = torch.argsort(certainty, descending=True, stable=True).numpy()  # and within each code
    members = {number: order[codes[order] == number] for number in shown}
    vectors = vectors_of(torch.from_numpy(shown))
    by_vector = [[]] * len(shown) if vectors is None else nearest(vectors, vectors, NEAREST, itself=True)
    center = F.normalize(data.features, dim=1).mean(0)
    means = torch.stack([F.normalize(data.features[members[k]], dim=1).mean(0) - center for k in shown])
    by_images = nearest(means, means, NEAREST, itself=True)
    return [
        Code(
            number=int(number),
            count=len(members[number]),
            certainty=certainty[members[number]].mean().item(),
            classes=_class_counts(data, members[number]),
            chance=float(chance[number] / len(members[number])) if chance else None,
            images=spread(members[number].tolist(), per_code),
            near_vectors=[(int(shown[j]), cosine) for j, cosine in by_vector[i]],
            near_images=[(int(shown[j]), cosine) for j, cosine in by_images[i]],
        )
        for i, number in enumerate(shown)
    ]


def _class_counts(data: Features, images: np.ndarray) -> list[tuple[str, int]]:
    if not data.classes:
        return []
    counts = np.bincount(data.labels.numpy()[images], minlength=len(data.classes))
    top = np.argsort(-counts, kind="stable")[:TOP_CLASSES]
    return [(data.classes[k], int(counts[k])) for k in top if counts[k]]


# --- thumbnails -----------------------------------------------------------------------------------------


def thumbnail(image: Image.Image, image_size: int, size: int) -> bytes:
    """Return what the network sees of an image as JPEG of at most `size` pixels."""
    view = Image.fromarray(augmentations.eval_pixels(image, image_size).permute(1, 2, 0).numpy())
    if image_size > size:
        view = view.resize((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    view.save(file, "JPEG", quality=85)
    return file.getvalue()


def read_thumbnail(dataset: ImageDataset, i: int, image_size: int, size: int) -> bytes:
    """Read an image again, large photos at a fraction of their size, and return its `thumbnail`."""

    def reduction(width: int, height: int) -> int:
        return next((k for k in (8, 4, 2) if min(width, height) // k >= 1.25 * image_size), 1)

    return thumbnail(dataset.read(i, reduction)[0], image_size, size)


def images_shown(gallery: Gallery) -> list[int]:
    """Return every image that the page shows, each once."""
    near = [i for query in gallery.queries for i, _ in query.nearest]
    listed = [i for code in gallery.codes for i in code.images] + gallery.most + gallery.least + near
    return sorted(set(listed))
