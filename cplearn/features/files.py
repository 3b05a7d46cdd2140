"""Files of features: parts that are written while images are read, and the .npz, .npy or .parquet made of them.

Nothing here holds more than the names and one part in memory, however many images there are. A part is there whole or
not at all, so a command that was killed goes on with the parts that are missing.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cplearn.errors import UserError
from cplearn.files import check_replaceable, read_text, reading, remove_quietly, write_text, written
from cplearn.text import printable

SUFFIXES = (".npz", ".npy", ".parquet")
SCRIPT = "extract_features"
MARK = f'"script": "{SCRIPT}"'  # how a file says that it is one of these: the end of its source
Rows = dict[str, np.ndarray]  # by column: features, embedding, codes, grid

# --- parts ----------------------------------------------------------------------------------------------


class Parts:
    """The folder of parts beside an output file: `.NAME.parts/`, with plan.json and a file per part.

    A part holds the rows of consecutive images, of those that could be read, and their numbers as `samples`. Several
    processes, also on several machines, write different parts: no file has two writers.
    """

    def __init__(self, out: Path):
        self.folder = out.with_name(f".{out.name}.parts")
        self.images = self.size = 0

    def open(self, identity: dict[str, object], images: int, size: int) -> None:
        """Begin with parts of `size` images, or go on with those that are there. For one rank, which tells the others.

        Raises `UserError` for the parts of another command, naming what differs.
        """
        path = self.folder / "plan.json"
        self.images, self.size = images, size
        if path.exists():
            with reading(path, f"remove {self.folder}"):
                plan = json.loads(read_text(path))
                self.size, before = int(plan["size"]), dict(plan["identity"])
            differ = [f"{name} {before.get(name)}, now {x}" for name, x in identity.items() if before.get(name) != x]
            if differ:
                raise UserError(
                    f"{self.folder} is what another command has left ({printable(differ[0])}): finish that one, "
                    "remove the folder, or choose another --out"
                )
        elif set(os.listdir(self.folder)) - {".lock"}:
            raise UserError(f"{self.folder} holds no parts of this command: move it away, or choose another --out")
        else:
            write_text(path, json.dumps({"identity": identity, "images": images, "size": size}) + "\n")
        for left in self.folder.glob(".part*.tmp"):  # of a process that was killed
            remove_quietly(left)

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def samples(self, k: int) -> range:
        """Return the images of part k."""
        return range(k * self.size, min(self.images, (k + 1) * self.size))

    def _path(self, k: int) -> Path:
        return self.folder / f"part_{k:07}.npz"

    def missing(self) -> list[int]:
        """Return the parts to make: not there, or with images that could not be read and may be repaired by now."""
        there = [k for k in range(len(self)) if self._path(k).exists()]
        whole = {k for k in there if len(self._read(k, "samples")) == len(self.samples(k))}
        return [k for k in range(len(self)) if k not in whole]

    def forget(self, images: Iterable[int]) -> None:
        """Remove the parts that hold any of these images."""
        for k in {i // self.size for i in images}:
            remove_quietly(self._path(k))

    def write(self, k: int, rows: Rows) -> None:
        """Write a part, whole or not at all. Raises `WriteError`."""
        with written(self._path(k), on_disk=True) as f:
            np.savez(f, **rows)

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Yield a column, part by part."""
        return (self._read(k, name) for k in range(len(self)))

    def _read(self, k: int, name: str) -> np.ndarray:
        with reading(self._path(k), "remove it and run again"), np.load(self._path(k)) as part:
            return part[name]

    def remove(self) -> None:
        """Remove everything that is ours, when the file is complete."""
        for path in (*self.folder.glob("part_*.npz"), self.folder / "images.pth", self.folder / "plan.json"):
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
    marked = sidecar(out) if out.suffix == ".npy" and sidecar(out).exists() else out  # a .npy alone has no mark
    check_replaceable(marked, MARK.encode("utf-32-le" if out.suffix == ".npz" else "utf-8"), "--out")


def source_of(out: Path) -> dict[str, object]:
    """Return what a file of ours says it is of, {} if there is none. Raises `UserError` for a damaged one."""
    try:
        with reading(out, "remove it and run again"):
            if out.suffix == ".npz":
                with np.load(out) as f:
                    return json.loads(str(f["source"]))
            if out.suffix == ".parquet":
                import pyarrow.parquet as pq

                return json.loads(pq.read_schema(out).metadata[b"cplearn"])
            return json.loads(read_text(sidecar(out)))["source"] if out.exists() else {}
    except FileNotFoundError:
        return {}


# --- the file -------------------------------------------------------------------------------------------


def assemble(out: Path, parts: Parts, columns: Rows, names, source: dict[str, object]) -> int:
    """Write `out` from its parts; return the number of its rows. `columns` have none: they say types and widths.

    Raises `WriteError`, and `UserError` if there is no row.
    """
    samples = np.concatenate(list(parts.read("samples")))
    if len(samples) == 0:
        raise UserError(f"none of the {parts.images} images could be read: {next(iter(source['unreadable'].values()))}")
    kept = np.array([str(names[i]) for i in samples])
    with written(out, on_disk=True) as f:
        if out.suffix == ".npz":
            _write_npz(f, parts, columns, kept, source)
        elif out.suffix == ".parquet":
            _write_parquet(f, parts, columns, kept, source)
        else:
            _write_array(f, *_column(parts, columns, "features", len(kept)))
            remove_quietly(out)  # killed anywhere here, it leaves no pair that does not belong together
            grid = {"grid": np.concatenate(list(parts.read("grid"))).tolist()} if "grid" in columns else {}
            write_text(sidecar(out), json.dumps({"names": kept.tolist(), **grid, "source": source}) + "\n")
    return len(samples)


def _column(
    parts: Parts, columns: Rows, name: str, rows: int
) -> tuple[np.dtype, tuple[int, ...], Iterator[np.ndarray]]:
    """Return type, shape and blocks of a column. Patches of images of several shapes have a row each."""
    empty = columns[name]
    if name == "features" and "grid" in columns and empty.ndim == 2:
        rows = sum(int(grid.prod(1).sum()) for grid in parts.read("grid"))
    return empty.dtype, (rows, *empty.shape[1:]), parts.read(name)


def _write_array(f: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write what numpy.save would write of all blocks at once."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(f, {"descr": descr, "fortran_order": False, "shape": shape})
    for block in blocks:
        f.write(np.ascontiguousarray(block, dtype=dtype).tobytes())


def _write_npz(f: BinaryIO, parts: Parts, columns: Rows, names: np.ndarray, source: dict[str, object]) -> None:
    arrays = {name: _column(parts, columns, name, len(names)) for name in columns}
    for name, x in {"names": names, "source": np.array(json.dumps(source))}.items():
        arrays[name] = (x.dtype, x.shape, [x])
    with zipfile.ZipFile(f, "w") as archive:
        for name, array in arrays.items():
            # A fixed date: the same features make the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                _write_array(member, *array)


def _write_parquet(f: BinaryIO, parts: Parts, columns: Rows, names: np.ndarray, source: dict[str, object]) -> None:
    """Write a row per image and a row group per part. Names are `printable`: the format takes proper text only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, start = None, 0
    for samples, *blocks in zip(*map(parts.read, ("samples", *columns)), strict=True):
        rows = dict(zip(columns, blocks, strict=True))
        content = {"name": pa.array([printable(name) for name in names[start : start + len(samples)]], pa.string())}
        start += len(samples)
        for name in ("features", "embedding"):
            if name in rows:
                content[name] = _vectors(rows[name], rows.get("grid") if name == "features" else None)
        if "codes" in rows:
            content["code"] = pa.array(rows["codes"])
        if "grid" in rows:
            content["grid_rows"], content["grid_columns"] = (pa.array(x) for x in rows["grid"].T)
        part = pa.table(content).replace_schema_metadata({"cplearn": json.dumps(source)})
        writer = writer or pq.ParquetWriter(f, part.schema)
        writer.write_table(part)
    writer.close()


def _vectors(x: np.ndarray, grid: np.ndarray | None):
    """Return a column of vectors: of one length, or (patch tokens, one after another) as long as each grid says."""
    import pyarrow as pa

    values = pa.array(x.reshape(-1))
    if grid is None:
        return pa.FixedSizeListArray.from_arrays(values, x.shape[1])
    lengths = grid.prod(1) * x.shape[-1]
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), values)
