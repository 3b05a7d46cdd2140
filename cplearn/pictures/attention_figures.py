"""Pictures of attention: overlays, masks and components of one image, a sheet of many, and the files they go to."""

import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cplearn.errors import UserError
from cplearn.files import check_output_dir, read_json, remove_quietly, write_bytes, write_text
from cplearn.pictures.attention import View
from cplearn.text import printable

COLORS = "inferno"  # of attention: black is none
SCALE = 3.0  # even shares of attention that the brightest color stands for at least: noise must not look like structure
COLOR_SHARE = 0.7  # of an overlay; the rest is the photo in gray
LEVELS = 2.0  # standard deviations of a component from gray to a full color
OUTSIDE = (0.17, 0.04, 0.27)  # of a mask: a color that photos rarely have
GRAY = "#333333"  # of text
ROWS = 12  # of a sheet; more images make more sheets


@dataclass
class Seen:
    """One image and what the network makes of it."""

    name: str
    photo: Image.Image  # the part that the network sees
    maps: dict[str, Tensor]  # (h, w) by name (mean, head 1, head 2 ...), in even shares
    masks: dict[str, Tensor] | None  # bool (h, w), with a threshold
    components: Tensor | None  # (h, w, 3) in standard deviations; NaN for what is background


def photo_of(image: Image.Image, view: View, side: int) -> Image.Image:
    """Return what the network sees of an image, from the image's own pixels, its longer side of this length."""
    left, top, right, bottom = view.region(image)
    scale = side / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def overlay(photo: Image.Image, shares: Tensor) -> Image.Image:
    """Lay attention over a photo in gray; its largest value, `SCALE` at least, has the brightest color.

    Shape: shares (h, w), attention as multiples of an even share.
    """
    import matplotlib

    values = _enlarged(shares / shares.max().clamp(min=SCALE), photo.size, Image.Resampling.BICUBIC)
    colors = matplotlib.colormaps[COLORS](values.clip(0, 1))[..., :3]
    gray = np.asarray(photo.convert("L"))[..., None] / 255
    return _image(COLOR_SHARE * colors + (1 - COLOR_SHARE) * gray)


def cut_out(photo: Image.Image, mask: Tensor) -> Image.Image:
    """Show what is inside a mask; outside, the photo is dark and violet. Shape: mask bool (h, w)."""
    inside = _enlarged(mask.float(), photo.size, Image.Resampling.NEAREST)[..., None] > 0.5
    gray = np.asarray(photo.convert("L"))[..., None] / 255
    return _image(np.where(inside, np.asarray(photo) / 255, 0.3 * gray + OUTSIDE))


def component_colors(scores: Tensor, size: tuple[int, int]) -> Image.Image:
    """Show three components as red, green and blue, patch by patch; what has none is white. Shape: (h, w, 3)."""
    levels = (0.5 + scores / (2 * LEVELS)).clamp(0, 1).nan_to_num(1.0)
    return _image(levels.double().numpy()).resize(size, Image.Resampling.NEAREST)


def _enlarged(values: Tensor, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values.float().cpu().numpy()).resize(size, how))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def pictures(seen: Seen) -> dict[str, Image.Image]:
    """Return all pictures of one image by their names: image, mean, head1 ..., mask_mean, mask_head1 ..., pca."""
    found = {"image": seen.photo}
    found |= {_file(name): overlay(seen.photo, shares) for name, shares in seen.maps.items()}
    for name, mask in (seen.masks or {}).items():
        found[f"mask_{_file(name)}"] = cut_out(seen.photo, mask)
    if seen.components is not None:
        found["pca"] = component_colors(seen.components, seen.photo.size)
    return found


def picture_names(heads: int, masks: bool, pca: bool) -> list[str]:
    """Return the names of `pictures`."""
    maps = ["mean", *(f"head{i + 1}" for i in range(heads))]
    return ["image", *maps, *(f"mask_{name}" for name in maps if masks), *(["pca"] if pca else [])]


def _file(name: str) -> str:
    return name.replace(" ", "")


# --- the sheet ----------------------------------------------------------------------------------------


class Sheet:
    """A contact sheet: one row per image, with its masks below if there are any; captions, headings and a legend."""

    GAP = 6

    def __init__(self, tile: int, title: str, threshold: float | None):
        self.tile, self.title, self.threshold = tile, title, threshold
        self.rows: list[Image.Image] = []
        self.headings: list[str] = []
        self.font, self.small = _font(max(10, tile // 11)), _font(max(9, tile // 13))

    def add(self, seen: Seen) -> None:
        """Draw one image's row. Its photo should be `tile` pixels long."""
        drawn, maps = pictures(seen), list(seen.maps)
        self.headings = ["image", *maps, *(["components"] if "pca" in drawn else [])]
        captions = [printable(seen.name), *(f"{float(shares.max()):.1f}×" for shares in seen.maps.values())]
        high, line, step = seen.photo.height, round(1.7 * self.small.size), self.tile + self.GAP
        masks = [f"mask_{_file(name)}" for name in maps] if seen.masks is not None else []
        row = Image.new("RGB", (self._left(len(self.headings)), high + line + bool(masks) * (high + self.GAP)), "white")
        pen = ImageDraw.Draw(row)
        for i, name in enumerate(["image", *map(_file, maps), *(["pca"] if "pca" in drawn else [])]):
            row.paste(drawn[name], (self._left(i) + (self.tile - seen.photo.width) // 2, 0))
        for i, text in enumerate(captions):
            self._center(pen, i, high + line // 2 - 1, _fit(text, self.small, self.tile))
        for i, name in enumerate(masks):
            row.paste(drawn[name], (self._left(i + 1) + (self.tile - seen.photo.width) // 2, high + line))
        if masks:
            text = f"{100 * self.threshold:g}% of the\nattention"
            pen.multiline_text((step - self.GAP, high + line + high // 2), text, GRAY, self.small, "rm", align="right")
        self.rows.append(row)

    def _center(self, pen: ImageDraw.ImageDraw, column: int, y: int, text: str) -> None:
        pen.text((self._left(column) + self.tile // 2, y), text, GRAY, self.small, anchor="mm")

    def _left(self, column: int) -> int:
        return self.GAP + column * (self.tile + self.GAP)

    def draw(self) -> Image.Image:
        """Return the sheet."""
        head, line = round(2 * self.font.size), round(1.7 * self.small.size)
        legend = self._legend()
        height = head + sum(row.height + self.GAP for row in self.rows) + (len(legend) + 1) * line + self.GAP
        sheet = Image.new("RGB", (self.rows[0].width, height), "white")
        pen, y = ImageDraw.Draw(sheet), head
        for i, text in enumerate(self.headings):
            pen.text((self._left(i) + self.tile // 2, head // 2), text, "black", self.font, anchor="mm")
        for row in self.rows:
            sheet.paste(row, (0, y))
            y += row.height + self.GAP
        self._bar(sheet, pen, y, line)
        for i, text in enumerate(legend):
            pen.text((self.GAP, y + (i + 1.5) * line), text, GRAY, self.small, anchor="lm")
        return sheet

    def _bar(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, y: int, line: int) -> None:
        """Draw the scale of colors and say what its ends are."""
        import matplotlib

        colors = matplotlib.colormaps[COLORS](np.linspace(0, 1, self.tile // 2))[None, :, :3].repeat(line // 2, 0)
        pen.text((self.GAP, y + line // 2), "0", GRAY, self.small, anchor="lm")
        x = self.GAP + round(self.small.getlength("0 "))
        sheet.paste(_image(colors), (x, y + line // 4))
        text = f"the picture's largest (N×), at least {SCALE:.0f}×; 1× is an even share of all tokens"
        x += self.tile // 2 + self.GAP
        pen.text((x, y + line // 2), _fit(text, self.small, sheet.width - x), GRAY, self.small, anchor="lm")

    def _legend(self) -> list[str]:
        masks = f"{100 * self.threshold:g}% of the attention: the fewest patches that hold it" if self.threshold else ""
        with_components = "components" in self.headings
        pca = "components: the first three of all patch tokens, in red, green, blue" if with_components else ""
        width = self._left(len(self.headings)) - 2 * self.GAP
        return [_fit(text, self.small, width) for text in (masks, pca, self.title) if text]


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings: it has more letters than Pillow's own."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text, or its end behind dots if it is too wide."""
    text = text[-300:]  # each try below measures the whole
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


# --- files --------------------------------------------------------------------------------------------


class OutputFolder:
    """The files of one call in a folder, and `attention.json` that lists them: only listed ones are ever replaced."""

    def __init__(self, path: str, planned: list[str]):
        """Raise `UserError` if a file is in the way that no earlier call wrote."""
        self.path, self.planned = Path(path), [*planned, "attention.json"]
        manifest = self.path / "attention.json"
        before = read_json(manifest) if not manifest.is_symlink() else {}
        listed = before.get("files") if before.get("script") == "visualize_attention" else []
        listed = [name for name in listed if _is_ours(name)] if isinstance(listed, list) else []
        self.earlier = {*listed, *(["attention.json"] if listed else [])}
        for name in self.planned:
            file = self.path / name
            for place in (file, *list(file.parents)[: len(PurePosixPath(name).parts) - 1]):
                linked = place.is_symlink()
                if linked or (place == file and file.exists() and name not in self.earlier):
                    what = "is a link" if linked else "was not written by visualize_attention.py"
                    raise UserError(f"--output_dir {printable(path)}: {printable(name)} {what}: choose another folder")

    def open(self) -> None:
        """Create the folder and list what is going to be written, which may be replaced if this call is killed."""
        check_output_dir(str(self.path))
        self._list({}, sorted({*self.planned, *self.earlier}))

    def picture(self, name: str, image: Image.Image) -> None:
        """Write a PNG."""
        content = io.BytesIO()
        image.save(content, "PNG")
        self.write(name, content.getvalue())

    def write(self, name: str, content: bytes) -> None:
        """Write a planned file."""
        (self.path / name).parent.mkdir(exist_ok=True)
        write_bytes(self.path / name, content)

    def close(self, record: dict) -> None:
        """Remove what an earlier call wrote and this one did not; write the record."""
        for name in self.earlier - set(self.planned):
            remove_quietly(self.path / name)
            folder = (self.path / name).parent
            if folder != self.path and folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        self._list(record, sorted(self.planned))

    def _list(self, record: dict, names: list[str]) -> None:
        content = {"script": "visualize_attention", **record, "files": names}
        write_text(self.path / "attention.json", json.dumps(content, indent=1) + "\n")


def _is_ours(name: object) -> bool:
    """Return whether a name can be one of this command's files: never one outside its folder."""
    if not isinstance(name, str):
        return False
    parts = PurePosixPath(name).parts
    return len(parts) in (1, 2) and ".." not in parts and parts[0] != "/" and name.endswith((".png", "attention.npz"))


def folder_name(number: int, name: str) -> str:
    """Return a short name for an image's pictures, of letters and digits: 0001_cat_003."""
    stem = str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name
    return f"{number:04}_" + "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)[-50:]


def by_name(attention: Tensor) -> dict[str, Tensor]:
    """Return the maps by name, the mean of all heads first. Shape: (heads, h, w) -> (h, w) each."""
    heads = {f"head {i + 1}": one for i, one in enumerate(attention)}
    return {"mean": attention.mean(0), **heads}
