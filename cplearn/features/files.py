"""Files of features: parts that are written while images are read, and the .npz, .npy or .parquet made of them.

Nothing here holds more than one part in memory, however many images there are. A part is there whole or not at all, so
a command that was killed goes on with the parts that are missing.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cplearn.errors import UserError
from cplearn.files import read_json, remove_quietly, write_text, written
from cplearn.text import printable

SUFFIXES = (".npz", ".npy", ".parquet")
SCRIPT = "extract_features"  # how a file says that it is one of these
Rows = dict[str, np.ndarray]  # by column: features, embedding, codes, grid

# --- parts ----------------------------------------------------------------------------------------------


class Parts:
    """The folder of parts beside an output file: `.NAME.parts/`, with plan.json and a file per part.

    A part holds the rows of consecutive images, and the reasons for those that have none.
    """

    def __init__(self, out: Path):
        self.folder = out.with_name(f".{out.name}.parts")
        self.images = self.size = 0

    def make_folder(self) -> None:
        """Raise `UserError` where it cannot be made, or is a link."""
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link, through which nothing is written: remove it")
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made ({error.strerror}): choose another --out") from None

    def open(self, identity: dict, images: int, size: int) -> None:
        """Begin with parts of `size` images, or go on with those that are there.

        Raises `UserError` for the parts of another command, naming what differs.
        """
        plan_file, others = self.folder / "plan.json", set(os.listdir(self.folder)) - {".lock"}
        plan = read_json(plan_file)
        if others and not isinstance(plan.get("identity"), dict):
            raise UserError(f"{self.folder} holds no parts of this command: move it away, or choose another --out")
        if others and plan["identity"] != identity:
            differ = [k for k in identity if plan["identity"].get(k) != identity[k]]
            what = f"{differ[0]} {plan['identity'].get(differ[0])}, now {identity[differ[0]]}" if differ else "its plan"
            raise UserError(
                f"{self.folder} is what another command has left ({printable(what)}): finish that one, remove the "
                "folder, or choose another --out"
            )
        if not others:
            write_text(plan_file, json.dumps({"identity": identity, "images": images, "size": size}) + "\n")
        for path in self.folder.glob(".*.tmp"):  # of a process that was killed
            remove_quietly(path)

    def read_plan(self) -> None:
        """Learn what `open` has decided: every rank calls it afterwards."""
        plan = read_json(self.folder / "plan.json")
        try:
            self.images, self.size = int(plan["images"]), int(plan["size"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.folder / 'plan.json'} is not there: all processes need the same disk") from None

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def samples(self, k: int) -> range:
        return range(k * self.size, min(self.images, (k + 1) * self.size))

    def _path(self, k: int) -> Path:
        return self.folder / f"part_{k:07}.npz"

    def missing(self) -> list[int]:
        """Return the parts to make: not there, damaged, or with images that could not be read and may be repaired."""
        return [k for k in range(len(self)) if self.failures(k) != {}]

    def failures(self, k: int) -> dict[str, str] | None:
        """Return the reasons for the images of a part that have no row, by sample; None if it is not there whole."""
        try:
            with np.load(self._path(k)) as part:
                return json.loads(str(part["failures"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, k: int, rows: Rows, failures: dict[int, str]) -> None:
        """Write a part, whole or not at all. Raises `WriteError`."""
        with written(self._path(k), on_disk=True) as f:
            np.savez(f, failures=np.array(json.dumps(failures)), **rows)

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yield a column, part by part. Raises `UserError` for a part that was damaged since."""
        for k in range(len(self)):
            try:
                with np.load(self._path(k)) as part:
                    found = part[name]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{self._path(k)} is damaged ({error}): remove it and run again") from None
            yield found

    def columns(self) -> dict[str, np.ndarray]:
        """Return the first part's columns, for their types and widths."""
        with np.load(self._path(0)) as part:
            return {name: part[name] for name in part if name not in ("samples", "failures")}

    def remove(self) -> None:
        """Remove everything that is ours, when the file is complete."""
        for path in (*self.folder.glob("part_*.npz"), *self.folder.glob(".part_*.tmp"), self.folder / "plan.json"):
            remove_quietly(path)


# --- what is there already ------------------------------------------------------------------------------


def sidecar(out: Path) -> Path:
    """Return the file beside a .npy that holds names and source."""
    return out.with_suffix(".json")


def check_out(out: Path) -> None:
    """Raise `UserError` for a name that says no format, a format whose library is missing, and files of others."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {printable(out)}: the name has to end in {', '.join(SUFFIXES)}")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError("--out *.parquet needs pyarrow: pip install pyarrow, or write .npz") from None
    for path in (out, sidecar(out)) if out.suffix == ".npy" else (out,):
        if path.is_symlink():
            raise UserError(f"--out: {printable(path)} is a link, through which nothing is written: remove it")
        if path.exists() and source_of(path) is None:
            raise UserError(f"--out {printable(path)} is there and no file of {SCRIPT}.py: choose another name")


def source_of(path: Path) -> dict | None:
    """Return what a file of ours says it is of; None for other files, and if there is none."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as f:
                source = json.loads(str(f["source"]))
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            source = json.loads(pq.read_schema(path).metadata[b"cplearn"])
        else:
            source = read_json(sidecar(path)).get("source")
    except Exception:  # another format, or damaged
        return None
    return source if isinstance(source, dict) and source.get("script") == SCRIPT else None


# --- the file -------------------------------------------------------------------------------------------


def assemble(out: Path, parts: Parts, names, source: dict) -> int:
    """Write `out` from its parts; return the number of its rows. Raises `WriteError`, and `UserError` for no row."""
    count = sum(map(len, parts.read("samples")))
    if count == 0:
        raise UserError(f"none of the {parts.images} images could be read: {next(iter(source['unreadable'].values()))}")
    with written(out, on_disk=True) as f:
        {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}[out.suffix](f, parts, names, source, count)
        if out.suffix == ".npy":  # killed anywhere here, it leaves no pair that does not belong together
            remove_quietly(out)
            with written(sidecar(out), on_disk=True) as beside:
                _write_sidecar(beside, parts, names, source)
    return count


def _shape(parts: Parts, name: str, first: np.ndarray, count: int) -> tuple[int, ...]:
    if name == "features" and first.ndim == 2 and "grid" in parts.columns():  # patches of images of several shapes
        count = sum(int(grid.prod(1).sum()) for grid in parts.read("grid"))
    return (count, *first.shape[1:])


def _names(parts: Parts, names) -> Iterator[list[str]]:
    for samples in parts.read("samples"):
        yield [str(names[i]) for i in samples]


def _write_array(f: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write what numpy.save would write of all blocks at once."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(f, {"descr": descr, "fortran_order": False, "shape": shape})
    for block in blocks:
        f.write(np.ascontiguousarray(block, dtype=dtype).tobytes())


def _write_npz(f: BinaryIO, parts: Parts, names, source: dict, count: int) -> None:
    def member(archive: zipfile.ZipFile, name: str, dtype, shape: tuple[int, ...], blocks: Callable) -> None:
        # A fixed date: the same features make the same bytes.
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as inside:
            _write_array(inside, dtype, shape, blocks)

    with zipfile.ZipFile(f, "w") as archive:
        for name, first in parts.columns().items():
            member(archive, name, first.dtype, _shape(parts, name, first, count), parts.read(name))
        longest = max(len(name) for block in _names(parts, names) for name in block)
        text = np.dtype(f"<U{longest}")
        member(archive, "names", text, (count,), (np.array(block, dtype=text) for block in _names(parts, names)))
        text = np.array(json.dumps(source))
        member(archive, "source", text.dtype, (), [text])


def _write_npy(f: BinaryIO, parts: Parts, names, source: dict, count: int) -> None:
    first = parts.columns()["features"]
    _write_array(f, first.dtype, _shape(parts, "features", first, count), parts.read("features"))


def _write_sidecar(f: BinaryIO, parts: Parts, names, source: dict) -> None:
    f.write(f'{{"source": {json.dumps(source)},\n"names": ['.encode())
    between = "\n"
    for block in _names(parts, names):
        for name in block:
            f.write(f"{between}{json.dumps(name)}".encode())
            between = ",\n"
    f.write(b"]")
    if "grid" in parts.columns():
        rows = ",".join(json.dumps(row) for grid in parts.read("grid") for row in grid.tolist())
        f.write(f',\n"grid": [{rows}]'.encode())
    f.write(b"}\n")


def _write_parquet(f: BinaryIO, parts: Parts, names, source: dict, count: int) -> None:
    """Write a row per image and a row group per part. Names are `printable`: the format takes proper text only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(parts.columns())
    writer = None
    for block, *arrays in zip(_names(parts, names), *map(parts.read, columns), strict=True):
        rows = dict(zip(columns, arrays, strict=True))
        table = {"name": pa.array([printable(name) for name in block], pa.string())}
        for name in ("features", "embedding"):
            if name in rows:
                table[name] = _vectors(rows[name], rows.get("grid") if name == "features" else None)
        if "codes" in rows:
            table["code"] = pa.array(rows["codes"])
        if "grid" in rows:
            table["grid_rows"], table["grid_columns"] = (pa.array(x) for x in rows["grid"].T)
        table = pa.table(table).replace_schema_metadata({"cplearn": json.dumps(source)})
        writer = writer or pq.ParquetWriter(f, table.schema)
        writer.write_table(table)
    writer.close()


def _vectors(x: np.ndarray, grid: np.ndarray | None):
    """Return a column of vectors: of one length, or (patch tokens, one after another) as long as each grid says."""
    import pyarrow as pa

    values = pa.array(x.reshape(-1))
    if grid is None:
        return pa.FixedSizeListArray.from_arrays(values, x.shape[1])
    lengths = grid.prod(1) * x.shape[-1]
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), values)
