"""DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).

    student   p^v = softmax(l_s^v / tau_s)                 all views
    teacher   q^a = softmax((l_t^a - m) / tau_t)           global views, no gradient
    loss      mean over pairs a != b of CE(q^a, p^b)
    after the step   theta_t <- lambda theta_t + (1 - lambda) theta_s,   m <- 0.9 m + 0.1 mean l_t

The mean behind the center m runs over both global views and all ranks. The evaluated network is the teacher. A step that
is skipped moves neither teacher nor center, unlike the original's under fp16.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm
from cplearn.errors import UserError
from cplearn.flags import bool_flag, fraction, nonnegative, positive
from cplearn.methods.base import LinearCodes, Method, ReferenceLosses, StepOutput, check_out_dim
from cplearn.methods.soft_targets import loss_over_pairs
from cplearn.precision import float32
from cplearn.schedules import cosine


class DINOHead(nn.Module):
    """f -> 2048 -> 2048 -> 256, L2, then `out_dim` unit rows. State-dict names are DINO's.

    Shape: (n, f) -> (n, 256), of unit length; `prototypes()` is (out_dim, 256).
    """

    def __init__(self, in_dim: int, out_dim: int, use_bn: bool = False, norm_last_layer: bool = True):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_dim, 2048)]
        for width in (2048, 256):
            layers += [BatchNorm(2048)] * use_bn + [nn.GELU(), nn.Linear(2048, width)]
        self.mlp = nn.Sequential(*layers)
        for m in self.mlp:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(nn.Linear(256, out_dim, bias=False).weight.detach())
        self.last_layer.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(self.mlp(z), dim=-1)

    def prototypes(self) -> Tensor:
        return self.last_layer.weight_g * F.normalize(self.last_layer.weight_v, dim=1)

    def logits(self, z: Tensor) -> Tensor:
        return self(z) @ self.prototypes().T


def teacher_targets(teacher_logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Compute q. Shape: (2, n, c), (c,) -> (2, n, c)."""
    return ((teacher_logits - center) / temperature).softmax(-1)


class DINO(Method):
    STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
    REMEDIES = {
        "cluster": "a higher --teacher_temp, up to 0.07, or a higher --momentum_teacher",
        "stuck at uniform": "a lower --teacher_temp or --warmup_teacher_temp",
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int,
        momentum_teacher: float = 0.996,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 1,
        use_bn_in_head: bool = False,
    ):
        super().__init__()
        check_out_dim("dino", out_dim, 2 * 256 * out_dim)
        self.backbone, self.out_dim = backbone, out_dim
        self.head = DINOHead(backbone.num_features, out_dim, use_bn_in_head, norm_last_layer)
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(self.head)})
        self.teacher.requires_grad_(False)
        for module in self.teacher.modules():
            if hasattr(module, "drop_prob"):  # stochastic depth is for the student
                module.drop_prob = 0.0
        self.register_buffer("center", torch.zeros(out_dim))
        self.momentum_teacher, self.freeze_last_layer = momentum_teacher, freeze_last_layer
        self.temperatures = (warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.before_step(0, 1, 1)
        self.use("teacher")

    @classmethod
    def add_flags(cls, parser) -> None:
        # fmt: off
        add = cls.flag_group(parser, "DINO")
        add("momentum_teacher", type=fraction, help="Of the EMA teacher, at the start; 1 at the end, by a cosine. 0.9995 for a batch of 256")
        add("warmup_teacher_temp", type=positive(float), help="Teacher temperature at the start")
        add("teacher_temp", type=positive(float), help="Teacher temperature after its warm-up; above 0.07 is unstable")
        add("warmup_teacher_temp_epochs", type=nonnegative(int), help="Epochs of its linear warm-up")
        add("norm_last_layer", type=bool_flag, help="Prototypes of unit length; false can be better for vit_small, and less stable")
        add("freeze_last_layer", type=nonnegative(int), help="Epochs during which the prototypes are kept fixed")
        add("use_bn_in_head", type=bool_flag, help="Batch norm in the head")
        # fmt: on

    @classmethod
    def from_args(cls, backbone: nn.Module, args) -> "DINO":
        warmup = args.warmup_teacher_temp_epochs
        if warmup > args.epochs:
            raise UserError(f"--warmup_teacher_temp_epochs {warmup} exceeds --epochs {args.epochs}: shorten it")
        return super().from_args(backbone, args)

    # --- a step ---

    @torch.no_grad()
    def begin(self) -> None:
        self.teacher["backbone"].load_state_dict(self.backbone.state_dict())
        self.teacher["head"].load_state_dict(self.head.state_dict())

    def before_step(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        epoch = step // steps_per_epoch
        first, last, warmup = self.temperatures
        self.teacher_temp = first + (last - first) * epoch / max(1, warmup - 1) if epoch < warmup else last
        self.momentum = cosine(self.momentum_teacher, 1.0, step / (epochs * steps_per_epoch))
        self.frozen = epoch < self.freeze_last_layer

    def forward(self, views: list[Tensor]) -> StepOutput:
        features = self.features(views)
        with torch.no_grad():
            of_teacher = self.teacher["backbone"](torch.cat(views[: self.N_GLOBAL]))
        with torch.autocast(features[0].device.type, enabled=False):  # head and loss in float32
            with torch.no_grad():
                logits = self.teacher["head"].logits(float32(of_teacher))
                self._mean_logits = collectives.mean_over_ranks(logits.mean(0))
                targets = teacher_targets(logits.unflatten(0, (self.N_GLOBAL, -1)), self.center, self.teacher_temp)
            bottlenecks = self.head(torch.cat([float32(z) for z in features])).chunk(len(features))
            loss = loss_over_pairs(list(bottlenecks), self.head.prototypes(), targets, 1 / self.STUDENT_TEMP)
            with torch.no_grad():  # of the teacher
                entropy = torch.special.entr(targets).sum(-1).mean()
        return StepOutput(loss, {"loss": loss.detach(), "entropy": entropy}, targets.mean((0, 1)))

    def after_backward(self) -> None:
        if self.frozen:
            for p in self.head.last_layer.parameters():
                p.grad = None

    @torch.no_grad()
    def after_step(self, output: StepOutput, skipped: Tensor) -> None:
        taken = (~skipped).to(self.center.dtype)
        moved = self.center.lerp(self._mean_logits.to(self.center.dtype), 1 - self.CENTER_MOMENTUM)
        self.center.copy_(torch.where(skipped, self.center, moved))  # 0 * NaN would be NaN
        teachers = list(self.teacher.parameters())
        difference = torch._foreach_sub([*self.backbone.parameters(), *self.head.parameters()], teachers)
        torch._foreach_mul_(difference, taken * (1 - self.momentum))
        torch._foreach_add_(teachers, difference)

    # --- evaluation ---

    def use(self, network: str) -> None:
        if network not in ("teacher", "student"):
            raise UserError(f"--checkpoint_key {network} is unknown: teacher or student")
        self.network = network

    @property
    def evaluated(self) -> nn.Module:
        return self.teacher["backbone"] if self.network == "teacher" else self.backbone

    @property
    def _evaluated_head(self) -> DINOHead:
        return self.teacher["head"] if self.network == "teacher" else self.head

    def embed(self, features: Tensor) -> Tensor:
        return self._evaluated_head(float32(features))

    def codebook(self) -> LinearCodes:
        """Return the prototypes of the head that is evaluated; the probability is as the student predicts.

        The teacher's center and lower temperature make its targets, whose largest entry need not be the code.
        """
        return LinearCodes(self._evaluated_head.prototypes(), 1 / self.STUDENT_TEMP)

    def learned_codes(self) -> Tensor:
        return self._evaluated_head.prototypes()

    def references(self, n: int) -> ReferenceLosses:
        """Return the loss of uniform targets and predictions, and of one code for all images, which centering is against."""
        return ReferenceLosses(uniform=math.log(self.out_dim), one_code=0.0, floor=0.0)

    def loss_matrices(self, n: int, views: int) -> float:
        """Count the teacher's logits and targets, their sum, one view's targets and logits."""
        return 2 * self.N_GLOBAL + 3

    def describe(self, n: int) -> dict[str, float | str]:
        return super().describe(n) | {"teacher_temp": "{:g} to {:g} over {} epochs".format(*self.temperatures)}

    def warnings(self) -> list[str]:
        if self.temperatures[1] > 0.07:
            return [f"--teacher_temp {self.temperatures[1]:g} is above 0.07: DINO's authors found that unstable"]
        return []
