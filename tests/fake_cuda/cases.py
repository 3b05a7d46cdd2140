"""Every step on a GPU that is not there (device.py), counted: python cases.py [CASE ...] prints JSON for each.

A case is `main_cplearn.train_one_epoch` itself with some flags, from the loader's views to the votes, or what
evaluations do on the device.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from device import CUDA, Counts, Device, device

import cplearn_head
import eval_linear
import main_cplearn
from cplearn.data import color
from cplearn.data.pixels import Pixels
from cplearn.features import extract, splits
from cplearn.load import Model
from cplearn.loss import codes, hadamard
from cplearn.probe.probe import Probe
from cplearn.training.run import Run, assemble

STEPS = 3  # the second to the third is counted: what is made once is there by then
SMALL = ["--dataset", "digits", "--batch_size_per_gpu", "8", "--num_workers", "0", "--device", "cuda", "--print_freq",
         "1000", "--precision", "bf16", "--out_dim", "512", "--image_size", "32", "--epochs", "2"]  # fmt: skip
VIT = [*SMALL, "--arch", "vit_tiny", "--patch_size", "8", "--local_image_size", "16", "--local_crops_number", "2"]
RESNET = [*SMALL, "--arch", "resnet8_w16"]
VIEWS = [*RESNET, "--local_image_size", "16", "--local_crops_number", "2"]
FULL = ["--arch", "vit_small", "--augmentation", "dino", "--image_size", "224", "--patch_size", "16",
        "--local_image_size", "96", "--local_crops_number", "8", "--out_dim", "131072"]  # fmt: skip
TRAININGS = {
    "ViT-S 2 + 8, 224 pixels, c = 131072": [*SMALL, *FULL],
    "ResNet-8, 32 pixels": [*SMALL, "--arch", "resnet8", "--augmentation", "cifar_strong"],
    "ResNet-18, 32 pixels": [*SMALL, "--arch", "resnet18", "--augmentation", "cifar_strong"],
    "ViT-Ti 2 + 2, 32 pixels": VIT,
    "cplearn": VIEWS,
    "cplearn, fp16": [*VIEWS, "--precision", "fp16"],
    "cplearn, fp32": [*VIEWS, "--precision", "fp32"],
    "cplearn, accum 2": [*VIEWS, "--accum", "2"],
    "cplearn, grad_checkpointing": [*VIT, "--grad_checkpointing"],
    "cplearn, Hadamard codes": [*VIEWS, "--dictionary", "hadamard"],
    "cplearn, plain": [*VIEWS, "--loss_form", "plain"],
    "cplearn, stored": [*VIEWS, "--loss_form", "stored"],
    "cplearn, recomputed": [*VIEWS, "--loss_form", "recomputed"],
    "cplearn, forward prior": [*VIEWS, "--prior", "forward"],
    "cplearn, prior buffer": [*VIEWS, "--prior_buffer", "3"],
    "cplearn, lars": [*VIEWS, "--optimizer", "lars"],
    "dino": [*VIEWS, "--method", "dino"],
    "swav": [*VIEWS, "--method", "swav", "--queue_length", "8", "--epoch_queue_starts", "0"],
    "barlow_twins": [*VIEWS, "--method", "barlow_twins"],
    "gedi": [*VIEWS, "--method", "gedi"],
    "gedi_gen": [*RESNET, "--method", "gedi_gen", "--sgld_buffer", "64", "--sgld_steps", "2"],
    "self_classifier": [*VIEWS, "--method", "self_classifier"],
}


def begin(flags: list[str], gpu: Device) -> Run:
    """Build a run as main_cplearn.py does."""
    args = main_cplearn.parse_args([*flags, "--output_dir", tempfile.mkdtemp()])
    args.compile = False  # kernels are counted as they stand in the code
    dataset, views = main_cplearn.find_images(args)
    run = assemble(args, Pixels(dataset, views), CUDA, None, SimpleNamespace(name=None))
    run.method.begin()
    run.method._queue_is_full = True  # SwAV's: until then it asks the device once a step
    return run


def training(flags: list[str], gpu: Device) -> Counts:
    """Count a step of `train_one_epoch`, from the end of one to the end of the next."""
    run = begin(flags, gpu)
    run.last_step, seen = STEPS, []
    with gpu.counting() as counts, mock.patch("main_cplearn.save"):
        run.profile = SimpleNamespace(step=lambda: seen.append(counts.copy()))
        main_cplearn.train_one_epoch(run)
    return seen[-1] - seen[-2]


def evaluating(flags: list[str], gpu: Device) -> Counts:
    """Count extraction with the head: features, embeddings, codes and certainty of a batch."""
    run = begin(flags, gpu)
    method, args = run.method.eval().requires_grad_(False), run.args
    model = Model(method.backbone, args.arch, args.patch_size, args.image_size, "digits", None, None, None, "none",
                  "none", False, method=method, method_name=args.method)  # fmt: skip
    job = extract.Extraction(model, CUDA, "cls", False, head=True)
    pixels = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    with gpu.counting() as counts:
        before = counts.copy()
        job.run(pixels)
        with torch.inference_mode():
            x = color.network_input(pixels, CUDA)
            method.certainty(splits.backbone_features(method.backbone, x))
    return counts - before


def probing(flags: list[str], gpu: Device) -> Counts:
    """Count the monitor's probe before training, the usage of codes in it, and after an epoch."""
    Probe.MOST = Probe.LEAST  # images: as many batches as a run without --knn_freq has
    run = begin([*flags, "--knn_freq", "1"], gpu)
    with gpu.counting() as counts:
        before = counts.copy()
        run.monitor.begin(run.method, CUDA, 64)
        record = {"epoch": 1, **{name: 1.0 for name in ("loss", "uniform", "aligned", "entropy")}}
        run.monitor.end_epoch(run.method, CUDA, 64, record, sound=True)
    return counts - before


def linear(flags: list[str], gpu: Device) -> Counts:
    """Count the steps of an epoch of the linear probe on kept features."""
    args = eval_linear.get_args_parser().parse_args(["--augment", "false", "--batch_size_per_gpu", "64"])
    args.lr, args.standardise = 0.01, True
    data = SimpleNamespace(features=torch.randn(128, 8), labels=torch.arange(128) % 10)
    probe = eval_linear.Probe(8, 10, args, CUDA)
    with gpu.counting() as counts, mock.patch("cplearn.checkpoints.save"):
        before = counts.copy()
        eval_linear.train_probe(probe, 1, eval_linear.cached_batches(args, data, CUDA), data, CUDA, Path(os.devnull))
    return counts - before


def from_a_file(flags: list[str], gpu: Device) -> Counts:
    """Count a step after weights and optimizer came from a file, whose tensors are on the CPU."""
    run = begin(flags, gpu)
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(p.shape), "exp_avg_sq": torch.zeros(p.shape)}
            run.optimizer.state[p] = state
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    return training(flags, gpu)


def with_an_item(flags: list[str], gpu: Device) -> Counts:
    """A mutation: the votes read the loss."""
    vote = main_cplearn.vote
    with mock.patch("main_cplearn.vote", lambda run, loss, failures: (loss.item(), vote(run, loss, failures))[1]):
        return training(flags, gpu)


def with_a_tensor_of_the_host(flags: list[str], gpu: Device) -> Counts:
    """A mutation: the prior has a tensor that was made on the CPU."""
    reverse = cplearn_head.PRIORS["reverse"]
    with mock.patch.dict(cplearn_head.PRIORS, reverse=lambda log_mean: reverse(log_mean) * torch.ones(1)):
        return training([*flags, "--loss_form", "plain"], gpu)


OTHERS: dict[str, tuple[Callable, list[str]]] = {
    "features, codes and certainty": (evaluating, VIT),
    "the probe": (probing, VIT),
    "the linear probe": (linear, []),
    "a state from a file": (from_a_file, VIEWS),
    "mutation: .item() in the votes": (with_an_item, VIEWS),
    "mutation: a tensor of the host": (with_a_tensor_of_the_host, VIEWS),
}
CASES = {name: (training, flags) for name, flags in TRAININGS.items()} | OTHERS


def count(name: str) -> dict:
    """Return what a case comes to: kernels, copies, waits, megabytes, or its error."""
    for kept in (codes._byte_table, hadamard._factors_on, color._normalization):
        kept.cache_clear()
    function, flags = CASES[name]
    with device() as gpu:
        try:
            counts = function(flags, gpu)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300], "trace": traceback.format_exc()[-3000:]}
    return {"kernels": counts.kernels.total(), "copies": counts.copies, "waits": counts.waits,
            "megabytes": round(counts.bytes / 1e6), "most": counts.kernels.most_common(8)}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or CASES:
        print("CASE " + json.dumps({"name": name, **count(name)}), flush=True)
