"""TODO cplearn.precision."""

import torch
from torch import Tensor


def float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()
