"""SwAV (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020).

scores    S^v = z^v C^T       unit embeddings, unit prototypes
targets   Q^a = Sinkhorn(S^a / eps) over all images of all ranks (and the queue), a a global view, no gradient
loss      mean over pairs a != b of CE(Q^a, softmax(S^b / tau))

Batch norm in the projector sees one view at a time, as in the other methods here; the original pools all crops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm, over_views
from cplearn.flags import nonnegative, positive
from cplearn.methods.base import LinearCodes, Method, ReferenceLosses, StepOutput, check_out_dim
from cplearn.methods.soft_targets import loss_over_pairs
from cplearn.precision import float32


@torch.no_grad()
def sinkhorn(scores: Tensor, iterations: int = 3) -> Tensor:
    """Assign rows to codes with equal mass per code, alternating columns and rows, in log space, as exp(1 / 0.05)
    overflows fp16.

    Columns run over the rows of all ranks, so all hold parts of one matrix; constant factors of a column are undone
    by its next row step. Shape: S / eps (n, c) -> (n, c), rows sum to 1.
    """
    q = float32(scores).clone()
    for _ in range(iterations):
        q -= collectives.log_mean_over_ranks(q.logsumexp(0))
        q -= q.logsumexp(1, keepdim=True)
    return q.exp_()


class SwAV(Method):
    TEMPERATURE, WIDTH = 0.1, 128
    REMEDIES = {
        "cluster": "more --sinkhorn_iterations, or a longer --queue_length",
        "stuck at uniform": "a smaller --epsilon (0.03), or a longer --freeze_prototypes_epochs",
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_length: int = 3840,
        epoch_queue_starts: int = 15,
        freeze_prototypes_epochs: int = 1,
    ):
        super().__init__()
        check_out_dim("swav", out_dim, self.WIDTH * out_dim)
        self.backbone, self.out_dim = backbone, out_dim
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, 2048), BatchNorm(2048), nn.ReLU(), nn.Linear(2048, self.WIDTH)
        )
        self.prototypes = nn.Linear(self.WIDTH, out_dim, bias=False)
        # Embeddings of the last images, of all ranks and the same on all, newest first: one queue a global view.
        self.register_buffer("queue", torch.zeros(self.N_GLOBAL, queue_length, self.WIDTH))
        self._queue_is_full = False
        self.epsilon, self.iterations = epsilon, sinkhorn_iterations
        self.epoch_queue_starts, self.freeze_epochs = epoch_queue_starts, freeze_prototypes_epochs
        self.before_step(0, 1, 1)
        self._normalize()

    @classmethod
    def add_flags(cls, parser) -> None:
        # fmt: off
        add = cls.flag_group(parser, "SwAV")
        add("epsilon", type=positive(float), help="Of Sinkhorn: smaller is harder. 0.03 if the loss sticks at log c")
        add("sinkhorn_iterations", type=positive(int), help="Alternating normalizations of columns and rows")
        add("queue_length", type=nonnegative(int), help="Embeddings of earlier images in Sinkhorn, over all processes; 0 for none")
        add("epoch_queue_starts", type=nonnegative(int), help="First epoch (from 0) that fills the queue; it is used when it is full")
        add("freeze_prototypes_epochs", type=nonnegative(int), help="Epochs during which the prototypes are kept fixed")
        # fmt: on

    @torch.no_grad()
    def _normalize(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def begin(self) -> None:
        self._normalize()

    def before_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        self.frozen = step < self.freeze_epochs * steps_per_epoch
        self.fill_queue = self.queue.shape[1] > 0 and step >= self.epoch_queue_starts * steps_per_epoch
        if self.fill_queue and not self._queue_is_full:  # until then this waits for the device once a step
            self._queue_is_full = bool(self.queue[:, -1].any())

    def embed(self, z: Tensor) -> Tensor:
        """Embed features. Shape: (n, f) -> (n, 128), of unit length."""
        return F.normalize(self.projector(float32(z)), dim=1)

    def forward(self, views: list[Tensor]) -> StepOutput:
        features = self.features(views)
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            x = [F.normalize(z, dim=1) for z in over_views(self.projector, [float32(z) for z in features])]
            with torch.no_grad():
                targets = [self.targets(a, x[a].detach()) for a in range(self.N_GLOBAL)]
                if self.fill_queue:
                    self._fresh = torch.stack(
                        [collectives.gather_equal_rows(x[a].detach()) for a in range(self.N_GLOBAL)]
                    )
            loss = loss_over_pairs(x, self.prototypes.weight, targets, 1 / self.TEMPERATURE)
            with torch.no_grad():
                entropy = sum(torch.special.entr(q).sum(1).mean() for q in targets) / self.N_GLOBAL
        return StepOutput(loss, {"loss": loss.detach(), "entropy": entropy})

    def targets(self, a: int, x: Tensor) -> Tensor:
        """Compute Q^a of this rank's images; each rank brings its share of the queue. Shape: (n, 128) -> (n, c)."""
        rows = x
        if self._queue_is_full:
            share = self.queue[a, collectives.rank() :: collectives.world_size()]
            rows = torch.cat([x, share.to(x.dtype)])
        return sinkhorn(rows @ self.prototypes.weight.T / self.epsilon, self.iterations)[: len(x)]

    def after_backward(self) -> None:
        if self.frozen:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, output: StepOutput, skipped: Tensor) -> None:
        self._normalize()
        if self.fill_queue:
            pushed = torch.cat([self._fresh.to(self.queue.dtype), self.queue], dim=1)[:, : self.queue.shape[1]]
            self.queue.copy_(torch.where(skipped, self.queue, pushed))

    def codebook(self) -> LinearCodes:
        """Return the prototypes; the probability is as the loss predicts, softmax(S / 0.1), without Sinkhorn."""
        return LinearCodes(self.prototypes.weight, 1 / self.TEMPERATURE)

    def learned_codes(self) -> Tensor:
        return self.prototypes.weight

    def references(self, n: int) -> ReferenceLosses:
        """Return log c, and 0 as the floor: with exactly equal mass per code it would be log(c / N), but three iterations
        leave room below that."""
        return ReferenceLosses(uniform=math.log(self.out_dim), one_code=math.inf, floor=0.0)

    def loss_matrices(self, n: int, views: int) -> float:
        """Count the scores of images and queue four times in Sinkhorn, the targets, one view's targets and logits."""
        queue = self.queue.shape[1] / collectives.world_size()
        return 4 * (1 + queue / n) + self.N_GLOBAL + 3
