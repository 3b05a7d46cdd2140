"""Exit codes."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch.utils.data import DataLoader, Dataset

from cplearn import errors
from cplearn.data.images import ImageError


def test_every_error_has_its_own_exit_code():
    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, errors.ExpectedError)]
    codes = {error.__name__: error.exit_code for error in kinds}
    assert codes == {
        "ExpectedError": 1,
        "UserError": 2,
        "LocalError": 2,
        "NonFiniteError": 3,
        "WriteError": 4,
        "ReadError": 4,
        "WorkerError": 5,
        "PeerError": 6,
        "CollapseError": 7,
        "Interrupted": 75,
    }
    page = (ROOT / "docs" / "errors.md").read_text()
    assert all(f"| {code} |" in page for code in set(codes.values()) | {0, 130})


def test_too_little_memory_is_no_bug():
    line = "out of memory (CUDA out of memory. Tried to allocate 2 GiB): use a smaller --batch_size_per_gpu; training"
    code, said = errors.exit_status(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsee also"))
    assert code == 2 and said.startswith(line)
    assert errors.exit_status(MemoryError())[1].startswith("out of memory (MemoryError): use a smaller")
    code = "from cplearn import errors; import torch; errors.run_script(lambda argv: torch.empty(2**60))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "error: out of memory (" in ended.stderr and "Traceback" not in ended.stderr


class Broken(Dataset):
    def __getitem__(self, i):
        raise ImageError("cannot read the image \x1b[2Jx.jpg: cut; repair it", "x.jpg", "cut")

    def __len__(self):
        return 2


def test_the_line_of_a_loader_process_and_codes_for_a_terminal():
    """Not the name of the type, which torch puts before it; and no escape sequence reaches the terminal."""
    with pytest.raises(ImageError) as error:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert errors.exit_status(error.value) == (2, r"cannot read the image \x1b[2Jx.jpg: cut; repair it")
