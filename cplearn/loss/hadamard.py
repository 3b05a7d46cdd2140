"""Sign-flipped Hadamard blocks as a dictionary: orthogonal inside a block, with a fast product. A variant."""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.errors import UserError
from cplearn.loss.codes import Dictionary, pack, unpack


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
        """Put the axis of factor k in the middle. Shape: B x f_h x n numbers -> (m, width of factor k, rest)."""
        blocks, width = self.flips.shape
        before = blocks * math.prod(len(f) for f in self.factors[:k])
        return x.reshape(before, len(self.factors[k]), -1)


class HadamardDictionary(Dictionary):
    """Codes f_h at a time: the rows of one Hadamard matrix H, each column of which keeps or flips its sign.

        w_(b f_h + k) = H_k * d_b,  d_b in {-1, +1}^f_h fair signs

    Codes of a block are exactly orthogonal, as Theorem 1 assumes; across blocks they are as random signs. A
    variant, not the paper's method. The first row of H is all ones, so d_b is the block's first code.

    Raises `UserError` for an embed_dim without a construction here.
    """

    GENERATOR = "hadamard-splitmix64-v1"

    def _draw(self) -> Tensor:
        h = pack(hadamard(self.embed_dim) > 0)
        blocks = -(-self.out_dim // self.embed_dim)
        same = ~(self._signs(0, blocks)[:, None] ^ h)  # equal bits: product +1
        if self.embed_dim % 8:
            same[..., -1] &= (1 << self.embed_dim % 8) - 1
        return same.flatten(0, 1)[: self.out_dim].contiguous()

    def whole_blocks(self, size: int) -> int:
        return max(1, size // self.embed_dim) * self.embed_dim

    def reader(self, size: int, dtype: torch.dtype = torch.float32) -> Callable[[int, int], HadamardBlock]:
        width = self.embed_dim
        factors = _factors_on(width, dtype, self.packed.device)

        def read(start: int, stop: int) -> HadamardBlock:
            first, stop = start // width, min(stop, self.out_dim)
            flips = unpack(self.packed[first * width : stop : width], width, dtype)
            return HadamardBlock(flips, factors, start - first * width, stop - start)

        return read


# --- Hadamard matrices --------------------------------------------------------------------------------


def paley(order: int) -> Tensor | None:
    """Build the Hadamard matrix of this order by Paley's construction for a prime q; None if there is none.

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
    """Build the Hadamard matrix of a power of two, by doubling. First row all ones. (order, order)"""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


@cache
def hadamard_factors(order: int) -> tuple[Tensor, ...]:
    """Return small Hadamard matrices whose Kronecker product has this order, each with a first row of ones.

    384 = 12 x 32, 2048 = 32 x 64. Raises `UserError` where neither Paley's (for primes) nor Sylvester's
    construction reaches, with orders near by that can be had.
    """
    with torch.inference_mode(False):
        factors = _factors(order)
        if factors is None:
            near = [n for n in range(max(2, order - 64), order + 64) if _factors(n) is not None]
            near.sort(key=lambda n: (abs(n - order), n))
            raise UserError(
                f"no Hadamard matrix of order {order} is built here: use --embed_dim "
                + " or ".join(map(str, near[:2]))
                + ", or --dictionary rademacher"
            )
        return factors


@cache
def _factors_on(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(f.to(device, dtype) for f in hadamard_factors(order))


def _factors(order: int) -> tuple[Tensor, ...] | None:
    power = rest = order & -order  # largest power of two in it
    bases: tuple[Tensor, ...] = ()
    if order != power:
        while rest and paley(order // rest) is None:
            rest //= 2
        if not rest:
            return None
        bases = (paley(order // rest),)
    if rest > 64:  # balanced: the transform costs the sum of the factors
        half = 2 ** ((rest.bit_length() - 1) // 2)
        return (*bases, sylvester(half), sylvester(rest // half))
    return (*bases, sylvester(rest)) if rest > 1 or not bases else bases


def hadamard(order: int) -> Tensor:
    """Build a Hadamard matrix: entries -1 and +1, orthogonal rows, first row all ones. -> (order, order)"""
    matrix = torch.ones(1, 1)
    for factor in hadamard_factors(order):
        matrix = torch.kron(matrix, factor)
    return matrix
