"""Which precision numbers are computed in."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def float32(x: Tensor) -> Tensor:
    """Raise half precision to float32; float64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()


def choose_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in --precision: bf16 on GPUs that have it, else fp16; fp32 on CPUs. DINO's --use_fp16 means fp16 or fp32."""
    if args.precision is None:
        if device.type != "cuda" or args.use_fp16 is False:
            args.precision = "fp32"
        elif args.use_fp16 or not torch.cuda.is_bf16_supported(including_emulation=False):
            args.precision = "fp16"
        else:
            args.precision = "bf16"
    args.use_fp16 = args.precision == "fp16"


def slow_precision(precision: str, device: torch.device) -> bool:
    """Return whether this CPU only emulates the precision, which is many times slower than float32."""
    if device.type != "cpu" or precision == "fp32":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    wanted = ("avx512_bf16", "amx_bf16", " bf16 ") if precision == "bf16" else ("avx512_fp16", "amx_fp16", "fphp")
    return not any(flag in flags for flag in wanted)


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Let a GPU round the inputs of float32 products to TF32 (10 bits of mantissa) inside. No effect on a CPU.

    If it is not `wanted`, what the user chose stays, and is not even looked at.
    """
    if not wanted:
        yield
        return
    products = torch.backends.cuda.matmul  # the older `allow_tf32` raises once the user has set this one
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a forward pass runs in this precision."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
