"""One image file: opened, read, refused."""

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from cplearn.errors import LocalError, WorkerError
from cplearn.text import printable

T = TypeVar("T")

# What a file may be, whatever its name says. Pillow would also hand PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit for warning of a decompression bomb: 256 MiB in RGB

MOST_BYTES = 2**30  # of an encoded image: above the pixels that may be decoded


class ImageError(LocalError):
    """An image that cannot be read. `path` names it ("" where that is not known), `reason` says what is wrong with it,
    without how to mend that.

    Made of its line alone where torch raises it again for a loader's process.
    """

    def __init__(self, line: str, path: str = "", reason: str = ""):
        super().__init__(line)
        self.path, self.reason = path, reason or line


def too_many(bad: int, images: int, share: float, repair: str) -> str:
    """Return why so many images that cannot be read end a run, and how to go on; `share` is --max_bad_images."""
    return (
        f"{bad} of {images} images cannot be read, more than --max_bad_images {share:g} allows "
        f"({int(share * images)}): {repair}, or allow more with --max_bad_images {min(1, 2 * bad / images):.1g}"
    )


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file to read. Raises OSError for what is none: a pipe would be waited for without end."""
    file = open(os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "is no regular file", str(path))
    return file


def file_stamp(name: str, file: BinaryIO) -> tuple[str, int, int]:
    """Return what tells a file from a changed one: name, bytes, time of the change."""
    status = os.fstat(file.fileno())
    return name, status.st_size, status.st_mtime_ns


def check_bytes(size: int) -> None:
    """Raise ValueError for more bytes than can be those of an image inside another file."""
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes are more than the {MOST_BYTES:,} allowed")


def image_size(path: Path | str, opened: Callable[[], BinaryIO] | None = None) -> tuple[int, int]:
    """Return width and height from the header of an image file. Raises as `read_image`."""
    return _with_image(path, opened, lambda image: image.size)


def read_image(
    path: Path | str,
    reduction: Callable[[int, int], int] | None = None,
    opened: Callable[[], BinaryIO] | None = None,
) -> Image.Image:
    """Read the first frame of an image file as 8-bit RGB, not turned by its EXIF orientation (as torchvision and DINO).

    With `reduction`, smaller by the factor (1, 2, 4 or 8) that it gives for width and height: a JPEG is then decoded at
    that size, which is faster, other files are averaged. Where the image lies inside another file, `path` only names
    it and `opened` returns its bytes. Raises `ImageError` for whatever cannot be decoded whole, or is larger than
    `MAX_PIXELS`, and `WorkerError` where it is not the file's fault.
    """

    def decode(image: Image.Image) -> Image.Image:
        if image.width * image.height > MAX_PIXELS:  # known from the header, nothing is decoded yet
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
        factor = reduction(*image.size) if reduction else 1
        if factor > 1 and image.format == "JPEG":
            image.draft(None, (image.width // factor, image.height // factor))
            factor = 1
        rgb = to_rgb(image)
        return rgb.reduce(factor) if factor > 1 else rgb

    return _with_image(path, opened, decode)


def _with_image(path: Path | str, opened: Callable[[], BinaryIO] | None, use: Callable[[Image.Image], T]) -> T:
    """Return what `use` makes of an image whose header has been read."""
    try:
        with opened() if opened else open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return use(image)
    except Exception as error:  # a damaged file can make Pillow raise anything
        first_line = (str(error).splitlines() or [""])[0].replace(f" {str(path)!r}", "")
        detail = re.sub(" <_io.*?>", "", first_line).strip(" :") or type(error).__name__
        reason = f"cannot read the image {printable(path)}: {detail}"
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_THE_FILES_FAULT:
            raise WorkerError(f"{reason}; fewer --num_workers, more memory, or more open files (ulimit -n)") from None
        raise ImageError(f"{reason}; repair it or remove it", printable(path), reason) from None


_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. 16-bit gray is scaled (Pillow itself clips it to white); transparency is dropped."""
    if image.mode.startswith("I"):  # Pillow reads 16-bit files as I;16, older versions as I
        gray = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert them to 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGB":  # `convert` would copy it
        image.load()
        return image
    return image.convert("RGB")
