"""Images in parquet files, as Hugging Face stores data sets: a column of image files as bytes, one of labels."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cplearn.data.cachefile import HEAD, Filling, make_once
from cplearn.data.encoded import EncodedImages, Names, checked, number_labels
from cplearn.data.tars import open_regular
from cplearn.errors import UserError
from cplearn.text import few, printable

SUFFIXES = (".parquet",)
IMAGE_COLUMNS = ("image", "img")  # the usual names, where several columns could be meant
KEPT_GROUPS = 2  # row groups that a process keeps, for images read in order
KEPT_FILES = 4
SMALL_GROUP = 2**17  # bytes of a row group that may be read for one image
FORMAT = 1  # of the file of unpacked images


class Parquet(EncodedImages):
    """The images of parquet files: files by name, images by row.

    An image is read with its whole row group. `unpacked`, once set, is a file of all images one after another.
    """

    unpacked: Path | None = None

    def __init__(self, root: Path, files: list[str], class_list: list[str] | None = None):
        """Raises `UserError` for files that are damaged, or have no column of images."""
        self.root, self.files, self.where = root, sorted(files), str(root)
        names, texts, groups, damaged = [], [], [], []
        self._stamps, self.columns, classes = [], [], []
        parquet = import_pyarrow()
        for k, one in enumerate(self.files):
            try:
                with open_regular(root / one) as file:
                    status = os.fstat(file.fileno())
                    table = parquet.ParquetFile(file)
                    image, label, named = find_columns(table.schema_arrow, f"{root}/{one}")
                    texts += read_labels(table, label, named, f"{root}/{one}")
                    names += [f"{one}#{row}{path}" for row, path in enumerate(_paths(table, image))]
                    sizes = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
            except UserError:
                raise
            except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:  # all of Arrow's
                damaged.append(f"{one} ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})")
                continue
            classes.append(named)
            self._stamps.append((one, status.st_size, status.st_mtime_ns))
            self.columns.append(image)
            groups += [(k, g, size) for g, size in enumerate(sizes)]
        if damaged:
            raise UserError(
                f"{printable(root)} has {len(damaged)} parquet files that cannot be used: {few(damaged)}; "
                "get them again, or move them away"
            )
        odd = [one for one, named in zip(self.files, classes, strict=True) if named != classes[0]]
        if odd:
            raise UserError(f"{printable(root)}: {few(odd)} names other classes than {printable(self.files[0])}")
        if not names:
            raise UserError(f"{printable(root)}: its {len(files)} parquet files have no rows")
        self.classes, self.labels, self.rows = number_labels(texts, self.where, class_list, classes[0])
        self.names = Names([names[i] for i in self.rows])
        self.groups = np.array(groups)[:, :2]  # file, and which of its row groups
        self.starts = np.cumsum([0, *(size for _, _, size in groups)])
        self._forget()

    def _forget(self) -> None:
        self._process, self._open, self._kept = os.getpid(), OrderedDict(), OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict(), "_kept": OrderedDict()}

    def stamps(self) -> list:
        return [*self._stamps, len(self)]

    def content(self, i: int) -> bytes:
        if self.unpacked is not None:
            offset, size = self.place[i].tolist()
            with open_regular(self.unpacked) as file:
                return checked(os.pread(file.fileno(), size, offset))
        row = int(self.rows[i])
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return checked(self._read_group(group)[row - int(self.starts[group])].as_py())

    def _read_group(self, group: int):
        """Return the bytes of the images of a row group, as Arrow has them."""
        if self._process != os.getpid():  # after a fork: files share their position with those of the parent
            self._forget()
        if group not in self._kept:
            k, g = self.groups[group].tolist()
            column = self.columns[k]
            table = self._file(k).read_row_group(g, columns=[column], use_threads=False)
            self._kept[group] = _bytes_of(table, column)
            while len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _file(self, k: int):
        if k not in self._open:
            self._open[k] = import_pyarrow().ParquetFile(open_regular(self.root / self.files[k]), pre_buffer=False)
            while len(self._open) > KEPT_FILES:
                self._open.popitem(last=False)[1].close(force=True)
        self._open.move_to_end(k)
        return self._open[k]

    def allow_any_order(self, cache_folder: str, stop: Callable[[], bool]) -> None:
        """Copy the images out of their row groups, once, if these are large. Raises as `cachefile.make_once`."""
        sizes = np.array([self._group_bytes(k, g) for k, g in self.groups.tolist()])
        if self.unpacked is not None or sizes.mean() <= SMALL_GROUP:
            return
        made_from = json.dumps([FORMAT, self.where, self.stamps()]).encode() + self.rows.tobytes()
        key = hashlib.sha256(made_from).hexdigest()
        path = Path(cache_folder).expanduser() / f"images_{key[:20]}.bin"
        what = f"{len(self):,} images of {printable(self.where)}, copied out of parquet,"
        make_once(path, key, int(sizes.sum()), what, lambda file: self._unpack(file, sizes, path, stop), "--cache disk")
        self.place = np.fromfile(path, np.int64, 2 * len(self), offset=HEAD).reshape(-1, 2)  # offset, size
        self.unpacked = path

    def _group_bytes(self, k: int, g: int) -> int:
        group = self._file(k).metadata.row_group(g)
        return sum(group.column(c).total_uncompressed_size for c in range(group.num_columns))

    def _unpack(self, file: BinaryIO, sizes: np.ndarray, path: Path, stop: Callable[[], bool]) -> None:
        """Write an index (offset and size of each image; 0 bytes for one that is missing) and the images."""
        print(
            f"Parquet is read by row groups of {sizes.mean() / 1e6:.1f} MB: copying {sizes.sum() / 1e9:.2f} GB of "
            f"images to {path}, once (--cache disk decodes them instead)",
            flush=True,
        )
        place = np.zeros((len(self), 2), np.int64)
        offset = file.seek(HEAD + place.nbytes)
        filling = Filling("Copying images", "copied out of parquet", len(self), stop)
        for i in range(len(self)):
            try:
                content = self.content(i)
            except (OSError, ValueError, LookupError, TypeError, NotImplementedError):  # it is met again when read
                content = b""
            file.write(content)
            place[i] = offset, len(content)
            offset += len(content)
            filling.reached(i + 1)
        file.seek(HEAD)
        file.write(place)
        file.flush()


def import_pyarrow():
    """Return `pyarrow.parquet`. Raises `UserError` that names how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


def find_columns(schema, where: str) -> tuple[str, str | None, list[str] | None]:
    """Return the columns of image bytes ("image.bytes" in a struct) and labels (None: there is none), and class names.

    Labels are the column `label`, else the first with class names. Raises `UserError` if no column has image bytes.
    """
    from pyarrow import types

    def binary(kind) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = {}
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            if binary(field.type.field("bytes").type):
                images[field.name] = f"{field.name}.bytes"
        elif binary(field.type):
            images[field.name] = field.name
    usual = [name for name in IMAGE_COLUMNS if name in images] or list(images)
    if not usual or (len(images) > 1 and usual[0] not in IMAGE_COLUMNS):
        raise UserError(
            f"{printable(where)} has {'several columns' if images else 'no column'} of image bytes (columns: "
            f"{few(schema.names)}): name it image, bytes of image files or a struct with bytes and path"
        )
    named = _class_names(schema.metadata)
    label = "label" if "label" in schema.names else next((name for name in named if name in schema.names), None)
    return images[usual[0]], label, named.get(label)


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the class names by column that `datasets` leaves in a schema."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    names = {name: feature.get("names") for name, feature in kinds.items() if feature.get("_type") == "ClassLabel"}
    return {name: list(map(str, found)) for name, found in names.items() if isinstance(found, list)}


def read_labels(table, label: str | None, classes: list[str] | None, where: str) -> list[str | None]:
    """Return the label of every row as text. Raises `UserError` for a label without a class name."""
    if label is None:
        return [None] * table.metadata.num_rows
    values = table.read(columns=[label], use_threads=False).column(0).to_pylist()
    return label_texts(values, classes, f"{where}: column {label}")


def label_texts(values: Sequence[object], classes: list[str] | None, what: str) -> list[str | None]:
    """Return labels as text: names, numbers where there are no names, None for null and -1. Raises `UserError`."""
    for value in values:
        if value is not None and not isinstance(value, (int, str)):
            raise UserError(f"{printable(what)} holds {type(value).__name__}, not whole numbers or names: rename it")
        if classes and isinstance(value, int) and not -1 <= value < len(classes):
            raise UserError(f"{printable(what)} holds {value}, but there are names for {len(classes)} classes")
    if not classes:
        return [None if value is None else str(value) for value in values]
    return [classes[value] if isinstance(value, int) and value >= 0 else None for value in values]


def _paths(table, image: str) -> list[str]:
    """Return the file name that is stored beside each image's bytes, with a slash before it; "" for none."""
    struct = image.rpartition(".")[0]
    kind = table.schema_arrow.field(struct).type if struct else None
    if kind is None or kind.get_field_index("path") < 0:
        return [""] * table.metadata.num_rows
    rows = table.read(columns=[f"{struct}.path"], use_threads=False).column(0).to_pylist()
    return [f"/{row['path']}" if row and row["path"] else "" for row in rows]


def _bytes_of(table, column: str):
    import pyarrow.compute

    chunks = table.column(0)
    return pyarrow.compute.struct_field(chunks, "bytes") if column.endswith(".bytes") else chunks
