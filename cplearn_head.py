"""CPLearn: the projector, the loss, and the method that ties them together.

Sansone, Lebailly, Tuytelaars, "Collapse-Proof Non-Contrastive Self-Supervised Learning", ICML 2025.

    z = g(view)                        backbone                                         (n, f)
    h = phi(BN(A z + b))               embedding, phi = tanh or L2 normalisation        (n, f_h)
    logits = s * kappa * h W           W in {-1, +1}^(f_h x c), frozen                  (n, c)
    p = softmax(logits)                soft assignment to the c codes
    loss = beta * CE(p, p') + KL(mean p || uniform), symmetric in the views

Letters: n images a rank, f backbone width, f_h `embed_dim`, c `out_dim` (the number of codes). Everything
is in log space and float32. There is no teacher, no stop-gradient, no centring and no predictor.

The loss here is the plain form, which stores the (n, c) logits: the definition. Training takes the same numbers from
`dictionary_attention.streamed_loss`. The dictionary W is in `dictionaries.py`.
"""

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
from dictionaries import DICTIONARIES, PriorBuffer
from dictionary_attention import FORMS, block_size, streamed_loss
from errors import UserError
from method import Method, ReferenceLosses, float32, forward_by_size


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
        self.dictionary = DICTIONARIES[dictionary](out_dim, embed_dim, seed)
        self.linear = nn.Linear(in_dim, embed_dim)
        self.norm = distributed.BatchNorm(embed_dim)
        self.activation = activation
        self.n_ref = n_ref
        self.scale = math.sqrt(n_ref) * math.log((1 - eps * (out_dim - 1)) / eps)
        # kappa: |logit| <= scale, with equality at h = a code (tanh) or h along a code (l2).
        self.kappa = 1 / embed_dim if activation == "tanh" else 1 / math.sqrt(embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Embedding of backbone features. Shape: z (n, f) -> h (n, f_h), in (-1, 1) or of unit length."""
        a = self.norm(self.linear(z))
        return torch.tanh(a) if self.activation == "tanh" else F.normalize(a, dim=1)

    def logits(self, h: Tensor) -> Tensor:
        """Scaled similarities to all codes, by definition; unpacks the whole dictionary.

        Shape: h (n, f_h) -> (n, c) float32.
        """
        h = float32(h)
        return F.linear(h * (self.scale * self.kappa), self.dictionary.codes(dtype=h.dtype))

    @torch.no_grad()
    def assign(self, h: Tensor, block: int | None = None) -> Tensor:
        """Index of each row's code, argmax_j <h_i, w_j>, a block of codes at a time: no (n, c) matrix.

        Ties go to the lowest index. Shape: h (n, f_h) -> (n,) int64.
        """
        block = block or block_size(len(h), self.dictionary, h.device)
        with torch.autocast(h.device.type, enabled=False):
            columns = h.float().T.contiguous()
            best = columns.new_full((len(h),), -math.inf)
            index = torch.zeros(len(h), dtype=torch.int64, device=h.device)
            read, room = self.dictionary.reader(block), columns.new_empty(block, len(h))
            for start in range(0, self.dictionary.out_dim, block):
                stop = min(start + block, self.dictionary.out_dim)
                value, j = read(start, stop).scores(columns, room[: stop - start]).max(dim=0)
                better = value > best
                best = torch.where(better, value, best)
                index = torch.where(better, j + start, index)
        return index

    def initial_logit_std(self) -> float:
        """Standard deviation of the logits over codes at initialisation, s * kappa * |h|.

        |h| = 1 for l2; for tanh of unit-normal features E|h|^2 = 0.394 f_h.
        """
        norm = 1.0 if self.activation == "l2" else math.sqrt(0.39429 * self.dictionary.embed_dim)
        return self.scale * self.kappa * norm


# --- loss terms ------------------------------------------------------------------------------------


def invariance(log_probs: list[Tensor], n_global: int = 2) -> Tensor:
    """Mean cross-entropy between views, gradient through both arguments (methods: L_inv).

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
    """log p-bar, the log of the mean assignment of one view over its reference population.

    The population is the images of all ranks (`global`, exact gradient under DDP) or this rank's (`local`).
    Shape: (n, c) -> (c,).
    """
    local = log_probs.logsumexp(0) - math.log(len(log_probs))
    return distributed.log_mean_over_ranks(local) if prior_group == "global" else local


def prior_reverse(log_mean: Tensor) -> Tensor:
    """KL(p-bar || uniform) = sum_j p-bar_j (log p-bar_j + log c); 0 .. log c. Shape: (c,) -> scalar."""
    return (log_mean.exp() * (log_mean + math.log(len(log_mean)))).sum()


def prior_forward(log_mean: Tensor) -> Tensor:
    """CE(uniform, p-bar) = -mean_j log p-bar_j = log c + KL(uniform || p-bar). Shape: (c,) -> scalar."""
    return -log_mean.mean()


PRIORS = {"reverse": prior_reverse, "forward": prior_forward}


def cplearn_loss(
    logits: list[Tensor],
    beta: float,
    *,
    prior: str = "reverse",
    prior_group: str = "global",
    n_global: int = 2,
    buffer: PriorBuffer | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """beta * invariance + prior, the prior averaged over the global crops (paper, Algorithm 1, symmetrised).

    `buffer` adds the code usage of earlier steps to p-bar.

    Shape: one (n, c) tensor of logits a view, the `n_global` global crops first -> scalar loss; detached
    scalars loss, invariance, prior, entropy (mean entropy of the assignments of the global crops, nats); detached
    mean assignment of the population, averaged over the global crops (c,).
    """
    if len(logits) < 2 or not 1 <= n_global <= len(logits):
        raise ValueError(f"cplearn_loss needs two or more views, got {len(logits)} with {n_global} global")
    if prior not in PRIORS or prior_group not in ("global", "local"):
        raise ValueError(f"prior {prior!r} / prior_group {prior_group!r} is unknown")
    log_probs = [F.log_softmax(float32(x), dim=1) for x in logits]
    inv = invariance(log_probs, n_global)
    log_means = [log_mean_probs(lp, prior_group) for lp in log_probs[:n_global]]
    mixed = log_means if buffer is None else [buffer.mix(x) for x in log_means]
    pri = sum(PRIORS[prior](x) for x in mixed) / n_global
    loss = beta * inv + pri
    with torch.no_grad():
        usage = sum(x.exp() for x in log_means) / n_global
        entropy = sum(-(lp.exp() * lp).sum(1).mean() for lp in log_probs[:n_global]) / n_global
    terms = {"loss": loss, "invariance": inv, "prior": pri, "entropy": entropy}
    return loss, {name: value.detach() for name, value in terms.items()}, usage


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
        population = n * distributed.world_size() if self.prior_group == "global" else n
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
