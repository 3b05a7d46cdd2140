"""Tensors on a GPU that is not there: they hold no numbers, and what would be done with them is counted.

On `cuda` they are torch's fake tensors, on the CPU real ones. Raises where a tensor of the CPU is mixed in, and where
the host would wait for a number of the device.
"""

import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.device("cuda", 0)
# Operations that make or look at a tensor without a kernel; views are known by their schema.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "is_same_size", "set_",
        "lift_fresh", "device", "_reshape_alias", "record_stream", "_unsafe_view", "is_pinned", "detach"}  # fmt: skip
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.rand, torch.randn, torch.randperm,
             torch.linspace, torch.eye, torch.randint}  # fmt: skip
READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__, torch.Tensor.__float__,
         torch.Tensor.__int__, torch.Tensor.__index__, torch.equal}  # fmt: skip
SMALL = 2**16  # bytes that the driver copies from pageable memory without a wait
FUSED = 50  # tensors that one kernel of torch._foreach_* takes


class Counts(TorchDispatchMode):
    """Counts kernels, copies from and to the device, and the bytes that kernels touch."""

    def __init__(self):
        super().__init__()
        self.kernels, self.copies, self.waits, self.bytes = collections.Counter(), 0, [], 0

    def copy(self) -> "Counts":
        """Return what has been counted so far."""
        kept = Counts()
        kept.kernels, kept.copies, kept.waits, kept.bytes = self.kernels.copy(), self.copies, [*self.waits], self.bytes
        return kept

    def __sub__(self, before: "Counts") -> "Counts":
        rest = Counts()
        rest.kernels, rest.waits = self.kernels - before.kernels, self.waits[len(before.waits) :]
        rest.copies, rest.bytes = self.copies - before.copies, self.bytes - before.bytes
        return rest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        inputs, outputs = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), out))
        here, there = {x.device.type for x in inputs}, {x.device.type for x in outputs}
        if "cuda" not in here | there or func._schema.name.startswith("prim::"):
            return out
        if name in ("_to_copy", "copy_"):
            source = (args[1] if name == "copy_" else args[0]).device.type
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if source != outputs[0].device.type:
                self.copies += 1
                if blocking:
                    self.waits.append(f"copy {source} to {outputs[0].device.type} at {place()}")
                return out
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name not in FREE and not is_view:
            self.kernels[name] += _launches(name, args)
            self.bytes += sum(x.nbytes for x in [*inputs, *outputs] if x.device.type == "cuda")
        return out


def _launches(name: str, args) -> int:
    """Return how many kernels an operation is; lists of other shapes than the first take torch's slow path."""
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor)]
    if not name.startswith("_foreach") or not lists:
        return 1
    slow = any(x.shape != y.shape for other in lists[1:] for x, y in zip(lists[0], other, strict=False))
    return len(lists[0]) if slow else -(-len(lists[0]) // FUSED)


def place() -> str:
    """Return the innermost line of the project's own code that is being run."""
    frames = [x for x in traceback.extract_stack() if x.filename.startswith(str(ROOT)) and ".venv" not in x.filename]
    frames = [x for x in frames if "fake_cuda" not in x.filename]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"


def _page_locked(x: torch.Tensor) -> torch.Tensor:
    x.is_page_locked = True
    return x


class Device(TorchFunctionMode):
    """Makes what is asked for on `cuda` a fake tensor there, and counts what waits for a copy from the host."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.counts: Counts | None = None

    def _copied(self, x: torch.Tensor, blocking: bool, what: str) -> torch.Tensor:
        if self.counts is not None:
            self.counts.copies += 1
            if blocking:
                self.counts.waits.append(f"{what} at {place()}")
        counts, self.counts = self.counts, None
        try:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                y = self.fake.from_tensor(x.detach())
                with self.fake:
                    y = y.to(CUDA)
                return y.requires_grad_(x.requires_grad) if x.is_leaf and x.requires_grad else y
        finally:
            self.counts = counts

    def _read(self, x: torch.Tensor, wait: str) -> torch.Tensor:
        """Return zeros for what the host reads of the device; `wait`: what makes it wait, "" for nothing."""
        if self.counts is not None:
            self.counts.copies += 1
            if wait:
                self.counts.waits.append(f"{wait} at {place()}")
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return torch.zeros(x.shape, dtype=x.dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        on_cuda = device is not None and torch.device(device).type == "cuda"
        if func is torch.Tensor.pin_memory:
            return _page_locked(args[0].clone())
        if func is torch.Tensor.record_stream:
            return None
        if kwargs.pop("pin_memory", False):
            return _page_locked(func(*args, **kwargs))
        if func in READS and isinstance(args[0], FakeTensor) and args[0].is_cuda:
            return func(self._read(args[0], f"{func.__name__}()"), *args[1:], **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.to) and isinstance(args[0], FakeTensor) and args[0].is_cuda:
            targets = [torch.device(x).type for x in (*args[1:], device) if isinstance(x, (torch.device, str))]
            if func is torch.Tensor.cpu or "cpu" in targets:
                return func(self._read(args[0], "a copy to the host"), *args[1:], **kwargs)
        if func is torch.Tensor.copy_ and isinstance(args[1], FakeTensor) and not isinstance(args[0], FakeTensor):
            later = (kwargs.get("non_blocking") or args[-1] is True) and hasattr(args[0], "is_page_locked")
            self._read(args[1], "" if later else "a copy to the host")
            return args[0].zero_()
        if func is torch.Tensor.is_pinned:
            return hasattr(args[0], "is_page_locked")
        if func in (torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward):
            with torch._C.DisableTorchFunction(), self.fake:
                return func(*args, **kwargs)
        if func is torch.where and any(isinstance(x, FakeTensor) for x in args):
            with torch._C.DisableTorchFunction(), self.fake:
                return func(*args, **kwargs)
        if on_cuda and func in FACTORIES:
            kwargs.pop("generator", None)
            with self.fake:
                return func(*args, **kwargs)
        if on_cuda and func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], FakeTensor):
            kwargs.pop("device")
            return self._copied(func(*args, **kwargs), True, func.__name__)
        if func is torch.Tensor.new_tensor and isinstance(args[0], FakeTensor) and args[0].is_cuda:
            return self._copied(torch.tensor(*args[1:], dtype=args[0].dtype), True, "new_tensor")
        if func in (torch.Tensor.to, torch.Tensor.cuda) and not isinstance(args[0], FakeTensor):
            targets = [x for x in (*args[1:], device) if isinstance(x, (torch.device, str))]
            targets += [x.device for x in args[1:] if isinstance(x, torch.Tensor)]
            if func is torch.Tensor.cuda or any(torch.device(x).type == "cuda" for x in targets):
                later = kwargs.get("non_blocking") or args[-1] is True
                later = later and (hasattr(args[0], "is_page_locked") or args[0].nbytes < SMALL)
                x = self._copied(args[0], not later, "a copy from the host")
                types_ = [y for y in (*args[1:], kwargs.get("dtype")) if isinstance(y, torch.dtype)]
                return x.to(types_[0]) if types_ else x
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def counting(self):
        with Counts() as self.counts:
            yield self.counts
        self.counts = None


_current: Device | None = None


class _Generator(torch.Generator):
    """One of the CPU, whatever is asked for."""

    def __new__(cls, device=None):
        return super().__new__(cls)


def _launch_nothing(kernel, *args, grid, warmup, **options) -> None:
    """Count a kernel of Triton."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if any(not x.is_cuda for x in tensors):
        raise ValueError(f"a tensor of the host is given to {kernel.__name__}")
    if _current.counts is not None:
        _current.counts.kernels[kernel.__name__] += 1
        _current.counts.bytes += sum(x.nbytes for x in tensors)


@contextlib.contextmanager
def device():
    """Let torch find one GPU, and give its tensors."""
    answers = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_initialized": lambda: False,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.manual_seed": lambda seed: None,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.Generator": _Generator,
        "torch.cuda.device.__enter__": lambda self: None,
        "torch.cuda.device.__exit__": lambda self, *error: False,
        "triton.runtime.jit.JITFunction.run": _launch_nothing,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    }
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        global _current
        _current = stack.enter_context(Device())
        yield _current
