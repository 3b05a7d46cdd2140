"""Barlow Twins (Zbontar et al., "Self-Supervised Learning via Redundancy Reduction", ICML 2021), without the c x c matrix.

    C     = (1/N) sum_i zhat^a_i (zhat^b_i)^T       zhat: standardized over the N images of all ranks
    loss  = kappa * [ sum_j (C_jj - 1)^2 + lambda sum_{j != k} C_jk^2 ]

With K = zhat zhat^T (N x N), sum_jk C_jk^2 = <K_a, K_b> / N^2, so the exact loss needs O(N c + N^2) memory: also at
out_dim 131072, where the matrix C alone is 69 GB.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm, over_views
from cplearn.flags import positive
from cplearn.methods.base import Method, ReferenceLosses, StepOutput, check_out_dim
from cplearn.precision import float32


def barlow_loss_explicit(a: Tensor, b: Tensor, lambd: float) -> Tensor:
    """Compute the loss by definition, in one process. Shape: zhat of two views (n, c) -> scalar."""
    c = a.T @ b / len(a)
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + lambd * (c.square().sum() - diagonal.square().sum())


def barlow_loss(views: list[Tensor], lambd: float, n_global: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Average over pairs of a global and another view, from Gram matrices over the images of all ranks.

    The value is the same on every rank; each rank's gradient runs through its own rows and is made larger by the number
    of ranks, so that DDP's average is the gradient of the loss. Shape: V x zhat (n, c) -> scalar, detached terms.
    """
    world = collectives.world_size()
    z = [all_rows(x) for x in views]
    grams = [x @ x.T for x in z]
    n = len(z[0])
    on, off, pairs = 0.0, 0.0, 0
    for a in range(n_global):
        for b in range(len(z)):
            if b == a or b < a:  # C^T of a pair of globals has the same loss
                continue
            weight = 2 if b < n_global else 1
            diagonal = torch.einsum("ij,ij->j", z[a], z[b]) / n
            on = on + weight * (diagonal - 1).square().sum()
            off = off + weight * ((grams[a] * grams[b]).sum() / n**2 - diagonal.square().sum())
            pairs += weight
    on, off = on / pairs, off / pairs
    loss = on + lambd * off
    return loss.detach() + world * (loss - loss.detach()), {"on_diagonal": on.detach(), "off_diagonal": off.detach()}


def all_rows(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, one rank after the other; gradient through this rank's own. (n, c) -> (R n, c)."""
    if collectives.world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(collectives.world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[collectives.rank()] = x
    return torch.cat(parts)


class BarlowTwins(Method):
    CERTAINTY, UNIFORM = "standardized output", "unrelated"
    REMEDIES = {"dimensional": "a larger --lambd"}

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        lambd: float = 0.0051,
        scale_loss: float = 1.0,
        projector_width: int = 2048,
    ):
        super().__init__()
        weights = projector_width * (backbone.num_features + projector_width + out_dim)
        check_out_dim("barlow_twins", out_dim, weights, f" --projector_width {projector_width}")
        self.backbone, self.out_dim, self.lambd, self.scale_loss = backbone, out_dim, lambd, scale_loss
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_width, bias=False), BatchNorm(projector_width), nn.ReLU(),
            nn.Linear(projector_width, projector_width, bias=False), BatchNorm(projector_width), nn.ReLU(),
            nn.Linear(projector_width, out_dim, bias=False),
        )  # fmt: skip
        self.norm = BatchNorm(out_dim, affine=False)

    @classmethod
    def add_flags(cls, parser) -> None:
        # fmt: off
        add = cls.flag_group(parser, "Barlow Twins")
        add("lambd", type=positive(float), help="Weight of the off-diagonal terms")
        add("scale_loss", type=positive(float), help="Factor of the whole loss: 1 in the original, 0.1 in some forks (matters for LARS, weight decay and clipping)")
        add("projector_width", type=positive(int), help="Of its two hidden layers; 8192 in the original, with out_dim 8192")
        # fmt: on

    def forward(self, views: list[Tensor]) -> StepOutput:
        features = self.features(views)
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            z = over_views([*self.projector, self.norm], [float32(x) for x in features])
            loss, terms = barlow_loss(z, self.lambd, self.N_GLOBAL)
            loss = self.scale_loss * loss
        return StepOutput(loss, {"loss": loss.detach(), **terms})

    def embed(self, features: Tensor) -> Tensor:
        """Return the last hidden layer, as wide for any `out_dim`."""
        return self.projector[:-1](float32(features))

    def assign(self, embedding: Tensor) -> Tensor:
        """Return the largest standardized output. Barlow Twins is no clustering method: this is the paper's convention."""
        return self.norm(self.projector[-1](embedding)).argmax(1)

    def certainty(self, embedding: Tensor) -> Tensor:
        """Return the largest standardized output itself: there is no softmax, so no probability."""
        return self.norm(self.projector[-1](embedding)).amax(1)

    def references(self, n: int) -> ReferenceLosses:
        """Return `uniform`, outputs of independent images, C_jk of variance 1/N; and the floor: C has a rank below N."""
        population = n * collectives.world_size()
        c, lambd = self.out_dim, self.lambd
        unrelated = c * (1 + 1 / population) + lambd * c * (c - 1) / population
        floor = min(1.0, lambd) * max(0, c - population + 1)
        return ReferenceLosses(self.scale_loss * unrelated, float("inf"), self.scale_loss * floor)

    def loss_matrices(self, n: int, views: int) -> float:
        """Count zhat of all ranks, its gradient and a product's copy for each view; never c x c."""
        return 3 * views * collectives.world_size()
