"""What a run says and keeps of itself: at start-up, while an epoch runs, after it."""

import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from cplearn.backbones import is_vit
from cplearn.data import datasets
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.files import append_json_line, write_text
from cplearn.host import busy_cores, cores_of_process, git_commit
from cplearn.methods.base import StepOutput
from cplearn.precision import slow_precision
from cplearn.probe import verdict
from cplearn.text import format_duration
from cplearn.training.memory import peak_memory
from cplearn.training.meters import Progress
from cplearn.training.optimizer import actual_lr
from cplearn.training.run import Run

TIMED_STEPS = 12  # after which a run says how long it will take, by the second half of them: the first are slower
SLOW_EPOCH = 3600  # seconds, above which other settings are recommended for a CPU


def announce(run: Run, lines: list[str], defaults: dict) -> None:
    """Print processes, flags that are not the `defaults`, derived values and warnings; write args.json."""
    images, side = run.images, run.images.halved_from()
    lines = [
        *lines,
        f"Data: {datasets.summary(images.dataset)}",
        f"  {images.summary()}" + f", from {side} x {side} pixels on at 1/2, 1/4 or 1/8 of their size" * bool(side),
        f"{'GPU memory' if run.device.type == 'cuda' else 'Memory'}: about {run.memory}",
    ]
    print("\n".join(lines))
    args, method, device = run.args, run.method, run.device
    derived = {
        "processes": collectives.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "effective_batch": args.batch_size_per_gpu * collectives.world_size(),
        "actual_lr": actual_lr(args),
        "train_images": len(run.images.dataset),
        "steps_per_epoch": run.steps_per_epoch,
        "backbone_parameters": sum(p.numel() for p in method.backbone.parameters()),
        "expected_memory_gb": run.memory.total / 1e9,
        "trained_parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        **method.describe(args.batch_size_per_gpu),
        "torch": torch.__version__,
        "commit": git_commit(),
    }
    if args.data_path is None and args.dataset == "digits":
        print(
            "WARNING: no --data_path, so this trains on the handwritten digits bundled with scikit-learn. "
            "For your own images: --data_path FOLDER"
        )
    print(f"Flags that are not as by default (all: args.json): {' '.join(changed_flags(vars(args), defaults))}")
    for name, value in derived.items():
        print(f"  {name}: {value:.6g}" if isinstance(value, float) else f"  {name}: {value}")
    warnings = method.warnings()
    if device.type == "cpu" and is_vit(args.arch) and args.image_size >= 128 and args.data_path:
        size = f"{args.image_size} x {args.image_size} pixels"
        warnings.append(f"{args.arch} on views of {size} takes a CPU days; @recipes/laptop.txt takes minutes")
    if device.type == "cpu" and torch.get_num_threads() > 1 and (busy := busy_cores()) > 0.5:
        warnings.append(
            f"other programs keep {busy:.1f} cores busy, and threads of torch spin while they wait: if it stays so, "
            "OMP_NUM_THREADS=1 or GOMP_SPINCOUNT=1000 (which keeps every bit) is 2 to 3 times as fast"
        )
    if slow_precision(args.precision, device):
        warnings.append(f"this CPU only emulates {args.precision}: --precision fp32 is many times as fast")
    for warning in warnings:
        print(f"WARNING: {warning}")
    content = json.dumps({"args": vars(args), "derived": derived}, indent=1, sort_keys=True)
    if run.step < run.last_step:
        write_text(Path(args.output_dir, "args.json"), content + "\n")
    sys.stdout.flush()


def changed_flags(args: dict, defaults: dict) -> list[str]:
    """Return the flags whose values are not the defaults, as they are typed."""
    changed = {k: v for k, v in sorted(args.items()) if v not in (None, False, defaults.get(k))}
    words = {k: [str(x) for x in v] if isinstance(v, (list, tuple)) else [str(v)] for k, v in changed.items()}
    return [f"--{k} {shlex.join(v)}" for k, v in words.items()]


class EpochReport:
    """Records the steps of an epoch, or of what is left of one: averages, time, a progress bar."""

    def __init__(self, run: Run):
        self.run, self.first_step = run, run.step
        self.batch = run.args.batch_size_per_gpu * collectives.world_size()
        self.progress = Progress(run.step // run.steps_per_epoch, run.args.epochs, run.steps_per_epoch)
        self.seconds_before = run.epoch.seconds
        self.start = time.perf_counter() - self.seconds_before
        self.first_step_seconds = 0.0  # with all that happens once

    def step(self, output: StepOutput, grad_norm: Tensor, skipped: Tensor, samples: Tensor, lr: float) -> None:
        """Record a step of these samples. Nothing here waits for the device, except every --print_freq steps."""
        run, epoch = self.run, self.run.epoch
        terms = {**output.terms, "grad_norm": grad_norm}
        epoch.meter.add(terms, skipped)
        run.monitor.add(output.usage, self.batch, skipped)
        run.bad_steps.remember(run.step, samples, terms)
        before, epoch.seconds = epoch.seconds, time.perf_counter() - self.start
        if run.step == self.first_step:
            self.first_step_seconds = epoch.seconds - before
            self.half = 1, epoch.seconds  # steps and their seconds that do not count for the duration
        run.step += 1
        done = (run.step - 1) % run.steps_per_epoch + 1
        if done % run.args.print_freq == 0 or done == run.steps_per_epoch:
            values = epoch.meter.read() | run.monitor.usage.read()
            rate, wait = done * self.batch / epoch.seconds, epoch.waiting.seconds / epoch.seconds
            self.progress.show(done, values, lr, rate, wait)
        steps = run.step - self.first_step
        if not run.is_timed and (steps == TIMED_STEPS or done == run.steps_per_epoch):
            counted, seconds = steps - self.half[0], epoch.seconds - self.half[1]
            self._tell_duration(seconds / counted if counted else self.first_step_seconds)
        if steps == TIMED_STEPS // 2:
            self.half = steps, epoch.seconds

    def _tell_duration(self, seconds: float) -> None:
        """Say how long an epoch and all of them take, from the seconds per step."""
        run, epoch = self.run, seconds * self.run.steps_per_epoch
        run.is_timed = True
        if not collectives.is_main():
            return
        goal = f"{run.args.epochs} epochs" if run.args.max_steps is None else f"--max_steps {run.args.max_steps}"
        print(
            f"{seconds:.2g} s per step: an epoch takes about {format_duration(epoch)}, what is left of "
            f"{goal} {format_duration(seconds * (run.last_step - run.step))}\n"
            f"{peak_memory(run.device) / 1e9:.1f} GB of memory at most so far",
            flush=True,
        )
        if run.device.type == "cpu" and epoch > SLOW_EPOCH:
            print(
                "WARNING: that is long for a CPU. Smaller views and networks take minutes: --image_size 64 "
                "--arch resnet8bn_w64, or fewer --local_crops_number",
                flush=True,
            )

    def close(self) -> dict:
        """Return the log record of the epoch so far. Every rank must call it."""
        self.progress.close()
        run, epoch = self.run, self.run.epoch
        values = epoch.meter.average()
        references = run.method.references(run.args.batch_size_per_gpu)
        uniform, floor = references.uniform, references.floor
        steps = (run.step - 1) % run.steps_per_epoch + 1
        return {
            "epoch": (run.step - 1) // run.steps_per_epoch,
            "step": run.step,
            "steps": steps,
            **{f"train_{name}": value for name, value in values.items()},
            "loss_uniform": uniform,
            "loss_one_code": references.one_code if math.isfinite(references.one_code) else None,
            "loss_floor": floor,
            "loss_aligned": references.aligned,
            "out_dim": run.method.out_dim,
            "uniform_to_floor": (uniform - values["loss"]) / (uniform - floor) if uniform > floor else None,
            "skipped_steps": epoch.skipped,
            "replaced_images": epoch.replaced,
            "lr": run.optimizer.param_groups[0]["lr"],
            "weight_decay": run.optimizer.param_groups[0]["weight_decay"],
            "images_per_second": steps * self.batch / epoch.seconds,
            "data_wait": epoch.waiting.seconds / epoch.seconds,
            "seconds": epoch.seconds,
            "first_step_seconds": self.first_step_seconds,
        }


def reference_words(record: dict) -> str:
    """Return the losses that a record's own is read against, those that the method has."""
    named = {"uniform": "loss_uniform", "aligned": "loss_aligned", "bound": "loss_floor"}
    known = [f"{word} {record[name]:.4f}" for word, name in named.items() if record.get(name) is not None]
    return f"({', '.join(known)})"


def report_epoch(run: Run, record: dict) -> None:
    """Write one line on the terminal, one in log.txt, and the numbers wherever else they are asked for."""
    run.lock.check()
    args = run.args
    remaining = (run.last_step - record["step"]) * record["seconds"] / record["steps"]
    terms = (name for name in record if name.startswith("train_") and name != "train_loss")
    parts = [
        f"epoch {record['epoch'] + 1}/{args.epochs}",
        f"loss {record['train_loss']:.4f}",
        *(f"{name.removeprefix('train_')} {record[name]:.4f}" for name in terms),
        reference_words(record),
        f"lr {record['lr']:.3g}",
        f"{record['images_per_second']:.0f} img/s",
        f"wait {record['data_wait']:.0%}",
    ]
    if record["skipped_steps"]:
        parts.append(f"skipped {record['skipped_steps']} steps")
    if record["replaced_images"]:
        parts.append(f"replaced {record['replaced_images']} unreadable images")
    print("  ".join([*parts, f"ETA {format_duration(remaining)}"]), flush=True)
    ending = run.monitor.at_end(run.step) if run.step == run.last_step else {}
    if run.step == args.epochs * run.steps_per_epoch:  # one cut by --max_steps goes on: no line of its log may differ
        record |= ending
    if judged := record if "verdict" in record else ending:
        mark = "WARNING: " if judged["verdict"] in verdict.WARNINGS else ""
        since = run.monitor.since(record["epoch"] + 1)  # its numbers were said then
        print(f"  {mark}{judged['verdict'] + since if since else judged['verdict_line']}", flush=True)
    if "probe_knn20" in record:
        start = f" ({record['start_knn20']:.4f} before the first step)" if "start_knn20" in record else ""
        print(f"  20-NN among the probe's images: {record['probe_knn20']:.4f}{start}", flush=True)
    if advice := loader_advice(record["data_wait"], run.loader.num_workers, run.device, run.images):
        print(f"  WARNING: {advice}", flush=True)
    append_json_line(Path(args.output_dir, "log.txt"), record)
    run.writers.write(record)


LONG_WAIT = 0.2  # share of the time, above which waiting for images is worth a word


def loader_advice(wait: float, workers: int, device: torch.device, images: Pixels) -> str:
    """Return what would shorten the wait for images, "" if it is short or nothing would.

    `wait`: share of the time. With W workers that are always behind, W / (1 - wait) of them would keep up.
    """
    if wait <= LONG_WAIT:
        return ""
    cores = cores_of_process(collectives.local_world_size())
    needed = math.ceil((workers or wait) / max(0.01, 1 - wait))
    waited = f"{wait:.0%} of the time went into waiting for images"
    if device.type != "cpu" and needed <= cores:  # on a CPU the workers would take the step's own cores
        return f"{waited}: --num_workers {needed} would keep up (now {workers}, this process has {cores} cores)"
    if images.kind == "none":
        size = images.expected_bytes() / 1e9
        return f"{waited}: --cache disk decodes them once ({size:.1f} GB in --cache_dir), --cache ram if that fits"
    if device.type == "cpu":
        return ""
    return f"{waited}: {needed} cores for --num_workers would keep up, this process has {cores}; fewer local crops help"


def report_end(run: Run, record: dict) -> None:
    """Say that the run is at its end, and with which last steps."""
    folder = run.args.output_dir
    if run.bad_steps.in_a_row:
        print(f"WARNING: the last {run.bad_steps.in_a_row} steps were not finite and had to be left out")
    nothing = f"Nothing left to do in {folder}: step {run.step} is its last"
    best = run.monitor.best
    kept = f"; checkpoint_best.pth is of epoch {best['epoch']}, by {best['by']}" if best else ""
    print(f"Done: {folder}/checkpoint.pth{kept}" if record else nothing)
    if run.step == run.args.epochs * run.steps_per_epoch:
        print("Next:\n" + "\n".join(f"  {command}" for command in next_commands(run)))


def next_commands(run: Run) -> list[str]:
    """Return what to type after a run: evaluate it, look at it, take its features away."""
    folder, data_path = run.args.output_dir, run.args.data_path
    weights = f"--pretrained_weights {shlex.quote(f'{folder}/checkpoint.pth')}"
    commands = [f"python eval_knn.py {weights}"] if run.images.dataset.classes else []
    commands.append(f"python visualize_codes.py {weights}")
    if run.args.dataset == "folder" and data_path:
        out = shlex.quote(f"{folder}/features.npz")
        commands.append(f"python extract_features.py {weights} --images {shlex.quote(data_path)} --out {out}")
    return [*commands, f"python plot_runs.py {shlex.quote(folder)}"]
