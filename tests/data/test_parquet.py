"""Parquet: columns, labels, row groups, copies; files and rows that lie."""

import io
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cplearn.data import parquet
from cplearn.data.sources import build_dataset, open_images
from cplearn.errors import Interrupted, LocalError, UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def rows(values, paths=None):
    paths = paths or [None] * len(values)
    return [{"bytes": None if v is None else png(v), "path": p} for v, p in zip(values, paths, strict=True)]


def write(path, columns, features=None, **options):
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def value(data, i: int) -> int:
    return int(np.asarray(data[i][0])[0, 0, 0])


def test_columns_and_labels(tmp_path):
    image = pa.array(rows([1, 2, 3]), STRUCT)
    names = {"_type": "ClassLabel", "names": ["owl", "elk"]}
    for columns, features, classes, labels in (
        ({"image": image, "label": [1, 0, 1]}, {"label": names}, ["owl", "elk"], [1, 0, 1]),
        ({"image": image, "label": [10, 9, 10]}, None, ["9", "10"], [1, 0, 1]),
        ({"image": image, "label": ["b", "a", "b"]}, None, ["a", "b"], [1, 0, 1]),
        ({"image": image, "label": [-1, -1, -1]}, {"label": names}, None, [-1] * 3),
        ({"image": image, "label": pa.array([1, None, 0], pa.int32())}, {"label": names}, None, [-1] * 3),
        ({"image": image, "fine": [0, 1, 0], "coarse": [1, 1, 1]}, {"fine": names, "coarse": names},
         ["owl", "elk"], [0, 1, 0]),
        ({"image": image, "height": [1, 2, 3]}, None, None, [-1] * 3),
        ({"img": image, "mask": image, "label": [1, 0, 0]}, None, ["0", "1"], [1, 0, 0]),
        ({"pixels": [png(1), png(2), png(3)], "label": [1, 0, 0]}, None, ["0", "1"], [1, 0, 0]),
    ):  # fmt: skip
        data = open_images(str(write(tmp_path / "x.parquet", columns, features)))
        assert (data.classes, list(data.labels)) == (classes, labels) and [value(data, i) for i in range(3)] == [
            1,
            2,
            3,
        ]


def test_order_over_files_and_row_groups(tmp_path):
    for k, name in enumerate(("b", "a")):
        columns = {"image": pa.array(rows(range(10 * k, 10 * k + 10), [f"{j}.png" for j in range(10)]), STRUCT)}
        write(tmp_path / f"{name}.parquet", columns, row_group_size=3)
    data = build_dataset("folder", str(tmp_path), "train")
    assert [value(data, i) for i in range(20)] == [*range(10, 20), *range(10)]
    assert data.names[0] == "a.parquet#0/0.png" and data.names[19] == "b.parquet#9/9.png"
    order = np.random.default_rng(0).permutation(20).tolist()
    assert [value(data, i) for i in order] == [(i + 10) % 20 for i in order]
    assert len(data._kept) == parquet.KEPT_GROUPS and len(data._open) <= parquet.KEPT_FILES
    again = pickle.loads(pickle.dumps(data))
    assert value(again, 7) == 17 and list(again.names) == list(data.names)
    read, wrote = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(wrote, b"y" if all(value(data, i) == (i + 10) % 20 for i in order * 3) else b"n")
        os._exit(0)
    assert all(value(data, i) == (i + 10) % 20 for i in order * 3)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"y"


def test_large_row_groups_are_copied_for_access_in_any_order(tmp_path, monkeypatch, capsys):
    columns = {"image": pa.array(rows([5, 6, None, 8]), STRUCT), "label": ["a", "b", "a", "c"]}
    path = write(tmp_path / "x.parquet", columns, row_group_size=2)
    data = open_images(str(path))
    data.allow_any_order(str(tmp_path / "cache"), lambda: False)
    assert data.unpacked is None and not (tmp_path / "cache").exists()  # small ones are read as they are
    monkeypatch.setattr(parquet, "SMALL_GROUP", 1)
    with pytest.raises(Interrupted, match="nothing is lost"):
        data.allow_any_order(str(tmp_path / "cache"), lambda: True)
    assert list((tmp_path / "cache").iterdir()) == []
    data.allow_any_order(str(tmp_path / "cache"), lambda: False)
    assert "copying 0.00 GB of images to" in capsys.readouterr().out
    path.unlink()  # the copy is enough
    data._forget()
    assert [value(data, i) for i in (3, 0, 1)] == [8, 5, 6]
    assert [value(pickle.loads(pickle.dumps(data)), i) for i in (3, 0, 1)] == [8, 5, 6]
    with pytest.raises(LocalError, match="x.parquet#2: the row holds no bytes"):
        data[2]
    write(tmp_path / "x.parquet", columns, row_group_size=2)
    (tmp_path / "classes").write_text("b\nc\n")
    chosen = build_dataset("folder", str(tmp_path / "x.parquet"), "train", str(tmp_path / "classes"))
    chosen.allow_any_order(str(tmp_path / "cache"), lambda: False)
    assert [value(chosen, i) for i in range(2)] == [6, 8] and chosen.unpacked != data.unpacked


def test_rows_that_lie(tmp_path):
    values = [{"bytes": png(1), "path": "a"}, {"bytes": None, "path": "/etc/passwd"}, None,
              {"bytes": b"", "path": None}, {"bytes": b"no image", "path": "x\ny"}]  # fmt: skip
    data = open_images(str(write(tmp_path / "x.parquet", {"image": pa.array(values, STRUCT)})))
    assert value(data, 0) == 1 and data.size_of(0) == (6, 4)
    for i, words in ((1, r"#1//etc/passwd: the row holds no bytes"), (2, "#2: the row holds no bytes"),
                     (3, "#3: the row holds no bytes"), (4, r"#4/x.ny: cannot identify image file;")):  # fmt: skip
        with pytest.raises(LocalError, match=words) as found:
            data[i]
        assert "\n" not in str(found.value)


def test_files_that_lie(tmp_path):
    image = pa.array(rows([1, 2]), STRUCT)
    names = {"_type": "ClassLabel", "names": ["owl", "elk"]}
    good = write(tmp_path / "good.parquet", {"image": image}).read_bytes()
    wrong = {
        "no_image": (
            {"a": [1, 2], "b": ["x", "y"]},
            None,
            r"has no column of image bytes \(columns: a, b\): name it image",
        ),
        "text": ({"image": ["a", "b"]}, None, "has no column of image bytes"),
        "numbers": ({"image": pa.array([{"bytes": 1}] * 2)}, None, "has no column of image bytes"),
        "two": ({"a": image, "b": image}, None, r"has several columns of image bytes \(columns: a, b\)"),
        "label": (
            {"image": image, "label": [0, 2]},
            {"label": names},
            "column label holds 2, but there are names for 2",
        ),
        "floats": ({"image": image, "label": [0.5, 1.0]}, None, "column label holds float, not whole numbers"),
        "lists": ({"image": image, "label": [[1], [2]]}, None, "column label holds list, not whole numbers"),
        "none": ({"image": image.slice(0, 0)}, None, "its 1 parquet files have no rows"),
    }
    for name, (columns, features, words) in wrong.items():
        with pytest.raises(UserError, match=words) as found:
            open_images(str(write(tmp_path / f"{name}.parquet", columns, features)))
        assert "\n" not in str(found.value)
    for metadata in (b"{", b"[]", b'{"info": 3}',
                     b'{"info": {"features": {"label": {"names": 3, "_type": "ClassLabel"}}}}',
                     b"[" * 100_000, b"\xff"):  # fmt: skip
        table = pa.table({"image": image, "label": [1, 0]}).replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(table, tmp_path / "meta.parquet")
        assert open_images(str(tmp_path / "meta.parquet")).classes == ["0", "1"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in (("a", b""), ("b", b"PAR1" + bytes(50)), ("c", good[:-20]), ("d", good[: len(good) // 2])):
        (broken / f"{name}.parquet").write_bytes(content)
    os.mkfifo(broken / "e.parquet")
    with pytest.raises(
        UserError, match=r"has 5 parquet files that cannot be used: a.parquet \(.*e.parquet \(is no reg"
    ):
        build_dataset("folder", str(broken), "train")


def test_a_damaged_row_group_names_its_images(tmp_path):
    columns = {"image": pa.array(rows([1, 2, 3, 4]), STRUCT)}
    path = write(tmp_path / "x.parquet", columns, row_group_size=2, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[at : at + 30] = b"\xff" * 30
    path.write_bytes(content)
    data = open_images(str(path))
    with pytest.raises(LocalError, match="cannot read the image .*x.parquet#0: "):
        data[0]
    assert value(data, 2) == 3


def test_files_that_do_not_fit_together(tmp_path):
    image = pa.array(rows([1, 2]), STRUCT)
    for name, classes in (("a", ["owl", "elk"]), ("b", ["elk", "owl"])):
        features = {"label": {"_type": "ClassLabel", "names": classes}}
        write(tmp_path / f"{name}.parquet", {"image": image, "label": [0, 1]}, features)
    with pytest.raises(UserError, match="b.parquet names other classes than a.parquet"):
        build_dataset("folder", str(tmp_path), "train")
