"""Schedules over training."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Return half a cosine from `start` (progress 0) to `end` (progress 1, and beyond)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def lr_at(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return DINO's learning rate at a step: linear from 0 during the warm-up, then a cosine from `lr` to `min_lr`."""
    if step < warmup_steps:
        return lr * step / max(1, warmup_steps - 1)
    return cosine(lr, min_lr, (step - warmup_steps) / max(1, total_steps - warmup_steps))
