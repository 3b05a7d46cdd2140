"""The frozen codes, at one bit an entry, and how often each was used lately.

Two dictionaries: i.i.d. fair signs (`rademacher`, the paper's) and sign-flipped Hadamard blocks (`hadamard`, exactly
orthogonal inside a block, with a fast product). Both hand out a `reader` of a few thousand codes at a time that can be
multiplied with; nothing here keeps codes as floating-point numbers.
"""

import hashlib
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from random_streams import random_bits


class DenseBlock(NamedTuple):
    """Some codes as numbers.

    Products are code-major: with thousands of codes against a few hundred embeddings that is a third faster on a CPU.
    """

    codes: Tensor  # (b, f_h)

    def scores(self, h: Tensor, out: Tensor) -> Tensor:
        """<w_j, h_i>, written to `out`. Shape: (f_h, n) -> (b, n)."""
        return torch.mm(self.codes, h, out=out)

    def combine(self, weights: Tensor, out: Tensor) -> Tensor:
        """sum_j weights_ji w_j, the transpose of `scores`, added to `out`. Shape: (b, n) -> (f_h, n)."""
        return out.addmm_(self.codes.T, weights)


class HadamardBlock(NamedTuple):
    """Some codes of sign-flipped Hadamard blocks, multiplied by the fast transform: f_h log f_h a block of f_h."""

    flips: Tensor  # (B, f_h) signs of the B blocks that cover these codes
    factors: tuple[Tensor, ...]  # H is their Kronecker product
    first: int  # position of the first code inside the B blocks
    count: int

    def scores(self, h: Tensor, out: Tensor) -> Tensor:
        x = h * self.flips[..., None]
        for k, factor in enumerate(self.factors):
            x = torch.matmul(factor, self._split(x, k))
        return out.copy_(x.reshape(-1, h.shape[1])[self.first : self.first + self.count])

    def combine(self, weights: Tensor, out: Tensor) -> Tensor:
        blocks, width = self.flips.shape
        x = F.pad(weights, (0, 0, self.first, blocks * width - self.first - self.count))
        for k, factor in enumerate(self.factors):
            x = torch.matmul(factor.T, self._split(x, k))
        return out.add_((x.reshape(blocks, width, -1) * self.flips[..., None]).sum(0))

    def _split(self, x: Tensor, k: int) -> Tensor:
        """The axis of factor k in the middle. Shape: B x f_h x n numbers -> (m, width of factor k, rest)."""
        blocks, width = self.flips.shape
        before = blocks * math.prod(len(f) for f in self.factors[:k])
        return x.reshape(before, len(self.factors[k]), -1)


class Dictionary(nn.Module):
    """c frozen codes w_j in {-1, +1}^f_h, i.i.d. fair signs, drawn once from a seed (paper, section 3).

    Stored as one bit an entry. The bits are a pure function of (generator, seed, j, i), so they are never
    saved, sent or trained: a checkpoint holds seed and checksum, and loading one that was trained with
    another dictionary raises `UserError`. Code j does not depend on out_dim, so dictionaries of several sizes
    are nested.
    """

    GENERATOR = "rademacher-splitmix64-v1"

    packed: Tensor  # uint8 (c, ceil(f_h / 8)); bit i % 8 of byte i // 8 is entry i, 1 for +1

    def __init__(self, out_dim: int, embed_dim: int, seed: int = 0):
        super().__init__()
        if out_dim < 2:
            raise UserError(f"out_dim {out_dim} is too small: a dictionary needs at least 2 codes")
        if embed_dim < 1 or (embed_dim < 63 and out_dim > 2**embed_dim):
            raise UserError(
                f"out_dim {out_dim} exceeds the {2 ** max(embed_dim, 0)} sign patterns of embed_dim {embed_dim}: "
                "use a larger embed_dim"
            )
        self.out_dim, self.embed_dim, self.seed = out_dim, embed_dim, seed
        self.register_buffer("packed", self._draw(), persistent=False)
        self._workspaces: dict[str, Tensor] = {}

    def _draw(self) -> Tensor:
        step = max(1, 2**24 // self.embed_dim)  # bounded memory: 64 bits are eight times a byte's worth
        rows = [self._signs(j, min(j + step, self.out_dim)) for j in range(0, self.out_dim, step)]
        return torch.cat(rows)

    def _signs(self, start: int, stop: int) -> Tensor:
        """Packed bits of rows start..stop-1 of an endless table of fair coins. -> (stop - start, ceil(f_h / 8))"""
        words = -(-self.embed_dim // 64)
        j = torch.arange(start, stop)
        bits = random_bits(self.seed, j[:, None] * words + torch.arange(words))
        rows = (bits[..., None] >> torch.arange(0, 64, 8)).to(torch.uint8).flatten(1)[:, : -(-self.embed_dim // 8)]
        if self.embed_dim % 8:
            rows[:, -1] &= (1 << self.embed_dim % 8) - 1
        return rows

    def codes(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes start..stop-1 as numbers. Shape: -> (stop - start, f_h), entries -1 and +1."""
        return unpack(self.packed[start:stop], self.embed_dim, dtype)

    def select(self, index: Tensor) -> Tensor:
        """The codes of these numbers. Shape: int64 (n,) -> (n, f_h), entries -1 and +1."""
        return unpack(self.packed[index], self.embed_dim, torch.float32)

    def reader(self, size: int, dtype: torch.dtype = torch.float32) -> Callable[[int, int], DenseBlock]:
        """`read(start, stop)`: up to `size` codes, ready to be multiplied with, until the next read overwrites them."""
        count = min(size, self.out_dim) * self.packed.shape[1]
        room = self.workspace("codes", count * 8, dtype).view(-1, 8)
        index = self.workspace("index", count, torch.int32)

        def read(start: int, stop: int) -> DenseBlock:
            packed = self.packed[start:stop].flatten()
            byte = index[: len(packed)].copy_(packed)
            signs = torch.index_select(_byte_table(dtype, packed.device), 0, byte, out=room[: len(packed)])
            return DenseBlock(signs.view(stop - start, -1)[:, : self.embed_dim])

        return read

    def workspace(self, purpose: str, numbers: int, dtype: torch.dtype) -> Tensor:
        """Memory of about a block, on a CPU kept for the next call: fresh pages cost more than filling them."""
        if self.packed.device.type != "cpu":  # torch's allocator keeps it, for whichever stream
            return torch.empty(numbers, dtype=dtype, device=self.packed.device)
        room = self._workspaces.get(purpose)
        if room is None or len(room) < numbers or room.dtype != dtype:
            with torch.inference_mode(False):  # made in an evaluation, it must serve training too
                room = torch.empty(numbers, dtype=dtype)
            self._workspaces[purpose] = room
        return room[:numbers]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_workspaces": {}}  # copies and pickles do without

    def checksum(self) -> str:
        """SHA-256 over the packed bits."""
        return hashlib.sha256(self.packed.cpu().numpy()).hexdigest()

    def description(self) -> dict[str, str | int]:
        """Everything needed to rebuild the codes, and to notice that they differ."""
        return {
            "generator": self.GENERATOR,
            "seed": self.seed,
            "out_dim": self.out_dim,
            "embed_dim": self.embed_dim,
            "checksum": self.checksum(),
        }

    def get_extra_state(self) -> dict[str, str | int]:
        return self.description()

    def set_extra_state(self, state: dict[str, str | int]) -> None:
        mine = self.description()
        if state != mine:
            differ = sorted(k for k in mine | state if mine.get(k) != state.get(k))
            raise UserError(
                "the checkpoint was trained with another dictionary: "
                + ", ".join(f"{k} {state.get(k)} instead of {mine.get(k)}" for k in differ)
            )


class HadamardDictionary(Dictionary):
    """Codes f_h at a time: the rows of one Hadamard matrix H, each column of which keeps or flips its sign.

        w_(b f_h + k) = H_k * d_b,  d_b in {-1, +1}^f_h fair signs

    Codes of a block are exactly orthogonal, as Theorem 1 assumes; across blocks they are as random signs. A
    variant, not the paper's method. The first row of H is all ones, so d_b is the block's first code.

    Raises `UserError` for an embed_dim without a construction here.
    """

    GENERATOR = "hadamard-splitmix64-v1"

    def _draw(self) -> Tensor:
        h = _pack(hadamard(self.embed_dim) > 0)
        blocks = -(-self.out_dim // self.embed_dim)
        same = ~(self._signs(0, blocks)[:, None] ^ h)  # equal bits: product +1
        if self.embed_dim % 8:
            same[..., -1] &= (1 << self.embed_dim % 8) - 1
        return same.flatten(0, 1)[: self.out_dim].contiguous()

    def reader(self, size: int, dtype: torch.dtype = torch.float32) -> Callable[[int, int], HadamardBlock]:
        width = self.embed_dim
        factors = _factors_on(width, dtype, self.packed.device)

        def read(start: int, stop: int) -> HadamardBlock:
            first, stop = start // width, min(stop, self.out_dim)
            flips = unpack(self.packed[first * width : stop : width], width, dtype)
            return HadamardBlock(flips, factors, start - first * width, stop - start)

        return read


DICTIONARIES = {"rademacher": Dictionary, "hadamard": HadamardDictionary}


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 8 signs of each byte. (256, 8)"""
    with torch.inference_mode(False):  # kept, so it must serve training too
        return ((torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1).to(dtype) * 2 - 1


def unpack(packed: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits to signs, by a table of bytes. Shape: (b, ceil(width / 8)) uint8 -> (b, width)."""
    signs = _byte_table(dtype, packed.device).index_select(0, packed.flatten().int())
    return signs.view(len(packed), -1)[:, :width]


def _pack(bits: Tensor) -> Tensor:
    """Shape: bool (b, width) -> uint8 (b, ceil(width / 8))."""
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    return (padded.view(len(bits), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(2).to(torch.uint8)


# --- Hadamard matrices --------------------------------------------------------------------------------


def paley(order: int) -> Tensor | None:
    """Hadamard matrix of this order by Paley's construction for a prime q, or None.

    I: order = q + 1, q = 3 mod 4. II: order = 2 (q + 1), q = 1 mod 4. First row all ones. (order, order)
    """
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        if q < 3 or any(q % d == 0 for d in range(2, math.isqrt(q) + 1)) or q % 4 != (1 if second else 3):
            continue
        if second and order % 4:
            continue
        character = torch.full((q,), -1.0)  # +1 for squares mod q, -1 for the others, 0 for 0
        character[[x * x % q for x in range(1, q)]] = 1.0
        character[0] = 0.0
        index = torch.arange(q)
        core = torch.zeros(q + 1, q + 1)
        core[1:, 1:] = character[(index[:, None] - index) % q]
        core[0, 1:] = 1.0
        core[1:, 0] = 1.0 if second else -1.0
        eye = torch.eye(q + 1)
        if second:
            a, b = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
            matrix = torch.kron(core, a) + torch.kron(eye, b)
        else:
            matrix = core + eye
        return matrix * matrix[0]
    return None


def sylvester(order: int) -> Tensor:
    """Hadamard matrix of a power of two, by doubling. First row all ones. (order, order)"""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


@cache
def hadamard_factors(order: int) -> tuple[Tensor, ...]:
    """Small Hadamard matrices whose Kronecker product has this order, each with a first row of ones.

    384 = 12 x 32, 2048 = 32 x 64. Raises `UserError` where neither Paley's (for primes) nor Sylvester's
    construction reaches, with orders near by that can be had.
    """
    with torch.inference_mode(False):
        found = _factors(order)
        if found is None:
            near = [n for n in range(max(2, order - 64), order + 64) if _factors(n) is not None]
            near.sort(key=lambda n: (abs(n - order), n))
            raise UserError(
                f"no Hadamard matrix of order {order} is built here: use --embed_dim "
                + " or ".join(map(str, near[:2]))
                + ", or --dictionary rademacher"
            )
        return found


@cache
def _factors_on(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(f.to(device, dtype) for f in hadamard_factors(order))


def _factors(order: int) -> tuple[Tensor, ...] | None:
    power = order & -order  # largest power of two in it
    if order == power:
        bases, rest = (), power
    else:
        rest, base = power, None
        while rest >= 1 and base is None:
            base = paley(order // rest)
            rest = rest if base is not None else rest // 2
        if base is None:
            return None
        bases = (base,)
    if rest > 64:  # balanced: the transform costs the sum of the factors
        half = 2 ** ((rest.bit_length() - 1) // 2)
        return (*bases, sylvester(half), sylvester(rest // half))
    return (*bases, sylvester(rest)) if rest > 1 or not bases else bases


def hadamard(order: int) -> Tensor:
    """Hadamard matrix: entries -1 and +1, orthogonal rows, first row all ones. -> (order, order)"""
    matrix = torch.ones(1, 1)
    for factor in hadamard_factors(order):
        matrix = torch.kron(matrix, factor)
    return matrix


# --- usage over steps ---------------------------------------------------------------------------------


class PriorBuffer(nn.Module):
    """Mean code usage of the last `steps` steps, so that the prior sees more images than one batch.

    With m steps kept, p-bar becomes (p-bar of now + sum of the m kept ones) / (m + 1). The kept ones are
    constants. The gradient through p-bar of now is *not* divided by m + 1: each image weighs in the prior as it
    would in a batch m + 1 times as large whose loss is the mean over its images, and the balance with the
    invariance term stays. Saved with the run: the next step depends on it.
    """

    ring: Tensor  # (steps, c) mean assignments over the global views of one step
    pushed: Tensor  # how many steps were ever pushed

    def __init__(self, steps: int, out_dim: int):
        super().__init__()
        self.register_buffer("ring", torch.zeros(steps, out_dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def mix(self, log_mean: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """log p-bar over now and the kept steps, for codes start..stop-1. Shape: (..., b) -> (..., b)."""
        with torch.no_grad():
            count = (self.pushed.clamp(max=len(self.ring)) + 1).to(log_mean.dtype)
            past = self.ring[:, start:stop].sum(0).to(log_mean.dtype).log()
            value = torch.logaddexp(log_mean, past) - count.log()
            weight = (log_mean - value).exp()
        return value + weight * (log_mean - log_mean.detach())

    @torch.no_grad()
    def push(self, usage: Tensor, skipped: Tensor | bool = False) -> None:
        """Keep this step's p-bar and forget the oldest, unless `skipped`. No device synchronisation. Shape: (c,)."""
        skipped = torch.as_tensor(skipped, device=self.ring.device)
        place = (self.pushed % len(self.ring))[None]
        kept = torch.where(skipped, self.ring.index_select(0, place), usage[None].to(self.ring.dtype))
        self.ring.index_copy_(0, place, kept)
        self.pushed += ~skipped
