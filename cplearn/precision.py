"""Which precision numbers are computed in."""

import argparse

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def float32(x: Tensor) -> Tensor:
    """Raise half precision to float32; float64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()


def choose_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in --precision, fp16 on GPUs and fp32 on CPUs, unless DINO's --use_fp16 false was given."""
    if args.precision is None:
        args.precision = "fp16" if device.type == "cuda" and args.use_fp16 is not False else "fp32"
    args.use_fp16 = args.precision == "fp16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a forward pass runs in this precision."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
