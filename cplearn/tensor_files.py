"""Files of tensors, ours or of others, read without running anything of them."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cplearn import errors
from cplearn.errors import ExpectedError, ReadError, UserError
from cplearn.files import reading


def load_file(path: str | Path, classes: Sequence[type] = ()) -> dict:
    """Load any file that torch saved, or a .safetensors, on the CPU, executing nothing from it.

    `classes` may be in the file besides tensors and plain containers. Raises `UserError` for a file that is damaged or
    refused, `ReadError` for one that cannot be read now, which says nothing about its content.
    """
    with _opened(path) as file:
        return _load(file, path, classes)


def load_file_and_hash(path: str | Path, classes: Sequence[type] = ()) -> tuple[dict, str]:
    """Load as `load_file` does; also return the SHA-256 of the file, which is opened once: no other lends its hash."""
    with _opened(path) as file:
        state = _load(file, path, classes)
        file.seek(0)
        return state, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file of somebody: damaged, it can make zipfile, pickle and torch raise anything."""
    try:
        with open(path, "rb") as file:
            yield file
    except ExpectedError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: give the path of a checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the path of a checkpoint") from None
    except pickle.UnpicklingError:
        reason = "it holds Python objects, which could run code, or is damaged"
        raise UserError(f"{path} is refused: {reason}; use a file of tensors and plain containers") from None
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or errors.NO_MEMORY in str(error)  # torch has no type for it
        of_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # zipfile's own, for damage
        if no_memory or of_system:
            reason = "not enough memory" if no_memory else error.strerror
            raise ReadError(f"{path} cannot be read now ({reason}) and may be whole: mend that, run again") from None
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        raise UserError(f"{path} is truncated or no checkpoint at all ({reason}): use another copy") from None


def _load(file: BinaryIO, path: str | Path, classes: Sequence[type]) -> dict:
    of_torch = not str(path).endswith(".safetensors")
    state = _load_torch(file, path, classes) if of_torch else _load_safetensors(file, path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    if (odd := next(_odd_tensors(state), None)) is not None:
        raise UserError(f"{path} is refused: it holds {odd}, which no weights are; save it as dense real numbers")
    return state


def _odd_tensors(x: object) -> Iterator[str]:
    """Yield what is odd about tensors in plain containers."""
    if isinstance(x, dict | list | tuple):
        for value in x.values() if isinstance(x, dict) else x:
            yield from _odd_tensors(value)
    elif isinstance(x, Tensor):
        kinds = {"sparse": x.layout != torch.strided, "quantized": x.is_quantized, "complex": x.is_complex(),
                 "without numbers (meta)": x.is_meta}  # fmt: skip
        yield from (f"tensors that are {kind}" for kind, true in kinds.items() if true)


def _load_torch(file: BinaryIO, path: str | Path, classes: Sequence[type]) -> object:
    """Load what torch saved, after its checksums: torch would hand out weights with flipped bits."""
    if file.read(2) == b"PK":  # as all that torch has written since 1.6
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            if sum(x.file_size for x in archive.infolist()) > size:  # unpacking it might never end
                raise UserError(f"{path} is refused: it claims to hold more than it is long; use another copy")
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong; use another copy")
    file.seek(0)
    with torch.serialization.safe_globals(list(classes)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_safetensors(file: BinaryIO, path: str | Path) -> dict:
    """Return the tensors as `state_dict`, and what the file says of them as `metadata`."""
    try:
        from safetensors.torch import load as parse
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    content = file.read()
    tensors, metadata = parse(content), safetensors_metadata(io.BytesIO(content), path)
    expected = metadata.get("data_sha256")  # the format itself has no checksum
    if expected and expected != safetensors_data_hash(content):
        raise UserError(f"{path} is damaged: its checksum is wrong; use another copy")
    return {"state_dict": tensors, "metadata": metadata}


def safetensors_metadata(file: BinaryIO, path: str | Path) -> dict[str, str]:
    """Return the texts in the header of a .safetensors file. Raises `UserError` if it has no such header."""
    with reading(path, "use another copy"):
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(min(length, 2**27))).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def safetensors_data_hash(content: bytes) -> str:
    """Return the SHA-256 of a .safetensors file's tensors, whatever its metadata."""
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
