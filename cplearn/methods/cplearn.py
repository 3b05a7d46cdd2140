"""CPLearn (Sansone, Lebailly and Tuytelaars, ICML 2025): Algorithm 1 as a method. Head and loss: `cplearn_head.py`."""

import math

import torch
from torch import Tensor, nn

from cplearn.dictionary import DICTIONARIES
from cplearn.dictionary.prior_buffer import PriorBuffer
from cplearn.dictionary.streamed_loss import FORMS
from cplearn.dictionary.terms import LossSpec
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.flags import nonnegative, positive
from cplearn.methods.base import Method, ReferenceLosses, StepOutput
from cplearn.precision import float32
from cplearn_head import PRIORS, CPLearnHead


def reference_losses(beta: float, out_dim: int, n: int, prior: str = "reverse") -> ReferenceLosses:
    """Return reference values of `cplearn_loss` for a batch mean over n images and c = out_dim codes.

    Reverse KL: with h the mean entropy of the assignments, CE >= h and the entropy of p-bar is at most
    min(log c, h + log n); minimizing over h gives the floor min(1, beta) * max(0, log(c / n)), which is
    attained when n divides c. Forward: the prior alone is at least log c; one code costs infinity in the
    limit of hard assignments.
    """
    log_c = math.log(out_dim)
    if prior == "forward":
        return ReferenceLosses(uniform=(beta + 1) * log_c, one_code=math.inf, floor=log_c)
    return ReferenceLosses(beta * log_c, log_c, min(1.0, beta) * max(0.0, math.log(out_dim / n)))


# --- the method --------------------------------------------------------------------------------------


def forward_prior_warning(beta: float, out_dim: int) -> str | None:
    """Warn of a trap in beta * CE(p, p) + CE(uniform, mean p): the same assignment for all images, half on one code and the
    rest spread evenly, has a lower loss than the uniform one if about beta log c > 1 (RESULTS.md). The reverse prior
    has none for beta < 1."""
    if beta * math.log(out_dim) <= 1:
        return None
    return (
        f"with the forward prior and --beta {beta:g}, putting all images half on one code lowers the loss: a --beta below "
        f"1 / log(out_dim) = {1 / math.log(out_dim):.2g} does not have this trap"
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
        add("beta", type=nonnegative(float), help="Weight of the invariance term. Above 1 all images drift to one code; smaller for more codes or weaker augmentation")
        add("activation", choices=("tanh", "l2"), help="Last step of the projector. The paper uses tanh; see results/cifar10_logit_scale.md for a comparison")
        add("embed_dim", type=positive(int), help="Width f_h of the embedding and the codes (default: the backbone's width, as in the paper's equations; the published code uses 2048)")
        add("n_ref", type=positive(float), help="Logit scale: sqrt(n_ref) * log((1 - eps (c-1)) / eps). 1 is the theory, 64 the published code. Change it if the start-up warns about the logits")
        add("eps", type=positive(float), help="Probability left for every wrong code at perfect alignment; must be below 1 / out_dim")
        add("prior", choices=tuple(PRIORS), help="Direction of the prior term: reverse KL(mean p || uniform), or forward CE(uniform, mean p) as in the equations")
        add("prior_group", choices=("global", "local"), help="Images that the batch mean runs over: those of all processes, or (published code) of each one")
        add("prior_buffer", type=nonnegative(int), help="Steps whose mean assignments are kept and averaged into the prior's batch mean; 0 for none. Its effect: results/prior_buffer.md")
        add("dictionary", choices=tuple(DICTIONARIES), help="Random signs (the paper's), or sign-flipped Hadamard blocks: orthogonal inside a block of embed_dim codes, and several times faster")
        add("dictionary_seed", type=nonnegative(int), help="Seed of the frozen codes, apart from --seed")
        add("loss_form", choices=(*FORMS, "plain"), help="How the loss is computed, with the same result to rounding: stored keeps the logits, recomputed saves memory, triton is for GPUs (not yet timed on one), plain is the definition. auto is stored up to 1 GiB of logits, then recomputed")
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

    def assign(self, embedding: Tensor) -> Tensor:
        return self.head.assign(embedding)

    def certainty(self, embedding: Tensor) -> Tensor:
        """Return p of the code, the assignment of the loss: softmax(s kappa h W), with the head's own scale."""
        return self.head.certainty(embedding)

    def code_vectors(self, codes: Tensor) -> Tensor:
        return self.head.dictionary.select(codes)

    def after_step(self, output: StepOutput, skipped: Tensor) -> None:
        """Keep the step's code usage for the prior, with --prior_buffer. There is no teacher, there are no prototypes."""
        if self.buffer is not None:
            self.buffer.push(output.usage, skipped)

    def references(self, n: int) -> ReferenceLosses:
        """Return reference losses for n images per rank.

        With a prior buffer the floor is that of all its images, were they as they are now: a guide and no bound.
        """
        population = n * collectives.world_size() if self.spec.prior_group == "global" else n
        if self.buffer is not None:
            population *= 1 + len(self.buffer.ring)
        return reference_losses(self.spec.beta, self.head.dictionary.out_dim, population, self.spec.prior)

    def describe(self, n: int) -> dict[str, float | str]:
        """Return derived values that decide a run, for n images per rank."""
        std = self.head.initial_logit_std()
        refs = self.references(n)
        return {
            "embed_dim": self.head.dictionary.embed_dim,
            "logit_scale": self.head.scale,
            "initial_logit_std": std,
            "loss_uniform": refs.uniform,
            "loss_one_code": refs.one_code if math.isfinite(refs.one_code) else "unbounded",
            "loss_floor": refs.floor,
            "dictionary": f"{self.head.dictionary.GENERATOR} seed {self.head.dictionary.seed} sha256 {self.head.dictionary.checksum()[:12]}",
        }

    def warnings(self) -> list[str]:
        """Name settings that are allowed but known to train badly."""
        found = []
        std = self.head.initial_logit_std()
        if not 0.5 <= std <= 3:
            found.append(
                f"the logits start with a standard deviation of {std:.2f}, outside 0.5 to 3: assignments start "
                f"{'almost one-hot' if std > 3 else 'almost uniform'}; --n_ref {(1.6 / std) ** 2 * self.head.n_ref:.3g} would start at 1.6"
            )
        if self.spec.beta == 0:
            found.append("--beta 0 has no invariance term: nothing ties the views of an image together")
        if self.spec.prior == "forward" and (trap := forward_prior_warning(self.spec.beta, self.out_dim)):
            found.append(trap)
        if self.spec.beta > 1:
            found.append(f"--beta {self.spec.beta:g} is above 1: collapse to one code is then a growing direction")
        if self.buffer is not None and self.buffer.ring.nbytes > 2**28:
            found.append(f"--prior_buffer keeps {self.buffer.ring.nbytes / 2**20:.0f} MiB, also in every checkpoint")
        return found
