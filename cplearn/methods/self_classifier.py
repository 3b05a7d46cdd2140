"""Self-Classifier (Amrani, Karlinsky and Bronstein, "Self-Supervised Classification Network", ECCV 2022), one head.

    T_ij = softmax over the N images of all ranks of l^a_ij / tau_col, then each row divided by its sum
    S_ij = softmax over the codes of l^b_ij / tau_row, then each column divided by its sum over all N images
    loss = mean over pairs of -(1/n) sum_ij T_ij log(N/c S_ij + 1e-12)

No teacher and no stop-gradient. The original's queue of nearest neighbors is left out. `--head cplearn` puts the same
loss on CPLearn's projector and frozen dictionary; with its default width of 2048 the sizes in the paper's Table 8 fit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm, over_views
from cplearn.flags import nonnegative, positive
from cplearn.methods.base import FrozenCodes, LinearCodes, Method, ReferenceLosses, StepOutput, check_out_dim
from cplearn.precision import float32
from cplearn_head import CPLearnHead


def self_classifier_loss(
    logits: list[Tensor], n_global: int = 2, row_temp: float = 0.1, col_temp: float = 0.05, eps: float = 1e-12
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Average over all ordered pairs of different views but local-local ones.

    Shape: V x (n, c) -> scalar loss; detached loss and mean entropy of the row softmax of the global crops; its detached
    mean over this rank's images (c,).
    """
    n, c = logits[0].shape
    population = n * collectives.world_size()
    # log T and log(N/c S): both normalized over the images of all ranks, with gradient
    targets = [F.softmax(x / col_temp - collectives.logsumexp_over_ranks(x / col_temp), dim=1) for x in logits]
    predictions, usage, entropy = [], logits[0].new_zeros(c), logits[0].new_zeros(())
    for v, x in enumerate(logits):
        rows = F.log_softmax(x / row_temp, dim=1)
        if v < n_global:
            with torch.no_grad():
                p = rows.exp()
                usage += p.mean(0) / n_global
                entropy -= torch.dot(p.flatten(), rows.flatten()) / (n * n_global)
        rows = rows - collectives.logsumexp_over_ranks(rows) + math.log(population / c)
        predictions.append(torch.logaddexp(rows, rows.new_full((), math.log(eps))))
    loss, pairs = 0.0, 0
    for a, target in enumerate(targets):
        for b, prediction in enumerate(predictions):
            if a != b and (a < n_global or b < n_global):
                loss = loss - (target * prediction).sum() / n
                pairs += 1
    loss = loss / pairs
    return loss, {"loss": loss.detach(), "entropy": entropy}, usage


class SelfClassifier(Method):
    WIDTH = 128

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        head: str = "selfclassifier",
        row_temp: float = 0.1,
        col_temp: float = 0.05,
        dictionary_seed: int = 0,
        embed_dim: int = 2048,
        activation: str = "l2",
    ):
        super().__init__()
        check_out_dim("self_classifier", out_dim, self.WIDTH * out_dim)
        self.backbone, self.out_dim, self.row_temp, self.col_temp = backbone, out_dim, row_temp, col_temp
        if head == "cplearn":
            self.frozen_head = CPLearnHead(
                backbone.num_features, out_dim, embed_dim, activation, eps=0.5 / out_dim, seed=dictionary_seed
            )
        else:
            self.frozen_head = None
            self.projector = nn.Sequential(
                nn.Linear(backbone.num_features, 4096), BatchNorm(4096), nn.LeakyReLU(),
                nn.Linear(4096, self.WIDTH),
            )  # fmt: skip
            self.classifier = nn.Linear(self.WIDTH, out_dim, bias=False)  # rows are brought to length 1

    @classmethod
    def add_flags(cls, parser) -> None:
        # fmt: off
        add = cls.flag_group(parser, "Self-Classifier")
        add("head", choices=("selfclassifier", "cplearn"), help="Its own, or CPLearn's projector and frozen dictionary")
        add("row_temp", type=positive(float), help="Temperature of the softmax over codes")
        add("col_temp", type=positive(float), help="Temperature of the softmax over images")
        add("embed_dim", type=positive(int), help="Width of the embedding and the codes of --head cplearn")
        add("activation", choices=("tanh", "l2"), help="Last step of the projector of --head cplearn")
        add("dictionary_seed", type=nonnegative(int), help="Seed of the frozen codes of --head cplearn")
        # fmt: on

    def embed(self, features: Tensor) -> Tensor:
        """Embed features. Shape: (n, f) -> (n, 128), of unit length; or CPLearn's (n, embed_dim)."""
        z = float32(features)
        return F.normalize(self.projector(z), dim=1) if self.frozen_head is None else self.frozen_head(z)

    def logits(self, features: list[Tensor]) -> list[Tensor]:
        """Compute the cosines of each view. Shape: V x (n, f) -> V x (n, c)."""
        if self.frozen_head is not None:
            head = self.frozen_head
            return [head.logits(h) / head.scale for h in head.embed_views(features)]
        codes = self.codebook().rows.T
        return [F.normalize(z, dim=1) @ codes for z in over_views(self.projector, features)]

    def forward(self, views: list[Tensor]) -> StepOutput:
        features = self.features(views)
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            logits = self.logits([float32(z) for z in features])
            return StepOutput(*self_classifier_loss(logits, self.N_GLOBAL, self.row_temp, self.col_temp))

    def codebook(self) -> FrozenCodes | LinearCodes:
        """Return the codes of either head; the probability is of the softmax over codes, without a column's sum."""
        if self.frozen_head is not None:
            return FrozenCodes(self.frozen_head, 1 / self.row_temp)
        return LinearCodes(self.classifier.weight, 1 / self.row_temp, unit=True)

    def references(self, n: int) -> ReferenceLosses:
        """Return log c, the loss of equal logits for every image, and the floor: N/c S is at most N/c, and by Gibbs'
        inequality the loss is never below 0."""
        log_c = math.log(self.out_dim)
        floor = max(0.0, math.log(self.out_dim / (n * collectives.world_size())))
        return ReferenceLosses(uniform=log_c, one_code=log_c, floor=floor)

    def loss_matrices(self, n: int, views: int) -> float:
        """Count ten per view, as measured: gradient runs through both sides."""
        return 10 * views
