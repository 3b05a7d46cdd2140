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
from cplearn.distributed.batch_norm import BatchNorm
from cplearn.errors import UserError
from cplearn.methods.base import Method, ReferenceLosses, check_out_dim, forward_by_size
from cplearn.methods.cplearn import BETA_KNOBS, forward_prior_warning, reference_losses
from cplearn.precision import float32
from cplearn_head import cplearn_loss, log_mean_probs, prior_forward


def gedi_loss_as_published(logits: list[Tensor], beta: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The `sum` reading; every other view predicts the first.

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
    TEMPERATURE = 0.1
    KNOBS = BETA_KNOBS | {"stuck at uniform": "a larger --lr or --beta"}

    def __init__(self, backbone: nn.Module, *, out_dim: int, beta: float, reduction: str, hidden: int = 2048):
        super().__init__()
        if beta <= 0:
            raise UserError(f"--beta {beta:g} must be positive")
        check_out_dim("gedi", out_dim, hidden * out_dim)
        self.backbone, self.out_dim, self.beta, self.reduction = backbone, out_dim, beta, reduction
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, hidden),
            BatchNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_dim),
        )

    @staticmethod
    def add_flags(parser) -> None:
        # fmt: off
        g = parser.add_argument_group("GEDI")
        g.add_argument("--beta", type=float, default=0.25, help="Weight of the invariance term")
        g.add_argument("--gedi_prior_reduction", default="mean", choices=("mean", "sum"), help="Of the prior over codes: mean is the equation, sum the published code (a prior c times stronger; there --beta 0.1)")
        # fmt: on

    @classmethod
    def from_args(cls, backbone: nn.Module, args) -> "GEDI":
        return cls(backbone, out_dim=args.out_dim, beta=args.beta, reduction=args.gedi_prior_reduction)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        features = forward_by_size(self.backbone, views)
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            logits = [self.projector(float32(z)) / self.TEMPERATURE for z in features]  # one view at a time
            if self.reduction == "sum":
                loss, terms, self.usage = gedi_loss_as_published(logits, self.beta)
            else:
                loss, terms, self.usage = cplearn_loss(logits, self.beta, prior="forward", n_global=self.N_GLOBAL)
        return loss, terms

    def embed(self, features: Tensor) -> Tensor:
        """The last hidden layer."""
        return self.projector[:-1](float32(features))

    def assign(self, embedding: Tensor) -> Tensor:
        return self.projector[-1](embedding).argmax(1)

    def code_vectors(self, codes: Tensor) -> Tensor:
        return self.projector[-1].weight[codes]

    def references(self, n: int) -> ReferenceLosses:
        if self.reduction == "mean":
            return reference_losses(self.beta, self.out_dim, n * collectives.world_size(), "forward")
        c, log_c = self.out_dim, math.log(self.out_dim)
        return ReferenceLosses(0.5 * (self.beta + c) * log_c, math.inf, 0.5 * c * log_c)

    def loss_memory(self, n: int, views: int) -> int:
        """Measured: nine tensors of images x codes a view, as gradient runs through both sides, and a weight gradient."""
        return 4 * self.out_dim * (9 * views * n + self.projector[-1].in_features)

    def warnings(self) -> list[str]:
        found = []
        if self.beta > 1:
            found.append(f"--beta {self.beta:g} is above 1: collapse to one code is then a growing direction")
        if self.reduction == "mean" and (trap := forward_prior_warning(self.beta, self.out_dim)):
            found.append(trap)
        return found
