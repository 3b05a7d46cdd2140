"""Pre-train a backbone with CPLearn (or, by --method, what it is compared with).

    python main_cplearn.py @recipes/digits.txt --output_dir output/digits                     # a laptop
    torchrun --nproc_per_node=8 main_cplearn.py @recipes/imagenet100_cplearn.txt \\
        --data_path /data/imagenet --output_dir output/in100                                  # one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        main_cplearn.py ...                                                                    # two nodes

Flags have DINO's names and meaning wherever the concept exists. The same command on the same --output_dir
resumes.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import timm.optim
import torch
from torch import Tensor, nn

import augmentations
import checkpoints
import datasets
import distributed
import models
import utils
from progress import Meter, Progress
from utils import UserError

# Flags of DINO's script that a user may bring along, and why they have no meaning for CPLearn.
NO_TEACHER = "CPLearn has no EMA teacher"
DINO_ONLY = {
    "--momentum_teacher": NO_TEACHER,
    "--teacher_temp": f"{NO_TEACHER}; the logit scale is set by --n_ref",
    "--warmup_teacher_temp": f"{NO_TEACHER}; the logit scale is set by --n_ref",
    "--warmup_teacher_temp_epochs": f"{NO_TEACHER}; the logit scale is set by --n_ref",
    "--norm_last_layer": "the dictionary is frozen, there is no last layer to normalise",
    "--freeze_last_layer": "the dictionary is always frozen",
    "--use_bn_in_head": "the CPLearn head always has batch norm",
}

# Flags that may differ between a run and its continuation, because they do not change the result.
FREE_ON_RESUME = {
    "output_dir",
    "num_workers",
    "saveckp_freq",
    "print_freq",
    "max_steps",
    "tensorboard",
    "device",
    "dist_url",
    "loss_form",
}

NON_FINITE_EXIT_CODE = 3


def get_args_parser(method: str = "cplearn") -> argparse.ArgumentParser:
    # fmt: off
    p = utils.ArgumentParser(prog="main_cplearn.py", description=__doc__)
    p.add_argument("--method", default="cplearn", help=f"What to train with: {', '.join(models.METHODS)}")
    p.add_argument("--out_dim", type=int, default=65536, help="Number of codes c. Any size trains the same number of weights")
    models.method_class(method).add_flags(p)

    g = p.add_argument_group("backbone")
    g.add_argument("--arch", default="vit_small", help=f"One of {', '.join(models.ARCHS)}")
    g.add_argument("--patch_size", type=int, default=16, help="ViT patch in pixels; smaller is slower and better")
    g.add_argument("--drop_path_rate", type=float, default=0.1, help="Stochastic depth of a ViT")
    g.add_argument("--init_from", default=None, help="Start from the backbone weights of this file (ours, DINO's, timm's)")

    g = p.add_argument_group("data and views")
    g.add_argument("--dataset", default=None, help=f"One of {', '.join(datasets.DATASETS)} (default: folder with --data_path, else digits)")
    g.add_argument("--data_path", default=None, help="Folder of images, with or without train/ and class folders; or of the downloaded data set")
    g.add_argument("--class_list", default=None, help="File of class folders to use, e.g. the bundled imagenet100.txt")
    g.add_argument("--augmentation", default=None, help=f"One of {', '.join(augmentations.RECIPES)} (default: by data set)")
    g.add_argument("--image_size", type=int, default=None, help="Global crop in pixels (default: 224, or 32 for the small data sets)")
    g.add_argument("--local_image_size", type=int, default=None, help="Local crop in pixels (default: 96 at 224, in proportion otherwise)")
    g.add_argument("--global_crops_scale", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"), help="Area range of global crops (default: 0.4 1, or 0.14 1 without local crops)")
    g.add_argument("--local_crops_number", type=int, default=None, help="Local crops an image (default: 8, or 0 for images below 96 pixels)")
    g.add_argument("--local_crops_scale", type=float, nargs=2, default=(0.05, 0.4), metavar=("LOW", "HIGH"), help="Area range of local crops")

    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size_per_gpu", type=int, default=64, help="Images a process and step. The batch over all processes is what the prior sees")
    g.add_argument("--epochs", type=int, default=300, help="Length of the schedules")
    g.add_argument("--max_steps", type=int, default=None, help="Stop after this many steps, for a smoke test; schedules stay as they are")
    g.add_argument("--optimizer", default="adamw", choices=("adamw", "adam", "sgd", "lars"))
    g.add_argument("--lr", type=float, default=0.0005, help="Peak learning rate for a batch of 256; scaled linearly with the batch over all processes")
    g.add_argument("--min_lr", type=float, default=1e-6, help="Learning rate at the end (not scaled)")
    g.add_argument("--warmup_epochs", type=int, default=10, help="Epochs of linear warm-up")
    g.add_argument("--weight_decay", type=float, default=0.04, help="At the start; biases and norms have none")
    g.add_argument("--weight_decay_end", type=float, default=0.4, help="At the end, by a cosine. Same as --weight_decay for a constant")
    g.add_argument("--clip_grad", type=float, default=3.0, help="Largest norm of each parameter's gradient; 0 for none")
    g.add_argument("--precision", default=None, choices=("fp32", "bf16", "fp16"), help="Of the backbone; head and loss are always fp32 (default: fp16 on GPUs, fp32 on CPUs)")
    g.add_argument("--use_fp16", type=utils.bool_flag, default=None, help="DINO's flag: false means --precision fp32")

    g = p.add_argument_group("run")
    g.add_argument("--output_dir", default="output/cplearn", help="Checkpoints, log.txt and args.json; resumes if a checkpoint is there")
    g.add_argument("--saveckp_freq", type=int, default=20, help="Keep a numbered checkpoint every so many epochs; 0 for none")
    g.add_argument("--seed", type=int, default=0, help="Of weights, order of images, and views")
    g.add_argument("--num_workers", type=int, default=None, help="Loader processes a process (default: 10, or fewer with fewer cores); 0 for none")
    g.add_argument("--print_freq", type=int, default=10, help="Steps between two readings of the loss")
    g.add_argument("--tensorboard", action="store_true", help="Also write TensorBoard events (needs the tensorboard package)")
    g.add_argument("--device", default="auto", help="auto, cpu or cuda")
    g.add_argument("--dist_url", default="env://", help="Rendezvous of the processes; torchrun needs no other")
    # fmt: on
    return p


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, refuse what makes no sense here, and fill in every default that depends on another flag."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = utils.ArgumentParser(add_help=False)
    first.add_argument("--method", default="cplearn")
    method = first.parse_known_args(argv)[0].method
    parser = get_args_parser(method)
    args, unknown = parser.parse_known_args(argv)
    for flag in (token.split("=")[0] for token in unknown):
        if flag in DINO_ONLY:
            raise UserError(f"{flag} makes no sense with --method {method}: {DINO_ONLY[flag]}; leave it out")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    fill_defaults(args)
    check_args(args)
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    if args.dataset is None:
        args.dataset = "folder" if args.data_path else "digits"
    if args.dataset not in datasets.DATASETS:
        raise UserError(f"--dataset {args.dataset} is unknown: {', '.join(datasets.DATASETS)}")
    utils.expand_paths(args, "data_path", "output_dir", "init_from", "class_list")
    if args.data_path is not None:  # an evaluation started elsewhere has to find it
        args.data_path = os.path.abspath(args.data_path)
    if args.class_list and os.path.isfile(args.class_list):
        args.class_list = os.path.abspath(args.class_list)
    if args.augmentation is None:
        args.augmentation = datasets.RECIPE[args.dataset]
    if args.image_size is None:
        args.image_size = datasets.NATIVE_SIZE[args.dataset]
    unit = args.patch_size if models.is_vit(args.arch) else 1
    if args.local_image_size is None:
        args.local_image_size = max(1, round(args.image_size * 96 / 224 / max(1, unit))) * max(1, unit)
    if args.local_crops_number is None:
        args.local_crops_number = 8 if args.image_size >= 96 else 0
    if args.global_crops_scale is None:
        args.global_crops_scale = [0.4, 1.0] if args.local_crops_number else [0.14, 1.0]
    args.global_crops_scale = list(args.global_crops_scale)
    args.local_crops_scale = list(args.local_crops_scale)


def check_args(args: argparse.Namespace) -> None:
    """What can be judged from the flags alone; models and data sets check the rest."""
    utils.check_finite(args)
    if not 0 <= args.drop_path_rate < 1:
        raise UserError(f"--drop_path_rate {args.drop_path_rate:g} must be at least 0 and below 1")
    for name in (
        "batch_size_per_gpu",
        "epochs",
        "print_freq",
        "lr",
        "image_size",
        "local_image_size",
        "patch_size",
    ):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name):g} must be positive")
    for name in (
        "local_crops_number",
        "warmup_epochs",
        "saveckp_freq",
        "clip_grad",
        "min_lr",
        "weight_decay",
        "weight_decay_end",
        "seed",
    ):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name):g} must not be negative")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers} must not be negative")
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError(f"--max_steps {args.max_steps} must be positive")
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            raise UserError(f"--{name} {low:g} {high:g} must satisfy 0 < LOW <= HIGH <= 1")
    if args.local_crops_number and models.is_vit(args.arch) and args.local_image_size % args.patch_size:
        raise UserError(
            f"--local_image_size {args.local_image_size} is not a multiple of --patch_size {args.patch_size}"
        )
    if not args.dist_url.startswith(("env://", "file://", "tcp://")):
        raise UserError(f"--dist_url {args.dist_url} is unknown: env:// (torchrun), tcp://HOST:PORT or file:///PATH")
    if args.warmup_epochs > args.epochs:
        raise UserError(f"--warmup_epochs {args.warmup_epochs} exceeds --epochs {args.epochs}: shorten the warm-up")


def main(argv: Sequence[str] | None = None) -> dict:
    """Train; returns the last epoch's log record."""
    args = parse_args(argv)
    device = distributed.init(args.dist_url, args.device)
    if args.batch_size_per_gpu * distributed.world_size() < 2:
        raise UserError("--batch_size_per_gpu 1 in one process: batch norm needs at least 2 images in a batch")
    choose_precision(args, device)
    utils.check_output_dir(args.output_dir)
    utils.seed_everything(utils.FOR_WEIGHTS, args.seed)

    dataset = datasets.build_dataset(args.dataset, args.data_path, "train", args.class_list)
    views = augmentations.build_views(
        args.augmentation,
        size=args.image_size,
        local_size=args.local_image_size,
        n_local=args.local_crops_number,
        global_scale=tuple(args.global_crops_scale),
        local_scale=tuple(args.local_crops_scale),
    )
    loader = datasets.train_loader(
        dataset,
        views,
        batch_size=args.batch_size_per_gpu,
        seed=args.seed,
        num_workers=datasets.default_workers(args.num_workers),
        pin_memory=device.type == "cuda",
    )
    method = models.build_method(args)
    for size in sorted({view.size for view in views}):
        models.check_image_size(method.backbone, args.arch, size)
    if args.init_from:
        checkpoints.load_backbone(method.backbone, checkpoints.load_file(args.init_from), args.init_from)
    method.to(device)
    optimizer = build_optimizer(method, args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    last_step = min(args.epochs * len(loader), args.max_steps or math.inf)
    identity = {"processes": distributed.world_size(), "data": datasets.fingerprint(dataset)}
    start_epoch = resume(args, identity, method, optimizer, scaler, len(loader), last_step)
    model = distributed.wrap(method, device)
    if distributed.is_main():
        announce(args, method, dataset, loader, device)

    writer = tensorboard_writer(args)
    record: dict = {}
    for epoch in range(start_epoch, args.epochs):
        if epoch * len(loader) >= last_step:
            break
        utils.seed_everything(utils.FOR_EPOCH, args.seed, epoch, distributed.rank())  # drop path
        record = train_one_epoch(model, method, views, loader, optimizer, scaler, epoch, last_step, device, args)
        if distributed.is_main():
            report_epoch(args, record, last_step, writer)
            save(args, identity, method, optimizer, scaler, record["step"], len(loader))
        distributed.barrier()
    if distributed.is_main():
        print(f"Done: {args.output_dir}/checkpoint.pth" if record else f"Nothing left to do in {args.output_dir}")
    return record


def train_one_epoch(model, method, views, loader, optimizer, scaler, epoch, last_step, device, args) -> dict:
    """Algorithm 1 over one epoch: views -> embeddings -> codes -> loss -> step. Returns the epoch's log record."""
    model.train()
    loader.batch_sampler.epoch = epoch
    batch = args.batch_size_per_gpu * distributed.world_size()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    meter, waiting = Meter(), utils.Stopwatch()
    progress = Progress(epoch, args.epochs, len(loader))
    start, step = time.perf_counter(), epoch * len(loader)
    batches = iter(loader)

    steps = min(len(loader), last_step - step)
    for i in range(steps):
        with waiting:
            crops, _, _ = next(batches)
        lr = set_schedules(optimizer, step + i, len(loader), args)
        images = [
            augmentations.colour(pixels.to(device, non_blocking=True), params, view)
            for (pixels, params), view in zip(crops, views, strict=True)
        ]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, terms = model(images)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradients(method, args.clip_grad)
        if scaler.is_enabled():  # the scaler leaves out a step with an overflow and lowers its scale: count it
            terms["skipped"] = 1.0 - norm.isfinite().float()
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        terms["grad_norm"] = norm
        scaler.step(optimizer)
        scaler.update()
        method.after_step()
        meter.add(terms)
        if (i + 1) % args.print_freq == 0 or i + 1 == steps:
            values = meter.read()  # the only device synchronisation
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                stop_non_finite(args, epoch, step + i, values)
            seconds = time.perf_counter() - start
            progress.show(i + 1, values, lr, (i + 1) * batch / seconds, waiting.seconds / seconds)

    progress.close()
    seconds = time.perf_counter() - start
    values = meter.average()
    references = method.references(args.batch_size_per_gpu)
    return {
        "epoch": epoch,
        "step": step + steps,
        "steps": steps,
        **{f"train_{name}": value for name, value in values.items()},
        "loss_uniform": references.uniform,
        "loss_floor": references.floor,
        "uniform_to_floor": (references.uniform - values["loss"]) / max(references.uniform - references.floor, 1e-9),
        "lr": lr,
        "weight_decay": optimizer.param_groups[0]["weight_decay"],
        "images_per_second": (i + 1) * batch / seconds,
        "data_wait": waiting.seconds / seconds,
        "seconds": seconds,
    }


# --- the step's parts --------------------------------------------------------------------------------


def build_optimizer(method: nn.Module, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    """Weight decay for matrices only, as in DINO: biases and one-dimensional parameters have none.

    torch's own optimisers are fused on a GPU: with fp16 the others ask the device at each step for overflows.
    """
    decayed = [
        p for name, p in method.named_parameters() if p.requires_grad and p.ndim > 1 and not name.endswith(".bias")
    ]
    exempt = [p for name, p in method.named_parameters() if p.requires_grad and (p.ndim <= 1 or name.endswith(".bias"))]
    groups = [{"params": decayed, "decay": True}, {"params": exempt, "decay": False, "weight_decay": 0.0}]
    fused = device.type == "cuda"
    kinds = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.0, fused=fused),
        "adam": lambda: torch.optim.Adam(groups, lr=0.0, fused=fused),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused),
        "lars": lambda: timm.optim.Lars(groups, lr=0.0, momentum=0.9),
    }
    return kinds[args.optimizer]()


def actual_lr(args: argparse.Namespace) -> float:
    """The linear rule: --lr is for a batch of 256 over all processes."""
    return args.lr * args.batch_size_per_gpu * distributed.world_size() / 256


def set_schedules(optimizer, step: int, steps_per_epoch: int, args) -> float:
    """Learning rate and weight decay of this step. Returns the learning rate."""
    total = args.epochs * steps_per_epoch
    lr = utils.lr_at(
        step,
        lr=actual_lr(args),
        min_lr=args.min_lr,
        warmup_steps=args.warmup_epochs * steps_per_epoch,
        total_steps=total,
    )
    decay = utils.cosine(args.weight_decay, args.weight_decay_end, step / total)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = decay
    return lr


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Scale down each parameter's gradient to `max_norm` on its own (DINO's clipping); 0 leaves all.

    Returns the norm of the whole gradient before clipping, on the device.
    """
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads)
    if max_norm > 0:
        torch._foreach_mul_(grads, [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
    return torch.stack(norms).norm()


def choose_precision(args: argparse.Namespace, device: torch.device) -> None:
    if args.precision is None:
        args.precision = "fp16" if device.type == "cuda" and args.use_fp16 is not False else "fp32"
    args.use_fp16 = args.precision == "fp16"


# --- what the run says and keeps ---------------------------------------------------------------------


def announce(args, method, dataset, loader, device) -> None:
    """Effective arguments, derived values and warnings: printed, and saved as args.json."""
    derived = {
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "effective_batch": args.batch_size_per_gpu * distributed.world_size(),
        "actual_lr": actual_lr(args),
        "steps_per_epoch": len(loader),
        "backbone_parameters": sum(p.numel() for p in method.backbone.parameters()),
        "trained_parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        **method.describe(args.batch_size_per_gpu),
        "torch": torch.__version__,
        "commit": utils.git_commit(),
    }
    print(f"Data: {datasets.summary(dataset)}")
    if args.data_path is None:
        print(
            "WARNING: no --data_path, so this trains on the handwritten digits bundled with scikit-learn. "
            "For your own images: --data_path FOLDER"
        )
    print("Arguments: " + " ".join(f"--{k} {v}" for k, v in sorted(vars(args).items()) if v is not None))
    for name, value in derived.items():
        print(f"  {name}: {value:.6g}" if isinstance(value, float) else f"  {name}: {value}")
    for warning in method.warnings():
        print(f"WARNING: {warning}")
    content = json.dumps({"args": vars(args), "derived": derived}, indent=1, sort_keys=True)
    Path(args.output_dir, "args.json").write_text(content + "\n")
    sys.stdout.flush()


def report_epoch(args, record: dict, last_step: int, writer) -> None:
    """One line on the terminal, one in log.txt, and TensorBoard if asked for."""
    remaining = (last_step - record["step"]) * record["seconds"] / record["steps"]
    print(
        f"epoch {record['epoch'] + 1}/{args.epochs}  loss {record['train_loss']:.4f}  "
        + "  ".join(
            f"{k.removeprefix('train_')} {v:.4f}"
            for k, v in record.items()
            if k.startswith("train_") and k != "train_loss"
        )
        + f"  (uniform {record['loss_uniform']:.4f}, floor {record['loss_floor']:.4f}, {record['uniform_to_floor']:.0%} of the way)  lr {record['lr']:.3g}"
        + f"  {record['images_per_second']:.0f} img/s  wait {record['data_wait']:.0%}"
        + f"  ETA {remaining / 3600:.1f} h" * (remaining >= 3600)
        + f"  ETA {remaining / 60:.1f} min" * (remaining < 3600),
        flush=True,
    )
    utils.append_json_line(Path(args.output_dir, "log.txt"), record)
    if writer is not None:
        for name, value in record.items():
            writer.add_scalar(name, value, record["epoch"])
        writer.flush()


def tensorboard_writer(args):
    if not args.tensorboard or not distributed.is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(os.path.join(args.output_dir, "tensorboard"))


def stop_non_finite(args, epoch: int, step: int, values: dict[str, float]) -> None:
    """Every rank comes here together, because what was read are means over ranks. Nothing has been saved since."""
    if distributed.is_main():
        path = Path(args.output_dir, "checkpoint.pth")
        print(
            f"STOPPED: loss {values['loss']}, gradient norm {values['grad_norm']} by step {step} of epoch {epoch + 1}; "
            + (f"{path} is the last good checkpoint. " if path.exists() else "no epoch was finished before. ")
            + "Try a lower --lr, or --precision bf16 instead of fp16.",
            file=sys.stderr,
        )
    sys.exit(NON_FINITE_EXIT_CODE)


def save(args, identity, method, optimizer, scaler, step: int, steps_per_epoch: int) -> None:
    epoch = step // steps_per_epoch  # whole ones; `step` tells of a part that --max_steps cut
    state = {
        "args": vars(args),
        "identity": identity,
        "commit": utils.git_commit(),
        "epoch": epoch,
        "step": step,
        "model": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    folder = Path(args.output_dir)
    checkpoints.save(folder / "checkpoint.pth", state)
    if args.saveckp_freq and epoch % args.saveckp_freq == 0 and step % steps_per_epoch == 0:
        checkpoints.save(folder / f"checkpoint{epoch:04}.pth", state)


def resume(args, identity, method, optimizer, scaler, steps_per_epoch: int, last_step: int) -> int:
    """Go on after the last whole epoch of output_dir/checkpoint.pth, if there is one. Returns the epoch to start with.

    Raises `UserError` if it belongs to a run with other settings, or was cut inside an epoch by --max_steps.
    """
    path = Path(args.output_dir, "checkpoint.pth")
    if not path.exists():
        return 0
    state = checkpoints.load(path)
    defaults = vars(get_args_parser(args.method).parse_args([]))  # of flags that are younger than the checkpoint
    mine, theirs = vars(args) | identity, defaults | state["args"] | state["identity"]
    differ = sorted(k for k in mine.keys() | theirs.keys() if k not in FREE_ON_RESUME and mine.get(k) != theirs.get(k))
    if differ:
        raise UserError(
            f"{path} belongs to another run: "
            + ", ".join(f"{k} {theirs.get(k)} there, {mine.get(k)} here" for k in differ)
            + "; use another --output_dir, or the same settings"
        )
    checkpoints.load_into(method, state["model"], str(path))
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if state["step"] >= last_step:
        return args.epochs
    if state["step"] % steps_per_epoch:
        raise UserError(
            f"{path} was cut by --max_steps at step {state['step']}, inside an epoch of {steps_per_epoch} steps, and only "
            "whole epochs are resumed: use another --output_dir"
        )
    log = Path(args.output_dir, "log.txt")
    if distributed.is_main():
        print(f"Resuming {path} after epoch {state['epoch']}")
        if log.exists():  # lines of epochs that did not reach a checkpoint are written again
            lines = log.read_text().splitlines(keepends=True)
            log.write_text("".join(x for x in lines if json.loads(x)["epoch"] < state["epoch"]))
    return state["epoch"]


if __name__ == "__main__":
    utils.run_script(main)
