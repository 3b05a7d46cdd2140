"""The measurements of `gpu.py`: how fast is this device, and what is the step's time spent on?

Each part takes the device, whether to be tiny (small enough for a CPU: nothing is judged then), the cells of the parts
before it, and the time at which it has to end: what does not fit is left out and said so.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import loss as loss_benchmark
import torch
import torch.multiprocessing as mp
from measure import Outcome, peak_memory, seconds, start_memory, synchronize
from random_jpegs import write_class
from steps import TrainingStep, dino_step, flops_per_image, random_views

import main_cplearn
from cplearn.data import augmentations, loaders
from cplearn.data.pixels import Pixels
from cplearn.host import usable_cores
from cplearn.loss.streamed import pick_form
from cplearn.precision import tf32_products
from cplearn.training.profile import device_times, largest_costs

Cells = dict[str, list[dict]]

# What makers say of dense products in TFLOP/s (16-bit, TF32) and of memory in GB/s; the first name that fits counts.
NOMINAL = {
    "H200": (989, 495, 4800), "H100 PCIe": (756, 378, 2000), "H100": (989, 495, 3350),
    "A100-SXM4-80GB": (312, 156, 2039), "A100": (312, 156, 1555),
    "L40S": (362, 183, 864), "RTX 4090": (165, 83, 1008), "RTX 3090": (71, 36, 936),
    "V100": (125, None, 900),
}  # fmt: skip


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    function()
    return statistics.median(seconds(function, device) for _ in range(repeats))


# --- ceilings ----------------------------------------------------------------------------------------------


def ceilings(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """The fastest copy and products of this card, beside what its maker says."""
    size, numbers = (256, 2**20) if tiny else (8192, 2**29)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    nominal = next((v for k, v in NOMINAL.items() if all(word in name for word in k.split())), (None, None, None))
    x = torch.zeros(numbers // 4, device=device)
    y = torch.empty_like(x)
    rate = 2 * x.nbytes / median_seconds(partial(y.copy_, x), device, 10) / 1e9
    cells = [{"what": "copy", "unit": "GB/s", "found": rate, "nominal": nominal[2]}]
    kinds = {"bf16": (torch.bfloat16, nominal[0]), "fp16": (torch.float16, nominal[0]),
             "tf32": (torch.float32, nominal[1]), "ieee": (torch.float32, None)}  # fmt: skip
    for precision, (dtype, makers) in kinds.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with tf32_products(precision == "tf32"):
            rate = 2 * size**3 / median_seconds(lambda a=a, b=b: a @ b, device, 10) / 1e12
        cells.append({"what": f"product, {precision}", "unit": "TFLOP/s", "found": rate, "nominal": makers})
    rows, misses = [], []
    for x in cells:
        share = f"{x['found'] / x['nominal']:.0%}" if x["nominal"] else ""
        rows.append((x["what"], f"{x['found']:.3g} {x['unit']}", f"{x['nominal'] or ''}", share))
        if x["nominal"] and x["found"] < 0.5 * x["nominal"] and not tiny:
            misses.append(f"{x['what']}: {share} of the maker's {x['nominal']}: shared, throttled or partitioned?")
    says = ", ".join(f"{x['what']} {x['found']:.3g} {x['unit']}" for x in cells[:2])
    return Outcome(("ceiling", "found", "the maker says", "share"), rows, cells, says, misses)


def _ceiling(before: Cells, precision: str) -> float | None:
    """Return operations per second of a product, or None if ceilings were not measured."""
    found = {x["what"]: x["found"] for x in before.get("ceilings", [])}
    rate = found.get(f"product, {precision}")
    return rate and 1e12 * rate


# --- forms of the loss -------------------------------------------------------------------------------------


def loss_forms(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """Loss and gradient, two views: time, memory, share of the ceiling; and whether `auto` picks the fastest."""
    sizes = [(64, 384, 131072), (64, 384, 16384), (64, 384, 1048576), (512, 384, 131072), (64, 2048, 131072),
             (512, 384, 16384), (512, 2048, 16384), (64, 2048, 16384), (512, 2048, 131072), (64, 2048, 1048576),
             (512, 384, 1048576), (512, 2048, 1048576)]  # fmt: skip
    kinds = ("plain", *loss_benchmark.FORMS, "compiled")
    if tiny:
        sizes, kinds = [(8, 32, 1024)], ("plain", "stored", "recomputed", "hadamard")
    cells: list[dict] = []
    for k, (n, f, c) in enumerate(sizes):
        for kind in kinds:
            cell = {"n": n, "embed_dim": f, "out_dim": c, "kind": kind}
            limit = 4 if kind == "compiled" else len(sizes)  # compiling takes seconds for each size
            if time.time() > until or k >= limit:
                cells.append(cell | {"left_out": "no time left" if k < limit else "not compiled at this size"})
                continue
            try:
                cells.append(cell | loss_benchmark.measure(kind, n, f, c, device, repeats=3 if tiny else 7))
            except (RuntimeError, ValueError, ImportError) as error:  # out of memory, no compiler, no Triton
                cells.append(cell | {"left_out": _reason(error)})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    rows = [_loss_row(x, before) for x in cells]
    misses, kernels = [], 0
    for n, f, c in sizes:
        ms = {x["kind"]: x["ms"] for x in cells if (x["n"], x["embed_dim"], x["out_dim"]) == (n, f, c) and "ms" in x}
        for end in ("", "_tf32"):
            exact = {form + end: ms[form + end] for form in ("stored", "recomputed", "triton") if form + end in ms}
            picked = pick_form("auto", 2 * n, c) + end
            if picked in exact and not tiny:
                best = min(exact, key=exact.get)
                kernels += best.startswith("triton")
                if exact[picked] > 1.15 * exact[best]:
                    misses.append(f"auto picks {picked} ({exact[picked]:.2f} ms) at {n} x {f} x {c}; {best} takes "
                                  f"{exact[best]:.2f} ms")  # fmt: skip
    timed = sum("ms" in x for x in cells)
    says = f"{timed} of {len(cells)} cells timed, the kernels are the fastest exact form at {kernels} sizes"
    columns = ("images x f_h x codes", "form", "ms", "MiB", "of the ceiling", "")
    return Outcome(columns, rows, cells, says, misses)


def _loss_row(x: dict, before: Cells) -> tuple[str, ...]:
    size = f"{x['n']} x {x['embed_dim']} x {x['out_dim']}"
    if "ms" not in x:
        return size, x["kind"], "", "", "", x["left_out"]
    _, _, precision = x["kind"].partition("_")
    peak = _ceiling(before, precision or "ieee")
    work = 2 * 2 * 2 * x["n"] * x["embed_dim"] * x["out_dim"]  # two views, a product each way
    share = f"{work / (x['ms'] / 1e3) / peak:.0%}" if peak and x["kind"] != "hadamard" else ""
    return size, x["kind"], f"{x['ms']:.2f}", f"{x['mib']:.0f}", share, ""


# --- whole steps -------------------------------------------------------------------------------------------


SHOWN = (("rate", ".0f"), ("gib", ".1f"), ("mfu", ".0%"), ("ratio", ".2f"))


def whole_steps(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """Training steps of ViT-S/16 on images that are there already, against DINO's; the most wanted first."""
    settings = [(local, batch, precision, compiled)
                for compiled in (False, True) for precision in ("bf16", "fp16") for batch in (64, 256)
                for local in (8, 0)]  # fmt: skip
    arch, c = ["--arch", "vit_small"], 65536
    if tiny:
        settings, c = [(8, 4, "fp32", False), (0, 4, "fp32", False)], 512
        arch = ["--arch", "timm:test_vit", "--image_size", "32", "--local_image_size", "16"]
    cells: list[dict] = []
    work = {local: _work([*arch, "--out_dim", str(c), "--local_crops_number", str(local)]) for local in (8, 0)}
    for local, batch, precision, compiled in settings:
        flags = [*arch, "--out_dim", str(c), "--local_crops_number", str(local), "--batch_size_per_gpu", str(batch),
                 "--precision", precision]  # fmt: skip
        cell = {"views": f"2 + {local}", "batch": batch, "precision": precision, "compile": compiled}
        cell["flops"] = work[local]
        build = {"CPLearn": partial(TrainingStep, [*flags, *["--compile"] * compiled], device)}
        if not compiled:
            build["DINO"] = partial(_dino, flags, c, batch, local, device, precision, tiny)
        for name, make in build.items():
            if time.time() > until:
                cells.append(cell | {"method": name, "left_out": "no time left"})
            else:
                cells.append(cell | {"method": name} | _time_steps(make, batch, device, 2 if tiny else 10))
    rows, misses = [], []
    for x in cells:
        peak = _ceiling(before, "ieee" if x["precision"] == "fp32" else x["precision"])
        if "rate" in x and x["method"] == "CPLearn" and peak:
            x["mfu"] = x["flops"] * x["rate"] / peak
        peer = next((y for y in cells if y["method"] == "DINO" and "rate" in y
                     and all(y[k] == x[k] for k in ("views", "batch", "precision"))), None)  # fmt: skip
        if "rate" in x and x["method"] == "CPLearn" and peer:
            x["ratio"] = x["rate"] / peer["rate"]
            if x["ratio"] < 1 and not tiny:
                misses.append(
                    f"{x['views']}, batch {x['batch']}, {x['precision']}: {x['ratio']:.2f} of DINO's images/s"
                )
        measured = [f"{x[k]:{form}}" if k in x else "" for k, form in SHOWN]
        size = (x["views"], str(x["batch"]), x["precision"], "yes" * x["compile"])
        rows.append((x.get("name", x["method"]), *size, *measured, x.get("left_out", "")))
    ours = [x for x in cells if "rate" in x and x["method"] == "CPLearn"]
    best = max(ours, key=lambda x: x["rate"], default=None)
    says = "nothing could be timed"
    if best:
        says = f"at most {best['rate']:.0f} images/s ({best['views']}, batch {best['batch']}, {best['precision']})"
    columns = ("step", "views", "batch", "precision", "compile", "images/s", "GiB", "MFU", "/ DINO", "")
    return Outcome(columns, rows, cells, says, misses)


def _work(flags: list[str]) -> float:
    return sum(flops_per_image(flags).values())


def _dino(flags, c, batch, local, device, precision, tiny) -> Callable[[], object]:
    """Return DINO's step from lightly's and timm's parts, or this project's where lightly is not installed."""
    try:
        if not tiny:
            return dino_step(c, batch, 224, device, local=local, precision=precision)
    except ImportError:
        pass
    return TrainingStep([*flags, "--method", "dino"], device)


def _time_steps(make: Callable[[], Callable], batch: int, device: torch.device, repeats: int) -> dict:
    """Return images per second and GiB, or why there are none."""
    try:
        used = start_memory(device)
        step = make()
        for _ in range(3):
            step()
        rate = batch / statistics.median(seconds(step, device) for _ in range(repeats))
        found = {"rate": rate, "gib": (peak_memory(device) - used) / 2**30}
        own_dino = isinstance(step, TrainingStep) and step.args.method == "dino"
        return found | ({"name": "DINO (this project's)"} if own_dino else {})
    except (RuntimeError, ValueError) as error:
        return {"left_out": _reason(error)}
    finally:
        step = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:60]


# --- images ------------------------------------------------------------------------------------------------


def data_path(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """Images per second that one core cuts from JPEG files, and that the device colors; cores needed for the step."""
    threads = torch.get_num_threads()
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        write_class(Path(folder, "class"), 0, 4 if tiny else 64, (60, 45) if tiny else (500, 375))
        for local in (8, 0):
            size = "32" if tiny else "224"
            args = main_cplearn.parse_args(
                ["--local_crops_number", str(local), "--image_size", size, "--data_path", folder, "--arch", "resnet8"]
            )
            dataset, views = main_cplearn.find_images(args)
            source = loaders.ViewDataset(Pixels(dataset, views), views, seed=0)
            items = [(0, i) for i in range(len(dataset))]
            torch.set_num_threads(1)
            cut = len(items) / median_seconds(partial(source.__getitems__, items), torch.device("cpu"), 3)
            torch.set_num_threads(threads)
            batch = source.__getitems__(items)
            color = partial(augmentations.color_views, batch.crops, batch.params, views, device)
            colored = len(items) / median_seconds(color, device, 5)
            rates = [x["rate"] for x in before.get("steps", []) if x["views"] == f"2 + {local}" and "rate" in x]
            cells.append({"views": f"2 + {local}", "cut": cut, "colored": colored, "step": max(rates, default=None)})
    cores = usable_cores() / max(1, torch.cuda.device_count())
    rows, misses, says = [], [], []
    for x in cells:
        x["cores"] = x["step"] and x["step"] / x["cut"]
        rows.append((x["views"], f"{x['cut']:.0f}", f"{x['colored']:.0f}", f"{x['step']:.0f}" if x["step"] else "",
                     f"{x['cores']:.1f}" if x["step"] else ""))  # fmt: skip
        if x["step"]:
            says.append(f"{x['views']} takes {x['cores']:.1f} cores of {cores:.0f} per GPU")
            if x["cores"] > cores and not tiny:
                misses.append(f"{x['views']}: {x['cores']:.1f} cores would feed this GPU, it has {cores:.0f}: --cache")
    columns = ("views", "cut on a core, images/s", "colored on the device, images/s", "step, images/s", "cores needed")
    return Outcome(columns, rows, cells, ", ".join(says) or "no step to compare with was measured", misses)


# --- where the time goes -----------------------------------------------------------------------------------


def costs(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """The ten largest costs of two steps, launches of kernels, and the share of the time in which the GPU works."""
    vit = ["--arch", "vit_small", "--out_dim", "65536", "--precision", "bf16"]
    resnet = ["--arch", "resnet8", "--image_size", "32", "--out_dim", "16384", "--precision", "bf16"]
    if tiny:
        vit = ["--arch", "timm:test_vit", "--image_size", "32", "--out_dim", "512", "--batch_size_per_gpu", "4"]
        resnet = ["--arch", "resnet8_w8", "--image_size", "16", "--out_dim", "64", "--batch_size_per_gpu", "4"]
    rows, cells, says, count = [], [], [], 2 if tiny else 10
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for flags in (vit, resnet):
        step = TrainingStep(flags, device)
        plain = median_seconds(step, device, 3 if tiny else 20)
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(count):
                step()
            synchronize(device)
        averages = profiler.key_averages()
        largest = largest_costs(averages, count)
        rows += [(flags[1], *row) for row in largest]
        found = {"arch": flags[1], "ms": 1e3 * plain, "largest": largest}
        if device.type == "cuda":
            busy = sum(time for time, _ in device_times(averages).values()) / 1e6 / count
            found |= {
                "busy": busy / plain,
                "launches": sum(calls for _, calls in device_times(averages).values()) / count,
            }
            bound = "bound by launches" if found["busy"] < 0.7 else "bound by the GPU"
            says.append(f"{flags[1]}: {found['launches']:.0f} launches a step, GPU busy {found['busy']:.0%}, {bound}")
        cells.append(found)
    columns = ("step", "operation", "ms a step", "share", "calls")
    return Outcome(columns, rows, cells, "; ".join(says) or "shares of a CPU's time", [])


# --- several at once ---------------------------------------------------------------------------------------


def side_by_side(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """Steps per second of several trainings of ResNet-8 (the paper's Table 1) on one card, all together."""
    cells: list[dict] = []
    for count in (1, 2) if tiny else (1, 2, 4, 8):
        if time.time() > until:
            break
        with tempfile.TemporaryDirectory() as folder:
            barrier = mp.get_context("spawn").Barrier(count)
            arguments = (device.type, tiny, barrier, folder)
            mp.start_processes(_steps_beside, arguments, nprocs=count, start_method="spawn")
            rates = [float(path.read_text()) for path in Path(folder).iterdir()]
        cells.append({"at once": count, "each": statistics.mean(rates), "together": sum(rates)})
    alone = cells[0]["together"]
    rows = [
        (str(x["at once"]), f"{x['each']:.1f}", f"{x['together']:.1f}", f"{x['together'] / alone:.2f}") for x in cells
    ]
    best = max(cells, key=lambda x: x["together"])
    says = f"--cells_per_gpu {best['at once']} does {best['together'] / alone:.2f} times the work of one at a time"
    return Outcome(("trainings", "steps/s each", "steps/s together", "gain"), rows, cells, says, [])


def _steps_beside(rank: int, device: str, tiny: bool, barrier, folder: str) -> None:
    flags = ["--arch", "resnet8", "--image_size", "32", "--out_dim", "16384", "--optimizer", "adam"]
    if tiny:
        flags = ["--arch", "resnet8_w8", "--image_size", "16", "--out_dim", "64", "--batch_size_per_gpu", "4"]
        torch.set_num_threads(1)
    place = torch.device(device)
    step = TrainingStep(flags, place, random_views(main_cplearn.parse_args(flags), place))
    for _ in range(3):
        step()
    barrier.wait()
    synchronize(place)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < (0.5 if tiny else 4):
        step()
        synchronize(place)
        count += 1
    Path(folder, str(rank)).write_text(str(count / (time.perf_counter() - start)))


PARTS = {
    "ceilings": ceilings,
    "forms": loss_forms,
    "steps": whole_steps,
    "data": data_path,
    "costs": costs,
    "beside": side_by_side,
}
