"""Files as others may send them: images of odd and damaged kinds, checkpoints that lie, are cut, or would run code."""

import copy
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cplearn import checkpoints

JUNK = [None, True, -1, 0, 3.7, 1e308, float("nan"), 10**30, "", "x", "x" * 2000, "../..", [], {}, [1, 2], {"a": 1},
        [[[[[[]]]]]], "\ud800"]  # fmt: skip


def lie(rng: random.Random, content):
    """Return a copy with one value somewhere inside replaced, removed or added."""
    content = copy.copy(content)
    if isinstance(content, dict) and content:
        key = rng.choice(list(content))
        if rng.random() < 0.7 and isinstance(content[key], (dict, list)):
            content[key] = lie(rng, content[key])
        elif rng.random() < 0.2:
            del content[key]
        elif rng.random() < 0.1:
            content[rng.choice(("more", 7, None))] = rng.choice(JUNK)
        else:
            content[key] = rng.choice(JUNK)
        return content
    if isinstance(content, list) and content and rng.random() < 0.8:
        k = rng.randrange(len(content))
        content[k] = lie(rng, content[k])
        return content
    return rng.choice(JUNK)


def damage(path: Path, rng: random.Random) -> None:
    """Flip a few bits, cut, or overwrite a piece."""
    content = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[rng.randrange(len(content)) :]
    elif kind == 2:
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(1, 4096)] = rng.randbytes(rng.randrange(0, 4096))
    else:  # the directory and the pickle are small: aim at them
        near = rng.randrange(min(2000, len(content)))
        content[rng.choice((near, len(content) - 1 - near))] = rng.randrange(256)
    path.write_bytes(bytes(content))


class _Attack:
    def __init__(self, witness: str):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def write_attack(path: Path, rng: random.Random, witness: Path) -> None:
    """Write a checkpoint that would make the file `witness` if it were unpickled, in one of several wrappings."""
    attack = _Attack(str(witness))
    content = {"format": checkpoints.FORMAT, "model": {"w": torch.zeros(3)}, "args": attack}
    kind = rng.randrange(4)
    if kind < 2:
        torch.save(content, path, _use_new_zipfile_serialization=kind == 0)
    elif kind == 2:
        path.write_bytes(pickle.dumps(content, protocol=rng.choice((0, 2, 4))))
    else:  # a checkpoint whose pickle is replaced, checksums and all
        plain = BytesIO()
        torch.save({**content, "args": {}}, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
            for item in source.namelist():
                evil = item.endswith("data.pkl")
                target.writestr(item, pickle.dumps(attack, protocol=2) if evil else source.read(item))


# --- images --------------------------------------------------------------------------------------------


class Pictures:
    """Random images, encoded."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def picture(self, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
        numbers = np.random.default_rng(self.rng.randrange(2**31)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(numbers).resize(size, Image.Resampling.BICUBIC).convert(mode)

    def encoded(self, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (48, 40), **options) -> bytes:
        return _bytes_of(self.picture(mode, size), kind, **options)

    def cut(self, kind: str = "JPEG", most: int = 2**30) -> bytes:
        content = self.encoded(kind)
        return content[: self.rng.randrange(1, int(len(content) * 0.95))][:most]

    def frames(self) -> bytes:
        return self.encoded("GIF", "P", save_all=True, append_images=[self.picture("P"), self.picture("P")])

    def turned(self) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = 6
        return self.encoded(exif=exif)

    def deep(self, kind: str) -> bytes:
        return _bytes_of(Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 30), kind)


def _bytes_of(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG that says it is this large and is not."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * 10000)  # far too few: only the header counts
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def image_kinds(rng: random.Random) -> dict[str, tuple[str, bool, Callable[[], bytes]]]:
    """Return by its name a kind's suffix, whether such files can be read, and what makes the content of one."""
    make = Pictures(rng)
    return {
        "JPEG": (".jpg", True, make.encoded),
        "progressive JPEG": (".jpg", True, lambda: make.encoded(progressive=True)),
        "CMYK JPEG": (".jpg", True, lambda: make.encoded(mode="CMYK")),
        "gray JPEG": (".jpeg", True, lambda: make.encoded(mode="L")),
        "JPEG with EXIF rotation": (".JPG", True, make.turned),
        "16-bit PNG": (".png", True, lambda: make.deep("PNG")),
        "palette PNG with transparency": (".png", True, lambda: make.encoded("PNG", "P", transparency=3)),
        "gray and alpha PNG": (".png", True, lambda: make.encoded("PNG", "LA")),
        "1-bit PNG": (".png", True, lambda: make.encoded("PNG", "1")),
        "animated GIF": (".gif", True, make.frames),
        "PNG called .jpg": (".jpg", True, lambda: make.encoded("PNG")),
        "WebP": (".webp", True, lambda: make.encoded("WEBP")),
        "16-bit TIFF": (".tif", True, lambda: make.deep("TIFF")),
        "1 x 1 pixel": (".png", True, lambda: make.encoded("PNG", size=(1, 1))),
        "20000 x 20 pixels": (".png", True, lambda: make.encoded("PNG", size=(20000, 20))),
        "20 x 20000 pixels": (".jpg", True, lambda: make.encoded(size=(20, 20000))),
        "cut JPEG": (".jpg", False, make.cut),
        "cut PNG": (".png", False, lambda: make.cut("PNG")),
        "cut GIF": (".gif", False, lambda: make.cut("GIF", 200)),
        "empty file": (".jpg", False, lambda: b""),
        "text": (".jpg", False, lambda: b"<html>404 not found</html>"),
        "random bytes": (".png", False, lambda: rng.randbytes(3000)),
        "JPEG head, then zeros": (".jpg", False, lambda: make.encoded()[:300] + bytes(3000)),
        "PostScript called .jpg": (".jpg", False, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "float TIFF": (".tiff", False, lambda: make.encoded("TIFF", "F")),
        "decompression bomb": (".png", False, lambda: _png_header(60000, 60000)),
        "large bomb": (".png", False, lambda: _png_header(10000, 10000)),
    }


def write_images(folder: Path, each: int, rng: random.Random) -> dict[str, bool]:
    """Write `each` files of every kind, KIND-NUMBER.SUFFIX; return whether such files can be read, by kind."""
    kinds = {name.replace(" ", "_"): kind for name, kind in image_kinds(rng).items()}
    for name, (suffix, _, make) in kinds.items():
        for i in range(each):
            (folder / f"{name}-{i}{suffix}").write_bytes(make())
    return {name: readable for name, (_, readable, _) in kinds.items()}
