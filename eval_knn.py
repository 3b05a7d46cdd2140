"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, as in DINO).

python eval_knn.py --pretrained_weights output/digits/checkpoint.pth
torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights CHECKPOINT --data_path /data/imagenet
"""

import argparse
from collections.abc import Sequence

from cplearn import errors
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.evaluation import cli
from cplearn.evaluation.features import features
from cplearn.evaluation.knn import knn
from cplearn.flags import ArgumentParser
from cplearn.text import format_table


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="eval_knn.py", description=__doc__)
    parser.add_argument("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="Numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="Of the votes, exp(cosine / T)")
    cli.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate; returns the metrics on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    if min(args.nb_knn) < 1 or args.temperature <= 0:
        raise UserError(f"--nb_knn {args.nb_knn} and --temperature {args.temperature} must be positive")
    device = cli.start(args)
    (train, val), _ = features(args, device, ("train", "val"), labels_for="eval_knn.py")
    if not collectives.is_main():
        return {}
    metrics = knn(train.features, train.labels, val.features, val.labels, ks=args.nb_knn, temperature=args.temperature)
    rows = [
        (k.removeprefix("knn").removesuffix("_top1"), metrics[k], metrics[k.replace("top1", "top5")])
        for k in metrics
        if k.endswith("top1")
    ]
    print(format_table(rows, ("k", "top-1", "top-5")))
    cli.write_result(args, "eval_knn", metrics, val)
    return metrics


if __name__ == "__main__":
    errors.run_script(main)
