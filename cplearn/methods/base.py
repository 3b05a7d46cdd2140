"""What a method is to the training loop and the evaluations: one interface."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cplearn.distributed.batch_norm import statistics_kept
from cplearn.errors import UserError
from cplearn.host import physical_memory
from cplearn.loss.spec import largest_probability
from cplearn_head import CPLearnHead


class ReferenceLosses(NamedTuple):
    """What the loss is worth in known states, for one batch (nats)."""

    uniform: float  # every assignment uniform: nothing learnt yet, or representation collapse
    one_code: float  # every image on one and the same code: cluster collapse
    floor: float  # lower bound for a batch of n images
    aligned: float | None = None  # each image on one code, in equal use; None where that is not a known state


class StepOutput(NamedTuple):
    """What `Method.forward` returns."""

    loss: Tensor  # scalar, with gradient
    terms: dict[str, Tensor]  # detached scalars, by their names in the log, the loss among them
    # Mean assignment of the global crops, detached (c,), of this rank's images or of all. None for methods whose loss
    # has no such thing. Where there is one, the terms hold its mean `entropy` (nats).
    usage: Tensor | None = None


class LinearCodes(NamedTuple):
    """Codes that are rows of a matrix. The code of an embedding is the row with the largest score, x W^T + b."""

    weight: Tensor  # (c, d)
    scale: float  # of the scores in the softmax with which the loss predicts: 1 / temperature
    bias: Tensor | None = None  # (c,)
    unit: bool = False  # scores are of rows brought to length 1

    @property
    def rows(self) -> Tensor:
        return F.normalize(self.weight, dim=1) if self.unit else self.weight

    def assign(self, embedding: Tensor) -> Tensor:
        return F.linear(embedding, self.rows, self.bias).argmax(1)

    def certainty(self, embedding: Tensor) -> Tensor:
        """Return the largest entry of softmax(scale * scores), a block of codes at a time. Shape: (n, d) -> (n,)."""
        step = max(1, 2**22 // max(1, len(embedding)))
        biases = (None,) * len(self.weight) if self.bias is None else self.bias.split(step)
        blocks = zip(self.rows.split(step), biases, strict=False)
        return largest_probability(self.scale * F.linear(embedding, w, b) for w, b in blocks)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.weight[codes]


class FrozenCodes(NamedTuple):
    """The codes of CPLearn's head. `scale`: of the cosines in the softmax, in place of the head's own."""

    head: CPLearnHead
    scale: float | None = None

    def assign(self, embedding: Tensor) -> Tensor:
        return self.head.assign(embedding)

    def certainty(self, embedding: Tensor) -> Tensor:
        return self.head.certainty(embedding, scale=self.scale)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.head.dictionary.select(codes)


class Method(nn.Module):
    """A backbone, what a method puts on it, and the loss. `main_cplearn.py` trains it, the evaluations read it.

    A method defines `add_flags`, `forward`, `embed`, `references`, and `codebook` (or, without vectors for its codes,
    `assign` and `certainty`); the other functions do nothing unless it needs them. Its settings are keyword-only
    arguments of its constructor, whose defaults are those of the flags of the same names. The order of a step is
    `before_step`, `forward`, backward, `after_backward`, the optimizer's step, `after_step`.
    """

    N_GLOBAL = 2  # global crops, the first of the views
    EXTRA_IMAGES = 0  # of a global view's size, that pass the backbone with a gradient beside the views of each image
    SPLITS = True  # whether the backbone can take a batch in parts (--accum)
    accum = 1  # those parts
    backbone: nn.Module  # trained; num_features wide
    out_dim: int
    # What to try against each kind of collapse, where there is more to say than `probe.verdict` has.
    REMEDIES: dict[str, str] = {}
    CERTAINTY = "probability"  # what `certainty` returns, in words
    UNIFORM = "uniform"  # what the state of `ReferenceLosses.uniform` is called at the start

    @classmethod
    def settings(cls) -> dict[str, object]:
        """Return the constructor's keyword-only arguments, by name, with their defaults (or `Parameter.empty`)."""
        defaults = {}
        for kind in reversed(cls.__mro__):
            if issubclass(kind, Method) and kind is not Method:
                parameters = inspect.signature(kind.__init__).parameters.values()
                defaults |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return defaults

    @classmethod
    def add_flags(cls, parser) -> None:
        """Add the flags that belong to this method alone."""

    @classmethod
    def flag_group(cls, parser, title: str) -> Callable[..., None]:
        """Add a group of flags to the parser; return add(name, **options), which takes the constructor's default."""
        group, defaults = parser.add_argument_group(title), cls.settings()
        return lambda name, **options: group.add_argument(f"--{name}", default=defaults[name], **options)

    @classmethod
    def from_args(cls, backbone: nn.Module, args) -> "Method":
        """Build the method from a run's flags. A checkpoint older than a flag means the flag's default.

        Raises `UserError` for a value of another type than the default's, as a file may hold.
        """
        given = {name: getattr(args, name) for name in cls.settings() if hasattr(args, name)}
        for name, value in given.items():
            default = cls.settings()[name]
            kinds = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(type(default), ())
            if kinds and type(value) not in kinds:
                raise UserError(
                    f"--{name} {value!r} is not a {type(default).__name__}: the flags of this run are damaged"
                )
        return cls(backbone, **given)

    def begin(self) -> None:
        """Act once, before the first step of a run that does not resume, when the weights are those it starts from."""

    def before_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Set the method's own schedules."""

    def forward(self, views: list[Tensor]) -> StepOutput:
        """Compute the loss of a batch. Shape: V tensors (n, 3, H_v, W_v), the global crops first."""
        raise NotImplementedError

    def features(self, views: list[Tensor]) -> list[Tensor]:
        """Run the backbone, for `forward`. Shape: V x (n, 3, H, W) -> V x (n, f)."""
        return forward_by_size(self.backbone, views, self.accum)

    def after_backward(self) -> None:
        """Remove gradients that this step must not apply."""

    def after_step(self, output: StepOutput, skipped: Tensor) -> None:
        """Act after the optimizer's step on what `forward` returned.

        `skipped`, a bool on the device: the step was left out, because its gradient was not finite.
        """

    def use(self, network: str) -> None:
        """Choose what is evaluated, `teacher` or `student`, where there are two."""

    @property
    def evaluated(self) -> nn.Module:
        """Return the backbone that is evaluated."""
        return self.backbone

    def embed(self, features: Tensor) -> Tensor:
        """Embed each image: the last vectors of the head before its codes. Shape: (n, f) -> (n, d) float32."""
        raise NotImplementedError

    def codebook(self) -> LinearCodes | FrozenCodes | None:
        """Return the codes, where they lie in the space of the embeddings."""
        return None

    def assign(self, embedding: Tensor) -> Tensor:
        """Return the code of each embedding. Shape: (n, d) -> (n,) int64."""
        return self.codebook().assign(embedding)

    def certainty(self, embedding: Tensor) -> Tensor:
        """Return how sure the method is of the code that `assign` chooses: its probability, where codes have one.

        That is the softmax with which the loss predicts, at its temperature. Shape: (n, d) -> (n,), no (n, c) matrix.
        """
        return self.codebook().certainty(embedding)

    def predict(self, features: Tensor) -> Tensor:
        """Return the code of each image from the features of the evaluated backbone. Shape: (n, f) -> (n,) int64."""
        return self.assign(self.embed(features))

    def code_vectors(self, codes: Tensor) -> Tensor | None:
        """Return where these codes lie in the space of the embeddings, if they do. Shape: (n,) -> (n, d)."""
        codebook = self.codebook()
        return None if codebook is None else codebook.vectors(codes)

    def learned_codes(self) -> Tensor | None:
        """Return the vectors of all codes where they are learned and may come to coincide. Shape: (c, d)."""

    def references(self, n: int) -> ReferenceLosses:
        """Return reference losses for n images per rank."""
        raise NotImplementedError

    def describe(self, n: int) -> dict[str, float | str]:
        """Return derived values that decide a run of n images per rank: printed before training."""
        trained, backbone = (
            sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (self, self.backbone)
        )
        refs = self.references(n)
        return {"head_parameters": trained - backbone, f"loss_{self.UNIFORM}": refs.uniform, "loss_floor": refs.floor}

    def loss_matrices(self, n: int, views: int) -> float:
        """Return how many (n, c) float32 matrices head and loss hold at once for n images per rank."""
        return 0

    def warnings(self) -> list[str]:
        """Name settings that are allowed but known to train badly."""
        return []


def check_out_dim(method: str, out_dim: int, weights: int, more: str = "") -> None:
    """Check before anything is made. Raises `UserError` for less than two codes, and if this machine cannot hold so many
    weights even once."""
    if out_dim < 2:
        raise UserError(f"--out_dim {out_dim} must be at least 2")
    have = physical_memory()
    if 4 * weights > have:
        raise UserError(
            f"--method {method} --out_dim {out_dim}{more}: {weights:,} weights take {4 * weights / 1e9:.0f} GB, "
            f"this machine has {have / 1e9:.0f} GB: make it smaller"
        )


def forward_by_size(backbone: nn.Module, views: list[Tensor], parts: int = 1) -> list[Tensor]:
    """Run the backbone once per run of views of equal size. Shape: V x (n, 3, H, W) -> V x (n, f).

    In several parts only one of them is held for the gradient: the others' activations are computed again in backward.
    The features, and all that follows from them, are those of the whole batch.
    """
    features: list[Tensor] = []
    while len(features) < len(views):
        first = len(features)
        last = first
        while last < len(views) and views[last].shape == views[first].shape:
            last += 1
        x = torch.cat(views[first:last])
        z = backbone(x) if parts == 1 else torch.cat([_recomputed(backbone, part) for part in x.chunk(parts)])
        features += z.chunk(last - first)
    return features


def _recomputed(backbone: nn.Module, x: Tensor) -> Tensor:
    """Run the backbone without keeping its activations, which backward computes again with the same drop path."""
    if not torch.is_grad_enabled():
        return backbone(x)
    # A second pass over the same images must not count in the running statistics.
    contexts = lambda: (nullcontext(), statistics_kept(backbone))  # noqa: E731
    return checkpoint(backbone, x, use_reentrant=False, context_fn=contexts)
