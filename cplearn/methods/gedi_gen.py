"""GEDI with its generative term, for small images and the paper's ResNet-8 (Table 1).

    E(x)   = -v^T g(x)                                  v learned
    L_gen  = mean E(x + noise) - mean E(x~)             x~ from SGLD, no gradient through the sampling
    x~    <- x~ - alpha grad E(x~) + sigma N(0, I)      K steps, from a replay buffer
    loss   = w_gen L_gen + beta invariance + prior      the last two as in `gedi.py`

The authors' code for this term is not public. The form is the usual one of joint energy models, and every constant
here is a flag whose default is a choice of ours, not of theirs.
"""

import torch
from torch import Tensor, nn

from cplearn import random_streams
from cplearn.backbones import has_batch_norm
from cplearn.data.augmentations import views_of
from cplearn.data.color import normalize
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.flags import fraction, nonnegative, positive
from cplearn.methods.base import StepOutput
from cplearn.methods.gedi import GEDI
from cplearn.precision import float32


class GEDIGen(GEDI):
    EXTRA_IMAGES = 2  # the real and the sampled one, whose energies have a gradient
    SPLITS = False

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        seed: int = 0,
        gen_weight: float | None = None,
        gen_limit: float = 1e3,
        input_noise: float | None = None,
        sgld_steps: int = 20,
        sgld_step_size: float = 1.0,
        sgld_noise: float = 0.01,
        sgld_buffer: int = 10_000,
        sgld_restart: float = 0.05,
        **options,
    ):
        super().__init__(backbone, **options)
        if has_batch_norm(backbone):
            raise UserError(
                "--method gedi_gen samples images with the backbone, whose batch norm would see them: use --arch resnet8"
            )
        self.gen_weight = 0.02 * self.beta if gen_weight is None else gen_weight
        self.gen_limit, self.seed = gen_limit, seed
        self.input_noise = 0.03 if input_noise is None else input_noise
        self.steps, self.step_size, self.noise, self.restart = sgld_steps, sgld_step_size, sgld_noise, sgld_restart
        self.energy = nn.Linear(backbone.num_features, 1, bias=False)
        # Samples of earlier steps, the same on all ranks; zeros stand for those that no step has written yet.
        self.register_buffer("replay", torch.zeros(sgld_buffer, 3, image_size, image_size))
        self.before_step(0, 1, 1)

    @classmethod
    def add_flags(cls, parser) -> None:
        super().add_flags(parser)
        # fmt: off
        add = cls.flag_group(parser, "GEDI's generative term (constants of ours: the authors' code is not public)")
        add("gen_weight", type=nonnegative(float), help="Weight of the term (default: 0.02 * beta)")
        add("gen_limit", type=positive(float), help="A step whose term is beyond this, or below minus this, counts as not finite and is skipped")
        add("input_noise", type=nonnegative(float), help="Standard deviation of the noise on real images, whose pixels go from 0 to 1 (default: the paper's 0.03, or 0 where the views have noise of their own: --augmentation cifar, svhn or digits)")
        add("sgld_steps", type=positive(int), help="Steps of Langevin dynamics per training step")
        add("sgld_step_size", type=nonnegative(float), help="Of a step of Langevin dynamics")
        add("sgld_noise", type=nonnegative(float), help="Standard deviation of the noise of such a step")
        add("sgld_buffer", type=positive(int), help="Images kept, in memory and in each checkpoint")
        add("sgld_restart", type=fraction, help="Probability that a chain starts again from uniform pixels")
        # fmt: on

    @classmethod
    def from_args(cls, backbone: nn.Module, args) -> "GEDIGen":
        if args.input_noise is None:
            args.input_noise = 0.0 if views_of(args)[0].noise_std else 0.03
        return super().from_args(backbone, args)

    def before_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        self.step = step

    def forward(self, views: list[Tensor]) -> StepOutput:
        loss, terms, usage = super().forward(views)
        with torch.autocast(views[0].device.type, enabled=False):  # chains and energies in float32
            images = float32(views[0])
            samples, noise = self.sample(images)
            noise = self.input_noise * (normalize(noise) - normalize(torch.zeros_like(noise)))  # in units of pixels
            energies = -self.energy(self.backbone(torch.cat([images + noise, samples])))
            real, fake = energies.chunk(2)
            generative = real.mean() - fake.mean()
            loss = loss + self.gen_weight * generative
            # All ranks skip such a step together, and the run ends after too many of them.
            beyond = collectives.mean_over_ranks(generative.detach()).abs() > self.gen_limit
            loss = torch.where(beyond, torch.nan, loss)
        return StepOutput(loss, {**terms, "loss": loss.detach(), "generative": generative.detach()}, usage)

    def sample(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Draw images from the model, and noise for the real ones, for this rank's rows. Shape: both as `like`.

        Every rank draws the numbers of all, so that they depend on seed and step and not on the number of processes.
        """
        n, world = len(like), collectives.world_size()
        mine = slice(collectives.rank(), n * world, world)
        seed = random_streams.seed_of(random_streams.FOR_SGLD, self.seed, self.step)
        generator = torch.Generator(like.device).manual_seed(seed)
        shape = (n * world, *self.replay.shape[1:])

        def draw(function):
            return function(shape, generator=generator, device=like.device).to(like.dtype)

        if n * world > len(self.replay):
            raise UserError(f"--sgld_buffer {len(self.replay)} is smaller than a batch of {n * world} images")
        rows = torch.randperm(len(self.replay), generator=generator, device=like.device)[: n * world]
        fresh = torch.rand(n * world, generator=generator, device=like.device) < self.restart
        uniform, noise = normalize(draw(torch.rand)), draw(torch.randn)[mine]
        kept = self.replay[rows].to(like.dtype)
        fresh |= ~kept.flatten(1).any(1)  # never written yet
        x = torch.where(fresh[:, None, None, None], uniform, kept)[mine].contiguous()
        for _ in range(self.steps):
            x.requires_grad_(True)
            with torch.enable_grad():
                energy = -self.energy(self.backbone(x)).sum()
                (slope,) = torch.autograd.grad(energy, x)
            x = x.detach() - self.step_size * slope + self.noise * draw(torch.randn)[mine]
        self._drawn = rows, collectives.gather_equal_rows(x.detach())
        return x.detach(), noise

    @torch.no_grad()
    def after_step(self, output: StepOutput, skipped: Tensor) -> None:
        rows, samples = self._drawn
        self.replay[rows] = torch.where(skipped, self.replay[rows], samples.to(self.replay.dtype))
