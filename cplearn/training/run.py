"""What a run is made of, and how far it is."""

import argparse
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from cplearn import random_streams
from cplearn.compiling import compile_backbone
from cplearn.data import datasets, loaders, workers
from cplearn.data.augmentations import View
from cplearn.data.identity import Identity
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.lock import FolderLock
from cplearn.methods import build_method_for
from cplearn.methods.base import Method
from cplearn.probe.monitor import Monitor
from cplearn.training.bad_batches import BadImages, BadSteps
from cplearn.training.memory import Memory, check_memory
from cplearn.training.meters import DeferredRead, EpochState
from cplearn.training.optimizer import build_optimizer
from cplearn.training.profile import StepProfile
from cplearn.training.stop import StopSignals
from cplearn.training.writers import Writers


@dataclass
class Run:
    """A pre-training: its parts, and how far it is."""

    args: argparse.Namespace
    identity: dict[str, int | str]  # what else must not differ in a continuation
    content: Identity | None  # of the images, for rank 0
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
    is_timed: bool = False  # its steps: how long it takes has been printed

    def set_training(self) -> None:
        """Enter train mode when an epoch begins; keep a frozen backbone (--freeze_backbone_epochs) in eval mode.

        What is frozen has no gradient, keeps nothing for one, and keeps its statistics.
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


def assemble(
    args: argparse.Namespace, images: Pixels, device: torch.device, lock: FolderLock, signals: StopSignals
) -> Run:
    """Build loader, method and optimizer; return the run at its beginning."""
    dataset, views = images.dataset, images.views
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, args.seed)
    on_cpu = device.type == "cpu"
    loader = loaders.train_loader(
        images,
        views,
        batch_size=args.batch_size_per_gpu,
        seed=args.seed,
        # On a CPU, workers that only cut views take more from the step than they give.
        num_workers=workers.default_workers(args.num_workers, no_gain=on_cpu and images.kind != "none"),
        pin_memory=not on_cpu,
    )
    method = build_method_for(args, views)
    memory = check_memory(method, args, views, device)
    method.to(device)
    if args.compile:
        for network in dict.fromkeys((method.backbone, method.evaluated)):  # DINO's teacher, too
            compile_backbone(network)
    processes, data, threads = collectives.world_size(), datasets.fingerprint(dataset), torch.get_num_threads()
    half = args.precision == "fp16"
    return Run(
        args=args,
        identity={"processes": processes, "data": data, "threads": threads},
        content=Identity.of(dataset) if collectives.is_main() else None,
        device=device,
        images=images,
        views=views,
        loader=loader,
        method=method,
        model=method,
        optimizer=build_optimizer(method, args),
        # Scale 1 outside fp16: there it only leaves out, on the device, steps whose gradient is not finite.
        scaler=torch.amp.GradScaler(device.type, init_scale=2.0**16 if half else 1.0),
        profile=StepProfile(args.profile, args.output_dir, device),
        last_step=min(args.epochs * len(loader), args.max_steps or math.inf),
        memory=memory,
        monitor=Monitor(images, views, args.seed, len(loader), args.knn_freq, args.best_by, args.precision),
        bad_steps=BadSteps(args.max_skipped_steps, args.output_dir, dataset.names),
        bad_images=BadImages(dataset, args.max_bad_images, args.output_dir),
        lock=lock,
        signals=signals,
    )
