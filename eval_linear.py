"""Linear classification on frozen features: DINO's protocol, or Adam as in the paper's appendix.

    python eval_linear.py --pretrained_weights output/digits/checkpoint.pth --augment false
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights CHECKPOINT --data_path /data/imagenet

DINO's protocol sends random crops and flips of every training image through the backbone in every epoch.
`--augment false` extracts the features once, from centre crops, and takes seconds. The result on the last
epoch is the one to report; the best epoch is chosen on the evaluation images and is named for what it is.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn import backbones, checkpoints, errors, random_streams
from cplearn.data import augmentations, datasets, loaders
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm
from cplearn.errors import LocalError, UserError
from cplearn.evaluation import cli
from cplearn.evaluation.features import Features, Model, backbone_features, features, has_features
from cplearn.flags import ArgumentParser, bool_flag
from cplearn.schedules import cosine
from cplearn.text import format_table


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="eval_linear.py", description=__doc__)
    # fmt: off
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=None, help="For a batch of 256 over all processes (default: 0.001 for sgd, 0.01 for adam)")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adam"), help="sgd is DINO's; adam the paper's appendix, not scaled with the batch")
    parser.add_argument("--n_last_blocks", type=int, default=None, help="Blocks whose CLS tokens are concatenated (default: 4 for vit_tiny and vit_small, else 1)")
    parser.add_argument("--augment", type=bool_flag, default=None, help="Random crops and flips in every epoch (default: true, false with --load_features)")
    parser.add_argument("--standardise", type=bool_flag, default=None, help="Batch norm without weights before the classifier (default: true unless the backbone is a ViT, whose last LayerNorm does it)")
    # fmt: on
    cli.add_flags(parser)
    return parser


class Probe:
    """A linear classifier in training, with all that is needed to go on with it later."""

    def __init__(self, width: int, n_classes: int, args: argparse.Namespace, device: torch.device):
        linear = nn.Linear(width, n_classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        norm = BatchNorm(width, affine=False) if args.standardise else nn.Identity()
        self.classifier = nn.Sequential(norm, linear).to(device)
        batch = args.batch_size_per_gpu * collectives.world_size()
        if args.optimizer == "sgd":
            self.peak_lr = args.lr * batch / 256
            self.optimizer = torch.optim.SGD(self.classifier.parameters(), self.peak_lr, momentum=0.9)
        else:
            self.peak_lr = args.lr
            self.optimizer = torch.optim.Adam(self.classifier.parameters(), self.peak_lr)
        self.epoch, self.history = 0, []

    def state(self) -> dict:
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
        }

    def load(self, state: dict) -> None:
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.history = state["epoch"], state["history"]


def cached_batches(train: Features, args) -> "datasets.Batches":
    """Batches of indices into features that were extracted once."""
    batch = min(args.batch_size_per_gpu, len(train.features) // collectives.world_size())
    return loaders.BatchSampler(len(train.features), batch, args.seed, collectives.rank(), collectives.world_size())


def augmented_loader(args, model: Model, dataset, device: torch.device):
    """DINO's training images of the probe: random resized crops of 8 to 100 %, flipped where a flip keeps the class."""
    flip_p = 0.0 if args.dataset in ("digits", "svhn") else 0.5
    view = augmentations.View(model.image_size, scale=(0.08, 1.0), flip_p=flip_p)
    return view, loaders.train_loader(
        dataset,
        [view],
        batch_size=args.batch_size_per_gpu,
        seed=args.seed,
        num_workers=loaders.default_workers(args.num_workers),
        pin_memory=device.type == "cuda",
    )


def accuracy(classifier: nn.Module, features: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 on features that every rank holds."""
    hits = torch.zeros(2, dtype=torch.float64)
    classifier.eval()
    with torch.inference_mode():
        for x, y in zip(features.split(8192), labels.split(8192), strict=True):
            logits = classifier(x.to(device)).cpu()
            correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
            hits += torch.stack([correct[:, 0].sum(), correct.any(1).sum()])
    top1, top5 = (hits / len(labels)).tolist()
    return {"top1": top1, "top5": top5}


def train_probe(
    probe: Probe,
    epochs: int,
    batches,
    val: Features,
    device: torch.device,
    checkpoint: Path,
    log_every: int = 10,
) -> dict[str, float]:
    """Train to the end; `batches(epoch)` yields this rank's (features, labels). Returns last and best accuracies."""
    model = collectives.wrap(probe.classifier, device)
    while probe.epoch < epochs:
        for group in probe.optimizer.param_groups:
            group["lr"] = cosine(probe.peak_lr, 0.0, probe.epoch / epochs)
        probe.classifier.train()
        for x, y in batches(probe.epoch):
            loss = F.cross_entropy(model(x), y)
            probe.optimizer.zero_grad()
            loss.backward()
            probe.optimizer.step()
        probe.epoch += 1
        probe.history.append(accuracy(probe.classifier, val.features, val.labels, device))
        if collectives.is_main():
            checkpoints.save(checkpoint, probe.state())
            if probe.epoch % log_every == 0 or probe.epoch == epochs:
                print(
                    f"epoch {probe.epoch}/{epochs}  loss {loss.item():.4f}  top-1 {probe.history[-1]['top1']:.4f}",
                    flush=True,
                )
    best = max(range(epochs), key=lambda e: probe.history[e]["top1"])
    return {
        "linear_last_top1": probe.history[-1]["top1"],
        "linear_last_top5": probe.history[-1]["top5"],
        "linear_best_top1": probe.history[best]["top1"],
        "linear_best_epoch": best + 1,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate; returns the metrics."""
    args = get_args_parser().parse_args(argv)
    if args.epochs < 1 or (args.lr is not None and args.lr <= 0):
        raise UserError(f"--epochs {args.epochs} and --lr {args.lr} must be positive")
    device = cli.start(args)
    if args.lr is None:
        args.lr = 0.001 if args.optimizer == "sgd" else 0.01
    if args.augment is None:
        args.augment = args.load_features is None
    if args.augment and args.load_features:
        raise UserError("--augment true needs the images: leave out --load_features")
    model = None
    if args.n_last_blocks is None:
        args.n_last_blocks = default_blocks(args)
    n_blocks = args.n_last_blocks
    if n_blocks < 1:
        raise UserError(f"--n_last_blocks {n_blocks} must be positive")
    splits = ("val",) if args.augment else ("train", "val")
    found, model = features(args, device, splits, n_blocks, labels_for="eval_linear.py")
    val = found[-1]

    if args.standardise is None:
        args.standardise = not backbones.is_vit(val.arch)
    random_streams.seed_everything(random_streams.FOR_PROBE, args.seed)
    probe = Probe(val.features.shape[1], len(val.classes), args, device)
    checkpoint = resume_file(args, found)
    if checkpoint.exists():
        probe.load(checkpoints.load(checkpoint))
        if collectives.is_main():
            print(f"Resuming {checkpoint} after epoch {probe.epoch}")
    if args.augment:
        dataset = datasets.build_dataset(args.dataset, args.data_path, "train", args.class_list)
        if dataset.classes != val.classes:
            raise UserError(f"{args.data_path}: the class folders of train and val differ")
        view, loader = augmented_loader(args, model, dataset, device)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            loader.batch_sampler.epoch = epoch
            for ((pixels, params),), labels, _, failures in loader:
                for _, reason in loaders.read_failures(failures):
                    raise LocalError(reason)  # a probe on other images than the user's would be another probe
                with torch.no_grad():
                    x = augmentations.colour(pixels.to(device, non_blocking=True), params, view)
                    x = backbone_features(model.backbone, x, n_blocks)
                yield x, labels.to(device)
    else:
        train = found[0]
        sampler = cached_batches(train, args)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            sampler.epoch = epoch
            for batch in sampler:
                index = torch.tensor([i for _, i in batch])
                yield train.features[index].to(device), train.labels[index].to(device)

    metrics = train_probe(probe, args.epochs, batches, val, device, checkpoint)
    if collectives.is_main():
        rows = [("last epoch", metrics["linear_last_top1"], metrics["linear_last_top5"])]
        rows += [(f"best epoch on val ({metrics['linear_best_epoch']})", metrics["linear_best_top1"], None)]
        print(format_table(rows, ("linear", "top-1", "top-5")))
    cli.write_result(args, "eval_linear", metrics, val)
    return metrics


def default_blocks(args) -> int:
    """DINO's choice by architecture, which a checkpoint of ours names; of kept features, what was kept."""
    if args.load_features:
        return 4 if has_features(args.load_features, "train", 4) else 1
    arch = args.arch
    state = checkpoints.load_file(args.pretrained_weights, checkpoints.DINO_CLASSES)
    if checkpoints.is_ours(state):
        arch = state["args"]["arch"]
    return 4 if arch in ("vit_tiny", "vit_small") else 1


def resume_file(args, found: list[Features]) -> Path:
    """A file of its own for each set of flags, weights and images: no other probe's state is ever taken up."""
    ignored = {
        "output_dir",
        "num_workers",
        "device",
        "dist_url",
        "dump_features",
        "load_features",
        "pretrained_weights",
    }
    key = {k: v for k, v in vars(args).items() if k not in ignored} | {"processes": collectives.world_size()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for data in found:
        digest.update(json.dumps([data.source, data.names, data.classes]).encode())
        digest.update(data.labels.numpy().tobytes())
        digest.update(data.features.numpy().tobytes())
    return Path(args.output_dir, f"linear_{digest.hexdigest()[:12]}.pth")


if __name__ == "__main__":
    errors.run_script(main)
