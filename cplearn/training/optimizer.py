"""The optimizer, and what is set or clipped at each step."""

import argparse
from functools import lru_cache

import torch
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.schedules import cosine, lr_at


def build_optimizer(method: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Build the optimizer. Only matrices are decayed, as in DINO: biases and one-dimensional parameters are not.

    torch's own optimizers are fused: one pass over memory, and with fp16 the others ask a GPU at each step for
    overflows.
    """
    from timm.optim import Lars, param_groups_weight_decay  # at half a second, not for --help

    exempt, decayed = param_groups_weight_decay(method)
    groups = [{**decayed, "decay": True}, {**exempt, "decay": False}]
    kinds = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.0, fused=True),
        "adam": lambda: torch.optim.Adam(groups, lr=0.0, fused=True),
        "sgd": lambda: with_momentum(torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)),
        # Matrices are adapted at any weight decay, as in DINO; timm by itself would not without one. Its ratio has
        # |g| + decay |w| where DINO's has |g + decay w|.
        "lars": lambda: with_momentum(
            skipping_on_device(Lars)([{**g, "always_adapt": g["decay"]} for g in groups], lr=0.0, momentum=0.9)
        ),
    }
    return kinds[args.optimizer]()


def skipping_on_device(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return an optimizer that undoes a step with infinities itself, as fused ones do: GradScaler asks the device else.

    Its state has to be there from the start.
    """

    class Skipping(kind):
        _step_supports_amp_scaling = True

        @torch.no_grad()
        def step(self, closure=None):
            now = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            now += [self.state[p]["momentum_buffer"] for p in now]
            before = torch._foreach_clone(now) if hasattr(torch, "_foreach_clone") else [x.clone() for x in now]
            super().step(closure)
            skipped = getattr(self, "found_inf", None)  # set by GradScaler
            if skipped is not None:
                for x, kept in zip(now, before, strict=True):
                    x.copy_(torch.where(skipped > 0, kept, x))

    return Skipping


def with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Start momentum from zero, to the same effect: torch's fused form leaves it uninitialized if step 0 is skipped."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def check_rate(args: argparse.Namespace) -> None:
    """Raise `UserError` for a peak learning rate below --min_lr: it would rise where it should fall."""
    if actual_lr(args) < args.min_lr:
        batch = args.batch_size_per_gpu * collectives.world_size()
        raise UserError(
            f"--lr {args.lr:g} is {actual_lr(args):.3g} at a batch of {batch}, below --min_lr {args.min_lr:g}: lower "
            f"--min_lr, or take --lr {args.min_lr * 256 / batch:.3g} or more"
        )


def actual_lr(args: argparse.Namespace) -> float:
    """Return the peak learning rate by the linear rule: --lr is for a batch of 256 over all processes."""
    return args.lr * args.batch_size_per_gpu * collectives.world_size() / 256


def set_schedules(optimizer, step: int, steps_per_epoch: int, args) -> float:
    """Set learning rate and weight decay of this step; return the learning rate."""
    total = args.epochs * steps_per_epoch
    lr = lr_at(
        step,
        lr=actual_lr(args),
        min_lr=args.min_lr,
        warmup_steps=args.warmup_epochs * steps_per_epoch,
        total_steps=total,
    )
    decay = cosine(args.weight_decay, args.weight_decay_end, step / total)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = decay
    return lr


@torch.no_grad()
def clip_gradients(module: nn.Module, norms: Tensor, max_norm: float) -> Tensor:
    """Scale down each parameter's gradient to `max_norm` on its own (DINO's clipping); 0 leaves all.

    Shape: the norms of the gradients (p,) -> that of the whole gradient before clipping (), on the device.
    """
    if max_norm > 0:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if norms.is_cuda:  # where a launch costs more than the passes
            _multiply_at_once(grads, factors)
        else:
            torch._foreach_mul_(grads, factors.unbind())
    return norms.norm()


def _multiply_at_once(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its factor in a few kernels; `torch._foreach_mul_` takes one for each. Shape: (p,)."""
    sizes = [x.numel() for x in tensors]
    together = torch.cat([x.flatten() for x in tensors])
    each = factors.repeat_interleave(_on_device(tuple(sizes), factors.device), output_size=sum(sizes))
    parts = together.mul_(each).split(sizes)
    torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])


@lru_cache(maxsize=8)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers).to(device)
