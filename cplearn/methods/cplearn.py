"""CPLearn (Sansone, Lebailly and Tuytelaars, ICML 2025): Algorithm 1 as a method. Head and loss: `cplearn_head.py`."""

import math

import torch
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.flags import nonnegative, positive
from cplearn.loss import DICTIONARIES
from cplearn.loss.prior_buffer import PriorBuffer
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import FORMS, pick_form
from cplearn.methods.base import FrozenCodes, Method, ReferenceLosses, StepOutput
from cplearn.precision import float32
from cplearn_head import PRIORS, CPLearnHead


def reference_losses(beta: float, out_dim: int, n: int, prior: str = "reverse") -> ReferenceLosses:
    """Return reference values of `cplearn_loss` for a batch mean over n images and c = out_dim codes.

    Reverse KL: with h the mean entropy of the assignments, CE >= h and the entropy of p-bar is at most
    min(log c, h + log n); minimizing over h gives the floor min(1, beta) * max(0, log(c / n)). Assignments attain it
    when n divides c; embeddings do not with n < c and beta < 1 (results/theory.md). `aligned`: every image on one
    code, as many codes as can be in equal use. Forward: the prior alone is at least log c; hard assignments leave codes
    out, which costs infinity.
    """
    log_c = math.log(out_dim)
    if prior == "forward":
        return ReferenceLosses(uniform=(beta + 1) * log_c, one_code=math.inf, floor=log_c)
    aligned = max(0.0, math.log(out_dim / n))
    return ReferenceLosses(beta * log_c, log_c, min(1.0, beta) * aligned, aligned)


def aligned_from(out_dim: int, n: int) -> float:
    """Return the beta at which one code per image, log(c / n), costs as much as uniform assignments, beta log c."""
    return 1 - math.log(n) / math.log(out_dim)


def regime(beta: float, out_dim: int, n: int) -> str:
    """Say in which of two ways a run with the reverse prior can have a loss below that of uniform assignments.

    One code per image costs log(c / n), uniform assignments beta log c. So codes are worth choosing if
    n > c^(1 - beta); with fewer images an image does better to spread over many codes, as few of them as the logit scale
    lets it keep from the other images.
    """
    least = out_dim ** (1 - min(1.0, beta))
    if n >= least:
        return f"clustered: one code per image is better than uniform, as {n} images >= c^(1 - beta) = {least:.4g}"
    return (
        f"spread: one code per image is worse than uniform, as {n} images < c^(1 - beta) = {least:.4g}; an image spreads "
        f"over many codes. --beta above {aligned_from(out_dim, n):.2f}, a batch of {math.ceil(least):,} or --prior_buffer "
        f"{math.ceil(least / n) - 1} would change that"
    )


# --- the method --------------------------------------------------------------------------------------


def forward_prior_threshold(out_dim: int) -> float:
    """Return the beta above which the forward prior has a trap: the same assignment for all images, a share d spread
    evenly and the rest on one code, with a loss below that of uniform assignments.

    That is beta H(d) + CE(uniform, p(d)) < (beta + 1) log c, for the best d (by a grid).
    """
    d = torch.linspace(0.0005, 1, 2000, dtype=torch.float64)[:-1] * (1 - 1 / out_dim)
    log_one, log_rest = torch.log1p(-d), (d / (out_dim - 1)).log()
    entropy = -(1 - d) * log_one - d * log_rest
    prior = -(log_one + (out_dim - 1) * log_rest) / out_dim
    log_c = math.log(out_dim)
    return ((prior - log_c) / (log_c - entropy)).min().item()


def forward_prior_warning(beta: float, out_dim: int) -> str | None:
    """Warn of the trap of the forward prior. The reverse prior has none for beta < 1."""
    threshold = forward_prior_threshold(out_dim)
    if beta <= threshold:
        return None
    return (
        f"with the forward prior and --beta {beta:g}, all images partly on one code have a lower loss than uniform "
        f"assignments: a --beta below {threshold:.3f} does not have this trap at --out_dim {out_dim}"
    )


BETA_REMEDIES = {  # against collapse, for every method with this loss
    "cluster": "a smaller --beta, 1 at most",
    "intracluster": "a larger --out_dim or a smaller --beta: fewer images that have to share a code",
}


class CPLearn(Method):
    """Algorithm 1 as a method: views in, loss out."""

    REMEDIES = BETA_REMEDIES | {
        "stuck at uniform": "a larger --lr, --beta or logit scale (--n_ref; start-up prints initial_logit_std: 0.5 to 3)",
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        beta: float = 0.25,
        activation: str = "l2",
        embed_dim: int | None = None,
        n_ref: float = 1.0,
        eps: float = 1e-8,
        prior: str = "reverse",
        prior_group: str = "global",
        dictionary: str = "rademacher",
        dictionary_seed: int = 0,
        prior_buffer: int = 0,
        loss_form: str = "auto",
        loss_precision: str = "auto",
    ):
        super().__init__()
        if prior_buffer and prior_group == "local":
            raise UserError(
                "prior_buffer keeps the usage of all processes: use --prior_group global, or --prior_buffer 0"
            )
        if loss_precision == "bf16" and loss_form != "triton":
            raise UserError("loss_precision bf16 needs --loss_form triton: the other forms have fp32 and tf32")
        if loss_precision == "tf32" and loss_form == "plain":
            raise UserError("loss_precision tf32 is not for --loss_form plain, which is the definition: use stored")
        self.backbone = backbone
        self.head = CPLearnHead(
            backbone.num_features,
            out_dim,
            embed_dim,
            activation,
            eps=eps,
            n_ref=n_ref,
            seed=dictionary_seed,
            dictionary=dictionary,
        )
        self.buffer = PriorBuffer(prior_buffer, out_dim) if prior_buffer else None
        self.out_dim, self.loss_form = out_dim, loss_form
        self.spec = LossSpec(beta, prior, prior_group, self.N_GLOBAL, self.buffer)
        self.loss_precision = loss_precision

    @classmethod
    def add_flags(cls, parser) -> None:
        # fmt: off
        add = cls.flag_group(parser, "CPLearn")
        add("beta", type=nonnegative(float), help="Weight of the invariance term. Above 1 a run can fall to a few codes. Small for features, larger for clusters (docs/losses.md)")
        add("activation", choices=("tanh", "l2"), help="Last step of the projector. The paper uses tanh; see results/cifar10_logit_scale.md for a comparison")
        add("embed_dim", type=positive(int), help="Width f_h of the embedding and the codes (default: the backbone's width, as in the paper's equations; the published code uses 2048)")
        add("n_ref", type=positive(float), help="Sharpness of the assignments (docs/losses.md): 1 is the theory, 64 the published code; change it if the start-up warns of the logits")
        add("eps", type=positive(float), help="Probability left for every wrong code at perfect alignment; must be below 1 / out_dim")
        add("prior", choices=tuple(PRIORS), help="Direction of the prior term: reverse KL(mean p || uniform), or forward CE(uniform, mean p) as in the equations")
        add("prior_group", choices=("global", "local"), help="Images that the batch mean runs over: those of all processes, or (published code) of each one")
        add("prior_buffer", type=nonnegative(int), help="Steps whose mean assignments are kept and averaged into the prior's batch mean; 0 for none. Its effect: results/prior_buffer.md")
        add("dictionary", choices=tuple(DICTIONARIES), help="Random signs (the paper's), or sign-flipped Hadamard blocks: orthogonal inside a block of embed_dim codes, and several times faster")
        add("dictionary_seed", type=nonnegative(int), help="Seed of the frozen codes, apart from --seed")
        add("loss_form", choices=(*FORMS, "plain"), help="How the loss is computed, with the same result to rounding: stored keeps the logits, recomputed saves memory, triton is for GPUs (not yet timed on one), plain is the definition (in float32 the least exact). auto is stored up to 1 GiB of logits, then recomputed")
        add("loss_precision", choices=("auto", "fp32", "tf32", "bf16"), help="Inputs of the loss's products on a GPU: tf32 (and bf16, in --loss_form triton) round the embeddings, the codes are exact. Sums are fp32 always. auto is tf32 beside a backbone in 16 bits (error: docs/losses.md), else fp32")
        # fmt: on

    def forward(self, views: list[Tensor]) -> StepOutput:
        """Compute the loss of a batch. Shape: V tensors (n, 3, H_v, W_v), the two global crops first."""
        features = self.features(views)
        precision = self.loss_precision
        if precision == "auto":  # its error is far below that of a backbone in 16 bits
            precision = "tf32" if torch.is_autocast_enabled("cuda") else "fp32"
        precision = {"fp32": "ieee"}.get(precision, precision)
        return StepOutput(*self.head.loss_of(features, self.spec, self.loss_form, precision))

    def embed(self, features: Tensor) -> Tensor:
        return self.head(float32(features))

    def codebook(self) -> FrozenCodes:
        """Return the frozen codes; the probability is the assignment of the loss, softmax(s kappa h W)."""
        return FrozenCodes(self.head)

    def after_step(self, output: StepOutput, skipped: Tensor) -> None:
        """Keep the step's code usage for the prior, with --prior_buffer. There is no teacher, there are no prototypes."""
        if self.buffer is not None:
            self.buffer.push(output.usage, skipped)

    def references(self, n: int) -> ReferenceLosses:
        """Return reference losses for n images per rank.

        With a prior buffer the floor is that of all its images, were they as they are now: a guide and no bound.
        """
        return reference_losses(self.spec.beta, self.out_dim, self._population(n), self.spec.prior)

    def _population(self, n: int) -> int:
        """Return how many images the prior's mean runs over, for n per rank."""
        population = n * collectives.world_size() if self.spec.prior_group == "global" else n
        return population * (1 + len(self.buffer.ring)) if self.buffer is not None else population

    def loss_matrices(self, n: int, views: int) -> float:
        """Count, as measured, the logits of all views once where they are stored, six times in the plain form."""
        form = self.loss_form if self.loss_form == "plain" else pick_form(self.loss_form, views * n, self.out_dim)
        return {"plain": 6, "stored": 1}.get(form, 0) * views

    def describe(self, n: int) -> dict[str, float | str]:
        """Return derived values that decide a run, for n images per rank."""
        refs, dictionary = self.references(n), self.head.dictionary
        aligned = {}
        if refs.aligned is not None:
            aligned["loss_aligned"] = refs.aligned
            aligned["regime"] = regime(self.spec.beta, self.out_dim, self._population(n))
        return {
            "embed_dim": dictionary.embed_dim,
            "logit_scale": self.head.scale,
            "initial_logit_std": self.head.initial_logit_std(),
            "loss_uniform": refs.uniform,
            "loss_one_code": refs.one_code if math.isfinite(refs.one_code) else "unbounded",
            "loss_floor": refs.floor,
            **aligned,
            "dictionary": f"{dictionary.GENERATOR} seed {dictionary.seed} sha256 {dictionary.checksum()[:12]}",
        }

    def warnings(self) -> list[str]:
        """Name settings that are allowed but known to train badly."""
        messages = []
        std = self.head.initial_logit_std()
        if not 0.5 <= std <= 3:
            messages.append(
                f"the logits start with a standard deviation of {std:.2f}, outside 0.5 to 3: assignments start "
                f"{'almost one-hot' if std > 3 else 'almost uniform'}; --n_ref {(1.6 / std) ** 2 * self.head.n_ref:.3g} would start at 1.6"
            )
        if self.spec.beta == 0:
            messages.append("--beta 0 has no invariance term: nothing ties the views of an image together")
        if self.spec.prior == "forward" and (trap := forward_prior_warning(self.spec.beta, self.out_dim)):
            messages.append(trap)
        if self.spec.beta > 1:
            messages.append(
                f"--beta {self.spec.beta:g} is above 1: near uniform assignments a step towards the same codes for all images then grows"
            )
        if self.buffer is not None and self.buffer.ring.nbytes > 2**28:
            messages.append(f"--prior_buffer keeps {self.buffer.ring.nbytes / 2**20:.0f} MiB, also in every checkpoint")
        return messages
