"""How well codes, and k-means clusters of the features, agree with the classes: with the chance levels beside it.

    python eval_cluster.py --pretrained_weights output/digits/checkpoint.pth

NMI rises with the number of clusters for no good reason: on 5,000 images of 100 classes every image in a
cluster of its own scores 0.70. So each table also has AMI and ARI (0 for chance), the same predictions with
shuffled labels, uniformly random codes, and singletons.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sk
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from cplearn import errors
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.evaluation import cli, collapse
from cplearn.evaluation.features import Features, features
from cplearn.files import check_output_dir
from cplearn.flags import ArgumentParser
from cplearn.text import format_table

COLUMNS = ("nmi", "ami", "ari", "hungarian", "used_codes", "perplexity")


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="eval_cluster.py", description=__doc__)
    parser.add_argument("--split", default="val", choices=("val", "train"), help="Images to cluster")
    parser.add_argument("--kmeans_redo", type=int, default=5, help="Restarts of k-means; the best objective counts")
    parser.add_argument("--shuffles", type=int, default=5, help="Draws of each random baseline, averaged")
    parser.add_argument("--out_csv", default=None, help="Write image, class and code of every image to this file")
    cli.add_flags(parser)
    return parser


def usage(codes: np.ndarray) -> dict[str, float]:
    """Number of used codes, and perplexity exp(entropy) of their frequencies. Shape: codes int (n,)."""
    used, perplexity = collapse.code_usage(torch.from_numpy(codes))
    return {"used_codes": used, "perplexity": perplexity}


def agreement(codes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """NMI and AMI (arithmetic), ARI, Hungarian accuracy (one code a class), usage. Shape: int (n,), int (n,)."""
    table = contingency_matrix(labels, codes, sparse=False)
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "nmi": float(sk.normalized_mutual_info_score(labels, codes)),
        "ami": float(sk.adjusted_mutual_info_score(labels, codes)),
        "ari": float(sk.adjusted_rand_score(labels, codes)),
        "hungarian": float(matched / len(labels)),
        **usage(codes),
    }


def kmeans(features: Tensor, k: int, *, seed: int, redo: int) -> np.ndarray:
    """faiss k-means on features of unit length. Shape: (n, f) -> int (n,)."""
    import faiss

    x = F.normalize(features, dim=1).numpy()
    # Thresholds of faiss that only print advice about the number of points are set aside.
    algorithm = faiss.Kmeans(
        x.shape[1],
        k,
        niter=50,
        nredo=redo,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    algorithm.train(x)
    return algorithm.index.search(x, 1)[1][:, 0]


def cluster_metrics(
    features: Tensor,
    labels: Tensor,
    codes: Tensor | None,
    out_dim: int | None,
    *,
    seed: int,
    redo: int,
    shuffles: int,
) -> dict[str, dict[str, float]]:
    """Rows of the table: codes, kmeans, and the trivial clusterings of the same images.

    Shape: features (n, f), labels int64 (n,), codes int64 (n,) or None for weights without a head.
    """
    rng = np.random.default_rng(seed)
    truth = labels.numpy()
    n, n_classes = len(truth), len(np.unique(truth))

    def mean_of(draw) -> dict[str, float]:
        draws = [agreement(draw(), truth) for _ in range(shuffles)]
        highest = {"nmi_highest": max(d["nmi"] for d in draws)}  # what has to be exceeded not to be chance
        return {name: float(np.mean([d[name] for d in draws])) for name in COLUMNS} | highest

    rows = {}
    if codes is not None:
        own = codes.numpy()
        rows["codes"] = agreement(own, truth)
        rows["codes_shuffled"] = mean_of(lambda: rng.permutation(own))
        rows["random_codes"] = mean_of(lambda: rng.integers(0, out_dim, n))
    rows["kmeans"] = agreement(kmeans(features, n_classes, seed=seed, redo=redo), truth)
    rows["singletons"] = agreement(np.arange(n), truth)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Evaluate; returns the rows on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    if args.shuffles < 1 or args.kmeans_redo < 1:
        raise UserError(f"--shuffles {args.shuffles} and --kmeans_redo {args.kmeans_redo} must be positive")
    device = cli.start(args)
    if args.out_csv:
        check_output_dir(str(Path(args.out_csv).parent), "--out_csv: the folder")
    (data,), _ = features(args, device, (args.split,))
    if not collectives.is_main():
        return {}
    if args.out_csv:
        write_csv(args.out_csv, data)
    if not data.classes:
        print("No class folders, so no agreement with classes: only the use of the codes is reported")
        rows = {"codes": usage(data.codes.numpy())} if data.codes is not None else {}
    else:
        rows = cluster_metrics(
            data.features,
            data.labels,
            data.codes,
            data.out_dim,
            seed=args.seed,
            redo=args.kmeans_redo,
            shuffles=args.shuffles,
        )
    header = ("clustering", "NMI", "AMI", "ARI", "Hungarian", "used", "perplexity")
    print(format_table([(name, *(row.get(c) for c in COLUMNS)) for name, row in rows.items()], header))
    cli.write_result(args, "eval_cluster", rows, data, args.split)
    return rows


def write_csv(path: str, data: Features) -> None:
    """One line an image: its name, class and code."""
    if data.codes is None:
        raise UserError("--out_csv needs a checkpoint with a head: these weights assign no codes")
    try:
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerow(("image", "class", "code"))
            for name, label, code in zip(data.names, data.labels.tolist(), data.codes.tolist(), strict=True):
                writer.writerow((name, data.classes[label] if data.classes else "", code))
    except OSError as error:
        raise UserError(f"--out_csv {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    errors.run_script(main)
