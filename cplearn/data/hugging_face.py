"""--dataset hf:PATH: a local copy that the `datasets` package wrote with `save_to_disk`."""

import os

import numpy as np

from cplearn.data.encoded import EncodedImages, Names, checked, number_labels
from cplearn.data.parquet import label_texts
from cplearn.errors import UserError
from cplearn.text import few, printable

PREFIX = "hf:"


class HuggingFace(EncodedImages):
    """The images of one split, in the order of its rows."""

    def __init__(self, path: str, names: tuple[str, ...], class_list: list[str] | None = None):
        """Take the first of the splits `names` that is there; a copy without splits is for pre-training.

        Raises `UserError` if there is none, or no column of images.
        """
        split, data = _open(path, names)
        self.where = f"{PREFIX}{path}, {split} split"
        images = [name for name, kind in data.features.items() if type(kind).__name__ == "Image"]
        if not images:
            raise UserError(f"{printable(self.where)} has no column of images (columns: {few(data.column_names)})")
        self.column = images[0]
        self.data = data.cast_column(self.column, type(data.features[self.column])(decode=False))
        texts, classes = _labels(data, self.where)
        self.classes, self.labels, self.rows = number_labels(texts, self.where, class_list, classes)
        self.names = Names(f"{split}#{row}" for row in self.rows)

    def content(self, i: int) -> bytes:
        image = self.data[int(self.rows[i])][self.column]
        if image and image["bytes"] is None and image["path"]:
            raise ValueError(f"the copy has its path only, {printable(image['path'])}, not its bytes")
        return checked(image and image["bytes"])

    def stamps(self) -> list:
        return [self.data._fingerprint, len(self)]


def _open(path: str, names: tuple[str, ...]):
    """Return the name of a split and its rows."""
    try:
        from datasets import Dataset, DatasetDict, load_from_disk
    except ImportError:
        raise UserError(
            f"--dataset {PREFIX}{printable(path)} needs the datasets package: pip install datasets"
        ) from None
    fix = "name a folder that save_to_disk of the datasets package wrote"
    if not os.path.isdir(path):
        raise UserError(f"--dataset {PREFIX}{printable(path)} is not a folder: {fix}")
    try:
        found = load_from_disk(path)
    except Exception as error:  # whatever Arrow or the package makes of a damaged copy
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--dataset {PREFIX}{printable(path)} cannot be read ({printable(reason)}): {fix}") from None
    if isinstance(found, DatasetDict):
        split = next((name for name in names if name in found), None)
        if split is None:
            raise UserError(
                f"--dataset {PREFIX}{printable(path)} has no {' or '.join(names)} split, but {few(list(found))}"
            )
        return split, found[split]
    assert isinstance(found, Dataset)
    if "train" not in names:
        raise UserError(f"--dataset {PREFIX}{printable(path)} has no splits: an evaluation needs train and validation")
    return "train", found


def _labels(data, where: str) -> tuple[list[str | None], list[str] | None]:
    """Return the label of every row as text, and the class names if the copy has them."""
    named = {name: kind.names for name, kind in data.features.items() if type(kind).__name__ == "ClassLabel"}
    label = "label" if "label" in data.column_names else next(iter(named), None)
    if label is None:
        return [None] * len(data), None
    values = np.asarray(data.select_columns([label]).with_format("numpy")[:][label]).tolist()
    return label_texts(values, named.get(label), f"{where}: column {label}"), named.get(label)
