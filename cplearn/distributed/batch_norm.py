"""Batch norm over the rows of all ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

from cplearn.distributed.collectives import GatherOverRanks, world_size
from cplearn.errors import UserError


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace torch's batch norms inside `module` by `BatchNorm`; names, parameters, buffers and mode stay.

    Raises `UserError` in several processes for a variant that cannot be replaced (timm's norm with activation).
    """
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            norm = BatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            norm._parameters, norm._buffers = child._parameters, child._buffers
            setattr(module, name, norm.train(child.training))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, BatchNorm):
            if world_size() > 1:
                raise UserError(
                    f"{type(child).__name__} layers cannot share their statistics over {world_size()} processes: "
                    "use one process, or another --arch"
                )
        else:
            convert_batch_norm(child)
    return module


def running_buffers(module: nn.Module) -> list[Tensor]:
    """Return what batch norms keep of the batches they saw, which a forward pass writes: means, variances, counters."""
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [b for m in norms for b in m.buffers(recurse=False)]


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Put `running_buffers` back afterwards, as if the batches inside had not been seen."""
    buffers = running_buffers(module)
    kept = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for now, before in zip(buffers, kept, strict=True):
            now.copy_(before)


@contextmanager
def plain_average(norms: list[nn.Module]) -> Iterator[None]:
    """Let batch norms forget what they saw and take a plain average over the batches inside; then they are in eval
    mode."""
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.eval()


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over the rows of all ranks, on any device and backend.

    torch's own SyncBatchNorm refuses CPU tensors, so that two gloo processes could not be compared with one.
    Names and values of the state equal `nn.BatchNorm1d`'s. In one process, and in eval mode, it is torch's
    batch norm.

    Shape: (n, features) or (n, features, height, width) -> the same; every rank holds the same n.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm expects (n, features, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        return self._over_ranks(x, [d for d in range(x.dim()) if d != 1])

    def views(self, x: Tensor) -> Tensor:
        """Normalize each of some views, in one exchange between ranks. Shape: (V, n, features) -> the same."""
        if not self.training or world_size() == 1:
            return torch.stack([self(view) for view in x])
        return self._over_ranks(x, [1])

    def _over_ranks(self, x: Tensor, dims: list[int]) -> Tensor:
        """Normalize over `dims` and all ranks; what is left of the other dimensions but features are views."""
        x32 = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(x32, dims, correction=0, keepdim=True)
        means, variances = GatherOverRanks.apply(torch.stack([mean, var])).unbind(1)
        # As Chan, Golub and LeVeque combine parts: E[x^2] - E[x]^2 would cancel.
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        self._remember(mean.detach(), var.detach(), x.numel() // mean.numel() * world_size())
        y = (x32 - mean) * torch.rsqrt(var + self.eps)
        if self.affine:
            shape = [1, -1] + [1] * (x.dim() - 2) if 1 not in dims else [1, 1, -1]
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics, by one view after the other."""
        for m, v in zip(mean.view(-1, self.num_features), var.view(-1, self.num_features), strict=True):
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(m, share)
            self.running_var.lerp_(v * count / max(1, count - 1), share)


def over_views(layers: Iterable[nn.Module], features: list[Tensor]) -> list[Tensor]:
    """Apply layers to the features of each view: batch norm sees one view at a time, and exchanges all at once.

    Shape: V x (n, f) -> V x (n, g).
    """
    layers = list(layers)
    if world_size() == 1:
        return [reduce(lambda z, layer: layer(z), layers, z) for z in features]
    x = torch.stack(features)
    for layer in layers:
        x = layer.views(x) if isinstance(layer, BatchNorm) else layer(x)
    return list(x.unbind())
