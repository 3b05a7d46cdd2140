"""What --profile counts; the trace of a real run is tested in tests/training/test_report.py."""

from types import SimpleNamespace

import torch

from cplearn.training.profile import largest_costs

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(key, device, cpu=0.0, gpu=0.0, count=1, annotation=False):
    return SimpleNamespace(
        key=key, device_type=device, self_cpu_time_total=cpu, self_device_time_total=gpu, count=count,
        is_user_annotation=annotation,
    )  # fmt: skip


def test_on_a_gpu_kernels_count_once():
    """torch gives a kernel's time to the operation that launched it, to itself, and to annotations around it."""
    events = [
        event("aten::mm", CPU, cpu=500.0, gpu=3000.0, count=4),
        event("gemm_kernel", CUDA, gpu=3000.0, count=4),
        event("add_kernel", CUDA, gpu=1000.0, count=2),
        event("Optimizer.step", CUDA, gpu=9000.0, annotation=True),
    ]
    assert largest_costs(events, steps=2) == [
        ("gemm_kernel", "1.50", "75.0%", "2"),
        ("add_kernel", "0.50", "25.0%", "1"),
    ]


def test_on_a_cpu_operations_count_without_what_they_call():
    found = largest_costs([event("aten::mm", CPU, cpu=3000.0), event("aten::linear", CPU, cpu=1000.0)], 1, count=1)
    assert found == [("aten::mm", "3.00", "75.0%", "1")]
