"""How far one or more networks are from collapse: numbers, and the paper's analysis figures with their data.

    python eval_collapse.py --pretrained_weights output/digits/checkpoint.pth
    python eval_collapse.py --checkpoints output/a/checkpoint.pth output/b/checkpoint.pth --labels "c = 128" "c = 16384"

Evaluation mode, all images of the split; the first network at random initialisation is drawn beside them. Into
--output_dir go one line a network in results.jsonl, and

    spectrum.png   singular values of the covariance of embeddings and representations (Fig. 6a, 13a, 14)
    mixture.png    entropy of a Gaussian mixture fitted to the representations (Fig. 6b, 13b, 15)
    matrices.png   covariance of the embedding, and cosines of images in the order of their codes (Fig. 4, 8, 9)
    codes.png      use of the codes, and alignment of embeddings to their codes (Theorem 1)
    tsne.png       t-SNE of the representations, coloured by class, or by code where there are no classes (Fig. 12c)

each with a .csv of the same name (of the matrices: one for each network and matrix). Covariances are centred and
nothing is padded; the published scripts take second moments as they are, of vectors padded with zeros to one width.
"""

import argparse
import copy
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from cplearn import errors
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.evaluation import cli
from cplearn.evaluation.collapse_figures import FIGURES, draw
from cplearn.evaluation.collapse_numbers import Network, mixture_entropy, numbers, scaled
from cplearn.evaluation.features import features
from cplearn.flags import ArgumentParser, bool_flag
from cplearn.text import format_table

matplotlib.use("Agg")


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="eval_collapse.py", description=__doc__)
    # fmt: off
    parser.add_argument("--checkpoints", nargs="+", default=None, help="Several networks in one figure, instead of --pretrained_weights")
    parser.add_argument("--labels", nargs="+", default=None, help="Their names in figures and results (default: their folders)")
    parser.add_argument("--baseline", type=bool_flag, default=True, help="Also the first network at random initialisation")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="Images to look at")
    parser.add_argument("--components", type=int, nargs="*", default=[10, 20, 50, 100, 200, 500, 1000], help="Sizes of the mixtures; none to leave them out")
    parser.add_argument("--mc_samples", type=int, default=10_000, help="Samples of each mixture, for its entropy")
    parser.add_argument("--shown_images", type=int, default=500, help="Images in the drawn matrix of cosines (numbers are of all)")
    parser.add_argument("--tsne_images", type=int, default=2000, help="Images in the t-SNE; 0 to leave it out")
    # fmt: on
    cli.add_flags(parser)
    return parser


# --- the run -------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Evaluate; returns the numbers of each network on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    check(args)
    paths = [os.path.expanduser(path) for path in args.checkpoints or [args.pretrained_weights]]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist")
    args.pretrained_weights = paths[0]
    device = cli.start(args)
    labels = args.labels or names_of(paths)
    todo = [(label, path, args.random_init) for label, path in zip(labels, paths, strict=True)]
    if args.baseline and not args.random_init:
        todo.append(("random init", paths[0], True))
    networks, flags = [], []
    for label, path, random_init in todo:  # before the slow part, in which the other ranks have nothing to wait for
        own = copy.copy(args)  # features fills in what the checkpoint says
        own.pretrained_weights, own.random_init = path, random_init
        own.dump_features = None if networks else args.dump_features
        networks.append(look_at(own, label, device))
        flags.append(own)
        if networks[-1].data.source["data"] != networks[0].data.source["data"]:
            raise UserError(f"{label} was trained on other data than {labels[0]}: name one with --data_path")
    if not collectives.is_main():
        return {}
    results = {}
    for network, own in zip(networks, flags, strict=True):
        label, found = network.label, numbers(network)
        for components in args.components:
            print(f"{label}: mixture of {components} ...", flush=True)
            entropy, status = mixture_entropy(
                scaled(network.data.features), components, samples=args.mc_samples, seed=args.seed
            )
            found[f"mixture{components}_entropy"], found[f"mixture{components}_fit"] = entropy, status
        results[label] = found
        cli.write_result(own, "eval_collapse", {"label": label, **found}, network.data, args.split)
    draw(args, networks, results)
    report(args, results)
    return results


def check(args: argparse.Namespace) -> None:
    """Flags that belong to this evaluation. Raises `UserError`."""
    if not args.checkpoints and not args.pretrained_weights:
        raise UserError("--pretrained_weights is missing: give a checkpoint, or several with --checkpoints")
    if args.dump_features and len(args.checkpoints or ()) > 1:
        raise UserError("--dump_features keeps one network's features: name one")
    if args.load_features:
        raise UserError("--load_features has no embeddings: name the weights")
    if args.checkpoints and args.pretrained_weights:
        raise UserError("--checkpoints and --pretrained_weights: give one of them")
    if args.labels and len(args.labels) != len(args.checkpoints or [0]):
        raise UserError(f"--labels names {len(args.labels)} networks, there are {len(args.checkpoints or [0])}")
    if args.labels and len({*args.labels, "random init"}) <= len(args.labels):
        raise UserError(f"--labels {' '.join(args.labels)}: they must differ, and from 'random init'")
    for name in ("shown_images", "mc_samples"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 2")
    if args.components and min(args.components) < 1:
        raise UserError(f"--components {min(args.components)} must be positive")
    if args.tsne_images and args.tsne_images < 5:
        raise UserError(f"--tsne_images {args.tsne_images} must be at least 5, or 0 for none")


def names_of(paths: list[str]) -> list[str]:
    """The folder of each checkpoint, with as much of its path as tells them apart."""
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:-1]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {Path(path).name}" for i, path in enumerate(paths)]


@torch.inference_mode()
def look_at(args: argparse.Namespace, label: str, device: torch.device) -> Network:
    (data,), model = features(args, device, (args.split,))
    if model.method is None:
        return Network(label, data, None, None, None)
    method, embeddings, cosines = model.method, [], []
    for start in range(0, len(data.features), 1024):
        h = method.embed(data.features[start : start + 1024].to(device))
        vectors = method.code_vectors(data.codes[start : start + 1024].to(device))
        embeddings.append(h.float().cpu())
        if vectors is not None:
            cosines.append(F.cosine_similarity(h, vectors, dim=1).cpu())
    embedding = torch.cat(embeddings)
    chance = None
    if cosines:
        generator = torch.Generator().manual_seed(args.seed)
        anywhere = torch.randn(1000, embedding.shape[1], generator=generator).to(device)
        vectors = method.code_vectors(method.assign(F.normalize(anywhere, dim=1)))
        chance = F.cosine_similarity(anywhere, vectors, dim=1).abs().mean().item()
    return Network(label, data, embedding, torch.cat(cosines) if cosines else None, chance)


def report(args: argparse.Namespace, results: dict[str, dict]) -> None:
    """The numbers, a column a network, and where the figures are."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    shown = [name for name in names if not name.endswith("_fit")]
    print(format_table([(name, *(r.get(name) for r in results.values())) for name in shown], ("", *results)))
    for label, found in results.items():
        for components in args.components:
            fit = found[f"mixture{components}_fit"]
            if fit != "ok":
                print(f"{label}: mixture of {components}: {fit}")
    files = sorted(path.name for path in Path(args.output_dir).glob("*.png") if path.stem in FIGURES)
    print(f"Figures in {args.output_dir}: {', '.join(files)}")


if __name__ == "__main__":
    errors.run_script(main)
