"""Linear classification on frozen features: DINO's protocol, or Adam as in the paper's appendix.

    python eval_linear.py --pretrained_weights output/digits/checkpoint.pth --augment false
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights CHECKPOINT --data_path /data/imagenet

DINO's protocol sends random crops (bilinear) and flips of every training image through the backbone in every epoch, the
last, smaller batch too. `--augment false` extracts the features once, from center crops, and takes seconds. The result
on the last epoch is the one to report; the best epoch is chosen on the evaluation images and is named for what it is.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn import backbones, checkpoints, errors, random_streams
from cplearn.data import augmentations, cachefile, datasets, loaders, workers
from cplearn.data.identity import Identity
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm
from cplearn.errors import LocalError, UserError
from cplearn.features import cli
from cplearn.features.splits import Features, Tokens, backbone_features, data_of, get_features, has_features
from cplearn.files import reading
from cplearn.load import Model
from cplearn.precision import autocast
from cplearn.text import printable
from utils import ArgumentParser, bool_flag, cosine, format_table, positive

# Flags that a probe does not depend on: what they lead to is in its features.
OF_NO_PROBE = (
    "output_dir",
    "num_workers",
    "device",
    "dist_url",
    "dump_features",
    "load_features",
    "pretrained_weights",
)

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # epoch -> this rank's (features, labels) of its steps


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="eval_linear.py", description=__doc__)
    # fmt: off
    parser.add_argument("--epochs", type=positive(int), default=100)
    parser.add_argument("--lr", type=positive(float), default=None, help="sgd: for a batch of 256 over all processes (default: 0.001 for sgd, 0.01 for adam)")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adam"), help="sgd is DINO's; adam the paper's appendix, not scaled with the batch")
    parser.add_argument("--n_last_blocks", type=positive(int), default=None, help="Blocks whose CLS tokens are concatenated (default: 4 for vit_tiny and vit_small, else 1)")
    parser.add_argument("--avgpool_patchtokens", type=bool_flag, default=False, help="Concatenate the mean of the last block's patch tokens (vit_tiny, vit_small, vit_base): DINO sets it for ViT-B, with one block")
    parser.add_argument("--augment", type=bool_flag, default=None, help="Random crops and flips in every epoch (default: true, false with --load_features)")
    parser.add_argument("--standardise", type=bool_flag, default=None, help="Batch norm without weights before the classifier (default: true, or false for a ViT, whose last LayerNorm does it)")
    # fmt: on
    cli.add_flags(parser)
    return parser


class Probe:
    """A linear classifier in training, with everything that it needs to resume."""

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
        self.images: Identity | None = None  # read in every epoch, for rank 0

    def state(self) -> dict:
        """Return everything that `load` takes."""
        states = {"classifier": self.classifier.state_dict(), "optimizer": self.optimizer.state_dict()}
        images = {"images": self.images.state()} if self.images else {}
        return {**states, **images, "epoch": self.epoch, "history": self.history}

    def load(self, state: dict) -> None:
        """Resume from a state."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.history = state["epoch"], state["history"]


def cached_batches(args: argparse.Namespace, train: Features, device: torch.device) -> Batches:
    """Return batches of features that were extracted once."""
    ranks = (collectives.rank(), collectives.world_size())
    sampler = loaders.BatchSampler(len(train.features), args.batch_size_per_gpu, args.seed, *ranks, keep_last=True)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        sampler.epoch = epoch
        for batch in sampler:
            index = torch.tensor([i for _, i in batch])
            yield train.features[index].to(device), train.labels[index].to(device)

    return batches


def augmented_batches(
    args: argparse.Namespace, model: Model, dataset: datasets.ImageDataset, device: torch.device
) -> Batches:
    """Return batches of DINO's protocol: features of random crops of every training image."""
    view = training_view(model)
    with collectives.raise_on_all_ranks():
        dataset.allow_any_order(cachefile.FOLDER)
    loader = loaders.train_loader(
        Pixels(dataset, [view]),
        [view],
        batch_size=args.batch_size_per_gpu,
        seed=args.seed,
        num_workers=workers.default_workers(args.num_workers),
        pin_memory=device.type == "cuda",
        keep_last=True,
    )

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader.batch_sampler.epoch = epoch
        with workers.watched(loader, args.worker_timeout) as read:
            for batch in read:
                for _, reason in batch.failures:
                    raise LocalError(reason)  # a probe on other images than the user's would be another probe
                with torch.no_grad():
                    (x,) = augmentations.color_views(batch.crops, batch.params, [view], device)
                    with autocast(device, args.precision or "fp32"):
                        x = backbone_features(model.backbone, x, tokens_of(args))
                yield x.float(), batch.labels.to(device)

    return batches


def training_view(model: Model) -> augmentations.View:
    """Return DINO's view for training, torchvision's RandomResizedCrop with its default values: 8 to 100 % of the area,
    bilinear; flipped where a flip keeps the class."""
    flip_p = 0.0 if model.dataset in ("digits", "svhn") else 0.5
    return augmentations.View(model.image_size, scale=(0.08, 1.0), flip_p=flip_p, interpolation="bilinear")


def tokens_of(args: argparse.Namespace) -> Tokens:
    """Return which tokens the flags ask for."""
    return Tokens(args.n_last_blocks, args.avgpool_patchtokens)


def accuracy(classifier: nn.Module, features: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """Return top-1 and top-5 on features that every rank holds. Shape: (n, f), int64 (n,)."""
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
    probe: Probe, epochs: int, batches: Batches, val: Features, device: torch.device, checkpoint: Path
) -> dict[str, float]:
    """Train to the last epoch, saving each; return the accuracies of the last and the best."""
    model = collectives.wrap(probe.classifier, device)
    standardised, world_size = not isinstance(probe.classifier[0], nn.Identity), collectives.world_size()
    while probe.epoch < epochs:
        for group in probe.optimizer.param_groups:
            group["lr"] = cosine(probe.peak_lr, 0.0, probe.epoch / epochs)
        probe.classifier.train()
        for x, y in batches(probe.epoch):
            if standardised and len(x) * world_size == 1:
                continue  # a last batch of one image, of which batch norm has no statistics
            loss = F.cross_entropy(model(x), y)
            probe.optimizer.zero_grad()
            loss.backward()
            probe.optimizer.step()
        probe.epoch += 1
        probe.history.append(accuracy(probe.classifier, val.features, val.labels, device))
        if collectives.is_main():
            checkpoints.save(checkpoint, probe.state())
            if probe.epoch % 10 == 0 or probe.epoch == epochs:
                top1 = probe.history[-1]["top1"]
                print(f"epoch {probe.epoch}/{epochs}  loss {loss.item():.4f}  top-1 {top1:.4f}", flush=True)
    best = max(range(epochs), key=lambda e: probe.history[e]["top1"])
    return {
        "linear_last_top1": probe.history[-1]["top1"],
        "linear_last_top5": probe.history[-1]["top5"],
        "linear_best_top1": probe.history[best]["top1"],
        "linear_best_epoch": best + 1,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate; return the metrics."""
    args = get_args_parser().parse_args(argv)
    device = cli.start(args)
    model = cli.open_model(args, device)
    if cli.is_undivided(args, model):
        where = f"--data_path {printable(model.data_path)}" if model else f"--load_features {args.load_features}"
        raise UserError(
            f"{where} is one set of images, eval_linear.py needs two with labels: train/CLASS/ and val/CLASS/ below it"
        )
    fill_in_defaults(args, model)
    splits = ("val",) if args.augment else ("train", "val")
    data = get_features(args, model, device, splits, tokens_of(args), labels_for="eval_linear.py")
    val, images = data[-1], model.images("train") if args.augment else None
    if images is not None and images.classes != val.classes:
        raise UserError(f"{model.data_path}: the classes of train and val differ")
    if args.standardise is None:
        args.standardise = not backbones.is_vit(val.arch)
    largest_batch = min(args.batch_size_per_gpu * collectives.world_size(), len(images or data[0].names))
    if args.standardise and largest_batch == 1:
        raise UserError("--standardise true needs two images in a batch: use a larger --batch_size_per_gpu, or false")

    random_streams.seed_everything(random_streams.FOR_PROBE, args.seed)
    probe = Probe(val.features.shape[1], len(val.classes), args, device)
    flags = cli.effective_flags(args, model)
    checkpoint = collectives.on_main(find_state, probe, flags, data, images)
    if checkpoint.exists():
        probe.load(checkpoints.load(checkpoint))
        if collectives.is_main():
            print(f"Resuming {checkpoint} after epoch {probe.epoch}")
    if images is not None:
        batches = augmented_batches(args, model, images, device)
    else:
        batches = cached_batches(args, data[0], device)
    metrics = train_probe(probe, args.epochs, batches, val, device, checkpoint)

    if collectives.is_main():
        rows = [("last epoch", metrics["linear_last_top1"], metrics["linear_last_top5"])]
        rows += [(f"best epoch on val ({metrics['linear_best_epoch']})", metrics["linear_best_top1"], None)]
        print(format_table(rows, ("linear", "top-1", "top-5")))
    cli.write_result(flags, "eval_linear", metrics, val, train=data[0].source if images is None else data_of(images))
    return metrics


def fill_in_defaults(args: argparse.Namespace, model: Model | None) -> None:
    """Set the flags whose defaults depend on others, or on the model (None for kept features)."""
    if args.augment and args.load_features:
        raise UserError("--augment true needs the images: leave out --load_features")
    if args.augment is None:
        args.augment = args.load_features is None
    if args.augment and args.dump_features:
        raise UserError("--dump_features keeps features of center crops: add --augment false")
    if args.lr is None:
        args.lr = 0.001 if args.optimizer == "sgd" else 0.01
    if args.n_last_blocks is None and model is not None:  # DINO's choice
        args.n_last_blocks = 4 if model.arch in ("vit_tiny", "vit_small") else 1
    elif args.n_last_blocks is None:
        kept = has_features(args.load_features, "train", Tokens(4, args.avgpool_patchtokens))
        args.n_last_blocks = 4 if kept else 1


def find_state(
    probe: Probe, flags: dict[str, object], data: list[Features], images: datasets.ImageDataset | None
) -> Path:
    """Return the file of this probe's state, for rank 0. That of a probe on images that have changed is removed."""
    if images is None:
        return state_file(flags, data)
    probe.images = Identity.of(images).read_sample(images)
    path = state_file(flags, data, probe.images)
    if path.exists():
        with reading(path, "remove it"):
            before = Identity(**checkpoints.load(path)["images"])
        if changed := probe.images.changes(before, images).text:
            print(f"{changed}: the probe begins again", flush=True)
            path.unlink()
    return path


def state_file(flags: dict[str, object], data: list[Features], images: Identity | None = None) -> Path:
    """Name a file for each set of flags, weights and images: no other probe's state is ever resumed.

    `images`: those that are read in every epoch.
    """
    key = {k: v for k, v in flags.items() if k not in OF_NO_PROBE} | {"processes": collectives.world_size()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for split in data:
        digest.update(json.dumps([split.source, split.names, split.classes]).encode())
        digest.update(split.labels.numpy().tobytes())
        digest.update(split.features.numpy().tobytes())
    if images is not None:
        digest.update(images.sha256(times=False).encode())
    return Path(flags["output_dir"], f"linear_{digest.hexdigest()[:12]}.pth")


if __name__ == "__main__":
    errors.run_script(main)
