"""The checks of `gpu.py`: is what this device computes right? Each part returns rows with a bound beside the value.

Each part takes the device and whether to be tiny: small enough for a CPU, by the same code.
"""

import contextlib
import io
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from measure import CPU, Outcome
from random_jpegs import write_class
from steps import TrainingStep, random_views
from torch import Tensor

import eval_knn
import eval_linear
import main_cplearn
from cplearn import checkpoints
from cplearn.data import color
from cplearn.distributed import launch
from cplearn.errors import UserError, leave_group
from cplearn.host import ROOT
from cplearn.loss import DICTIONARIES
from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import streamed_loss
from cplearn.methods import METHODS
from cplearn.training import memory
from cplearn_head import CPLearnHead, cplearn_loss

COLUMNS = ("check", "found", "bound", "within", "")
# The relative error of rounding once: to float32 and bf16 to nearest; tensor cores cut TF32 off.
ROUNDING = {"ieee": 2.0**-24, "tf32": 2.0**-10, "bf16": 2.0**-9}


class Check(NamedTuple):
    """A number and the most that it may be; `right` is None where there was nothing to check."""

    what: str
    found: float
    bound: float
    note: str = ""

    @property
    def right(self) -> bool | None:
        return None if math.isnan(self.bound) else self.found <= self.bound  # NaN is not right

    def row(self) -> tuple[str, ...]:
        if self.right is None:
            return self.what, "", "", "", self.note
        return self.what, f"{self.found:.2g}", f"{self.bound:.2g}", "yes" if self.right else "NO", self.note

    def cell(self) -> dict:
        numbers = {k: x if math.isfinite(x) else None for k, x in (("found", self.found), ("bound", self.bound))}
        return {"what": self.what, **numbers, "note": self.note, "right": self.right}


def outcome(checks: list[Check]) -> Outcome:
    """Return checks as a part's outcome."""
    tried = [check for check in checks if check.right is not None]
    wrong = [check for check in tried if not check.right]
    says = f"{len(tried) - len(wrong)} of {len(tried)} within their bounds"
    if len(tried) < len(checks):
        says += f", {len(checks) - len(tried)} not tried"
    misses = [f"{x.what}: {x.found:.2g}, bound {x.bound:.2g} {x.note}".strip() for x in wrong]
    return Outcome(COLUMNS, [x.row() for x in checks], [x.cell() for x in checks], says, misses)


def left_out(what: str, why: str) -> Check:
    return Check(what, math.nan, math.nan, why)


def yes(what: str, holds: bool, note: str = "") -> Check:
    """Return a check of something that holds or not: found counts what went wrong."""
    return Check(what, float(not holds), 0.0, note)


def kernels(device: torch.device, tiny: bool) -> list[Check]:
    """The tests that are marked `gpu`, of Triton's kernels at full size."""
    if device.type == "cpu":
        return [left_out("the tests marked gpu", "no GPU")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/loss", "tests/data", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [yes("the tests marked gpu", done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1])]


# --- the loss ----------------------------------------------------------------------------------------------

LOSS_FORMS = (("plain", "ieee"), ("stored", "ieee"), ("stored", "tf32"), ("recomputed", "ieee"), ("recomputed", "tf32"),
              ("triton", "ieee"), ("triton", "tf32"), ("triton", "bf16"))  # fmt: skip


class Case(NamedTuple):
    """Embeddings, with the logit scale in them, and a dictionary."""

    name: str
    dictionary: Dictionary
    h: list[Tensor]  # on the CPU
    spec: LossSpec


def loss_cases(tiny: bool) -> Iterator[Case]:
    """Yield cases: both dictionaries and priors, 2 and 2 + 8 views, sizes that no block divides, saturated logits."""
    sizes = [(2, 64, 384, 16384), (2, 37, 100, 1003), (10, 20, 384, 5003), (2, 64, 2048, 4096)]
    if tiny:
        sizes = [(2, 5, 20, 203), (4, 3, 32, 100)]
    generator = torch.Generator().manual_seed(0)
    for views, n, f, c in sizes:
        for kind, prior in (("rademacher", "reverse"), ("rademacher", "forward"), ("hadamard", "reverse")):
            head = CPLearnHead(8, c, f, dictionary=kind)
            h = [F.normalize(torch.randn(n, f, generator=generator)) * head.scale * head.kappa for _ in range(views)]
            yield Case(f"{views} x {n} x {f} x {c}, {kind}, {prior}", head.dictionary, h, LossSpec(0.25, prior=prior))
    for prior in ("reverse", "forward"):  # p and p-bar underflow in float32
        dictionary = DICTIONARIES["rademacher"](200, 32, seed=1)
        codes = 150 / 32 * dictionary.codes()[:7]
        yield Case(f"logits of +-150, {prior}", dictionary, [codes, -codes], LossSpec(0.25, prior=prior))


def loss_forms(device: torch.device, tiny: bool) -> list[Check]:
    """Loss and gradient of every form against the definition in float64 on the CPU."""
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    worst: dict[str, Check] = {}
    for case in loss_cases(tiny):
        exact = _loss_and_gradient(case, CPU, "plain", "ieee", torch.float64)
        length, depth = max(x.norm(dim=1).max().item() for x in case.h), _largest_log_p(case)
        for form, precision in LOSS_FORMS:
            what = f"{form}, {precision}{', logits of +-150' * (length > 10)}"
            try:  # also: no bf16 products in Triton's interpreter
                values = _loss_and_gradient(case, device, form, precision, torch.float32)
            except UserError as error:
                worst[what] = left_out(what, str(error))
                continue
            # A logit is a sum of f_h terms of either sign: rounding each moves it by about `rounding * length`; log p
            # is kept in float32; the gradient is off in proportion. The 8 is for a largest of many, and what sums add.
            bound = 8 * (ROUNDING[precision] * (1 + length) + ROUNDING["ieee"] * depth)
            check = Check(what, max(map(_relative_error, values, exact)), bound, f"farthest at {case.name}")
            before = worst.get(what)
            if before is None or not check.found / check.bound <= before.found / before.bound:
                worst[what] = check
    return list(worst.values())


def _loss_and_gradient(case: Case, device: torch.device, form: str, precision: str, dtype) -> list[Tensor]:
    h = [x.to(device, dtype).requires_grad_() for x in case.h]
    dictionary = case.dictionary.to(device)
    if form == "plain":
        codes = dictionary.codes(dtype=dtype)
        loss = cplearn_loss([x @ codes.T for x in h], case.spec)[0]
    else:
        loss = streamed_loss(h, dictionary, 1.0, case.spec, form=form, precision=precision)[0]
    return [loss.detach(), torch.stack(torch.autograd.grad(loss, h))]


def _largest_log_p(case: Case) -> float:
    codes = case.dictionary.codes()
    return max(F.log_softmax(x @ codes.T, dim=1).abs().max().item() for x in case.h)


def _relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return ((value.cpu().double() - exact).abs().max() / exact.abs().max()).item()


# --- colors ------------------------------------------------------------------------------------------------


def color_transforms(device: torch.device, tiny: bool) -> list[Check]:
    """Each color transform alone and all at once, beside the same on the CPU; of normalized pixels, about -2 to 2.6."""
    n, size = (6, 24) if tiny else (32, 224)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "order": -1.0, "gray": 0.0,
               "sigma": 0.0, "solarize": 0.0, "noise_seed": -1.0}  # fmt: skip
    draws = torch.rand(n, generator=generator)
    ranges = {"brightness": 0.6 + 0.8 * draws, "contrast": 0.6 + 0.8 * draws, "saturation": 0.8 + 0.4 * draws,
              "hue": 0.2 * draws - 0.1, "gray": (draws < 0.5).float(), "sigma": 0.1 + 1.9 * draws,
              "solarize": (draws > 0.5).float()}  # fmt: skip
    orders = torch.arange(n) % len(color.ORDERS)
    checks = []
    for name in (*ranges, "all", "noise"):
        params = {k: torch.full((n,), v, dtype=torch.float64) for k, v in neutral.items()}
        params |= {k: v.double() for k, v in ranges.items() if name in (k, "all")}
        if name in ("brightness", "contrast", "saturation", "hue", "all"):
            params["order"] = orders.double()
        noise = 0.05 * (name == "noise")
        if noise:
            params["noise_seed"] = torch.arange(n).double()
        here, there = color.color(pixels, params, noise), color.color(pixels.to(device), params, noise).cpu()
        apart, note = (here - there).abs(), ""
        if name in ("solarize", "all"):
            flipped = apart > 1e-3
            apart, note = apart[~flipped], "of pixels on the same side of the threshold"
            checks.append(Check(f"{name}: share on another side", flipped.float().mean().item(), 1e-4))
        checks.append(Check(name, apart.max().item(), 2e-4 if name in ("hue", "all") else 2e-5, note))
    return checks


# --- a step ------------------------------------------------------------------------------------------------


def one_step(device: torch.device, tiny: bool) -> list[Check]:
    """The gradient of all weights after one step, by precision, against float64 on the CPU."""
    vit = ["--arch", "vit_small", "--batch_size_per_gpu", "8", "--local_crops_number", "2", "--out_dim", "16384"]
    resnet = ["--arch", "resnet8", "--image_size", "32", "--batch_size_per_gpu", "64", "--out_dim", "1024"]
    if tiny:
        vit = ["--arch", "timm:test_vit", "--image_size", "32", "--batch_size_per_gpu", "8", "--out_dim", "512",
               "--local_crops_number", "2", "--local_image_size", "16"]  # fmt: skip
        resnet = ["--arch", "resnet8_w8", "--image_size", "16", "--batch_size_per_gpu", "8", "--out_dim", "64"]
    return network_checks([*vit, "--drop_path_rate", "0"], device) + network_checks(resnet, device)


def network_checks(flags: list[str], device: torch.device) -> list[Check]:
    """Return the checks of one network's gradient."""
    images, arch = random_views(main_cplearn.parse_args(flags), CPU), flags[1]
    exact = gradient(flags, CPU, images, double=True)

    def off(where: torch.device, *more: str, tf32: bool = False) -> float:
        return distance(gradient([*flags, *more], where, images, tf32=tf32), exact)

    here = off(CPU)
    checks = [Check(f"{arch}, fp32", off(device), max(20 * here, 1e-5), f"this CPU's own fp32: {here:.1e}")]
    if device.type == "cuda":
        checks.append(Check(f"{arch}, fp32, convolutions in TF32 (torch's default)", off(device, tf32=True), 0.02))
    # Weights, activations and gradients of all layers are rounded: by eight times as much in bf16.
    if device.type == "cpu" or torch.cuda.is_bf16_supported(False):
        checks.append(Check(f"{arch}, bf16", off(device, "--precision", "bf16"), 0.4))
    else:
        checks.append(left_out(f"{arch}, bf16", "this card has no bf16"))
    return [*checks, Check(f"{arch}, fp16", off(device, "--precision", "fp16"), 0.05)]


def gradient(
    flags: list[str], device: torch.device, images: list[Tensor], *, double: bool = False, tf32: bool = False
) -> Tensor:
    """Return the gradient of all weights in one vector, on the CPU in float64. Weights are the same on every device."""
    torch.backends.cudnn.allow_tf32 = tf32
    step = TrainingStep([*flags, "--compile", "false"], device, [x.to(device) for x in images])
    if double:
        step.method.double()
        step.images = [x.double() for x in images]
    for scale in 2.0 ** torch.arange(16, -2, -2) if step.precision == "fp16" else (1.0,):  # until nothing overflows
        step.scaler = torch.amp.GradScaler(device.type, init_scale=float(scale))
        step.gradients()
        grads = [p.grad for p in step.method.parameters() if p.grad is not None]
        vector = torch.cat([g.detach().cpu().double().flatten() / float(scale) for g in grads])
        if vector.isfinite().all():
            break
    return vector


def distance(vector: Tensor, exact: Tensor) -> float:
    """Return the length of the difference relative to that of `exact`."""
    return ((vector - exact).norm() / exact.norm()).item()


# --- runs --------------------------------------------------------------------------------------------------


def run_flags(device: torch.device, tiny: bool) -> list[str]:
    """Return the flags of a short run on the bundled digits."""
    network = ["--arch", "vit_tiny", "--patch_size", "8", "--image_size", "32", "--batch_size_per_gpu", "64"]
    if tiny:
        network = ["--arch", "resnet8_w16", "--image_size", "16", "--batch_size_per_gpu", "16"]
    return [*network, "--out_dim", "512", "--epochs", "40", "--warmup_epochs", "1", "--saveckp_freq", "0",
            "--num_workers", "0", "--device", device.type]  # fmt: skip


def train(flags: list[str], out: str | Path) -> dict:
    """Train in this process, without its words. Returns the last record of the log."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main_cplearn.main([*flags, "--output_dir", str(out)])


def overflow(device: torch.device, tiny: bool) -> list[Check]:
    """fp16 with gradients that overflow at first: steps are skipped and counted, the scale falls, the run goes on."""
    scaler = torch.amp.GradScaler
    too_large = mock.patch.object(
        torch.amp, "GradScaler", lambda x, init_scale: scaler(x, init_scale=2**12 * init_scale)
    )
    with tempfile.TemporaryDirectory() as folder, too_large:
        record = train([*run_flags(device, tiny), "--precision", "fp16", "--max_steps", "40",
                        "--max_skipped_steps", "40"], folder)  # fmt: skip
        state = checkpoints.load(Path(folder) / "checkpoint.pth")
        finite = all(x.isfinite().all() for x in state["model"].values() if isinstance(x, Tensor))
    lines = f"{record['skipped_steps']} of 40 steps skipped"
    return [
        yes("steps are skipped, and counted in the log", 1 <= record["skipped_steps"] < 30, lines),
        yes("the loss is finite in the end", math.isfinite(record["train_loss"]), f"{record['train_loss']:.3f}"),
        yes("all weights are finite", finite),
    ]


def resuming(device: torch.device, tiny: bool) -> list[Check]:
    """A run that is stopped and goes on, against one that is not, and that against itself."""
    flags = run_flags(device, tiny)
    with tempfile.TemporaryDirectory() as folder:
        for name, pieces in (("once", ("24",)), ("again", ("24",)), ("stopped", ("11", "24"))):
            for piece in pieces:
                train([*flags, "--max_steps", piece], Path(folder, name))
        once, again, stopped = (_weights(Path(folder, name)) for name in ("once", "again", "stopped"))
    chance, apart = distance(again, once), distance(stopped, once)
    note = "to the same bits" if torch.equal(stopped, once) else f"two runs without a stop: {chance:.1e} apart"
    # What two runs of the same command differ by (atomic sums on GPUs) grows from step to step.
    return [
        Check("weights after a stop and a resume", apart, 0.0 if device.type == "cpu" else 10 * chance + 1e-5, note)
    ]


def _weights(folder: Path) -> Tensor:
    model = checkpoints.load(folder / "checkpoint.pth")["model"]
    return torch.cat([x.double().flatten() for x in model.values() if isinstance(x, Tensor) and x.is_floating_point()])


def real_steps(device: torch.device, tiny: bool) -> list[Check]:
    """Steps on JPEG files with workers and pinned memory: the host never waits for the device; memory as forecast."""
    flags = ["--batch_size_per_gpu", "64", "--out_dim", "131072"]
    if tiny:
        flags = ["--arch", "resnet8_w8", "--image_size", "32", "--batch_size_per_gpu", "4", "--out_dim", "64"]
    batch, steps, schedules, last = int(flags[flags.index("--batch_size_per_gpu") + 1]), 4 if tiny else 20, [], []

    def at_start_of_step(*given):
        if len(schedules) == 2 and device.type == "cuda":  # what happens once is over
            torch.cuda.set_sync_debug_mode("error")
        schedules.append(given)
        return set_schedules(*given)

    def after_the_last(run):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        last.append(run)
        return count_last(run)

    set_schedules, count_last = main_cplearn.set_schedules, main_cplearn.count_last
    patched = (mock.patch.object(main_cplearn, "set_schedules", at_start_of_step),
               mock.patch.object(main_cplearn, "count_last", after_the_last))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, patched[0], patched[1]:
        photos = Path(folder, "photos", "class")
        write_class(photos, 0, batch, (60, 45) if tiny else (500, 375))
        for i, photo in enumerate(sorted(photos.iterdir()) * (steps + 1)):
            os.link(photo, photos / f"again_{i:05}.jpg")
        record = train([*flags, "--data_path", str(photos.parent), "--num_workers", "2", "--max_steps", str(steps),
                        "--print_freq", "1000", "--saveckp_minutes", "0", "--device", device.type], folder)  # fmt: skip
    peak, forecast = memory.peak_memory(device), last[0].memory.total
    note = f"{forecast / 1e9:.1f} GB forecast, {peak / 1e9:.1f} GB seen"
    ratio = max(peak / forecast, forecast / peak)
    return [
        yes(f"{steps} finite steps without a wait", len(schedules) == steps and math.isfinite(record["train_loss"])),
        left_out("memory", note) if tiny else Check("memory against its forecast, times", ratio, 1.5, note),
    ]


def all_methods(device: torch.device, tiny: bool) -> list[Check]:
    """Twenty steps of every method, and a k-NN evaluation of its checkpoint; the digits have ten classes."""
    checks, steps = [], "5" if tiny else "20"
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            more = ["--sgld_buffer", "64"] if method == "gedi_gen" else []
            out = Path(folder, method)
            record = train([*run_flags(device, tiny), "--method", method, "--max_steps", steps, *more], out)
            with contextlib.redirect_stdout(io.StringIO()):
                metrics = eval_knn.main(["--pretrained_weights", str(out / "checkpoint.pth"), "--output_dir", str(out),
                                       "--num_workers", "0", "--nb_knn", "20", "--device", device.type])  # fmt: skip
            accuracy, healthy = (
                metrics["knn20_top1"],
                math.isfinite(record["train_loss"]) and not record["skipped_steps"],
            )
            note = f"loss {record['train_loss']:.3f}, 20-NN {accuracy:.3f} (chance 0.1)"
            checks.append(
                yes(f"{method}: {steps} finite steps, then k-NN above chance", healthy and accuracy > 0.2, note)
            )
        with contextlib.redirect_stdout(io.StringIO()):
            out = Path(folder, "cplearn")
            weights = ["--pretrained_weights", str(out / "checkpoint.pth"), "--output_dir", str(out)]
            quick = ["--augment", "false", "--epochs", "20", "--num_workers", "0", "--device", device.type]
            metrics = eval_linear.main([*weights, *quick])
        checks.append(yes("linear probe above chance", metrics["linear_last_top1"] > 0.2))
    return checks


# --- processes ---------------------------------------------------------------------------------------------


def processes(device: torch.device, tiny: bool) -> list[Check]:
    """Two processes: gradients as of one, and what happens when one of them dies, freezes or shares its GPU."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    checks = []
    if device.type == "cuda":
        checks.append(_refused("two processes on one GPU", {"CUDA_VISIBLE_DEVICES": "0"}))
        checks.append(_refused("two ranks with the same LOCAL_RANK", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}))
    if device.type == "cuda" and gpus < 2:
        return [*checks, left_out("gradients of two processes; one killed; one frozen", "needs two GPUs")]
    checks.append(_two_process_gradient(device, tiny))
    # A frozen rank is found after --peer_timeout; torchrun then gives it 30 s to end.
    for name, number, limit in (("killed", signal.SIGKILL, 45), ("frozen", signal.SIGSTOP, 120)):
        with tempfile.TemporaryDirectory() as folder:
            checks.append(_end_of_the_other(device, tiny, Path(folder), name, number, limit))
    return checks


def _ranks() -> list[dict[str, str]]:
    """Return the environment of two ranks that meet at a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def _refused(what: str, environment: dict[str, str]) -> Check:
    """Start two ranks of a run that must refuse to begin, with exit code 2."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "main_cplearn.py"), "--device", "cuda", "--dist_timeout", "0.5",
                   "--output_dir", folder]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks = [subprocess.Popen(command, env=os.environ | x | environment, **pipes) for x in _ranks()]
        printed = "".join(rank.communicate(timeout=60)[0] for rank in ranks).strip()
    note = (printed.splitlines() or [""])[-1][:100]
    return yes(f"{what}: refused", all(rank.returncode == 2 for rank in ranks), note)


def _two_process_gradient(device: torch.device, tiny: bool) -> Check:
    """Compare the gradient of two processes with half of the images each to that of one with all of them."""
    network = ["--arch", "vit_tiny", "--patch_size", "8", "--image_size", "32"] if tiny else ["--arch", "vit_small"]
    flags = [*network, "--drop_path_rate", "0", "--local_crops_number", "0", "--out_dim", "1024"]
    images = random_views(main_cplearn.parse_args([*flags, "--batch_size_per_gpu", "8"]), CPU)
    alone = gradient([*flags, "--batch_size_per_gpu", "8"], device, images)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ([*flags, "--batch_size_per_gpu", "4"], device.type, _ranks(), images, folder)
        mp.start_processes(_gradient_of_rank, arguments, nprocs=2, start_method="spawn")
        both = torch.load(f"{folder}/gradient", weights_only=True)
    return Check("gradient of two processes against one", distance(both, alone), 1e-4)


def _gradient_of_rank(rank: int, flags: list[str], device: str, ranks: list[dict], images: list[Tensor], folder: str):
    os.environ.update(ranks[rank])
    place = launch.init("env://", device)
    vector = gradient(flags, place, [x[4 * rank : 4 * rank + 4] for x in images])
    if rank == 0:
        torch.save(vector, f"{folder}/gradient")
    leave_group()


@contextlib.contextmanager
def _torchrun(flags: list[str], processes: int, folder: Path) -> Iterator[subprocess.Popen]:
    """Run main_cplearn.py under torchrun; at the end nothing of it is left. Its words go to FOLDER/output.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / "main_cplearn.py"), *flags, "--output_dir", str(folder)]  # fmt: skip
    with open(folder / "output.txt", "ab") as file:
        run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield run
    finally:
        for pid in _children_of(run.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def all_ranks(device: torch.device, tiny: bool) -> list[Check]:
    """All GPUs together, as a run stands and compiled: stopped by SIGTERM, the same command takes it to its end."""
    processes = torch.cuda.device_count() if device.type == "cuda" else 2
    checks = []
    for compiled in ("false", "true") if device.type == "cuda" else ("false",):
        flags = [*run_flags(device, tiny), "--epochs", "100000", "--print_freq", "1", "--saveckp_minutes", "0.02",
                 "--compile", compiled]  # fmt: skip
        what = f"{processes} processes{', compiled' * (compiled == 'true')}"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            with _torchrun(flags, processes, folder) as run:
                _wait(lambda: (folder / "checkpoint.pth").exists() or run.poll() is not None, 240)  # noqa: B023
                run.terminate()
                _wait(lambda: run.poll() is not None, 60)  # noqa: B023
                ended = run.poll() is not None
            checks.append(yes(f"{what}: end by SIGTERM", ended and (folder / "checkpoint.pth").exists()))
            if not checks[-1].right:
                return [*checks, yes("words", False, (folder / "output.txt").read_text()[-200:])]
            step = checkpoints.load(folder / "checkpoint.pth")["step"]
            with _torchrun([*flags, "--max_steps", str(step + 20)], processes, folder) as run:
                _wait(lambda: run.poll() is not None, 240)  # noqa: B023
            reached = checkpoints.load(folder / "checkpoint.pth")["step"]
            checks.append(yes(f"{what}: go on to the end", run.returncode == 0 and reached == step + 20,
                              f"from step {step} to {reached}"))  # fmt: skip
    return checks


def _end_of_the_other(device: torch.device, tiny: bool, folder: Path, name: str, number: int, limit: float) -> Check:
    """Return how long a run under torchrun takes to end after one of its two ranks was killed or frozen."""
    patience = "0.2" if device.type == "cpu" else "0.5"  # minutes: NCCL takes some time to begin
    flags = [*run_flags(device, tiny), "--epochs", "100000", "--print_freq", "1", "--saveckp_minutes", "0.02",
             "--peer_timeout", patience]  # fmt: skip
    with _torchrun(flags, 2, folder) as run:
        _wait(lambda: (folder / "checkpoint_previous.pth").exists() or run.poll() is not None, 120)
        ranks = _children_of(run.pid)
        if len(ranks) != 2:
            words = (folder / "output.txt").read_text()[-200:]
            return yes(f"rank 1 {name}", False, f"the run did not begin: {words!r}")
        os.kill(ranks[1], number)
        start = time.monotonic()
        _wait(lambda: run.poll() is not None, limit)
        ended, took = run.poll() is not None, time.monotonic() - start
    whole = checkpoints.load(folder / "checkpoint.pth")["step"] > 0 if ended else False
    note = f"the run {'ended' if ended else 'had not ended'} {took:.1f} s later, its checkpoint is whole"
    return Check(f"rank 1 {name}: seconds until all have ended", took if ended and whole else math.inf, limit, note)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def _children_of(pid: int) -> list[int]:
    """Return the processes that `pid` has started, oldest first."""
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return sorted(map(int, pids))


PARTS = {
    "kernels": kernels,
    "loss": loss_forms,
    "colors": color_transforms,
    "step": one_step,
    "overflow": overflow,
    "resume": resuming,
    "real": real_steps,
    "ranks": all_ranks,
    "methods": all_methods,
    "processes": processes,
}
