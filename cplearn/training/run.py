"""What a run is made of, and how far it is."""

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from cplearn.data import loaders, workers
from cplearn.data.augmentations import View
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.lock import FolderLock
from cplearn.methods.base import Method
from cplearn.probe.monitor import Monitor
from cplearn.training.bad_batches import BadImages, BadSteps
from cplearn.training.memory import Memory
from cplearn.training.meters import DeferredRead, EpochState
from cplearn.training.profile import StepProfile
from cplearn.training.stop import StopSignals
from cplearn.training.writers import Writers


@dataclass
class Run:
    """A pre-training: its parts, and how far it is."""

    args: argparse.Namespace
    identity: dict[str, int | str]  # what else must not differ in a continuation
    device: torch.device
    images: Pixels
    views: list[View]
    loader: workers.Loader
    method: Method
    model: nn.Module  # the method, in several processes inside DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    profile: StepProfile
    last_step: int
    memory: Memory  # expected
    bad_steps: BadSteps
    bad_images: BadImages
    monitor: Monitor
    lock: FolderLock
    signals: StopSignals
    writers: Writers = field(init=False)  # once the training begins
    frozen: bool | None = None  # the backbone, in this epoch; None before the first one
    trained: list[nn.Parameter] = field(default_factory=list)  # of the backbone
    step: int = 0  # finished optimizer steps
    resumed: bool = False  # it goes on from a checkpoint
    epoch: EpochState = field(default_factory=EpochState)
    outcomes: DeferredRead = field(default_factory=DeferredRead)  # of the last step, on their way to the host
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    duration_told: bool = False  # how long it will take

    def set_training(self) -> None:
        """Set all to training, but the backbone in the epochs in which --freeze_backbone_epochs keeps it as it is.

        What is frozen has no gradient, keeps nothing for one, and keeps its statistics. Called when an epoch begins.
        """
        backbone, epochs = self.method.backbone, self.args.freeze_backbone_epochs
        frozen = self.step < epochs * self.steps_per_epoch
        if self.frozen is None:
            self.trained = [p for p in backbone.parameters() if p.requires_grad]
        if frozen != self.frozen:
            for p in self.trained:
                p.requires_grad_(not frozen)
            self.model = collectives.wrap(self.method, self.device)  # DDP waits for all that had a gradient when made
            self.frozen = frozen
        self.model.train()
        if frozen:
            for network in (backbone, self.method.evaluated):  # a teacher is another
                network.eval()

    def close(self) -> None:
        """Stop the loader's processes, and let go of DDP.

        DDP must be gone before its process group is: found by the garbage collector after that, it aborts the process.
        """
        self.profile.close()
        self.loader.stop()
        self.model = self.method
        gc.collect()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def rest_of_epoch(self) -> Iterator[loaders.Batch]:
        """Yield the batches that are left of the current epoch, as far as `last_step`."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        last = min(self.steps_per_epoch, self.last_step - epoch * self.steps_per_epoch)
        batches = loaders.read_batches(
            self.loader, epoch, first, last, timeout=self.args.worker_timeout, waiting=self.epoch.waiting
        )
        return loaders.copy_ahead(batches, self.device)

    @property
    def between_epochs(self) -> bool:
        return self.step % len(self.loader) == 0
