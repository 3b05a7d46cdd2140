"""The README.md of an exported folder: what the network is, what was measured of it, and how it is loaded."""

from pathlib import Path

from cplearn.backbones import is_vit
from cplearn.export.common import MARKER
from cplearn.files import read_json, read_json_lines
from cplearn.load import Model
from cplearn.text import format_table

SETTINGS = "out_dim beta n_ref augmentation local_crops_number batch_size_per_gpu optimizer lr seed".split()
NUMBERS = {
    "eval_knn": ("knn20_top1", "20-NN, top-1"),
    "eval_linear": ("linear_last_top1", "linear probe, top-1"),
}


def write_card(folder: Path, model: Model, library: str, usage: str) -> None:
    """Write README.md, with what args.json, log.txt and results.jsonl beside the weights say of them."""
    beside = Path(model.weights).parent
    size = f"{model.image_size} x {model.image_size}"
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(model, beside))
    patch = f"/{model.patch_size}" if is_vit(model.arch) else ""
    known = f"library_name: {library}\n" if library in ("timm", "transformers") else ""
    text = f"""---
{known}tags: [image-feature-extraction, self-supervised-learning, cplearn]
---

# {model.arch}{patch}, pre-trained without labels

{model.backbone.num_features} features of an image of {size} pixels. `{MARKER}` says how images are
prepared and where the weights came from.

    {usage}

{facts}
"""
    if rows := _numbers(model, beside):
        text += f"\n{format_table(rows, ('measured', 'on', 'trained', 'untrained'))}\n"
    (folder / "README.md").write_text(text)


def _facts(model: Model, beside: Path) -> list[tuple[str, object]]:
    """Return names and values of what is known of the training."""
    saved = read_json(beside / "args.json") if model.method_name else {}  # those of others lie anywhere
    args, derived = saved.get("args", {}), saved.get("derived", {})
    images = f"{derived['train_images']:,} of " if "train_images" in derived else ""
    log = [r for r in read_json_lines(beside / "log.txt") if r.get("epoch") == (model.epoch or 0) - 1]
    facts = {
        "method": model.method_name,
        "images": f"{images}{Path(model.data_path).name}" if model.data_path else model.dataset,
        "epochs": model.epoch,
        "settings": " ".join(f"`--{name} {args[name]}`" for name in SETTINGS if args.get(name) is not None),
        f"verdict after epoch {model.epoch}": log[-1].get("verdict_line") if log else None,
    }
    return [(name, value) for name, value in facts.items() if value]


def _numbers(model: Model, beside: Path) -> list[tuple[str, str, float | None, float | None]]:
    """Return what evaluations found of these weights, and of such a network untrained."""
    found: dict[tuple[str, str], dict[bool, float]] = {}
    for record in read_json_lines(beside / "results.jsonl"):
        name, label = NUMBERS.get(record.get("script"), (None, None))
        if record.get("weights_sha256") == model.weights_sha256 and name in record.get("metrics", {}):
            row = found.setdefault((label, Path(record["data"]).name), {})
            row[record["random_init"]] = record["metrics"][name]
    return [(*key, row.get(False), row.get(True)) for key, row in found.items() if False in row]
