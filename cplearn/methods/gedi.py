"""GEDI without its generative term (Sansone and Manhaeve 2022-2024; the paper's "GEDI no gen").

The same losses as CPLearn on a learned projector f -> 2048 -> c with batch norm and ReLU, temperature 0.1. Two readings:

    mean (the equations)   beta * invariance + CE(uniform, mean p), both directions, all ranks: `cplearn_loss`
    sum (published code)   1/2 beta * CE(p^2, p^1) + 1/2 sum_j -log mean p^1_j, one direction, each rank for itself

The sum makes the prior c times stronger.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm, over_views
from cplearn.flags import positive
from cplearn.loss.spec import LossSpec
from cplearn.methods.base import LinearCodes, Method, ReferenceLosses, StepOutput, check_out_dim
from cplearn.methods.cplearn import BETA_REMEDIES, forward_prior_warning, reference_losses
from cplearn.precision import float32
from cplearn_head import cplearn_loss, log_mean_probs, prior_forward


def gedi_loss_as_published(logits: list[Tensor], beta: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute the `sum` reading; every other view predicts the first.

    Shape: V x (n, c) -> scalar loss, detached terms, detached mean assignment of the first view (c,).
    """
    first, *others = [F.log_softmax(float32(x), dim=1) for x in logits]
    invariance = sum(-(x.exp() * first).sum(1).mean() for x in others) / len(others)
    log_mean = log_mean_probs(first, "local")
    prior = first.shape[1] * prior_forward(log_mean)
    loss = 0.5 * beta * invariance + 0.5 * prior
    entropy = -(first.exp() * first).sum(1).mean()
    terms = {"loss": loss, "invariance": invariance, "prior": prior, "entropy": entropy}
    return loss, {name: value.detach() for name, value in terms.items()}, log_mean.detach().exp()


class GEDI(Method):
    TEMPERATURE, WIDTH = 0.1, 2048
    REMEDIES = BETA_REMEDIES | {"stuck at uniform": "a larger --lr or --beta"}

    def __init__(self, backbone: nn.Module, *, out_dim: int, beta: float = 0.25, gedi_prior_reduction: str = "mean"):
        super().__init__()
        check_out_dim("gedi", out_dim, self.WIDTH * out_dim)
        self.backbone, self.out_dim, self.beta, self.reduction = backbone, out_dim, beta, gedi_prior_reduction
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, self.WIDTH),
            BatchNorm(self.WIDTH),
            nn.ReLU(),
            nn.Linear(self.WIDTH, out_dim),
        )

    @classmethod
    def add_flags(cls, parser) -> None:
        # fmt: off
        add = cls.flag_group(parser, "GEDI")
        add("beta", type=positive(float), help="Weight of the invariance term")
        add("gedi_prior_reduction", choices=("mean", "sum"), help="Of the prior over codes: mean is the equation, sum the published code (a prior c times stronger; there --beta 0.1)")
        # fmt: on

    def forward(self, views: list[Tensor]) -> StepOutput:
        features = self.features(views)
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            logits = [x / self.TEMPERATURE for x in over_views(self.projector, [float32(z) for z in features])]
            if self.reduction == "sum":
                return StepOutput(*gedi_loss_as_published(logits, self.beta))
            return StepOutput(*cplearn_loss(logits, LossSpec(self.beta, "forward", n_global=self.N_GLOBAL)))

    def embed(self, features: Tensor) -> Tensor:
        """Return the last hidden layer."""
        return self.projector[:-1](float32(features))

    def codebook(self) -> LinearCodes:
        """Return the last layer; the probability is the assignment of the loss, softmax(logits / 0.1)."""
        return LinearCodes(self.projector[-1].weight, 1 / self.TEMPERATURE, self.projector[-1].bias)

    def references(self, n: int) -> ReferenceLosses:
        if self.reduction == "mean":
            return reference_losses(self.beta, self.out_dim, n * collectives.world_size(), "forward")
        c, log_c = self.out_dim, math.log(self.out_dim)
        return ReferenceLosses(0.5 * (self.beta + c) * log_c, math.inf, 0.5 * c * log_c)

    def loss_matrices(self, n: int, views: int) -> float:
        """Count nine per view, as measured: gradient runs through both sides."""
        return 9 * views

    def warnings(self) -> list[str]:
        messages = []
        limit = 1 if self.reduction == "mean" else self.out_dim  # the sum makes the prior so many times stronger
        if self.beta > limit:
            messages.append(
                f"--beta {self.beta:g} is above {limit}: near uniform assignments a step towards the same codes for all "
                "images then grows"
            )
        if self.reduction == "mean" and (trap := forward_prior_warning(self.beta, self.out_dim)):
            messages.append(trap)
        return messages
