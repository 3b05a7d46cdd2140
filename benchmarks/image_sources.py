"""Images per second from a list, tar shards, parquet and a saved copy, next to the same images in a folder.

    python benchmarks/image_sources.py --data_path CIFAR --images 10000
    python benchmarks/image_sources.py --data_path PHOTOS --images 200

CIFAR and PHOTOS are folders of JPEG files. They are copied into a temporary folder as each of the sources; then every
image is read and decoded on one core, in shuffled order, source by source in turn. Time is that of the processor, so
files come from the system's cache; medians of the ratios within a round.
"""

import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn import errors
from cplearn.data.datasets import Folder, ImageDataset
from cplearn.data.sources import build_dataset
from cplearn.flags import ArgumentParser, positive
from cplearn.host import git_commit
from cplearn.text import format_table

SHARDS = 4


def write_copies(data: Folder, out: Path) -> None:
    """Write the images as a list, as tar shards, as parquet and with `save_to_disk`."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    labels = [max(0, int(label)) for label in data.labels]
    paths = [data.root / str(name) for name in data.names]
    for kind in ("list", "tar", "parquet"):
        (out / kind).mkdir()
    lines = [f"{path.resolve()}\t{label}\n" for path, label in zip(paths, labels, strict=True)]
    (out / "list" / "train.txt").write_text("".join(lines))
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for k, part in enumerate(np.array_split(np.arange(len(paths)), SHARDS)):
        rows = [{"bytes": paths[i].read_bytes(), "path": paths[i].name} for i in part]
        with tarfile.open(out / "tar" / f"train-{k:06}.tar", "w") as tar:
            for i, row in zip(part, rows, strict=True):
                for suffix, content in (("jpg", row["bytes"]), ("cls", str(labels[i]).encode())):
                    member = tarfile.TarInfo(f"{i:09}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        table = pyarrow.table({"image": pyarrow.array(rows, struct), "label": [labels[i] for i in part]})
        parquet.write_table(table, out / "parquet" / f"train-{k:05}-of-{SHARDS:05}.parquet", row_group_size=1000)
    table = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(out / "copy"))


def seconds_to_read(data: ImageDataset, order: Sequence[int]) -> float:
    """Return the processor's seconds."""
    start = time.process_time()
    for i in order:
        data.read(i)
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = ArgumentParser(prog="benchmarks/image_sources.py", description=__doc__)
    parser.add_argument("--data_path", required=True, help="Folder of JPEG files")
    parser.add_argument("--images", type=positive(int), default=10_000, help="Images per measurement, at most all")
    parser.add_argument("--repeats", type=positive(int), default=5)
    args = parser.parse_args(argv)
    folder, rng = Folder(Path(args.data_path)), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        write_copies(folder, out)
        opened, data = {}, {"folder": folder}
        for kind in ("list", "tar", "parquet", "hf"):
            start = time.process_time()
            where = (f"hf:{out}/copy", None) if kind == "hf" else ("folder", str(out / kind))
            data[kind] = build_dataset(*where, "train")
            if kind == "parquet":
                data[kind].allow_any_order(str(out / "cache"))
            opened[kind] = time.process_time() - start
        rounds = []
        for _ in range(args.repeats):
            order = rng.permutation(len(folder))[: args.images].tolist()
            rounds.append({kind: seconds_to_read(source, order) for kind, source in data.items()})
    count = min(args.images, len(folder))
    rows = [
        (
            kind,
            f"{count / statistics.median(r[kind] for r in rounds):.0f}",
            f"{statistics.median(r['folder'] / r[kind] for r in rounds):.2f}",
            f"{opened[kind]:.1f}" if kind in opened else "",
        )
        for kind in data
    ]
    print(f"\n{count} images, commit {git_commit()}, medians of {args.repeats}\n")
    print(format_table(rows, ("source", "images/s", "ratio to the folder", "opening, s")))


if __name__ == "__main__":
    errors.run_script(main)
