"""Tar shards: names, labels, order; shards and members that lie."""

import io
import os
import pickle
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import write_images
from PIL import Image

from cplearn.data import scan
from cplearn.data.datasets import summary
from cplearn.data.images import ImageError
from cplearn.data.sources import build_dataset, open_images
from cplearn.data.tars import scan_shard
from cplearn.errors import UserError


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    gray = np.random.default_rng(seed).integers(0, 256, (3, 4), dtype=np.uint8)
    Image.fromarray(gray).resize((40, 36)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def names_of(path: Path) -> list[str]:
    return list(open_images(str(path)).names)


# --- labels ----------------------------------------------------------------------------------------------


def labels_of(tmp_path, members: dict[str, bytes]):
    data = open_images(str(write_tar(tmp_path / "x.tar", members)))
    return data.classes, list(data.labels)


def test_where_labels_come_from(tmp_path):
    image = jpeg()
    numbers = {f"{k}.{x}": y for k in range(12) for x, y in (("jpg", image), ("cls", str(k).encode()))}
    assert labels_of(tmp_path, numbers) == ([str(k) for k in range(12)], list(range(12)))  # 10 after 9, not after 1
    names = {"a.jpg": image, "a.cls": b"owl\n", "b.jpg": image, "b.cls": b"elk"}
    assert labels_of(tmp_path, names) == (["elk", "owl"], [1, 0])
    fields = {"a.json": b'{"label": 7}', "a.jpg": image, "b.jpg": image, "b.json": b'{"cls": "x", "text": 1}'}
    assert labels_of(tmp_path, fields) == (["7", "x"], [0, 1])
    texts = {f"{k}.{x}": y for k in range(4) for x, y in (("png", image), ("txt", [b"golden owl", b"elk"][k % 2]))}
    assert labels_of(tmp_path, texts) == (["elk", "golden owl"], [1, 0, 1, 0])
    first = {"a.jpg": image, "a.json": b'{"label": 1}', "a.cls": b"2", "b.jpg": image, "b.cls": b"3"}
    assert labels_of(tmp_path, first) == (["2", "3"], [0, 1])
    dots = {"a.left.jpg": image, "a.right.jpg": image, "a.cls": b"1", "b.1.jpg": image, "b.1.cls": b"2"}
    assert labels_of(tmp_path, dots) == (["1", "2"], [0, 0, 1])
    folders = {"owl/1.jpg": image, "./elk/2.jpg": image}
    assert labels_of(tmp_path, folders) == (["elk", "owl"], [1, 0])


def test_what_is_no_label(tmp_path, capsys):
    image = jpeg()
    captions = {f"{k}.{x}": y for k in range(4) for x, y in (("jpg", image), ("txt", b"photo %d" % k))}
    assert labels_of(tmp_path, captions) == (None, [-1] * 4)
    assert "count as captions" in capsys.readouterr().out
    assert labels_of(tmp_path, {"a.jpg": image, "a.cls": b"1", "b.jpg": image}) == (None, [-1, -1])
    assert "1 of 2 images have no label, so no label is used" in capsys.readouterr().out
    for wrong in (b"[1]", b"{", b'{"label": [1]}', b'{"label": true}', b"[" * 100_000, b"\xff\xfe"):
        assert labels_of(tmp_path, {"a.jpg": image, "a.json": wrong, "b.jpg": image, "b.json": wrong})[0] is None
    for wrong in (b"", b"x" * 5000, b"two\nlines", b"-1", b"\x00"):
        assert labels_of(tmp_path, {"a.jpg": image, "a.cls": wrong, "b.jpg": image, "b.cls": wrong})[0] is None


# --- order and access --------------------------------------------------------------------------------------


def test_order_and_any_access(tmp_path):
    contents = [jpeg(k) for k in range(9)]
    for k, shard in enumerate(("b.tar", "a.tar", "c.tar")):
        write_tar(tmp_path / shard, {f"{j}.jpg": contents[3 * k + j] for j in (2, 0, 1)})
    data = build_dataset("folder", str(tmp_path), "train")
    assert list(data.names) == [f"{shard}.tar/{j}.jpg" for shard in "abc" for j in (2, 0, 1)]
    expected = [contents[k] for k in (5, 3, 4, 2, 0, 1, 8, 6, 7)]
    assert [data.open(i).read() for i in range(9)] == expected
    again = pickle.loads(pickle.dumps(data))  # as a worker gets it
    assert [again.open(i).read() for i in (8, 0, 4)] == [expected[i] for i in (8, 0, 4)]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # reads at the same time as its parent
        ok = all(data.open(i % 9).read() == expected[i % 9] for i in range(500))
        os.write(write, b"y" if ok else b"n")
        os._exit(0)
    assert all(data.open(i % 9).read() == expected[i % 9] for i in range(500))
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"y"
    assert len(os.listdir("/proc/self/fd")) < 100


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(form, tmp_path):
    name = "/".join(["folder" * 10] * 3) + "/ü.jpg" if form != tarfile.USTAR_FORMAT else "d" * 90 + "/ü.jpg"
    path = write_tar(tmp_path / "x.tar", {name: jpeg(1), "short.jpg": jpeg(2)}, format=form)
    assert names_of(path) == [f"x.tar/{name}", "x.tar/short.jpg"]
    assert open_images(str(path)).open(1).read() == jpeg(2)


def test_a_scan_that_takes_long_says_so(tmp_path, monkeypatch, capsys):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg()})
    open_images(str(path))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(scan, "SAY_AFTER", 0.0)
    open_images(str(path))
    assert f"Still scanning {tmp_path}, in shard 1, 0 images in those before it" in capsys.readouterr().out


def test_many_names_take_little_memory(tmp_path):
    """One long name must not make all others as long."""
    members = {f"{k:05}.jpg": b"x" for k in range(2000)} | {"y" * 20_000 + ".jpg": b"x"}
    data = open_images(str(write_tar(tmp_path / "x.tar", members)))
    assert len(pickle.dumps(data)) < 200_000 and data.names[-1] == f"x.tar/{'y' * 20_000}.jpg"
    with pytest.raises(IndexError):
        data.names[2001]


# --- what lies -----------------------------------------------------------------------------------------------


def refused(path: Path, named: str | None = None) -> None:
    with pytest.raises(UserError) as error:
        open_images(str(path))
    assert "\n" not in str(error.value) and (named or path.name) in str(error.value)


def test_shards_that_are_damaged_or_compressed(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{k}.jpg": jpeg(k) for k in range(5)}).read_bytes()
    last = whole.rindex(b"4.jpg")
    cases = {
        "empty": b"",
        "text": b"hello " * 1000,
        "middle": whole[:last] + b"\xff" * 512 + whole[last + 512 :],
        "in_data": whole[: last + 600],
        "in_header": whole[: last + 100],
        "between": whole[:last],
        "gzip": b"\x1f\x8b\x08" + bytes(600),
        "zstd": b"\x28\xb5\x2f\xfd" + bytes(600),
    }
    for name, content in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        refused(tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "real.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "whole.tar", "x.jpg")
    refused(tmp_path / "real.tar.gz")
    with pytest.raises(UserError, match=rf"{len(cases) + 1} tar shards .*: between.tar, empty.tar,.* and 4 more"):
        build_dataset("folder", str(tmp_path), "train")


def test_sizes_that_are_not_there(tmp_path):
    def with_size(field: bytes) -> Path:
        content = bytearray(write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "b.jpg": jpeg()}).read_bytes())
        content[124:136] = field
        content[148:156] = b" " * 8
        content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
        (tmp_path / "x.tar").write_bytes(content)
        return tmp_path / "x.tar"

    start = time.monotonic()
    for field in (b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12, b"\xff" * 10 + b"\x00\x00",
                  b"-0000000512\0"):  # fmt: skip
        refused(with_size(field))
    assert time.monotonic() - start < 5


def test_members_that_lie(tmp_path, capsys):
    """Nothing is extracted, links lead nowhere; what is no regular file is left out."""
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("pipe.jpg", tarfile.FIFOTYPE),
            ("device.jpg", tarfile.CHRTYPE), ("folder.jpg", tarfile.DIRTYPE), ("sparse.jpg", tarfile.GNUTYPE_SPARSE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(member)
        for name, content in (("../../up.jpg", jpeg()), ("/abs.jpg", jpeg()), ("._mac.jpg", b"x"), (".h/x.jpg", b"x"),
                              ("zero.jpg", b""), ("line\nend.jpg", b"broken"), ("note.md", b"x")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = open_images(str(path))
    assert list(data.names) == ["x.tar/../../up.jpg", "x.tar/abs.jpg", "x.tar/zero.jpg", "x.tar/line\nend.jpg"]
    assert data[0][0].size == data[1][0].size == (40, 36)
    for i, name in ((2, "x.tar/zero.jpg"), (3, r"x.tar/line\nend.jpg")):
        with pytest.raises(ImageError) as error:
            data[i]
        assert error.value.path == f"{tmp_path}/{name}" and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["secret.jpg", "x.tar"]


def test_images_that_share_a_name(tmp_path):
    refused(write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(1)), ("a.jpg", jpeg(2))]),
            "x.tar/a.jpg")  # fmt: skip
    write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(1)})
    write_tar(tmp_path / "y.tar", {"a.jpg": jpeg(1), "a.png": jpeg(1)})
    assert len(build_dataset("folder", str(tmp_path), "train")) == 3


def test_what_is_no_file(tmp_path):
    """A pipe would be waited for without end."""
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg()})
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "c.tar").symlink_to("/dev/zero")
    (tmp_path / "d.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match="3 tar shards .*: b.tar, c.tar, d.tar;"):
        build_dataset("folder", str(tmp_path), "train")
    for name in "bcd":
        (tmp_path / f"{name}.tar").unlink()
    data = build_dataset("folder", str(tmp_path), "train")
    (tmp_path / "a.tar").unlink()
    for _ in range(2):
        with pytest.raises(ImageError, match="a.tar/a.jpg: "):
            data[0]
        os.path.exists(tmp_path / "a.tar") or os.mkfifo(tmp_path / "a.tar")


def test_a_shard_without_images(tmp_path):
    for members in ({"a.txt": b"1"}, {}):
        refused(write_tar(tmp_path / "x.tar", members), str(tmp_path))


def test_offsets_are_those_of_tarfile(tmp_path):
    """Against an independent reading of the same file."""
    write_images(tmp_path / "images", 6)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    with tarfile.open(tmp_path / "x.tar") as tar, open(tmp_path / "x.tar", "rb", buffering=0) as file:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
        found = [(x.name, os.pread(file.fileno(), x.size, x.offset)) for x in scan_shard(file, Counter())]
    assert found == expected and len(found) == 6


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole + whole,  # cat a.tar b.tar: all tools see the first alone
        lambda whole: whole + b"x",
        lambda whole: nested_headers(500) + whole,
        lambda whole: pax_header(b"size=100000000000000000000\n") + whole,
    ],
)
def test_shards_of_which_a_part_would_be_missed(spoil, tmp_path):
    whole = write_tar(tmp_path / "x.tar", {f"{k}.jpg": jpeg(k) for k in range(5)}).read_bytes()
    (tmp_path / "x.tar").write_bytes(spoil(whole))
    refused(tmp_path / "x.tar")


def pax_header(record: bytes) -> bytes:
    member = tarfile.TarInfo("p")
    body = b"%d %s" % (len(record) + 3, record)
    member.type, member.size = tarfile.XHDTYPE, len(body)
    return member.tobuf() + body.ljust(512, b"\0")


def nested_headers(count: int) -> bytes:
    return pax_header(b"path=abcdefghijk\n") * count


def test_several_images_in_a_sample(tmp_path):
    """As left and right cameras and masks in WebDataset: one of them is named, or all are taken."""
    samples = {f"{k:02}.{name}": jpeg(k) for k in range(20) for name in ("left.jpg", "right.jpg", "mask.png")}
    path = write_tar(tmp_path / "x.tar", samples | {f"{k:02}.cls": b"%d" % (k % 2) for k in range(20)})
    with pytest.raises(UserError, match=r"20 samples with 20 left.jpg, 20 right.jpg, 20 mask.png: .* --image_column"):
        open_images(str(path))
    data = open_images(str(path), image_column="right.jpg")
    assert list(data.names) == [f"x.tar/{k:02}.right.jpg" for k in range(20)] and list(data.labels) == [0, 1] * 10
    assert data.encoded(3) == jpeg(3) and len(open_images(str(path), image_column="all")) == 60
    with pytest.raises(UserError, match="--image_column depth.png"):
        open_images(str(path), image_column="depth.png")
    frames = write_tar(tmp_path / "y.tar", {f"film.{k:04}.jpg": jpeg(k) for k in range(30)})
    assert len(open_images(str(frames))) == 30  # a dot in a name is no sample of 30 images


def test_other_images_are_counted(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "b.avif": b"x", "c.JFIF": b"x", "d.json": b"{}"})
    assert summary(open_images(str(path))).startswith("1 images, 2 left out (.avif, .jfif), no classes")
