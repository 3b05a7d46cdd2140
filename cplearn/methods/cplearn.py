"""TODO cplearn.methods.cplearn."""

import math

import torch
from torch import Tensor, nn

from cplearn.dictionary import DICTIONARIES
from cplearn.dictionary.prior_buffer import PriorBuffer
from cplearn.dictionary.streamed_loss import FORMS, streamed_loss
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.methods.base import Method, ReferenceLosses, forward_by_size
from cplearn.precision import float32
from cplearn_head import PRIORS, CPLearnHead, cplearn_loss


def reference_losses(beta: float, out_dim: int, n: int, prior: str = "reverse") -> ReferenceLosses:
    """Reference values of `cplearn_loss` for a batch mean over n images and c = out_dim codes.

    Reverse KL: with h the mean entropy of the assignments, CE >= h and the entropy of p-bar is at most
    min(log c, h + log n); minimising over h gives the floor min(1, beta) * max(0, log(c / n)), which is
    attained when n divides c. Forward: the prior alone is at least log c; one code costs infinity in the
    limit of hard assignments.
    """
    log_c = math.log(out_dim)
    if prior == "forward":
        return ReferenceLosses(uniform=(beta + 1) * log_c, one_code=math.inf, floor=log_c)
    return ReferenceLosses(beta * log_c, log_c, min(1.0, beta) * max(0.0, math.log(out_dim / n)))


# --- the method --------------------------------------------------------------------------------------


def forward_prior_warning(beta: float, out_dim: int) -> str | None:
    """Of a trap in beta * CE(p, p) + CE(uniform, mean p): the same assignment for all images, half on one code and the
    rest spread evenly, has a lower loss than the uniform one if about beta log c > 1 (RESULTS.md). The reverse prior
    has none for beta < 1."""
    if beta * math.log(out_dim) <= 1:
        return None
    return (
        f"with the forward prior and --beta {beta:g}, putting all images half on one code lowers the loss: a --beta below "
        f"1 / log(out_dim) = {1 / math.log(out_dim):.2g} does not have this trap"
    )


BETA_KNOBS = {  # against collapse, for every method with this loss
    "cluster": "a smaller --beta, 1 at most",
    "intracluster": "a larger --out_dim or a smaller --beta: fewer images that have to share a code",
}


class CPLearn(Method):
    """Algorithm 1 as a method: views in, loss out."""

    KNOBS = BETA_KNOBS | {
        "stuck at uniform": "a larger --lr, --beta or logit scale (--n_ref; start-up prints initial_logit_std: 0.5 to 3)",
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        embed_dim: int | None,
        activation: str,
        eps: float,
        n_ref: float,
        beta: float,
        prior: str,
        prior_group: str,
        dictionary_seed: int,
        dictionary: str = "rademacher",
        prior_buffer: int = 0,
        loss_form: str = "auto",
        loss_precision: str = "fp32",
    ):
        super().__init__()
        if beta < 0:
            raise UserError(f"beta {beta:g} must not be negative: 0.25 is the paper's value for ImageNet-100")
        if prior_buffer < 0:
            raise UserError(f"prior_buffer {prior_buffer} must not be negative: 0 for none")
        if prior_buffer and prior_group == "local":
            raise UserError(
                "prior_buffer keeps the usage of all processes: use --prior_group global, or --prior_buffer 0"
            )
        if loss_precision != "fp32" and loss_form != "triton":
            raise UserError(f"loss_precision {loss_precision} needs --loss_form triton: the other forms are fp32")
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
        self.out_dim = out_dim
        self.beta, self.prior, self.prior_group, self.loss_form = beta, prior, prior_group, loss_form
        # Inputs of the products in the Triton kernels; sums are float32 always.
        self.product_precision = {"fp32": "ieee"}.get(loss_precision, loss_precision)

    @staticmethod
    def add_flags(parser) -> None:
        # fmt: off
        group = parser.add_argument_group("CPLearn")
        group.add_argument("--beta", type=float, default=0.25, help="Weight of the invariance term. Above 1 all images drift to one code; smaller for more codes or weaker augmentation")
        group.add_argument("--activation", default="l2", choices=("tanh", "l2"), help="Last step of the projector. The paper uses tanh; see RESULTS.md for a comparison")
        group.add_argument("--embed_dim", type=int, default=None, help="Width f_h of the embedding and the codes (default: the backbone's width, as in the paper's equations; the published code uses 2048)")
        group.add_argument("--n_ref", type=float, default=1.0, help="Logit scale: sqrt(n_ref) * log((1 - eps (c-1)) / eps). 1 is the theory, 64 the published code. Change it if the start-up warns about the logits")
        group.add_argument("--eps", type=float, default=1e-8, help="Probability left for every wrong code at perfect alignment; must be below 1 / out_dim")
        group.add_argument("--prior", default="reverse", choices=tuple(PRIORS), help="Direction of the prior term: reverse KL(mean p || uniform), or forward CE(uniform, mean p) as in the equations")
        group.add_argument("--prior_group", default="global", choices=("global", "local"), help="Images that the batch mean runs over: those of all processes, or (published code) of each one")
        group.add_argument("--prior_buffer", type=int, default=0, help="Steps whose mean assignments are kept and averaged into the prior's batch mean; 0 for none. See RESULTS.md for its effect")
        group.add_argument("--dictionary", default="rademacher", choices=tuple(DICTIONARIES), help="Random signs (the paper's), or sign-flipped Hadamard blocks: orthogonal inside a block of embed_dim codes, and several times faster")
        group.add_argument("--dictionary_seed", type=int, default=0, help="Seed of the frozen codes, apart from --seed")
        group.add_argument("--loss_form", default="auto", choices=(*FORMS, "plain"), help="How the loss is computed, with the same result to rounding: stored keeps the logits, recomputed saves memory, triton is for GPUs (not yet timed on one), plain is the definition. auto is stored up to 1 GiB of logits, then recomputed")
        group.add_argument("--loss_precision", default="fp32", choices=("fp32", "tf32", "bf16"), help="Inputs of the products in --loss_form triton: tf32 and bf16 round the embeddings (the codes are exact) and are faster. Sums are fp32 always")
        # fmt: on

    @classmethod
    def from_args(cls, backbone: nn.Module, args) -> "CPLearn":
        names = (
            "out_dim",
            "embed_dim",
            "activation",
            "eps",
            "n_ref",
            "beta",
            "prior",
            "prior_group",
            "dictionary_seed",
            "dictionary",
            "prior_buffer",
            "loss_form",
            "loss_precision",
        )
        # A checkpoint from before a flag existed means its default.
        return cls(backbone, **{name: getattr(args, name) for name in names if hasattr(args, name)})

    def forward(self, views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Shape: V tensors (n, 3, H_v, W_v), the two global crops first -> scalar loss, named terms."""
        features = forward_by_size(self.backbone, views)
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            h = [self.head(float32(z)) for z in features]  # batch norm sees one view at a time
            options = {"prior": self.prior, "prior_group": self.prior_group, "n_global": self.N_GLOBAL}
            if self.loss_form == "plain":
                logits = [self.head.logits(x) for x in h]
                loss, terms, usage = cplearn_loss(logits, self.beta, buffer=self.buffer, **options)
            else:
                loss, terms, usage = streamed_loss(
                    h,
                    self.head.dictionary,
                    self.head.scale * self.head.kappa,
                    self.beta,
                    buffer=self.buffer,
                    form=self.loss_form,
                    precision=self.product_precision,
                    **options,
                )
        self.usage = usage
        return loss, terms

    def embed(self, features: Tensor) -> Tensor:
        return self.head(float32(features))

    def assign(self, embedding: Tensor) -> Tensor:
        return self.head.assign(embedding)

    def code_vectors(self, codes: Tensor) -> Tensor:
        return self.head.dictionary.select(codes)

    def after_step(self, skipped: Tensor) -> None:
        """Keeps the step's code usage for the prior, if it does; no teacher to move, no prototypes to normalise."""
        if self.buffer is not None:
            self.buffer.push(self.usage, skipped)

    def references(self, n: int) -> ReferenceLosses:
        """Reference losses for n images a rank.

        With a prior buffer the floor is that of all its images, were they as they are now: a guide and no bound.
        """
        population = n * collectives.world_size() if self.prior_group == "global" else n
        if self.buffer is not None:
            population *= 1 + len(self.buffer.ring)
        return reference_losses(self.beta, self.head.dictionary.out_dim, population, self.prior)

    def describe(self, n: int) -> dict[str, float | str]:
        """Derived values that decide a run, for n images a rank."""
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
        """Settings that are allowed but known to train badly."""
        found = []
        std = self.head.initial_logit_std()
        if not 0.5 <= std <= 3:
            found.append(
                f"the logits start with a standard deviation of {std:.2f}, outside 0.5 to 3: assignments start "
                f"{'almost one-hot' if std > 3 else 'almost uniform'}; --n_ref {(1.6 / std) ** 2 * self.head.n_ref:.3g} would start at 1.6"
            )
        if self.beta == 0:
            found.append("--beta 0 has no invariance term: nothing ties the views of an image together")
        if self.prior == "forward" and (trap := forward_prior_warning(self.beta, self.out_dim)):
            found.append(trap)
        if self.beta > 1:
            found.append(f"--beta {self.beta:g} is above 1: collapse to one code is then a growing direction")
        if self.buffer is not None and self.buffer.ring.nbytes > 2**28:
            found.append(f"--prior_buffer keeps {self.buffer.ring.nbytes / 2**20:.0f} MiB, also in every checkpoint")
        return found
