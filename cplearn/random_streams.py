"""Random numbers with an owner: each is a pure function of a seed and of what it is for.

No draw depends on which process makes it or when, so a run has no random state that would have to be saved.
"""

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def hash64(x: Tensor) -> Tensor:
    """Apply the SplitMix64 finalizer (Steele et al. 2014) to 64-bit counters: the same bits on every device.

    Shape: x int64 (any shape) -> int64 of the same shape, read as 64 random bits. Integer products wrap
    modulo 2^64 in torch, which is what the function is defined with.
    """
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's >> on int64 copies the sign bit, so those copies are masked away."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(seed: Tensor | int, counter: Tensor) -> Tensor:
    """Return 64 random bits for each counter of the stream `seed`: a pure function, so any block can be redrawn.

    Shape: counter int64, seed an int or an int64 tensor that broadcasts against it -> int64.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=counter.device)
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, SplitMix64's increment
    return hash64(hash64(seed * golden + golden) + (counter + 1) * golden)


def random_normal(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers, one independent stream per row, from `random_bits` (Box-Muller).

    Shape: seed int64 (n,) -> float32 (n, *shape), on the seeds' device.
    """
    size = math.prod(shape)
    counter = torch.arange(size, device=seed.device)
    bits = random_bits(seed[:, None], counter[None])
    u1 = ((bits & 0xFFFFFF) + 1).to(torch.float32) / 2**24  # (0, 1]: 24 bits, exact in float32
    u2 = (_shift_right(bits, 24) & 0xFFFFFF).to(torch.float32) / 2**24
    return ((-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()).reshape(len(seed), *shape)


# What a stream of random numbers is for. NumPy pads short seeds with zeros, so (seed, epoch) alone would be the
# same stream as (seed, epoch, sample 0, view 0).
FOR_VIEWS, FOR_ORDER, FOR_WEIGHTS, FOR_STEP, FOR_PROBE, FOR_REPLACEMENT, FOR_SGLD, FOR_MONITOR = range(1, 9)
FOR_TUNING = 9


def random_stream(purpose: int, *key: int) -> np.random.Generator:
    """Return a generator of its own for (purpose, *key), with Philox, whose stream NumPy guarantees."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((purpose, *key))))


def seed_of(purpose: int, *key: int) -> int:
    """Return 63 bits for torch's generators."""
    return int(np.random.SeedSequence((purpose, *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(purpose: int, *key: int) -> None:
    """Seed torch, NumPy and Python from (purpose, *key), for instance (FOR_STEP, seed, step, rank)."""
    value = seed_of(purpose, *key)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


@contextlib.contextmanager
def kept_state() -> Iterator[None]:
    """Give the caller's generators of torch (GPUs' too), NumPy and Python back as they were."""
    on_gpus = torch.cuda.is_initialized()
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    of_gpus = torch.cuda.get_rng_state_all() if on_gpus else []
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
        else:  # not begun when we came: their seed is the CPU's
            torch.cuda.manual_seed_all(torch.initial_seed())
