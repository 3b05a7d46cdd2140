"""Images as Hugging Face stores them: parquet files, and copies that `save_to_disk` wrote. The `datasets` package reads
both. Nothing here reaches the network, and no column is decoded: image files go through `read_image` as all others.

To be imported only where such images are named: it takes seconds. Raises `UserError` where the package is missing.
"""

import glob
import os
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from cplearn.data.datasets import SAMPLE, ImageFiles
from cplearn.data.images import ImageError, check_bytes, file_stamp, open_regular
from cplearn.data.labels import Names, number_labels
from cplearn.data.scan import say
from cplearn.errors import UserError, WriteError
from cplearn.text import few, printable

try:
    import datasets
    import pyarrow
    import pyarrow.compute
    from pyarrow import parquet
except ImportError:
    raise UserError("parquet files and saved copies need the datasets package: pip install datasets") from None

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said in one line

SMALL = 2**22  # bytes of parquet files up to which they are read as they are, in any order


class Rows(ImageFiles):
    """Rows of a table of `datasets`, whose column of images is not decoded."""

    data = None  # the table
    column: str  # of images

    def image_of(self, row: int) -> dict | bytes | None:
        return self.data[row][self.column]

    def open(self, i: int) -> BinaryIO:
        image = self.image_of(int(self.rows[i]))
        content = image["bytes"] if isinstance(image, dict) else image
        if not content:
            raise ValueError("the row holds no bytes")
        check_bytes(len(content))
        return BytesIO(content)


class Parquet(Rows):
    """The images of parquet files: files by name, images by row.

    An image is read with its whole row group, until `allow_any_order` has copied them all.
    """

    def __init__(self, root: Path, files: list[str], class_list: list[str] | None = None, image: str | None = None):
        """`image` names the column. Raises `UserError` for files that are damaged, or have no one column of images."""
        self.root, self.files, self.where = root, sorted(files), str(root)
        self._stamps, names, texts, groups, damaged, kinds, empty = [], [], [], [], [], [], 0
        for k, one in enumerate(self.files):
            try:
                with open_regular(root / one) as file:
                    self._stamps.append(file_stamp(one, file))
                    table = parquet.ParquetFile(file)
                    features = _features(table.schema_arrow)
                    columns = column, label, _ = columns_of(features, image, f"{root}/{one}")
                    rows = table.read(columns=[f"{column}.path"] + [label] * (label is not None), use_threads=False)
                    texts += label_texts(rows, columns, f"{root}/{one}")
                    names += [f"{one}#{row}{path}" for row, path in enumerate(_paths(rows, column))]
                    empty += _rows_without(table.metadata, column)
                    groups += [(k, g, table.metadata.row_group(g).num_rows) for g in range(table.num_row_groups)]
                    kinds.append(columns)
            except UserError:
                raise
            except Exception:  # whatever Arrow makes of a damaged file
                damaged.append(one)
        if damaged:
            raise UserError(
                f"{printable(root)} has {len(damaged)} parquet files that cannot be read: {few(damaged)}; "
                "get them again, or move them away"
            )
        if odd := [one for one, columns in zip(self.files, kinds, strict=True) if columns != kinds[0]]:
            raise UserError(f"{printable(root)}: {few(odd)} has other columns or classes than {printable(files[0])}")
        if not names:
            raise UserError(f"{printable(root)}: its {len(files)} parquet files have no rows")
        if empty == len(names):
            raise UserError(NO_BYTES.format(printable(root)))
        self.column, _, classes = kinds[0]
        self.classes, self.labels, self.rows = number_labels(texts, self.where, class_list, classes)
        self.names = Names([names[i] for i in self.rows])
        self.groups = np.array(groups)[:, :2]  # file, and which of its row groups
        self.starts = np.cumsum([0, *(size for _, _, size in groups)])
        self._kept = (-1, None)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": (-1, None)}

    def stamps(self) -> list[tuple[str, int, int]]:
        return self._stamps

    def file_of(self) -> np.ndarray:
        return self.groups[self._group_of(self.rows), 0]

    def sample(self) -> np.ndarray:
        """Return images of a few row groups: each is read whole."""
        groups = np.unique(np.linspace(0, len(self.groups) - 1, min(len(self.groups), 10)).astype(int))
        of_group = self._group_of(self.rows)
        return np.concatenate([np.flatnonzero(of_group == g)[: SAMPLE // len(groups)] for g in groups])

    def _group_of(self, rows: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        try:
            return super().read(i, reduction)
        except ImageError:
            copy, self.data = self.data, None
            if copy is None:
                raise
            try:
                super().read(i, reduction)  # raises what is wrong with the image itself
            finally:
                self.data = copy
            raise UserError(
                f"{printable(self.copied_to)} holds a damaged copy of {printable(self.full_name(i))}: remove it and "
                "run again"
            ) from None

    def image_of(self, row: int) -> dict | bytes | None:
        if self.data is not None:
            return super().image_of(row)
        group = int(self._group_of(row))
        if self._kept[0] != group:  # the last one is kept, for images that are read in order
            k, g = self.groups[group].tolist()
            with open_regular(self.root / self.files[k]) as file:
                table = parquet.ParquetFile(file).read_row_group(g, columns=[self.column], use_threads=False)
            self._kept = group, table.column(0)
        return self._kept[1][row - int(self.starts[group])].as_py()

    def allow_any_order(self, cache_folder: str) -> None:
        """Let `datasets` copy the images out of their row groups, once, unless they are few.

        Raises `UserError` for a damaged file, `WriteError` for a folder that cannot be written.
        """
        total = sum(size for _, size, _ in self._stamps)
        if self.data is not None or total <= SMALL:
            return
        folder = self.copied_to = str(Path(cache_folder).expanduser())
        say(
            f"Parquet is read by whole row groups: a copy of its {total / 1e9:.2f} GB is made once, in "
            f"{printable(folder)} (--cache disk decodes the images instead)"
        )
        image = parquet.read_schema(self.root / self.files[0]).field(self.column)
        try:
            self.data = datasets.Dataset.from_parquet(
                [glob.escape(os.path.abspath(self.root / one)) for one in self.files],  # it takes them for patterns
                features=datasets.Features.from_arrow_schema(pyarrow.schema([image])),
                columns=[self.column],
                cache_dir=folder,
            )
            self.data.data.validate(full=True)
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno:
                raise WriteError(f"{printable(folder)} cannot take a copy: {cause.strerror}; see --cache_dir") from None
            raise UserError(f"{self.where} cannot be copied ({_first_line(cause)}): get these files again") from None


class SavedCopy(Rows):
    """The images of one split that `save_to_disk` wrote, in the order of its rows."""

    def __init__(
        self, path: str, names: tuple[str, ...], class_list: list[str] | None = None, image: str | None = None
    ):
        """Take the first of the splits `names` that is there; a copy without splits is for pre-training.

        `image` names the column. Raises `UserError` if there is no split, or no one column of images.
        """
        split, data = _split_of(path, names)
        self.where = f"hf:{path}, {split} split"
        columns = self.column, _, classes = columns_of(data.features, image, self.where)
        # No other column is read: it may name files and addresses, which `datasets` would open.
        self.data = data.select_columns([self.column])
        if isinstance(data.features[self.column], datasets.Image):
            self.data = self.data.cast_column(self.column, datasets.Image(decode=False))
        used = data.select_columns([name for name in columns[:2] if name])
        try:
            used.data.validate(full=True)  # offsets of a damaged file would lead anywhere
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{printable(self.where)} is damaged ({_first_line(error)}): get it again") from None
        column = self.data.data.column(self.column)
        stored = pyarrow.compute.struct_field(column, "bytes") if pyarrow.types.is_struct(column.type) else column
        if len(data) and stored.null_count == len(data):
            raise UserError(NO_BYTES.format(printable(self.where)))
        rows = data.select_columns([columns[1]]).with_format("arrow")[:] if columns[1] else data
        texts = label_texts(rows, columns, self.where)
        self.classes, self.labels, self.rows = number_labels(texts, self.where, class_list, classes)
        self.names = Names(f"{split}#{row}" for row in self.rows)
        self.fingerprint = data._fingerprint

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return one for all files of the copy; what `datasets` takes for its fingerprint counts as its time."""
        files = [os.stat(file["filename"]) for file in self.data.cache_files]
        times = f"{self.fingerprint} {[file.st_mtime_ns for file in files]}"
        return [("", sum(file.st_size for file in files), zlib.crc32(times.encode()))]


def _split_of(path: str, names: tuple[str, ...]):
    """Return the name of a split and its rows."""
    where, fix = f"--dataset hf:{printable(path)}", "name a folder that save_to_disk of the datasets package wrote"
    if not os.path.isdir(path):
        raise UserError(f"{where} is not a folder: {fix}")
    try:
        copy = datasets.load_from_disk(path)
    except Exception as error:  # whatever Arrow or the package makes of a damaged copy
        raise UserError(f"{where} cannot be read ({_first_line(error)}): {fix}") from None
    if not isinstance(copy, datasets.DatasetDict):
        if "train" not in names:
            raise UserError(f"{where} has no splits: an evaluation needs train and validation")
        return "train", copy
    split = next((name for name in names if name in copy), None)
    if split is None:
        raise UserError(f"{where} has no {' or '.join(names)} split, but {few(list(copy))}")
    return split, copy[split]


# --- columns -------------------------------------------------------------------------------------------------------


def _features(schema):
    """Return the kind of each column; what `datasets` left in the schema counts if it can be understood."""
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception:  # these words are anyone's
        return datasets.Features.from_arrow_schema(schema.remove_metadata())


def _candidates(features) -> list[str]:
    """Return the columns that may hold images: those said to, else structs with bytes, else bytes."""
    said = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    structs = [name for name, kind in features.items() if isinstance(kind, dict) and _are_bytes(kind.get("bytes"))]
    return said or structs or [name for name, kind in features.items() if _are_bytes(kind)]


def _are_bytes(kind) -> bool:
    return getattr(kind, "dtype", None) in ("binary", "large_binary") and not isinstance(kind, datasets.Image)


def columns_of(features, image: str | None, where: str) -> tuple[str, str | None, list[str] | None]:
    """Return the column of images, that of labels (`label`, else the first one with class names, else None), and the
    class names. Raises `UserError` for no column of images, and for several of which `image` names none."""
    images = _candidates(features)
    chosen = [name for name in images if image in (None, name)]
    if len(chosen) != 1:
        what = f"has several columns of images ({few(images)}): name one with --image_column"
        if not images:
            what = f"has no column of images (columns: {few(list(features))}): name it image, bytes of image files or "
            what += "a struct with bytes and path"
        elif image is not None:
            what = f"has no column of images --image_column {printable(image)}, but {few(images)}: name one of these"
        raise UserError(f"{printable(where)} {what}")
    classes = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    label = "label" if "label" in features else next(iter(classes), None)
    return chosen[0], label, classes.get(label)


NO_BYTES = "{} holds paths of images, not images: save it again with their bytes (datasets' embed_table_storage)"


def _rows_without(metadata, column: str) -> int:
    """Return how many rows of a parquet file have no bytes in a column, as far as the file says."""
    count = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for kept in map(group.column, range(group.num_columns)):
            if kept.path_in_schema in (column, f"{column}.bytes") and kept.statistics is not None:
                count += kept.statistics.null_count or 0
    return count


def label_texts(table, columns: tuple[str, str | None, list[str] | None], where: str) -> list[str | None]:
    """Return the labels as text: names, numbers where there are no names, None for null and -1.

    Raises `UserError` for what is no label, and for one without a class name.
    """
    _, label, classes = columns
    if label is None:
        return [None] * table.num_rows
    what, values = f"{printable(where)}: column {printable(label)}", table[label].to_pylist()
    for value in values:
        if value is not None and not isinstance(value, (int, str)):
            raise UserError(f"{what} holds {type(value).__name__}, not whole numbers or names: rename it")
        if classes and isinstance(value, int) and not -1 <= value < len(classes):
            raise UserError(f"{what} holds {value}, but there are names for {len(classes)} classes")
    if not classes:
        return [None if value is None else str(value) for value in values]
    return [classes[value] if isinstance(value, int) and value >= 0 else None for value in values]


def _paths(table, image: str) -> list[str]:
    """Return the file name that is stored beside each image, with a slash before it; "" for none."""
    if image not in table.column_names:
        return [""] * table.num_rows
    return [f"/{row['path']}" if row and row["path"] else "" for row in table[image].to_pylist()]


def _first_line(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0][:200])
