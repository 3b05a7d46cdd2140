"""The frozen codes, at one bit per entry.

Two dictionaries: i.i.d. fair signs (`rademacher`, the paper's) and sign-flipped Hadamard blocks (`hadamard`, exactly
orthogonal inside a block, with a fast product). Both hand out a `reader` of a few thousand codes at a time that can be
multiplied with; nothing here keeps codes as floating-point numbers.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.errors import UserError
from cplearn.random_streams import random_bits


class DenseBlock(NamedTuple):
    """Some codes as numbers.

    Products are code-major: with thousands of codes against a few hundred embeddings that is a third faster on a CPU.
    """

    codes: Tensor  # (b, f_h)

    def scores(self, h: Tensor, out: Tensor) -> Tensor:
        """Compute <w_j, h_i>, written to `out`. Shape: (f_h, n) -> (b, n)."""
        return torch.mm(self.codes, h, out=out)

    def combine(self, weights: Tensor, out: Tensor) -> Tensor:
        """Add sum_j weights_ji w_j, the transpose of `scores`, to `out`. Shape: (b, n) -> (f_h, n)."""
        return out.addmm_(self.codes.T, weights)


class Dictionary(nn.Module):
    """c frozen codes w_j in {-1, +1}^f_h, i.i.d. fair signs, drawn once from a seed (paper, section 3).

    Stored as one bit an entry. The bits are a pure function of (generator, seed, j, i), so they are never saved or
    trained, nor sent unless DDP is told to broadcast buffers: a checkpoint holds seed and checksum, and loading one
    that was trained with another dictionary raises `UserError`. Code j does not depend on out_dim, so dictionaries of
    several sizes are nested.
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
        """Draw packed bits of rows start..stop-1 of an endless table of fair coins. -> (stop - start, ceil(f_h / 8))"""
        words = -(-self.embed_dim // 64)
        j = torch.arange(start, stop)
        bits = random_bits(self.seed, j[:, None] * words + torch.arange(words))
        rows = (bits[..., None] >> torch.arange(0, 64, 8)).to(torch.uint8).flatten(1)[:, : -(-self.embed_dim // 8)]
        if self.embed_dim % 8:
            rows[:, -1] &= (1 << self.embed_dim % 8) - 1
        return rows

    def codes(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return codes start..stop-1 as numbers. Shape: -> (stop - start, f_h), entries -1 and +1."""
        return unpack(self.packed[start:stop], self.embed_dim, dtype)

    def select(self, index: Tensor) -> Tensor:
        """Return the codes of these numbers. Shape: int64 (n,) -> (n, f_h), entries -1 and +1."""
        return unpack(self.packed[index], self.embed_dim, torch.float32)

    def reader(self, size: int, dtype: torch.dtype = torch.float32) -> Callable[[int, int], DenseBlock]:
        """Return `read(start, stop)`: up to `size` codes, ready for products until the next read overwrites them."""
        count = min(size, self.out_dim) * self.packed.shape[1]
        buffer = self.workspace("codes", count * 8, dtype).view(-1, 8)
        index = self.workspace("index", count, torch.int32)

        def read(start: int, stop: int) -> DenseBlock:
            packed = self.packed[start:stop].flatten()
            byte = index[: len(packed)].copy_(packed)
            signs = torch.index_select(_byte_table(dtype, packed.device), 0, byte, out=buffer[: len(packed)])
            return DenseBlock(signs.view(stop - start, -1)[:, : self.embed_dim])

        return read

    def whole_blocks(self, size: int) -> int:
        """Round a number of codes to what is read at once most cheaply."""
        return size

    def workspace(self, purpose: str, numbers: int, dtype: torch.dtype) -> Tensor:
        """Return memory of about a block, on a CPU kept for the next call: fresh pages cost more than filling them."""
        if self.packed.device.type != "cpu":  # torch's allocator keeps it, for whichever stream
            return torch.empty(numbers, dtype=dtype, device=self.packed.device)
        memory = self._workspaces.get(purpose)
        if memory is None or len(memory) < numbers or memory.dtype != dtype:
            with torch.inference_mode(False):  # made in an evaluation, it must serve training too
                memory = self._workspaces[purpose] = torch.empty(numbers, dtype=dtype)
        return memory[:numbers]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_workspaces": {}}  # copies and pickles do without

    def checksum(self) -> str:
        """Return the SHA-256 of the packed bits."""
        return hashlib.sha256(self.packed.cpu().numpy()).hexdigest()

    def description(self) -> dict[str, str | int]:
        """Return everything needed to rebuild the codes, and to notice that they differ."""
        return {
            "generator": self.GENERATOR,
            "seed": self.seed,
            "out_dim": self.out_dim,
            "embed_dim": self.embed_dim,
            "checksum": self.checksum(),
        }

    def get_extra_state(self) -> Tensor:
        """Return the description as bytes of JSON: safetensors and others that save weights take tensors only."""
        return torch.tensor(list(json.dumps(self.description()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | dict[str, str | int]) -> None:
        """Raise `UserError` for the description of another dictionary; a dict is one of an earlier version."""
        own = self.description()
        state = json.loads(bytes(state.tolist())) if isinstance(state, Tensor) else state
        differ = sorted(k for k in own | state if own.get(k) != state.get(k))
        if differ:
            raise UserError(
                "the checkpoint was trained with another dictionary: "
                + ", ".join(f"{k} {state.get(k)} instead of {own.get(k)}" for k in differ)
            )


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the 8 signs of each byte. (256, 8)"""
    with torch.inference_mode(False):  # kept, so it must serve training too
        return ((torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1).to(dtype) * 2 - 1


def unpack(packed: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn bits into signs, by a table of bytes. Shape: (b, ceil(width / 8)) uint8 -> (b, width)."""
    signs = _byte_table(dtype, packed.device).index_select(0, packed.flatten().int())
    return signs.view(len(packed), -1)[:, :width]


def pack(bits: Tensor) -> Tensor:
    """Pack bits. Shape: bool (b, width) -> uint8 (b, ceil(width / 8))."""
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    return (padded.view(len(bits), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(2).to(torch.uint8)
