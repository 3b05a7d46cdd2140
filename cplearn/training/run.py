"""A run: what it is made of and how far it is; what its ranks agree on at each step; its way to disk and back."""

import argparse
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from cplearn.data.augmentations import View
from cplearn.training.bad_batches import BadSteps
from cplearn.training.folder_lock import FolderLock
from cplearn.training.monitor import Monitor
from cplearn.training.progress import Later, Meter, Stopwatch


@dataclass
class Run:
    """What a run is made of, and how far it is."""

    args: argparse.Namespace
    identity: dict[str, int | str]  # what else must not differ in a continuation
    device: torch.device
    dataset: torch.utils.data.Dataset
    views: list[View]
    loader: torch.utils.data.DataLoader
    method: nn.Module
    model: nn.Module  # the method, in several processes inside DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    last_step: int
    bad_steps: BadSteps
    monitor: Monitor
    lock: FolderLock
    step: int = 0  # finished optimiser steps
    # of the current epoch
    meter: Meter = field(default_factory=Meter)
    outcomes: Later = field(default_factory=Later)  # of the last step, on their way to the host
    skipped: int = 0  # steps
    replaced: int = 0  # images
    seconds: float = 0.0
    waiting: Stopwatch = field(default_factory=Stopwatch)
    # unreadable images: name -> reason; and those that the other ranks do not know of yet
    bad_images: dict[str, str] = field(default_factory=dict)
    news: dict[str, str] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
