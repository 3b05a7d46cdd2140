"""How far one or more networks are from collapse: numbers, and the paper's analysis figures with their data.

    python eval_collapse.py --pretrained_weights output/digits/checkpoint.pth
    python eval_collapse.py --checkpoints output/a/checkpoint.pth output/b/checkpoint.pth --labels "c = 128" "c = 16384"

Networks are in evaluation mode and see all images of the split, or of a folder without train/ and val/; the first one
at random initialization is drawn with them. Into --output_dir go one line per network in results.jsonl, whose numbers
docs/collapse-numbers.md explains, and

    spectrum.png   singular values of the covariance of embeddings and representations (Fig. 6a, 13a, 14)
    mixture.png    entropy of a Gaussian mixture fitted to the representations (Fig. 6b, 13b, 15)
    matrices.png   covariance of embedding and representation, similar dimensions side by side
    cosines.png    cosines of images, ordered and averaged by class and code (with matrices.png: Fig. 4, 8, 9)
    codes.png      use of the codes, and alignment of embeddings to their codes (Theorem 1)
    tsne.png       t-SNE of the representations, colored by class, or by code where there are no classes (Fig. 12c)

each with a .csv of the same name (of matrices and cosines: one per network and matrix). Covariances are centered and
nothing is padded; the published scripts take second moments as they are, of vectors padded with zeros to one width.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cplearn import errors
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.features import cli
from cplearn.features.splits import get_features
from cplearn.flags import check_path
from cplearn.load import read_weights
from cplearn.metrics.analysis import Network, collapse_metrics, embed, good_values
from cplearn.metrics.mixture import IMAGES_PER_COMPONENT, mixture_entropy, scaled
from cplearn.pictures.collapse import Analysis, check_figures, draw_figures
from cplearn.text import names_of
from utils import ArgumentParser, bool_flag, format_table, positive

COMPONENTS = (10, 20, 50, 100, 200, 500, 1000)  # of the mixtures
WIDTH = 80  # of a terminal


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="eval_collapse.py", description=__doc__)
    # fmt: off
    parser.add_argument("--checkpoints", nargs="+", default=None, help="Several networks in one figure, instead of --pretrained_weights")
    parser.add_argument("--labels", nargs="+", default=None, help="Their names in figures and results (default: their folders)")
    parser.add_argument("--baseline", type=bool_flag, default=True, help="Also the first network at random initialization")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="Images to look at")
    parser.add_argument("--components", type=positive(int), nargs="*", default=None, help=f"Sizes of the mixtures; none to leave them out (default: those of {' '.join(map(str, COMPONENTS))} for which there are {IMAGES_PER_COMPONENT} images per component)")
    parser.add_argument("--mc_samples", type=int, default=10_000, help="Samples of each mixture, for its entropy")
    parser.add_argument("--shown_images", type=int, default=500, help="Images in the drawn matrix of cosines (numbers are of all)")
    parser.add_argument("--tsne_images", type=int, default=2000, help="Images in the t-SNE; 0 to leave it out")
    # fmt: on
    cli.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Evaluate; return the numbers of each network on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    flag = "--checkpoints" if args.checkpoints else "--pretrained_weights"
    paths = [check_path(flag, path) for path in args.checkpoints or [args.pretrained_weights]]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{flag} {path or repr(path)} does not exist: give the path of a checkpoint")
    args.pretrained_weights = paths[0]
    device = cli.start(args)
    check_figures(Path(args.output_dir))
    networks, flags = load_networks(args, paths, device)
    if not collectives.is_main():
        return {}
    components = choose_components(args.components, len(networks[0].data.features))
    results = {}
    for network, own_flags in zip(networks, flags, strict=True):
        results[network.label] = metrics = collapse_metrics(network) | mixture_metrics(args, network, components)
        cli.write_result(own_flags, "eval_collapse", {"label": network.label, **metrics}, network.data, args.split)
    analysis = Analysis(networks, results, components, args.shown_images, args.tsne_images, args.seed)
    figures = draw_figures(Path(args.output_dir), analysis)
    report(results)
    print(f"Figures in {args.output_dir}: {', '.join(figures)}")
    return results


def check_flags(args: argparse.Namespace) -> None:
    """Check what belongs to this evaluation alone. Raises `UserError`."""
    if not args.checkpoints and not args.pretrained_weights:
        raise UserError("--pretrained_weights is missing: give a checkpoint, or several with --checkpoints")
    if args.checkpoints and args.pretrained_weights:
        raise UserError("--checkpoints and --pretrained_weights: give one of them")
    if args.load_features:
        raise UserError("--load_features has no embeddings: name the weights")
    count = len(args.checkpoints or [args.pretrained_weights])
    if args.dump_features and count > 1:
        raise UserError("--dump_features keeps one network's features: name one")
    if args.labels and len(args.labels) != count:
        raise UserError(f"--labels names {len(args.labels)} networks, there are {count}")
    if args.labels and len({*args.labels, "random init"}) <= count:
        raise UserError(f"--labels {' '.join(args.labels)}: they must differ, and from 'random init'")
    for name, least in {"shown_images": 2, "mc_samples": 2, "tsne_images": 5 if args.tsne_images else 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")


def load_networks(
    args: argparse.Namespace, paths: list[str], device: torch.device
) -> tuple[list[Network], list[dict[str, object]]]:
    """Run the images through each network, and the baseline; return the networks and the flags of each.

    All ranks take part; the slow part that follows is for rank 0 alone.
    """
    labels = args.labels or names_of(paths)
    todo = [(label, path, args.random_init) for label, path in zip(labels, paths, strict=True)]
    if args.baseline and not args.random_init:
        todo.append(("random init", paths[0], True))
    first = read_weights(paths[0])  # once, for the baseline too
    networks, flags = [], []
    for label, path, random_init in todo:
        changed = {"pretrained_weights": path, "random_init": random_init}
        if networks:
            changed["dump_features"] = None
        own = argparse.Namespace(**vars(args) | changed)
        model = cli.open_model(own, device, first if path == first.path else None)
        cli.take_all_if_undivided(own, model)
        args.split = own.split
        (data,) = get_features(own, model, device, (own.split,))
        networks.append(embed(label, data, model.method, device, args.seed))
        flags.append(cli.effective_flags(own, model))
        if networks[-1].data.source["data"] != networks[0].data.source["data"]:
            raise UserError(f"{label} was trained on other data than {labels[0]}: name one with --data_path")
    return networks, flags


def choose_components(asked: list[int] | None, images: int) -> list[int]:
    """Return the sizes of the mixtures: those asked for, or the default ones that so many images allow."""
    if asked is not None:
        return asked
    components = [k for k in COMPONENTS if IMAGES_PER_COMPONENT * k <= images]
    if len(components) < len(COMPONENTS):
        left_out = ", ".join(map(str, COMPONENTS[len(components) :]))
        print(f"No mixtures of {left_out}: {images:,} images are fewer than {IMAGES_PER_COMPONENT} per component")
    return components


def mixture_metrics(args: argparse.Namespace, network: Network, components: list[int]) -> dict[str, float | str | None]:
    """Fit Gaussian mixtures of these sizes to the representations; return entropy and fit of each."""
    metrics = {}
    for k in components:
        print(f"{network.label}: mixture of {k} ...", flush=True)
        entropy, fit = mixture_entropy(scaled(network.data.features), k, samples=args.mc_samples, seed=args.seed)
        metrics |= {f"mixture{k}_entropy": entropy, f"mixture{k}_fit": fit}
    return metrics


def report(results: dict[str, dict]) -> None:
    """Print the numbers, one column per network and which values are good, then what is to be said of the mixtures."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    fits = [name for name in names if name.endswith("_fit")]
    rows = [(name, *(r.get(name) for r in results.values()), good_values(name)) for name in names if name not in fits]
    for table in tables_of_width(rows, list(results)):
        print(table)
    print("What each is, and what to expect: docs/collapse-numbers.md")
    for label, metrics in results.items():
        for name in fits:
            if metrics[name] != "ok":
                print(f"{label}: mixture of {name.removeprefix('mixture').removesuffix('_fit')}: {metrics[name]}")


def tables_of_width(rows: list[tuple], labels: list[str], width: int = WIDTH) -> Iterator[str]:
    """Return the numbers as one table, or as several if that is too wide; networks of long names are numbered.

    `rows`: name, one value per network, and a last word.
    """
    heads = [label if len(label) <= 11 else f"({i + 1})" for i, label in enumerate(labels)]
    yield from (f"{head} {label}" for head, label in zip(heads, labels, strict=True) if head != label)
    while heads:
        for count in range(len(heads), 0, -1):
            part = [(*row[: 1 + count], row[-1]) for row in rows]
            table = format_table(part, ("", *heads[:count], "good is"))
            if table.index("\n") <= width:
                break
        yield table
        rows, heads = [(row[0], *row[1 + count :]) for row in rows], heads[count:]


if __name__ == "__main__":
    errors.run_script(main)
