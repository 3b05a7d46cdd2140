"""What tells the images of a data set from others of the same names: kept with all that goes on later.

Of every image its name and the size and time of its file, as numbers of 32 bits; the content of a sample; labels and
class names. Files that are copied lose their times: then the sample decides.
"""

import hashlib
import json
import zlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cplearn.data.datasets import ImageDataset
from cplearn.text import few

ENOUGH = 100  # of the images with other times that have to be in the sample, unless all of them are
UNREADABLE = -1


class Changes(NamedTuple):
    """What differs between a data set and what was kept of it."""

    text: str  # in words; "" for nothing
    images: Sequence[int]  # numbers of images whose content differs or may differ
    copied: int = 0  # files have other times and the same content, as in a copy: how many images of them were compared


class Identity:
    """Of n images, `contents` of the m of `dataset.sample()`.

    Shape: names int32 (n,), files int32 (n, 2) of sizes and times, contents int64 (m,).
    """

    def __init__(self, names: Tensor, files: Tensor, labels: str, contents: Tensor | None = None):
        self.names, self.files, self.labels, self.contents = names, files, labels, contents

    @classmethod
    def of(cls, dataset: ImageDataset) -> "Identity":
        """Look at the files; read none of them yet."""
        names = [zlib.crc32(str(name).encode("utf-8", "surrogateescape")) for name in dataset.names]
        stamps = np.array([stamp[1:] for stamp in dataset.stamps()] or [(0, 0)], np.int64)
        folded = (stamps ^ (stamps >> 32)).astype(np.int32)  # of a size below 4 GiB it is all
        return cls(_int32(names), torch.from_numpy(folded[dataset.file_of()]), labels_hash(dataset))

    def read_sample(self, dataset: ImageDataset) -> "Identity":
        """Read the content of the sample, unless that is done."""
        if self.contents is not None:
            return self
        self.contents = torch.tensor([_content(dataset, int(i)) for i in dataset.sample()], dtype=torch.int64)
        return self

    def state(self) -> dict[str, Tensor | str]:
        """Return what `Identity(**state)` makes the same of."""
        return vars(self)

    def sha256(self, *, times: bool) -> str:
        """Return a hash of names, sizes and labels, with the times of the files, or for copies the sample instead."""
        parts = [self.names, self.files] if times else [self.names, self.files[:, 0].contiguous(), self.contents]
        digest = hashlib.sha256(self.labels.encode())
        for part in parts:
            digest.update(part.numpy())
        return digest.hexdigest()

    def changes(self, before: "Identity", dataset: ImageDataset, repaired: Collection[str] = ()) -> Changes:
        """Compare with what was kept `before`. `repaired`: images that could not be read then, and may be by now.

        The content of the sample is read only where files have other times and the same sizes.
        """
        n, names = len(self.names), dataset.names
        if len(before.names) != n or not self.names.equal(before.names):
            new = np.flatnonzero(~np.isin(self.names, before.names))
            gone = int((~np.isin(before.names, self.names)).sum())
            first = f" (the first: {few([str(names[new[0]])])})" if len(new) else ""
            moved = "" if len(new) or gone else ", in another order"
            return Changes(f"images gone: {gone:,}, new: {len(new):,}{first}{moved}", range(n))
        differ = (self.files != before.files).numpy()
        if repaired and differ.any():
            differ[[i for i in np.flatnonzero(differ.any(1)) if str(names[i]) in repaired]] = False
        changed, touched = differ[:, 0], differ[:, 1] & ~differ[:, 0]
        compared = 0
        if touched.any() and before.contents is not None:
            now = self.read_sample(dataset).contents
            sample, asked = dataset.sample(), int(touched.sum())
            looked = touched[sample]
            same = np.zeros(len(sample), bool)
            if len(now) == len(before.contents):
                same = ((now == before.contents) | (now == UNREADABLE) | (before.contents == UNREADABLE)).numpy()
            touched[sample[looked & same]] = False
            compared = int(looked.sum())
            if same[looked].all() and compared >= min(ENOUGH, asked):
                touched[:] = False
        images = np.flatnonzero(changed | touched)
        if len(images):
            what = "1 image has" if len(images) == 1 else f"{len(images):,} images have"
            text = f"{what} changed since (the first: {few([str(names[images[0]])])})"
            return Changes(text, images.tolist())
        if self.labels != before.labels:
            return Changes("labels or class names have changed since", range(n))
        return Changes("", [], compared)


def labels_hash(dataset: ImageDataset) -> str:
    """Return a hash of labels and class names."""
    digest = hashlib.sha256(json.dumps(list(dataset.classes or [])).encode())
    digest.update(np.asarray(dataset.labels, np.int64))
    return digest.hexdigest()


def _int32(numbers: list[int]) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.uint32).view(np.int32))


def _content(dataset: ImageDataset, i: int) -> int:
    try:
        return int.from_bytes(hashlib.sha256(dataset.encoded(i)).digest()[:7])
    except Exception:  # whatever a damaged file makes of it
        return UNREADABLE
