"""TODO cplearn.training.report."""

import json
import os
import sys
from pathlib import Path

import torch

from cplearn.data import datasets
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.files import append_json_line, write_text
from cplearn.host import git_commit
from cplearn.text import format_duration
from cplearn.training.optimizer import actual_lr, expected_memory
from cplearn.training.run import Run

# --- what the run says and keeps ---------------------------------------------------------------------


def announce(run: Run, lines: list[str]) -> None:
    """Processes, effective arguments, derived values and warnings: printed, and saved as args.json."""
    print("\n".join([*lines, f"Data: {datasets.summary(run.dataset)}"]))
    args, method, device = run.args, run.method, run.device
    derived = {
        "processes": collectives.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "effective_batch": args.batch_size_per_gpu * collectives.world_size(),
        "actual_lr": actual_lr(args),
        "train_images": len(run.dataset),
        "steps_per_epoch": len(run.loader),
        "backbone_parameters": sum(p.numel() for p in method.backbone.parameters()),
        "expected_memory_gb": sum(expected_memory(method, args, len(run.views))) / 1e9,
        "trained_parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        **method.describe(args.batch_size_per_gpu),
        "torch": torch.__version__,
        "commit": git_commit(),
    }
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
    if run.step < run.last_step:
        write_text(Path(args.output_dir, "args.json"), content + "\n")
    sys.stdout.flush()


def report_epoch(run: Run, record: dict, writer) -> None:
    """One line on the terminal, one in log.txt, and TensorBoard if asked for."""
    args = run.args
    remaining = (run.last_step - record["step"]) * record["seconds"] / record["steps"]
    print(
        f"epoch {record['epoch'] + 1}/{args.epochs}  loss {record['train_loss']:.4f}  "
        + "  ".join(
            f"{k.removeprefix('train_')} {v:.4f}"
            for k, v in record.items()
            if k.startswith("train_") and k != "train_loss"
        )
        + f"  (uniform {record['loss_uniform']:.4f}, floor {record['loss_floor']:.4f}, {record['uniform_to_floor']:.0%} of the way)  lr {record['lr']:.3g}"
        + f"  {record['images_per_second']:.0f} img/s  wait {record['data_wait']:.0%}"
        + f"  skipped {record['skipped_steps']} steps" * (record["skipped_steps"] > 0)
        + f"  replaced {record['replaced_images']} unreadable images" * (record["replaced_images"] > 0)
        + f"  ETA {format_duration(remaining)}",
        flush=True,
    )
    if "verdict" in record:
        mark = "" if record["verdict"] == "healthy" else "WARNING: "
        print(f"  {mark}{record['verdict_line']}", flush=True)
    append_json_line(Path(args.output_dir, "log.txt"), record)
    if writer is not None:
        for name, value in record.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()


def tensorboard_writer(args, epoch: int):
    if not args.tensorboard or not collectives.is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(os.path.join(args.output_dir, "tensorboard"), purge_step=epoch)
