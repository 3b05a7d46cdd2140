"""Training steps on random images, for what times or compares them: ours, DINO's from others' parts, a plain one."""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import main_cplearn
from cplearn import backbones
from cplearn.compiling import choose_compile, compile_backbone
from cplearn.distributed import collectives
from cplearn.loss.spec import LossSpec
from cplearn.methods import build_method_for
from cplearn.methods.base import StepOutput
from cplearn.precision import DTYPES, autocast
from cplearn.training.bad_batches import RunningStatistics, check_gradients
from cplearn.training.optimizer import build_optimizer, clip_gradients
from cplearn_head import CPLearnHead, cplearn_loss


def random_views(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Return images as the flags of `main_cplearn.py` ask for them, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(0)
    sizes = [args.image_size] * 2 + [args.local_image_size] * args.local_crops_number
    shapes = [(args.batch_size_per_gpu, 3, size, size) for size in sizes]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


class TrainingStep:
    """A method, its optimizer, and a step of them on `images`, as `main_cplearn.train_one_epoch` takes it.

    `flags` are those of `main_cplearn.py`; without --precision the step is in float32.
    """

    def __init__(self, flags: Sequence[str], device: torch.device, images: list[Tensor] | None = None):
        self.args = main_cplearn.parse_args([*flags, "--device", device.type])
        self.device, self.precision = device, self.args.precision or "fp32"
        self.images = random_views(self.args, device) if images is None else images
        torch.manual_seed(0)
        self.method = build_method_for(self.args, []).to(device)
        choose_compile(self.args, device)
        if self.args.compile:
            compile_backbone(self.method.backbone)
        self.method.begin()
        self.method.train()
        self.model = collectives.wrap(self.method, device)
        self.optimizer = build_optimizer(self.method, self.args)
        scale = 2.0**16 if self.precision == "fp16" else 1.0
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        self.statistics = RunningStatistics(self.method)
        self.done = 0

    def gradients(self) -> StepOutput:
        """Run forward and backward, into the weights' `grad`, times the scaler's factor."""
        # A place in training where nothing special goes on: no warm-up, no queue that fills.
        self.method.before_step(10_000 + self.done, 100, 1000)
        self.statistics.keep()
        with autocast(self.device, self.precision):
            output = self.model(self.images)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()
        self.method.after_backward()
        return output

    def __call__(self) -> Tensor:
        """Take a step. Returns whether it was skipped, a bool on the device."""
        output = self.gradients()
        skipped, norms = check_gradients(self.method, output.loss.detach(), self.optimizer, self.scaler)
        clip_gradients(self.method, norms, self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.precision == "fp16" else 1.0)
        self.statistics.restore(skipped)
        self.method.after_step(output, skipped)
        self.done += 1
        return skipped


def dino_step(
    out_dim: int, n: int, size: int, device: torch.device, *, local: int = 0, precision: str = "fp32"
) -> Callable[[], None]:
    """Return a step of DINO from lightly's head and loss and timm's ViT-S/16.

    The student also gets `local` crops of 96 pixels. Raises ImportError without lightly.
    """
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    def network():
        backbone = timm.create_model(
            "vit_small_patch16_224", num_classes=0, img_size=size, dynamic_img_size=local > 0, drop_path_rate=0.1
        )
        return nn.Sequential(backbone, DINOProjectionHead(384, 2048, 256, out_dim)).to(device)

    torch.manual_seed(0)
    student, teacher = network(), network().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(output_dim=out_dim).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = [torch.randn(n, 3, size, size, device=device) for _ in range(2)]
    crops = [torch.randn(n, 3, 96, 96, device=device) for _ in range(local)]
    pairs = list(zip(student.parameters(), teacher.parameters(), strict=True))

    def step():
        with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
            with torch.no_grad():
                targets = teacher(torch.cat(images)).chunk(2)
            predictions = list(student(torch.cat(images)).chunk(2))
            predictions += student(torch.cat(crops)).chunk(local) if local else []
            loss = criterion(list(targets), predictions, epoch=5)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for s, t in pairs:
                t.mul_(0.996).add_(s, alpha=0.004)

    return step


def plain_step(arch: str, out_dim: int, n: int, size: int, device: torch.device) -> Callable[[], None]:
    """Return a step of the same network as PyTorch and timm build it, with the plain form of the loss."""
    import timm

    torch.manual_seed(0)
    if arch.startswith("timm:"):
        backbone = timm.create_model(arch.removeprefix("timm:"), num_classes=0)
    else:
        blocks = backbones.build_backbone(arch, patch_size=16, image_size=size).blocks
        blocks = blocks.to(memory_format=torch.contiguous_format)
        backbone = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        backbone.num_features = 128
    head = CPLearnHead(backbone.num_features, out_dim).to(device)
    backbone.to(device)
    codes = head.dictionary.codes()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters)
    images = [torch.randn(n, 3, size, size, device=device) for _ in range(2)]

    def step():
        h = [head(z) for z in (backbone(x) for x in images)]
        loss = cplearn_loss([head.scale * head.kappa * x @ codes.T for x in h], LossSpec(0.25))[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()

    return step


def flops_per_image(flags: Sequence[str]) -> dict[str, float]:
    """Count the multiply-adds, each as two operations, of an image's training step under flags of `main_cplearn.py`.

    `backbone`: all views, forward once and backward twice, as torch counts products; `loss`: the products of embeddings
    and codes, one each way, of a form that keeps the logits.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    args = main_cplearn.parse_args(flags)
    sizes = {args.image_size: 2}
    sizes[args.local_image_size] = sizes.get(args.local_image_size, 0) + args.local_crops_number
    backbone = backbones.build_backbone(args.arch, patch_size=args.patch_size, image_size=args.image_size).eval()
    forward = 0
    for size, count in sizes.items():
        if count:
            # The fused attention of a CPU is not counted.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                backbone(torch.zeros(1, 3, size, size))
            forward += count * counter.get_total_flops()
    views = 2 + args.local_crops_number
    width = getattr(args, "embed_dim", None) or backbone.num_features
    return {"backbone": 3.0 * forward, "loss": 2 * 2.0 * views * width * args.out_dim}
