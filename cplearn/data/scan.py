"""Looking for images below a folder, and lines on the progress of what takes long."""

import errno
import heapq
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.text import few, printable

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
# Images that are not read here, to be counted.
OTHERS = {".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".heic", ".heif", ".tga", ".svg", ".eps", ".exr", ".dng", ".psd"}
SAY_AFTER = 5.0  # seconds between two lines on a scan that takes long


def say(line: str) -> None:
    """Print a line, on the first process only."""
    if collectives.is_main():
        print(line, flush=True)


class Progress:
    """Says every `SAY_AFTER` seconds how far something is."""

    def __init__(self):
        self.last = time.monotonic()

    def tell(self, line: Callable[[], str]) -> None:
        if time.monotonic() - self.last >= SAY_AFTER:
            self.last = time.monotonic()
            say(line())


def has_image_suffix(name: str) -> bool:
    return suffix_of(name) in EXTENSIONS


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def left_out(suffixes: Counter[str]) -> str:
    """Return a word on images that are not read for their suffix, "" for none."""
    there = sorted(OTHERS & suffixes.keys())
    return f", {sum(suffixes[x] for x in there):,} left out ({', '.join(there)})" if there else ""


def scan(root: Path, tops: list[str]) -> tuple[list[str], str]:
    """Return the images in these folders of `root` ("" for itself), however deep: sorted paths relative to `root`; and
    a word on those that were left out.

    Each folder counts once, by its own name rather than a link's, so links may lead anywhere: they wait until no real
    folder is left, in order. Hidden files and folders are left out (._x.jpg, .ipynb_checkpoints). Raises `UserError`
    that names folders that cannot be read.
    """
    images, others, unreadable, seen, twice = [], Counter(), [], set(), 0
    folders = [(top, os.path.realpath(root / top)) for top in tops]  # paths relative to root, and real ones
    links: list[str] = []  # relative to root
    progress = Progress()
    while folders or links:
        folder, real = folders.pop() if folders else _resolved(root, heapq.heappop(links))
        if real in seen:
            twice += 1
            continue
        seen.add(real)
        try:
            entries = _visible(real)
        except OSError as error:
            unreadable.append(f"{folder or root} ({error.strerror})")
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                if error.errno != errno.ELOOP:  # a link to itself leads nowhere
                    unreadable.append(f"{path} ({error.strerror})")
                continue
            if is_folder and entry.is_symlink():
                heapq.heappush(links, path)
            elif is_folder:
                folders.append((path, entry.path))
            elif has_image_suffix(path):
                images.append(path)
            else:
                others[suffix_of(path)] += 1
        progress.tell(lambda: f"Still scanning {printable(root)}, {len(images):,} images")
    if unreadable:
        raise UserError(
            f"{printable(root)} has {len(unreadable)} folders that cannot be read: {few(sorted(unreadable))}; "
            "correct their rights or names, or move them away"
        )
    if twice:
        say(f"{printable(root)}: {twice} links to folders were left out, whose images count already")
    return sorted(images), left_out(others)


def _resolved(root: Path, link: str) -> tuple[str, str]:
    return link, os.path.realpath(root / link)


def _visible(folder: str) -> list[os.DirEntry]:
    """List a folder without what is hidden. Raises OSError also for a folder whose files cannot be opened."""
    os.stat(os.path.join(folder, "."))
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
