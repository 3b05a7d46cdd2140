"""Weighted k-nearest-neighbor classification on frozen features (Wu et al. 2018, as in DINO).

python eval_knn.py --pretrained_weights output/digits/checkpoint.pth
torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights CHECKPOINT --data_path /data/imagenet

Images of val/ are classified by those of train/; in a folder of classes without these two, each image by all others.
"""

import argparse
from collections.abc import Sequence

from cplearn import errors
from cplearn.distributed import collectives
from cplearn.features import cli
from cplearn.features.splits import get_features
from cplearn.metrics.knn import knn
from utils import ArgumentParser, format_table, positive


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="eval_knn.py", description=__doc__)
    parser.add_argument("--nb_knn", type=positive(int), nargs="+", default=[10, 20, 100, 200], help="Numbers of neighbors")
    parser.add_argument("--temperature", type=positive(float), default=0.07, help="Of the votes, exp(cosine / T)")
    cli.add_flags(parser)
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate; return the metrics on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    device = cli.start(args)
    model = cli.open_model(args, device)
    one_set = cli.is_undivided(args, model)
    splits = ("all",) if one_set else ("train", "val")
    sets = get_features(args, model, device, splits, labels_for="eval_knn.py")
    train, val = sets[0], sets[-1]
    if not collectives.is_main():
        return {}
    if one_set:
        print("No train/ and no val/: each image is classified by all others (leave-one-out)")
    metrics = knn(
        train.features,
        train.labels,
        val.features,
        val.labels,
        ks=args.nb_knn,
        temperature=args.temperature,
        leave_one_out=one_set,
        device=device,
    )
    ks = [name.removesuffix("_top1") for name in metrics if name.endswith("_top1")]
    rows = [(k.removeprefix("knn"), metrics[f"{k}_top1"], metrics[f"{k}_top5"]) for k in ks]
    print(format_table(rows, ("k", "top-1", "top-5")))
    compared = None if one_set else train.source
    cli.write_result(cli.effective_flags(args, model), "eval_knn", metrics, val, splits[-1], train=compared)
    return metrics


if __name__ == "__main__":
    errors.run_script(main)
