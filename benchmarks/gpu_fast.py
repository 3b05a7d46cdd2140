"""The measurements of `gpu.py`: how fast is this device, and what is the step's time spent on?

Each part takes the device, whether to be tiny (small enough for a CPU: nothing is judged then), the cells of the parts
before it, and the time at which it has to end: what does not fit is left out and said so.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import loss as loss_benchmark
import torch
from measure import Outcome, median_seconds, peak_memory, rows_of, seconds, start_memory, synchronize
from steps import TrainingStep, dino_step, flops_per_image

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
TINY_VIT = ["--arch", "timm:test_vit", "--image_size", "32", "--out_dim", "512", "--batch_size_per_gpu", "4"]
TINY_RESNET = ["--arch", "resnet8_w8", "--image_size", "16", "--out_dim", "64", "--batch_size_per_gpu", "4"]


def outcome(cells: list[dict], columns: dict[str, tuple[str, str]], says: str, misses: list[str]) -> Outcome:
    """Return cells as a part's outcome, with a table of these columns (`rows_of`)."""
    return Outcome(tuple(columns), rows_of(cells, columns), cells, says, misses)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:60]


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    misses = []
    for x in cells:
        x["rate"] = f"{x['found']:.3g} {x['unit']}"
        x["share"] = x["found"] / x["nominal"] if x["nominal"] else None
        if x["share"] and x["share"] < 0.5 and not tiny:
            misses.append(
                f"{x['what']}: {x['share']:.0%} of the maker's {x['nominal']}: shared, throttled, partitioned?"
            )
    columns = {"ceiling": ("what", ""), "found": ("rate", ""), "the maker says": ("nominal", ""),
               "share": ("share", ".0%")}  # fmt: skip
    return outcome(cells, columns, ", ".join(f"{x['what']} {x['rate']}" for x in cells[:2]), misses)


def _ceiling(before: Cells, precision: str) -> float | None:
    """Return operations per second of a product, or None if ceilings were not measured."""
    rates = {x["what"]: 1e12 * x["found"] for x in before.get("ceilings", [])}
    return rates.get(f"product, {'ieee' if precision == 'fp32' else precision}")


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
            cell = {"size": f"{n} x {f} x {c}", "n": n, "embed_dim": f, "out_dim": c, "kind": kind}
            if kind == "compiled" and k >= 4:  # compiling takes seconds for each size
                cell["left_out"] = "not compiled at this size"
            elif time.time() > until:
                cell["left_out"] = "no time left"
            else:
                cell |= _time_loss(kind, n, f, c, device, 3 if tiny else 7)
                _, _, precision = kind.partition("_")
                peak = _ceiling(before, precision or "ieee")
                if "ms" in cell and peak and kind != "hadamard":  # two views, a product each way
                    cell["share"] = 2 * 2 * 2 * n * f * c / (cell["ms"] / 1e3) / peak
            cells.append(cell)
    misses, kernels = ([], 0) if tiny else _judge_auto(cells)
    says = f"{sum('ms' in x for x in cells)} of {len(cells)} cells timed, the kernels are the fastest exact form at "
    columns = {"images x f_h x codes": ("size", ""), "form": ("kind", ""), "ms": ("ms", ".2f"), "MiB": ("mib", ".0f"),
               "of the ceiling": ("share", ".0%"), "": ("left_out", "")}  # fmt: skip
    return outcome(cells, columns, f"{says}{kernels} sizes", misses)


def _time_loss(kind: str, n: int, f: int, c: int, device: torch.device, repeats: int) -> dict:
    try:
        return loss_benchmark.measure(kind, n, f, c, device, repeats=repeats)
    except (RuntimeError, ValueError, ImportError) as error:  # out of memory, no compiler, no Triton
        return {"left_out": _reason(error)}
    finally:
        _empty_cache(device)


def _judge_auto(cells: list[dict]) -> tuple[list[str], int]:
    """Return where `auto` does not pick the fastest exact form, and how often that is the kernels."""
    misses, kernels = [], 0
    for size in dict.fromkeys(x["size"] for x in cells):
        timed = [x for x in cells if x["size"] == size and "ms" in x]
        for end in ("", "_tf32"):
            names = {f"{form}{end}" for form in ("stored", "recomputed", "triton")}
            exact = {x["kind"]: x["ms"] for x in timed if x["kind"] in names}
            picked = pick_form("auto", 2 * timed[0]["n"], timed[0]["out_dim"]) + end if timed else ""
            if picked in exact:
                best = min(exact, key=exact.get)
                kernels += best.startswith("triton")
                if exact[picked] > 1.15 * exact[best]:
                    misses.append(
                        f"auto picks {picked} ({exact[picked]:.2f} ms) at {size}; {best} takes {exact[best]:.2f} ms"
                    )
    return misses, kernels


# --- whole steps -------------------------------------------------------------------------------------------


def whole_steps(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """Training steps of ViT-S/16 on images that are there already, against DINO's; the most wanted first."""
    settings = [(local, batch, precision, compiled)
                for precision in ("bf16", "fp16") for batch in (64, 256) for local in (8, 0)
                for compiled in (False, True)]  # fmt: skip
    arch, c = ["--arch", "vit_small"], 131072
    if tiny:
        settings, c = [(8, 4, "fp32", False), (0, 4, "fp32", False)], 512
        arch = [*TINY_VIT, "--local_image_size", "16"]
    arch += ["--out_dim", str(c)]
    work = {x: sum(flops_per_image([*arch, "--local_crops_number", str(x)]).values()) for x in (8, 0)}
    cells, misses = [], []
    for local, batch, precision, compiled in settings:
        flags = [*arch, "--local_crops_number", str(local), "--batch_size_per_gpu", str(batch)]
        flags += ["--precision", precision, "--compile", str(compiled).lower()]
        size = {"views": f"2 + {local}", "batch": batch, "precision": precision, "compile": compiled,
                "compiled": "yes" * compiled, "flops": work[local]}  # fmt: skip
        build = {"CPLearn": partial(TrainingStep, flags, device)}
        if not compiled:
            build["DINO"] = partial(_dino, flags, c, batch, local, device, precision, tiny)
        for name, make in build.items():
            timed = {"left_out": "no time left"} if time.time() > until else _time_steps(make, batch, device, tiny)
            cells.append(size | {"method": name, "name": name} | timed)
    for x in [x for x in cells if "rate" in x and x["method"] == "CPLearn"]:
        if peak := _ceiling(before, x["precision"]):
            x["mfu"] = x["flops"] * x["rate"] / peak
        alike = [y for y in cells if all(y[k] == x[k] for k in ("views", "batch", "precision")) and "rate" in y]
        peer = next((y for y in alike if y["method"] == "DINO"), None)
        if peer:
            x["ratio"] = x["rate"] / peer["rate"]
            if x["ratio"] < 1 and not tiny:
                where = f"{x['views']}, batch {x['batch']}, {x['precision']}"
                misses.append(f"{where}: {x['ratio']:.2f} of DINO's images/s")
    best = max((x for x in cells if "rate" in x and x["method"] == "CPLearn"), key=lambda x: x["rate"], default=None)
    says = "nothing could be timed"
    if best:
        says = f"at most {best['rate']:.0f} images/s ({best['views']}, batch {best['batch']}, {best['precision']})"
    columns = {"step": ("name", ""), "views": ("views", ""), "batch": ("batch", ""), "precision": ("precision", ""),
               "compile": ("compiled", ""), "images/s": ("rate", ".0f"), "GiB": ("gib", ".1f"), "MFU": ("mfu", ".0%"),
               "/ DINO": ("ratio", ".2f"), "": ("left_out", "")}  # fmt: skip
    return outcome(cells, columns, says, misses)


def _dino(flags, c, batch, local, device, precision, tiny) -> Callable[[], object]:
    """Return DINO's step from lightly's and timm's parts, or this project's where lightly is not installed."""
    try:
        if not tiny:
            return dino_step(c, batch, 224, device, local=local, precision=precision)
    except ImportError:
        pass
    return TrainingStep([*flags, "--method", "dino"], device)


def _time_steps(make: Callable[[], Callable], batch: int, device: torch.device, tiny: bool) -> dict:
    """Return images per second and GiB, or why there are none."""
    try:
        used = start_memory(device)
        step = make()
        for _ in range(3):
            step()
        rate = batch / statistics.median(seconds(step, device) for _ in range(2 if tiny else 10))
        own_dino = isinstance(step, TrainingStep) and step.args.method == "dino"
        timed = {"rate": rate, "gib": (peak_memory(device) - used) / 2**30}
        return timed | ({"name": "DINO (this project's)"} if own_dino else {})
    except (RuntimeError, ValueError) as error:
        return {"left_out": _reason(error)}
    finally:
        step = None
        _empty_cache(device)


# --- where the time goes -----------------------------------------------------------------------------------


def costs(device: torch.device, tiny: bool, before: Cells, until: float) -> Outcome:
    """The ten largest costs of two steps, launches of kernels, and the share of the time in which the GPU works."""
    vit = ["--arch", "vit_small", "--out_dim", "131072", "--precision", "bf16"]
    resnet = ["--arch", "resnet8", "--image_size", "32", "--out_dim", "16384", "--precision", "bf16"]
    rows, cells, says, count = [], [], [], 2 if tiny else 10
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for flags in (TINY_VIT, TINY_RESNET) if tiny else (vit, resnet):
        step = TrainingStep(flags, device)
        plain = median_seconds(step, device, 3 if tiny else 20)
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(count):
                step()
            synchronize(device)
        averages = profiler.key_averages()
        largest = largest_costs(averages, count)
        rows += [(flags[1], *row) for row in largest]
        cell = {"arch": flags[1], "ms": 1e3 * plain, "largest": largest}
        if device.type == "cuda":
            times, calls = zip(*device_times(averages).values(), strict=True)
            cell |= {"busy": sum(times) / 1e6 / count / plain, "launches": sum(calls) / count}
            bound = "bound by launches" if cell["busy"] < 0.7 else "bound by the GPU"
            says.append(f"{flags[1]}: {cell['launches']:.0f} launches a step, GPU busy {cell['busy']:.0%}, {bound}")
        cells.append(cell)
    columns = ("step", "operation", "ms a step", "share", "calls")
    return Outcome(columns, rows, cells, "; ".join(says) or "shares of a CPU's time", [])


PARTS = {
    "ceilings": ceilings,
    "costs": costs,
    "steps": whole_steps,
    "forms": loss_forms,
}
