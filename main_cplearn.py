"""Pre-train a backbone with CPLearn, or with one of the baselines (--method).

    python main_cplearn.py @recipes/digits.txt --output_dir output/digits                     # a laptop
    torchrun --nproc_per_node=8 main_cplearn.py @recipes/imagenet100_cplearn.txt \\
        --data_path /data/imagenet --output_dir output/in100                                  # one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        main_cplearn.py ...                                                                    # two nodes

Flags have DINO's names and meaning wherever the concept exists. The same command on the same --output_dir
resumes at the exact step (on CPUs: to the same bits).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch

from cplearn import backbones, checkpoints, errors, random_streams, tensor_files
from cplearn.compiling import choose_compile
from cplearn.data import augmentations, cachefile, datasets, sources, workers
from cplearn.data.pixels import KINDS, CacheOptions, open_pixels
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.lock import FolderLock
from cplearn.methods import METHODS, method_class
from cplearn.precision import autocast, choose_precision
from cplearn.training.bad_batches import RunningStatistics, check_gradients
from cplearn.training.meters import EpochState
from cplearn.training.optimizer import check_rate, clip_gradients, set_schedules
from cplearn.training.report import EpochReport, announce, report_end, report_epoch
from cplearn.training.resume import resume, save
from cplearn.training.run import Run, assemble
from cplearn.training.stop import StopSignals
from cplearn.training.votes import act_on_votes, count_last, stop_if_asked, vote
from cplearn.training.writers import Writers, check_writers
from utils import (
    ArgumentParser,
    bool_flag,
    check_output_dir,
    check_unread_path,
    expand_paths,
    expand_recipes,
    fraction,
    fraction_below_one,
    ignore_local_rank,
    nonnegative,
    positive,
)


def get_args_parser(method: str = "cplearn") -> argparse.ArgumentParser:
    # fmt: off
    common = "method out_dim beta n_ref arch patch_size init_from data_path dataset augmentation image_size local_crops_number batch_size_per_gpu epochs lr optimizer precision accum output_dir seed num_workers knn_freq device"
    p = ArgumentParser(prog="main_cplearn.py", description=__doc__, common=common.split())
    ignore_local_rank(p)
    p.add_argument("--method", default="cplearn", help=f"What to train with: {', '.join(METHODS)}")
    p.add_argument("--out_dim", type=positive(int), default=65536, help="Number of codes c (of outputs, where a method has none); CPLearn's trained weights stay as many")
    shared = len(p._actions)
    method_class(method).add_flags(p)
    if method != "cplearn":
        p.common |= {action.dest for action in p._actions[shared:]}

    g = p.add_argument_group("backbone")
    g.add_argument("--arch", type=backbones.arch_name, default="vit_small", help=f"One of {', '.join(backbones.ARCHS)}")
    g.add_argument("--patch_size", type=positive(int), default=16, help="ViT patch in pixels; smaller is slower and better")
    g.add_argument("--drop_path_rate", type=fraction_below_one, default=0.1, help="Stochastic depth of a ViT")
    g.add_argument("--init_from", default=None, help="Start from the backbone weights of this file (ours, DINO's, timm's)")
    g.add_argument("--freeze_backbone_epochs", type=nonnegative(int), default=0, help="Train the head alone for N epochs first, on the features of --init_from")

    g = p.add_argument_group("data and views")
    g.add_argument("--dataset", default=None, help=f"One of {', '.join(datasets.DATASETS)}, or hf:PATH, a copy that the datasets package saved (default: folder with --data_path, else digits)")
    g.add_argument("--data_path", default=None, help="Folder of images, with or without train/ and class folders; a list of paths (.txt); tar shards or parquet, a file or a folder of them (docs/data.md); or the downloaded data set's folder")
    g.add_argument("--class_list", default=None, help="File of classes to use, e.g. the bundled imagenet100.txt")
    g.add_argument("--image_column", default=None, help="Where a row of parquet or a sample of a tar has several images: the column's name, or the name's ending (left.jpg; all for all)")
    g.add_argument("--augmentation", default=None, help=f"One of {', '.join(augmentations.RECIPES)} (default: by data set)")
    g.add_argument("--image_size", type=positive(int), default=None, help="Global crop in pixels (default: 224, or 32 for the small data sets)")
    g.add_argument("--local_image_size", type=positive(int), default=None, help="Local crop in pixels (default: 96 at 224, in proportion otherwise)")
    g.add_argument("--global_crops_scale", type=fraction, nargs=2, default=None, metavar=("LOW", "HIGH"), help="Area range of global crops (default: 0.4 1, or 0.14 1 without local crops)")
    g.add_argument("--local_crops_number", type=nonnegative(int), default=None, help="Local crops per image (default: 8, or 0 for images below 96 pixels)")
    g.add_argument("--local_crops_scale", type=fraction, nargs=2, default=(0.05, 0.4), metavar=("LOW", "HIGH"), help="Area range of local crops")

    g = p.add_argument_group("optimization")
    g.add_argument("--batch_size_per_gpu", type=positive(int), default=64, help="Images per process and step. The batch over all processes is what the prior sees")
    g.add_argument("--epochs", type=positive(int), default=300, help="Length of the schedules")
    g.add_argument("--max_steps", type=positive(int), default=None, help="Stop after this many steps, for a smoke test; schedules stay as they are")
    g.add_argument("--optimizer", default="adamw", choices=("adamw", "adam", "sgd", "lars"))
    g.add_argument("--lr", type=positive(float), default=0.0005, help="Peak learning rate for a batch of 256; scaled linearly with the batch over all processes")
    g.add_argument("--min_lr", type=nonnegative(float), default=1e-6, help="Learning rate at the end (not scaled)")
    g.add_argument("--warmup_epochs", type=nonnegative(int), default=None, help="Epochs of linear warm-up (default: 10, or a tenth of --epochs if that is less)")
    g.add_argument("--weight_decay", type=nonnegative(float), default=0.04, help="At the start; biases and norms have none")
    g.add_argument("--weight_decay_end", type=nonnegative(float), default=0.4, help="At the end, by a cosine. Same as --weight_decay for a constant")
    g.add_argument("--clip_grad", type=nonnegative(float), default=3.0, help="Largest norm of each parameter's gradient; 0 for none")
    g.add_argument("--precision", default=None, choices=("fp32", "bf16", "fp16"), help="Of the backbone; head and loss are always fp32 (default: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPUs)")
    g.add_argument("--use_fp16", type=bool_flag, default=None, help="DINO's flag: true means --precision fp16, false fp32")
    g.add_argument("--accum", type=positive(int), default=1, help="Split the batch into N parts to save memory, at one more forward pass (docs/speed.md)")
    g.add_argument("--grad_checkpointing", action="store_true", help="Keep only the inputs of a ViT's blocks, and compute the rest again in backward: same numbers, less memory, a third more work")
    g.add_argument("--compile", nargs="?", const="true", default="auto", choices=("auto", "true", "false"), help="torch.compile the backbone: a minute at the start, needs a C++ compiler (auto: on GPUs)")
    # fmt: on
    add_run_flags(p)
    return p


def add_run_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of where a run is kept, what it prints and when it stops."""
    # fmt: off
    g = p.add_argument_group("run")
    g.add_argument("--output_dir", default="output/cplearn", help="Checkpoints, log.txt and args.json; resumes if a checkpoint is there")
    g.add_argument("--saveckp_freq", type=nonnegative(int), default=20, help="Keep a numbered checkpoint every N epochs; 0 for none")
    g.add_argument("--saveckp_minutes", type=nonnegative(float), default=15.0, help="Also save checkpoint.pth every N minutes; 0 for none. At most this much work is lost on a kill")
    g.add_argument("--resume_force", nargs="+", default=[], metavar="FLAG", help="Resume although these flags differ from the checkpoint's, e.g. lr (or processes, data)")
    g.add_argument("--seed", type=nonnegative(int), default=0, help="Of weights, order of images, and views")
    g.add_argument("--cache", default=None, choices=KINDS, help="Decode images once: into memory that all processes of a machine share, or a file that later runs find. Changes no pixel (default: ram for what is small, else none)")
    g.add_argument("--cache_dir", default=cachefile.FOLDER, help="Folder of --cache disk, and of images copied out of parquet")
    g.add_argument("--num_workers", type=nonnegative(int), default=None, help="Loader processes per process (default: 10, or fewer with fewer cores); 0 for none")
    g.add_argument("--worker_timeout", type=nonnegative(float), default=600.0, help="Seconds without a batch after which a loader process counts as hung; 0 for never")
    g.add_argument("--max_bad_images", type=fraction, default=0.001, help="Stop when more than this fraction of the images cannot be read; fewer are replaced")
    g.add_argument("--max_skipped_steps", type=nonnegative(int), default=20, help="Stop after more than N steps in a row without a finite loss and gradient")
    g.add_argument("--print_freq", type=positive(int), default=10, help="Steps between two readings of the loss")
    g.add_argument("--on_collapse", default="warn", choices=("warn", "stop"), help="After two alarms in a row (a collapse, or stuck at uniform): go on, or save and end with exit code 7")
    g.add_argument("--best_by", default="score", choices=("score", "knn", "none"), help="Keep checkpoint_best.pth, by the probe's label-free score or by the k-NN of --knn_freq")
    g.add_argument("--knn_freq", type=nonnegative(int), default=0, help="Epochs between two k-NN tests among the probe's training images, by their labels; 0 for none. Also before the first step, and whenever the probe is measured")
    g.add_argument("--profile", action="store_true", help="Write a trace of 20 steps to profile.json and print the ten largest costs")
    g.add_argument("--tensorboard", action="store_true", help="Also write TensorBoard events (needs the tensorboard package)")
    g.add_argument("--wandb", action="store_true", help="Also log to Weights & Biases, offline where there is no network (needs the wandb package)")
    g.add_argument("--wandb_project", default="cplearn", help="Its project there")
    g.add_argument("--device", default="auto", help="auto, cpu or cuda")
    g.add_argument("--dist_url", default="env://", help="Rendezvous of the processes; torchrun needs no other")
    g.add_argument("--dist_timeout", type=positive(float), default=5.0, help="Minutes to wait for all processes at the start")
    g.add_argument("--peer_timeout", type=positive(float), default=5.0, help="Minutes without a sign of life after which another process counts as frozen")
    # fmt: on


def train_one_epoch(run: Run) -> dict:
    """Run Algorithm 1 over what is left of an epoch: views -> embeddings -> codes -> loss -> step.

    Returns the epoch's log record.
    """
    args, method, optimizer, scaler = run.args, run.method, run.optimizer, run.scaler
    statistics, report = RunningStatistics(method), EpochReport(run)
    run.set_training()
    for batch in run.rest_of_epoch():
        lr = set_schedules(optimizer, run.step, run.steps_per_epoch, args)
        random_streams.seed_everything(random_streams.FOR_STEP, args.seed, run.step, collectives.rank())  # drop path
        images = augmentations.color_views(batch.crops, batch.params, run.views, run.device)
        method.before_step(run.step, run.steps_per_epoch, args.epochs)
        statistics.keep()
        with autocast(run.device, args.precision):
            output = run.model(images)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(output.loss).backward()
        method.after_backward()
        votes = vote(run, output.loss, batch.failures)
        skipped, norms = check_gradients(method, votes.loss, optimizer, scaler)
        grad_norm = clip_gradients(method, norms, args.clip_grad)
        scaler.step(optimizer)  # not if `skipped`
        scaler.update(None if args.precision == "fp16" else 1.0)
        statistics.restore(skipped)
        method.after_step(output, skipped)
        report.step(output, grad_norm, skipped, batch.samples, lr)
        run.profile.step()
        act_on_votes(run, skipped, votes)

    count_last(run)
    if not run.between_epochs:  # cut by --max_steps: the epoch goes on from here, as if there had been no line of it
        save(run)
    return report.close()


def train(run: Run) -> dict:
    """Train until `last_step`, or until a signal. Return the last epoch's log record."""
    args, record = run.args, {}
    run.saved_at = time.monotonic()
    stop_if_asked(run)  # while it was built
    if not run.resumed:
        run.monitor.begin(run.method, run.device, args.batch_size_per_gpu)
    while run.step < run.last_step:
        record = train_one_epoch(run)
        if run.between_epochs:
            ending = {"sound": run.bad_steps.in_a_row == 0, "last": run.step == args.epochs * run.steps_per_epoch}
            record |= run.monitor.end_epoch(run.method, run.device, args.batch_size_per_gpu, record, **ending)
        collectives.on_main(report_epoch, run, record)
        if run.between_epochs:
            run.epoch = EpochState()
            save(run)
            if args.on_collapse == "stop":
                run.monitor.check(record, run.saved_step)
        run.bad_images.check()
        stop_if_asked(run)
    collectives.on_main(report_end, run, record)
    return record


def main(argv: Sequence[str] | None = None) -> dict:
    """Train; return the last epoch's log record."""
    args = parse_args(argv)
    device = launch.init(args.dist_url, args.device, args.dist_timeout, args.peer_timeout)
    if args.batch_size_per_gpu * collectives.world_size() < 2:
        raise UserError("--batch_size_per_gpu 1 in one process: batch norm needs at least 2 images in a batch")
    choose_precision(args, device)
    choose_compile(args, device)
    check_rate(args)
    collectives.on_main(check_writers, args)
    collectives.on_main(check_output_dir, args.output_dir)
    with StopSignals() as signals, FolderLock(args.output_dir) as lock:
        run = build(args, device, lock, signals)
        try:
            with Writers(args, run.step // run.steps_per_epoch) as run.writers:
                return train(run)
        except RuntimeError as error:  # torch raises it wherever the main process happens to be
            raise run.loader.failure() or error from None
        finally:
            run.close()


# --- a run -------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, device: torch.device, lock: FolderLock, signals: StopSignals) -> Run:
    """Build data, model and optimizer, and load the checkpoint in the folder if there is one."""
    with collectives.raise_on_all_ranks():
        num_workers = workers.default_workers(args.num_workers)
        dataset, views = find_images(args)
    cache = CacheOptions(args.cache, args.cache_dir, num_workers, lambda: signals.name is not None, args.worker_timeout)
    images = open_pixels(dataset, views, cache)
    with collectives.raise_on_all_ranks():
        run = assemble(args, images, device, lock, signals)
    flags = {f"--{k}": v for k, v in vars(args).items() if k not in ("num_workers", "dist_url")}
    collectives.check_same({"data": run.identity["data"], **flags})
    # A flag that is younger than the checkpoint had its default there.
    resume(run, vars(get_args_parser(args.method).parse_args([])))
    with collectives.raise_on_all_ranks():
        if args.init_from and not run.resumed:
            state = tensor_files.load_file(args.init_from, checkpoints.DINO_CLASSES)
            checkpoints.load_backbone(run.method.backbone, state, args.init_from)
    if not run.resumed:
        run.method.begin()
    collectives.on_main(announce, run, launch.self_check(device), vars(parse_args(["--method", args.method])))
    return run


def find_images(args: argparse.Namespace) -> tuple[datasets.ImageDataset, list[augmentations.View]]:
    """Return the data set and the views to cut from its images."""
    dataset = sources.build_dataset(args.dataset, args.data_path, "train", args.class_list, args.image_column)
    if args.knn_freq and not dataset.classes:
        raise UserError(f"--knn_freq {args.knn_freq} needs labels, but these images have none")
    return dataset, augmentations.views_of(args)


# --- flags -------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, refuse what makes no sense here, and fill in every default that depends on another flag."""
    argv = expand_recipes(sys.argv[1:] if argv is None else argv)
    first = ArgumentParser(add_help=False)
    first.add_argument("--method", default="cplearn")
    method = first.parse_known_args(argv)[0].method
    parser = get_args_parser(method)
    args, unknown = parser.parse_known_args(argv)
    for flag in (word.split("=")[0] for word in unknown):
        if owners := [name for name in METHODS if flag in get_args_parser(name)._option_string_actions]:
            raise UserError(f"{flag} belongs to --method {' or '.join(owners)}, not to {method}: leave it out")
    if unknown:
        parser.refuse(unknown)
    fill_defaults(args)
    check_args(args)
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    """Fill in every default that depends on another flag."""
    expand_paths(args, "data_path", "output_dir", "init_from", "class_list", "cache_dir")
    if args.dataset is None:
        args.dataset = "folder" if args.data_path else "digits"
    args.dataset = sources.absolute_name(args.dataset)
    sources.check_name(args.dataset)
    if args.data_path is not None:  # an evaluation started elsewhere has to find it
        args.data_path = os.path.abspath(args.data_path)
    if args.class_list and os.path.isfile(args.class_list):
        args.class_list = os.path.abspath(args.class_list)
    args.augmentation = args.augmentation or datasets.RECIPE.get(args.dataset, "dino")
    args.image_size = args.image_size or datasets.NATIVE_SIZE.get(args.dataset, 224)
    patch = args.patch_size if backbones.is_vit(args.arch) else 1
    if args.local_image_size is None:
        args.local_image_size = patch * max(1, round(args.image_size * 96 / 224 / patch))
    if args.local_crops_number is None:
        args.local_crops_number = 8 if args.image_size >= 96 else 0
    given = args.global_crops_scale
    args.global_crops_scale = given or ([0.4, 1.0] if args.local_crops_number else [0.14, 1.0])
    args.local_crops_scale = list(args.local_crops_scale)
    if given and augmentations.views_of(args)[0].pad:
        raise UserError(
            f"--global_crops_scale {given[0]:g} {given[1]:g}: --augmentation {args.augmentation} shifts the whole image "
            "and has no such scale: leave it out, or use --augmentation cifar_strong"
        )
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs // 10)


def check_args(args: argparse.Namespace) -> None:
    """Check the rules between flags; their types check the ranges, models and data sets the rest."""
    check_unread_path(args)
    implied = {True: "fp16", False: "fp32"}.get(args.use_fp16)
    if args.precision and implied and args.precision != implied:
        given = f"--use_fp16 {str(args.use_fp16).lower()}"
        raise UserError(f"{given} means --precision {implied}, not {args.precision}: leave one of them out")
    for name in ("saveckp_minutes", "worker_timeout", "dist_timeout", "peer_timeout"):
        if getattr(args, name) > 1e7:
            raise UserError(f"--{name} {getattr(args, name):g} must be at most 1e7: no clock counts further")
    if unknown := sorted(set(args.resume_force) - set(vars(args)) - {"processes", "data"}):
        raise UserError(f"--resume_force {' '.join(unknown)}: not the name of a flag (or processes, data)")
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            raise UserError(f"--{name} {low:g} {high:g} must satisfy 0 < LOW <= HIGH <= 1")
    if args.local_crops_number and backbones.is_vit(args.arch) and args.local_image_size % args.patch_size:
        raise UserError(f"--local_image_size {args.local_image_size} is no multiple of --patch_size {args.patch_size}")
    if not args.dist_url.startswith(("env://", "file://", "tcp://")):
        raise UserError(f"--dist_url {args.dist_url} is unknown: env:// (torchrun), tcp://HOST:PORT or file:///PATH")
    if args.batch_size_per_gpu % args.accum:
        raise UserError(f"--accum {args.accum} does not divide --batch_size_per_gpu {args.batch_size_per_gpu}")
    if args.accum > 1 and not method_class(args.method).SPLITS:
        raise UserError(f"--accum {args.accum} cannot split {args.method}'s sampling: leave it out")
    if args.best_by == "knn" and not args.knn_freq:
        raise UserError("--best_by knn needs --knn_freq N, epochs between two tests: add --knn_freq 1")
    if args.freeze_backbone_epochs and not args.init_from:
        raise UserError(
            f"--freeze_backbone_epochs {args.freeze_backbone_epochs} would freeze random weights: add --init_from FILE"
        )
    for name in ("freeze_backbone_epochs", "warmup_epochs"):
        if getattr(args, name) > args.epochs:
            raise UserError(f"--{name} {getattr(args, name)} exceeds --epochs {args.epochs}: shorten it")


if __name__ == "__main__":
    errors.run_script(main)
