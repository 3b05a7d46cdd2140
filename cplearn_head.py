"""CPLearn's head and loss: projector, frozen codes, and the terms of the loss in plain form.

Sansone, Lebailly, Tuytelaars, "Collapse-Proof Non-Contrastive Self-Supervised Learning", ICML 2025.

    z = g(view)                        backbone                                         (n, f)
    h = phi(BN(A z + b))               embedding, phi = tanh or L2 normalization        (n, f_h)
    logits = s * kappa * h W           W in {-1, +1}^(f_h x c), frozen                  (n, c)
    p = softmax(logits)                soft assignment to the c codes
    loss = beta * CE(p, p') + KL(mean p || uniform), symmetric in the views

Letters: n images per rank, f backbone width, f_h `embed_dim`, c `out_dim` (the number of codes). Everything
is in log space and float32. There is no teacher, no stop-gradient, no centering and no predictor.

In a training loop of your own:

    head = CPLearnHead(in_dim=backbone.num_features, out_dim=16384)
    loss, terms = head.loss([backbone(view1), backbone(view2)], beta=0.25)

The loss here is the plain form, which stores the (n, c) logits: the definition. `CPLearnHead.loss` takes the
same from `cplearn.loss.streamed`, whose gradients are closer to exact in float32. The method that trains a
backbone is `cplearn.methods.cplearn`.
"""

import math
from collections.abc import Iterator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm, over_views
from cplearn.errors import UserError
from cplearn.host import physical_memory
from cplearn.loss import DICTIONARIES
from cplearn.loss.spec import LossSpec, largest_probability
from cplearn.loss.streamed import block_size, streamed_loss
from cplearn.precision import float32


class CPLearnHead(nn.Module):
    """Projector and frozen dictionary (paper, section 3 and Algorithm 1).

    `n_ref` sets the logit scale s = sqrt(n_ref) * log((1 - eps (c-1)) / eps). 1 is the theory, in which the
    batch size cancels and logits are s times a cosine; 64 is what the published CIFAR code does at its batch
    of 64. It is a constant: train, evaluation and any number of GPUs see the same function.

    Raises `UserError` for out_dim < 2, eps outside (0, 1/out_dim), or an unknown activation or dictionary.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        embed_dim: int | None = None,
        activation: str = "l2",
        eps: float = 1e-8,
        n_ref: float = 1.0,
        seed: int = 0,
        dictionary: str = "rademacher",
    ):
        super().__init__()
        if dictionary not in DICTIONARIES:
            raise UserError(f"dictionary {dictionary!r} is unknown: {', '.join(DICTIONARIES)}")
        if activation not in ("tanh", "l2"):
            raise UserError(f"activation {activation!r} is unknown: tanh or l2")
        if n_ref <= 0:
            raise UserError(f"n_ref {n_ref:g} must be positive: 1 (theory) or 64 (as published)")
        if out_dim >= 2 and not 0 < eps < 1 / out_dim:
            raise UserError(
                f"eps {eps:g} must lie between 0 and 1/out_dim = {1 / out_dim:.3g}: use a smaller --eps or --out_dim"
            )
        embed_dim = in_dim if embed_dim is None else embed_dim
        need = embed_dim * (out_dim / 8 + 4 * in_dim)
        if need > physical_memory():
            raise UserError(
                f"embed_dim {embed_dim} with out_dim {out_dim}: codes and projector take {need / 1e9:,.0f} GB, this "
                f"machine has {physical_memory() / 1e9:.0f} GB: make one of them smaller"
            )
        self.dictionary = DICTIONARIES[dictionary](out_dim, embed_dim, seed)
        self.linear = nn.Linear(in_dim, embed_dim)
        self.norm = BatchNorm(embed_dim)
        self.activation = activation
        self.n_ref = n_ref
        self.scale = math.sqrt(n_ref) * math.log((1 - eps * (out_dim - 1)) / eps)
        # kappa: |logit| <= scale, with equality at h = a code (tanh) or h along a code (l2).
        self.kappa = 1 / embed_dim if activation == "tanh" else 1 / math.sqrt(embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Embed backbone features. Shape: z (n, f) -> h (n, f_h), in (-1, 1) or of unit length."""
        return self._activate(self.norm(self.linear(z)))

    def embed_views(self, features: list[Tensor]) -> list[Tensor]:
        """Embed the features of each view; batch norm sees one at a time. Shape: V x (n, f) -> V x (n, f_h)."""
        return [self._activate(a) for a in over_views((self.linear, self.norm), features)]

    def _activate(self, a: Tensor) -> Tensor:
        return torch.tanh(a) if self.activation == "tanh" else F.normalize(a, dim=1)

    def logits(self, h: Tensor) -> Tensor:
        """Compute scaled similarities to all codes, by definition; unpacks the whole dictionary.

        Shape: h (n, f_h) -> (n, c) float32.
        """
        h = float32(h)
        return F.linear(h * (self.scale * self.kappa), self.dictionary.codes(dtype=h.dtype))

    @torch.no_grad()
    def score_blocks(self, h: Tensor, block: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield <h_i, w_j>, a block of codes at a time, with the number of its first code: no (n, c) matrix.

        Each block is overwritten by the next. Shape: h (n, f_h) -> (b, n) float32.
        """
        block = block or block_size(len(h), self.dictionary, h.device)
        columns = h.float().T.contiguous()
        read, scratch = self.dictionary.reader(block), columns.new_empty(block, len(h))
        for start in range(0, self.dictionary.out_dim, block):
            stop = min(start + block, self.dictionary.out_dim)
            with torch.autocast(h.device.type, enabled=False):
                scores = read(start, stop).scores(columns, scratch[: stop - start])
            yield start, scores

    @torch.no_grad()
    def assign(self, h: Tensor, block: int | None = None) -> Tensor:
        """Return the index of each row's code, argmax_j <h_i, w_j>.

        Ties go to the lowest index. Shape: h (n, f_h) -> (n,) int64.
        """
        best = h.new_full((len(h),), -math.inf, dtype=torch.float32)
        index = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        for start, scores in self.score_blocks(h, block):
            value, j = scores.max(dim=0)
            better = value > best
            best = torch.where(better, value, best)
            index = torch.where(better, j + start, index)
        return index

    def certainty(self, h: Tensor, scale: float | None = None, block: int | None = None) -> Tensor:
        """Return the probability of the code that `assign` chooses: the largest of softmax(`logits`), streamed.

        `scale`: of the cosines, in place of the head's own. Shape: h (n, f_h) -> (n,) float32.
        """
        factor = self.kappa * (self.scale if scale is None else scale)
        return largest_probability(factor * scores.T for _, scores in self.score_blocks(h, block))

    def loss(
        self, features: list[Tensor], beta: float = 0.25, *, n_global: int = 2
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch from backbone features, for a training loop of your own.

        Batch norm sees one view at a time. In several processes every rank must call it with as many images; the prior
        then runs over all of them, and the averaging of gradients in DDP gives the exact gradient.

        Shape: one (n, in_dim) tensor per view, the `n_global` global crops first -> scalar loss; detached scalars
        loss, invariance, prior, entropy (nats).
        """
        loss, terms, _ = self.loss_of(features, LossSpec(beta, n_global=n_global))
        return loss, terms

    def loss_of(
        self, features: list[Tensor], spec: LossSpec, form: str = "auto", precision: str = "ieee"
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute the loss `spec` by one of the streamed forms, or by `plain`, in float32 also under autocast.

        Shape: as `loss`, and the detached mean assignment (c,), as in `cplearn_loss`.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            h = self.embed_views([float32(z) for z in features])
            if form == "plain":
                return cplearn_loss([self.logits(x) for x in h], spec)
            scale = self.scale * self.kappa
            return streamed_loss(h, self.dictionary, scale, spec, form=form, precision=precision)

    def initial_logit_std(self) -> float:
        """Return the standard deviation of the logits over codes at initialization, s * kappa * |h|.

        |h| = 1 for l2; for tanh of unit-normal features E|h|^2 = 0.394 f_h.
        """
        norm = 1.0 if self.activation == "l2" else math.sqrt(0.39429 * self.dictionary.embed_dim)
        return self.scale * self.kappa * norm


# --- loss terms ------------------------------------------------------------------------------------


def invariance(log_probs: list[Tensor], n_global: int = 2) -> Tensor:
    """Compute the mean cross-entropy between views, gradient through both arguments (L_inv).

        1/|P| * sum over (a, b) in P of 1/n sum_i -sum_j p^a_ij log p^b_ij

    P: ordered pairs of different views whose first is a global crop, |P| = G (V - 1). The sum over b is
    taken before the product with p^a, so the work grows with V + G and not with G * V.

    Shape: list of V tensors (n, c), global crops first -> scalar.
    """
    n, views = len(log_probs[0]), len(log_probs)
    total = reduce(torch.add, log_probs)
    ce = sum(-(lp.exp() * (total - lp)).sum() for lp in log_probs[:n_global])
    return ce / (n_global * (views - 1) * n)


def log_mean_probs(log_probs: Tensor, prior_group: str = "global") -> Tensor:
    """Return log p-bar, the log of the mean assignment of one view over its reference population.

    The population is the images of all ranks (`global`, exact gradient under DDP) or this rank's (`local`).
    Shape: (n, c) -> (c,).
    """
    local = log_probs.logsumexp(0) - math.log(len(log_probs))
    return collectives.log_mean_over_ranks(local) if prior_group == "global" else local


def prior_reverse(log_mean: Tensor) -> Tensor:
    """Compute KL(p-bar || uniform) = sum_j p-bar_j (log p-bar_j + log c); 0 .. log c. Shape: (c,) -> scalar."""
    return (log_mean.exp() * (log_mean + math.log(len(log_mean)))).sum()


def prior_forward(log_mean: Tensor) -> Tensor:
    """Compute CE(uniform, p-bar) = -mean_j log p-bar_j = log c + KL(uniform || p-bar). Shape: (c,) -> scalar."""
    return -log_mean.mean()


PRIORS = {"reverse": prior_reverse, "forward": prior_forward}


def cplearn_loss(logits: list[Tensor], spec: LossSpec) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute beta * invariance + prior, averaged over the global crops (paper, Algorithm 1, symmetrized).

    Shape: one (n, c) tensor of logits per view, the global crops first -> scalar loss; detached scalars loss,
    invariance, prior, entropy (mean entropy of the assignments of the global crops, nats); detached mean assignment of
    the population, averaged over the global crops (c,). Raises ValueError for fewer than two views.
    """
    spec.check_views(len(logits))
    n_global, buffer = spec.n_global, spec.buffer
    log_probs = [F.log_softmax(float32(x), dim=1) for x in logits]
    inv = invariance(log_probs, n_global)
    log_means = [log_mean_probs(lp, spec.prior_group) for lp in log_probs[:n_global]]
    mixed = log_means if buffer is None else [buffer.mix(x) for x in log_means]
    pri = sum(PRIORS[spec.prior](x) for x in mixed) / n_global
    loss = spec.beta * inv + pri
    with torch.no_grad():
        usage = sum(x.exp() for x in log_means) / n_global
        entropy = sum(-(lp.exp() * lp).sum(1).mean() for lp in log_probs[:n_global]) / n_global
    terms = {"loss": loss, "invariance": inv, "prior": pri, "entropy": entropy}
    return loss, {name: value.detach() for name, value in terms.items()}, usage
