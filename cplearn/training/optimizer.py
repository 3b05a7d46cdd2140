"""The optimizer, and what is set or clipped at each step."""

import argparse

import torch
from torch import Tensor, nn

from cplearn.distributed import collectives
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
        "lars": lambda: Lars([{**g, "always_adapt": g["decay"]} for g in groups], lr=0.0, momentum=0.9),
    }
    return kinds[args.optimizer]()


def with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Start momentum from zero, to the same effect: torch's fused form leaves it uninitialized if step 0 is skipped."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


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
        torch._foreach_mul_(grads, (max_norm / (norms + 1e-6)).clamp(max=1.0).unbind())
    return norms.norm()
