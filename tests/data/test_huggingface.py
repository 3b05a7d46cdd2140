"""Parquet and saved copies: columns, labels, row groups, the copy for any order; files and rows that lie."""

import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, run_in_processes
from PIL import Image

from cplearn.data.sources import build_dataset, open_images
from cplearn.errors import LocalError, UserError, WriteError

hf = pytest.importorskip("datasets")
huggingface = pytest.importorskip("cplearn.data.huggingface")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = {"_type": "ClassLabel", "names": ["owl", "elk"]}


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def images(values, paths=None) -> pa.Array:
    paths = paths or [None] * len(values)
    rows = [{"bytes": None if v is None else png(v), "path": p} for v, p in zip(values, paths, strict=True)]
    return pa.array(rows, STRUCT)


def write(path, columns, features=None, **options):
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def value(data, i: int) -> int:
    return int(np.asarray(data[i][0])[0, 0, 0])


# --- columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "features", "classes", "labels"),
    [
        ({"label": [1, 0, 1]}, {"label": NAMES}, ["owl", "elk"], [1, 0, 1]),
        ({"label": [10, 9, 10]}, None, ["9", "10"], [1, 0, 1]),
        ({"label": ["b", "a", "b"]}, None, ["a", "b"], [1, 0, 1]),
        ({"label": [-1, -1, -1]}, {"label": NAMES}, None, [-1] * 3),
        ({"label": pa.array([1, None, 0], pa.int64())}, {"label": NAMES}, None, [-1] * 3),
        ({"label": [1, 0, 1]}, {"label": {"_type": "ClassLabel", "names": ["cat", "cat"]}}, ["0", "1"], [1, 0, 1]),
        ({"fine": [0, 1, 0], "coarse": [1, 1, 1]}, {"fine": NAMES, "coarse": NAMES}, ["owl", "elk"], [0, 1, 0]),
        ({"height": [1, 2, 3]}, None, None, [-1] * 3),
        ({"raw": pa.array([b"7", b"8", b"9"]), "label": [1, 0, 0]}, None, ["0", "1"], [1, 0, 0]),
    ],
)
@pytest.mark.parametrize("image", ["image", "img", "pixels"])
def test_columns_and_labels(columns, features, classes, labels, image, tmp_path):
    """Structs go before other bytes, which may be images too where there are none."""
    if image == "pixels" and "raw" in columns:
        return
    column = pa.array([png(1), png(2), png(3)]) if image == "pixels" else images([1, 2, 3])
    data = open_images(str(write(tmp_path / "x.parquet", {**columns, image: column}, features)))
    assert (data.classes, list(data.labels)) == (classes, labels)
    assert [value(data, i) for i in range(3)] == [1, 2, 3] and data.size_of(0) == (6, 4)


@pytest.mark.parametrize(
    ("columns", "features", "named"),
    [
        ({"a": [1, 2], "b": ["x", "y"]}, None, "columns: a, b"),
        ({"image": ["a", "b"]}, None, "columns: image"),
        ({"image": pa.array([{"bytes": 1}] * 2)}, None, "columns: image"),
        ({"a": images([1, 2]), "image": images([1, 2])}, None, "(a, image): name one with --image_column"),
        ({"image": images([1, 2]), "label": [0, 2]}, {"label": NAMES}, "label holds 2"),
        ({"image": images([1, 2]), "label": [0.5, 1.0]}, None, "label holds float"),
        ({"image": images([1, 2]), "label": [[1], [2]]}, None, "label holds list"),
        ({"image": images([])}, None, "x.parquet"),
        ({"image": images([None, None], ["/a.png", "/b.png"])}, None, "holds paths of images"),
    ],
)
def test_tables_that_cannot_be_used(columns, features, named, tmp_path):
    with pytest.raises(UserError) as error:
        open_images(str(write(tmp_path / "x.parquet", columns, features)))
    assert named in str(error.value) + "x.parquet" and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata",
    [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": 3, "_type": "ClassLabel"}}}}',
     b'{"info": {"features": {"label": {"_type": "os"}}}}', b"[" * 100_000, b"\xff"],
)  # fmt: skip
def test_words_of_a_schema_that_lie_are_not_listened_to(metadata, tmp_path):
    table = pa.table({"image": images([1, 2]), "label": [1, 0]}).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_images(str(tmp_path / "x.parquet")).classes == ["0", "1"]


def test_damaged_files_are_named(tmp_path):
    good = write(tmp_path / "good.parquet", {"image": images([1, 2])}).read_bytes()
    (tmp_path / "data").mkdir()
    for name, content in (("a", b""), ("b", b"PAR1" + bytes(50)), ("c", good[:-20]), ("d", good[: len(good) // 2])):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(content)
    os.mkfifo(tmp_path / "data" / "e.parquet")
    with pytest.raises(UserError, match="5 parquet files .*: a.parquet, b.parquet, c.parquet, d.parquet, e.parquet"):
        build_dataset("folder", str(tmp_path / "data"), "train")


def test_files_that_do_not_fit_together(tmp_path):
    for name, classes in (("a", ["owl", "elk"]), ("b", ["elk", "owl"])):
        features = {"label": {"_type": "ClassLabel", "names": classes}}
        write(tmp_path / f"{name}.parquet", {"image": images([1, 2]), "label": [0, 1]}, features)
    with pytest.raises(UserError, match="b.parquet .* a.parquet"):
        build_dataset("folder", str(tmp_path), "train")


def test_rows_that_lie(tmp_path):
    values = [{"bytes": png(1), "path": "a"}, {"bytes": None, "path": "/etc/passwd"}, None,
              {"bytes": b"", "path": None}, {"bytes": b"no image", "path": "x\ny"}]  # fmt: skip
    data = open_images(str(write(tmp_path / "x.parquet", {"image": pa.array(values, STRUCT)})))
    assert value(data, 0) == 1
    for i, name in enumerate(("#1//etc/passwd", "#2", "#3", r"#4/x\ny"), 1):
        with pytest.raises(LocalError) as error:
            data[i]
        assert f"x.parquet{name}: " in str(error.value) and "\n" not in str(error.value)


# --- row groups, and the copy for any order ------------------------------------------------------------------------


def two_files(folder):
    for k, name in enumerate(("b", "a")):
        columns = {"image": images(range(10 * k, 10 * k + 10), [f"{j}.png" for j in range(10)])}
        write(folder / f"{name}.parquet", columns, row_group_size=3)
    return build_dataset("folder", str(folder), "train")


@pytest.mark.parametrize("copied", [False, True])
def test_order_over_files_and_row_groups(copied, tmp_path, monkeypatch):
    """Also of what is handed to other processes, forked or not."""
    (tmp_path / "odd[1] *").mkdir()  # no pattern
    data = two_files(tmp_path / "odd[1] *")
    if copied:
        monkeypatch.setattr(huggingface, "SMALL", 0)
        data.allow_any_order(str(tmp_path / "cache"))
        for name in "ab":
            (tmp_path / "odd[1] *" / f"{name}.parquet").unlink()  # the copy is enough
    assert data.names[0] == "a.parquet#0/0.png" and data.names[19] == "b.parquet#9/9.png"
    order = [*range(20), *np.random.default_rng(0).permutation(20).tolist()]
    sent = pickle.dumps(data)
    again = pickle.loads(sent)
    pid = os.fork()
    if pid == 0:
        os._exit(int([value(data, i) for i in order * 3] != [(i + 10) % 20 for i in order * 3]))
    assert [value(data, i) for i in order * 3] == [value(again, i) for i in order * 3]
    assert [value(data, i) for i in order] == [(i + 10) % 20 for i in order] and len(sent) < 10_000
    assert os.waitpid(pid, 0)[1] == 0


def test_a_copy_is_made_once_until_the_files_change(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images([5, 6, None, 8]), "label": ["a", "b", "a", "c"]})
    open_images(str(path)).allow_any_order(str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()  # few are read as they are
    monkeypatch.setattr(huggingface, "SMALL", 0)

    def copies():
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}

    data = open_images(str(path))
    data.allow_any_order(str(tmp_path / "cache"))
    made = copies()
    assert len(made) == 1 and [value(data, i) for i in (3, 0, 1)] == [8, 5, 6]
    with pytest.raises(LocalError, match="x.parquet#2: the row holds no bytes"):
        data[2]
    (tmp_path / "classes").write_text("b\nc\n")
    chosen = build_dataset("folder", str(path), "train", str(tmp_path / "classes"))
    chosen.allow_any_order(str(tmp_path / "cache"))
    assert copies() == made and [value(chosen, i) for i in range(2)] == [6, 8]
    os.utime(path)
    open_images(str(path)).allow_any_order(str(tmp_path / "cache"))
    assert len(copies()) == 2 and made.items() <= copies().items()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="--cache_dir"):
        open_images(str(path)).allow_any_order(str(tmp_path / "file" / "cache"))


def test_a_damaged_row_group(tmp_path, monkeypatch):
    """In their order, images around it can be read; a copy of all is refused."""
    path = write(tmp_path / "x.parquet", {"image": images([1, 2, 3, 4])}, row_group_size=2, compression="zstd",
                 use_dictionary=False)  # fmt: skip
    content = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[at : at + 30] = b"\xff" * 30
    path.write_bytes(content)
    data = open_images(str(path))
    with pytest.raises(LocalError, match="x.parquet#0: "):
        data[0]
    assert value(data, 2) == 3
    monkeypatch.setattr(huggingface, "SMALL", 0)
    with pytest.raises(UserError) as error:
        data.allow_any_order(str(tmp_path / "cache"))
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def _first_use(rank, folder, cache):
    huggingface.SMALL = 0
    data = build_dataset("folder", folder, "train")
    data.allow_any_order(cache)
    return [value(data, i) for i in range(20)]


@pytest.mark.dist
def test_two_processes_that_want_the_copy_at_once_make_one(tmp_path):
    (tmp_path / "data").mkdir()
    two_files(tmp_path / "data")
    found = run_in_processes(tmp_path, _first_use, str(tmp_path / "data"), str(tmp_path / "cache"))
    assert found[0] == found[1] == [*range(10, 20), *range(10)]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_of_several_columns_of_images_only_the_named_is_read(kind, tmp_path):
    """The other holds addresses, a pipe and bytes that are no image; each is left alone."""
    os.mkfifo(tmp_path / "pipe")
    other = [{"bytes": None, "path": "http://127.0.0.1:9/x.png"}, {"bytes": None, "path": str(tmp_path / "pipe")},
             {"bytes": b"no image", "path": "x"}]  # fmt: skip
    rows = {"photo": images([1, 2, 3]), "mask": pa.array(other, STRUCT)}
    if kind == "parquet":
        name, path = "folder", str(write(tmp_path / "x.parquet", rows))
    else:
        struct = {"bytes": hf.Value("binary"), "path": hf.Value("string")}  # of which save_to_disk opens nothing
        data = hf.Dataset.from_dict({k: v.to_pylist() for k, v in rows.items()},
                                    features=hf.Features({"photo": hf.Image(), "mask": struct}))  # fmt: skip
        data.save_to_disk(str(tmp_path / "copy"))
        words = tmp_path / "copy" / "dataset_info.json"
        words.write_text(
            json.dumps({**json.loads(words.read_text()), "features": {x: {"_type": "Image"} for x in rows}})
        )
        name, path = f"hf:{tmp_path}/copy", None
    with pytest.raises(UserError, match=r"\(photo, mask\): name one with --image_column"):
        build_dataset(name, path, "train")
    data = build_dataset(name, path, "train", image_column="photo")
    assert [value(data, i) for i in range(3)] == [1, 2, 3] and len(data.encoded(1)) == len(png(2))
    with pytest.raises(UserError, match="no column of images --image_column depth, but photo, mask"):
        build_dataset(name, path, "train", image_column="depth")


def test_a_damaged_copy_is_named_and_not_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SMALL", 0)
    data = open_images(str(write(tmp_path / "x.parquet", {"image": images([5, 6, 7])})))
    data.allow_any_order(str(tmp_path / "cache"))
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    content = arrow.read_bytes()
    assert content.count(png(6)) == 1
    with open(arrow, "r+b") as file:  # in place: the copy is mapped
        file.seek(content.index(png(6)))
        file.write(bytes(len(png(6))))
    assert value(data, 0) == 5
    with pytest.raises(UserError, match=f"{tmp_path}/cache holds a damaged copy of .*x.parquet#1"):
        data[1]
    assert value(data, 2) == 7


OFFLINE = """
import socket, sys

def refused(*args, **options):
    raise SystemExit(f"network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
from cplearn.data import huggingface, sources
huggingface.SMALL = 0
for data in (sources.open_images(sys.argv[1]), sources.build_dataset(f"hf:{sys.argv[2]}", None, "train")):
    data.allow_any_order(sys.argv[3])
    print(data[0][0].size)
"""


def test_no_network_and_no_other_column_is_touched(tmp_path):
    """Of a struct with an address in place of bytes, and of a column that would be a sound somewhere else."""
    rows = {"image": images([1, None], ["x", "http://127.0.0.1:9/x.png"]), "sound": ["http://127.0.0.1:9/a.wav"] * 2}
    write(tmp_path / "x.parquet", rows, {"image": {"_type": "Image"}, "sound": {"_type": "Value", "dtype": "string"}})
    rows = {"image": [{"bytes": png(1), "path": None}], "sound": ["http://127.0.0.1:9/a.wav"]}
    features = hf.Features({"image": hf.Image(), "sound": hf.Value("string")})
    hf.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "copy"))
    command = [sys.executable, "-c", OFFLINE, *(str(tmp_path / name) for name in ("x.parquet", "copy", "cache"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "0"})
    assert done.stdout.splitlines()[-2:] == ["(6, 4)"] * 2 and not done.stderr, done.stderr


def test_the_package_that_is_missing_is_named(tmp_path):
    code = ("import sys; sys.modules['datasets'] = None; from cplearn import errors; from cplearn.data import sources; "
            f"errors.run_script(lambda argv: sources.build_dataset('hf:{tmp_path}', None, 'train'))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "pip install datasets" in done.stderr


# --- saved copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "split"),
    [("nowhere", "train"), ("empty", "train"), ("cut", "train"), ("lies", "train"), ("text", "train"), ("text", "val")],
)
def test_wrong_saved_copies_are_refused(path, split, tmp_path):
    hf.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    hf.Dataset.from_dict({"image": [png(1)] * 50}).save_to_disk(str(tmp_path / "cut"))
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    os.truncate(arrow, 100)
    hf.Dataset.from_dict({"image": [png(1)] * 50}).save_to_disk(str(tmp_path / "lies"))
    (arrow,) = (tmp_path / "lies").glob("*.arrow")
    offsets = np.arange(51, dtype=np.int32) * len(png(1))  # of the images: read unchecked, they end the process
    assert arrow.read_bytes().count(offsets.tobytes()) == 1
    arrow.write_bytes(arrow.read_bytes().replace(offsets.tobytes(), (offsets * 10**6).tobytes()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        build_dataset(f"hf:{tmp_path}/{path}", None, split)
    assert f"{tmp_path}/{path}" in str(error.value) and "\n" not in str(error.value)
