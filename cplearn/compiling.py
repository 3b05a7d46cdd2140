"""--compile: torch.compile of the backbone, where it can be had."""

import argparse
import atexit
import importlib.util
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from cplearn.errors import UserError


def what_compiling_lacks(device: torch.device) -> str:
    """Return what has to be installed before torch can compile for a device, "" if nothing."""
    on_gpu = device.type == "cuda"
    names = [os.environ.get("CC", "gcc"), "clang"] if on_gpu else [os.environ.get("CXX", "g++"), "clang++"]
    if not any(shutil.which(name) for name in names):
        return f"a C++ compiler ({' or '.join(names)})"
    return "the triton package" if on_gpu and importlib.util.find_spec("triton") is None else ""


def choose_compile(args: argparse.Namespace, device: torch.device) -> None:
    """Make --compile true or false: `auto` compiles on GPUs, where it can be had, and goes on without if it fails.

    Raises `UserError` if it is asked for and cannot be had.
    """
    lacks, wish = what_compiling_lacks(device), str(args.compile).lower()
    if wish == "true" and lacks:
        raise UserError(f"--compile needs {lacks}: install it, or leave --compile out")
    args.compile = wish == "true" or (wish == "auto" and device.type == "cuda" and not lacks)
    if args.compile and wish == "auto":
        import torch._dynamo  # seconds, which no run without it needs

        torch._dynamo.config.suppress_errors = True


def compile_backbone(backbone: nn.Module) -> None:
    """Let torch compile the backbone at its first call in each size. Its weights and their names stay as they are.

    What it compiles lies in a folder of this process: a killed one may leave a file in it that ends the next run.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="cplearn_compiled_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    backbone.compile(dynamic=False)
    backbone.is_compiled = True


def eagerly(backbone: nn.Module) -> AbstractContextManager:
    """Return a context in which a compiled backbone runs as it was: its size of batch would be compiled, too."""
    return torch.compiler.set_stance("force_eager") if getattr(backbone, "is_compiled", False) else nullcontext()
