"""Which precision a run takes when it is not told."""

import argparse

import pytest
import torch

from cplearn.precision import choose_precision, slow_precision

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "has_bf16", "given", "use_fp16", "expected"),
    [
        (CPU, False, None, None, "fp32"),
        (CPU, False, None, True, "fp32"),  # DINO's default, on a laptop
        (CPU, False, "bf16", None, "bf16"),
        (GPU, True, None, None, "bf16"),
        (GPU, False, None, None, "fp16"),
        (GPU, True, None, True, "fp16"),
        (GPU, True, None, False, "fp32"),
        (GPU, True, "fp16", None, "fp16"),
    ],
)
def test_the_default_is_bf16_on_gpus_that_have_it(monkeypatch, device, has_bf16, given, use_fp16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    args = argparse.Namespace(precision=given, use_fp16=use_fp16)
    choose_precision(args, device)
    assert args.precision == expected and args.use_fp16 == (expected == "fp16")


def test_a_cpu_that_emulates_a_precision_is_told_by_its_flags():
    assert not slow_precision("fp32", CPU) and not slow_precision("bf16", GPU)
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    assert slow_precision("bf16", CPU) == ("avx512_bf16" not in flags and "amx_bf16" not in flags)
