"""How well codes, and k-means clusters of the features, agree with the classes, with the levels of chance.

    python eval_cluster.py --pretrained_weights output/digits/checkpoint.pth

NMI rises with the number of clusters for no good reason: on 5,000 images of 100 classes every image in a
cluster of its own scores 0.70. So each table also has AMI and ARI (0 for chance), the same codes against
shuffled labels, uniformly random codes, and singletons. Of a folder without train/ and val/ all images count.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn import errors
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.features import cli
from cplearn.features.splits import Features, get_features
from cplearn.files import check_replaceable, write_csv
from cplearn.metrics import collapse
from utils import ArgumentParser, check_output_dir, expand_paths, format_table, positive

COLUMNS = ("nmi", "ami", "ari", "hungarian", "used_codes", "perplexity")
CSV_HEADER = ("image", "class", "code")


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="eval_cluster.py", description=__doc__)
    parser.add_argument("--split", default="val", choices=("val", "train"), help="Images to cluster")
    parser.add_argument("--kmeans_redo", type=positive(int), default=5, help="Restarts of k-means; the best objective counts")
    parser.add_argument("--shuffles", type=positive(int), default=5, help="Repetitions of each random baseline, averaged")
    parser.add_argument("--out_csv", default=None, help="Write image, class and code of every image to this file")
    cli.add_flags(parser)
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Evaluate; return the rows of the table on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    expand_paths(args, "out_csv")
    device = cli.start(args)
    if args.out_csv:
        check_output_dir(str(Path(args.out_csv).parent), "--out_csv: the folder")
        check_replaceable(Path(args.out_csv), ",".join(CSV_HEADER).encode(), "--out_csv")
    model = cli.open_model(args, device)
    if args.out_csv and model and model.method is None:
        raise UserError("--out_csv needs a checkpoint with a head: these weights assign no codes")
    cli.take_all_if_undivided(args, model)
    (data,) = get_features(args, model, device, (args.split,))
    if not collectives.is_main():
        return {}
    if args.out_csv:
        write_codes(args.out_csv, data)
    if data.classes:
        rows = cluster_metrics(
            data.features,
            data.labels,
            data.codes,
            data.out_dim,
            seed=args.seed,
            redo=args.kmeans_redo,
            shuffles=args.shuffles,
            gpu=device.type == "cuda",
        )
    else:
        print("No labels, so no agreement with classes: only the use of the codes is reported")
        rows = {} if data.codes is None else {"codes": usage(data.codes.numpy())}
    header = ("clustering", "NMI", "AMI", "ARI", "Hungarian", "used", "perplexity")
    print(format_table([(name, *(row.get(c) for c in COLUMNS)) for name, row in rows.items()], header))
    cli.write_result(cli.effective_flags(args, model), "eval_cluster", rows, data, args.split)
    return rows


def write_codes(path: str, data: Features) -> None:
    """Write one line per image: its name, class and code. Raises `UserError` for weights without a head."""
    if data.codes is None:
        raise UserError("--out_csv needs a checkpoint with a head: these weights assign no codes")
    classes = [data.classes[label] if data.classes else "" for label in data.labels.tolist()]
    rows = zip(data.names, classes, data.codes.tolist(), strict=True)
    write_csv(Path(path), CSV_HEADER, rows)


def cluster_metrics(
    features: Tensor,
    labels: Tensor,
    codes: Tensor | None,
    out_dim: int | None,
    *,
    seed: int,
    redo: int,
    shuffles: int,
    gpu: bool = False,
) -> dict[str, dict[str, float]]:
    """Return the rows of the table: codes, k-means, and the trivial clusterings of the same images.

    Shape: features (n, f), labels int64 (n,), codes int64 (n,) or None for weights without a head.
    """
    rng = np.random.default_rng(seed)
    truth = labels.numpy()
    n, n_classes = len(truth), len(np.unique(truth))

    def mean_of(sample: Callable[[], np.ndarray]) -> dict[str, float]:
        samples = [agreement(sample(), truth) for _ in range(shuffles)]
        highest = {"nmi_highest": max(row["nmi"] for row in samples)}  # what has to be exceeded not to be chance
        return {name: float(np.mean([row[name] for row in samples])) for name in COLUMNS} | highest

    rows = {}
    if codes is not None:
        own = codes.numpy()
        rows["codes"] = agreement(own, truth)
        rows["codes_shuffled"] = mean_of(lambda: rng.permutation(own))
        rows["random_codes"] = mean_of(lambda: rng.integers(0, out_dim, n))
    rows["kmeans"] = agreement(kmeans(features, n_classes, seed=seed, redo=redo, gpu=gpu), truth)
    rows["singletons"] = singletons(truth)
    return rows


def agreement(codes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return NMI and AMI (arithmetic), ARI, Hungarian accuracy (one code per class), and the use of the codes.

    Shape: int (n,), int (n,).
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, codes, sparse=False)
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, codes)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, codes)),
        "ari": float(metrics.adjusted_rand_score(labels, codes)),
        "hungarian": float(matched / len(labels)),
        **usage(codes),
    }


def singletons(labels: np.ndarray) -> dict[str, float]:
    """Return the `agreement` of one cluster per image with the labels, without its table of classes by images.

    A cluster of one image tells its class, so the mutual information is the classes' entropy, whatever the order of the
    images: all of it is chance. The best matching has one image per class. Shape: int (n,).
    """
    n = len(labels)
    share = np.unique(labels, return_counts=True)[1] / n
    entropy = float(-(share * np.log(share)).sum())
    same = float(len(share) == n)  # each image is a class of its own
    nmi = 2 * entropy / (entropy + np.log(n)) if len(share) > 1 else same
    return {"nmi": float(nmi), "ami": same, "ari": same, "hungarian": len(share) / n, **usage(np.arange(n))}


def usage(codes: np.ndarray) -> dict[str, float]:
    """Return the number of used codes, and the perplexity exp(entropy) of their frequencies. Shape: int (n,)."""
    used, perplexity = collapse.code_usage(torch.from_numpy(codes))
    return {"used_codes": used, "perplexity": perplexity}


def kmeans(features: Tensor, k: int, *, seed: int, redo: int, gpu: bool = False) -> np.ndarray:
    """Cluster the features, scaled to unit length, with faiss: on the GPUs, if it has any (not measured).

    Shape: (n, f) -> int (n,).
    """
    import faiss

    x = F.normalize(features, dim=1).numpy()
    algorithm = faiss.Kmeans(
        x.shape[1],
        k,
        niter=50,
        nredo=redo,
        seed=seed,
        min_points_per_centroid=1,  # below it, faiss only prints advice
        max_points_per_centroid=len(x),  # no subset of the images
        gpu=gpu and faiss.get_num_gpus() > 0,
    )
    algorithm.train(x)
    return algorithm.index.search(x, 1)[1][:, 0]


if __name__ == "__main__":
    errors.run_script(main)
