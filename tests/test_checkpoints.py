"""Atomic writing, safe loading, strict keys."""

import errno
import multiprocessing
import os
import pathlib
import pickle
import resource
import zipfile
from argparse import Namespace

import pytest
import torch
from helpers import fork_script, run_script

from cplearn import checkpoints, tensor_files
from cplearn.backbones import ResNet8
from cplearn.errors import ReadError, UserError, WriteError


class Attack:
    """Unpickled without care, it would create the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_round_trip(tmp_path):
    state = {"args": {"lr": 0.1, "scale": [0.4, 1.0], "path": None}, "model": {"w": torch.arange(3.0)}}
    checkpoints.save(tmp_path / "c.pth", state)
    loaded = checkpoints.load(tmp_path / "c.pth")
    assert loaded["args"] == state["args"] and torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert os.listdir(tmp_path) == ["c.pth"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pth"
    checkpoints.save(path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle|lambda"):
        checkpoints.save(path, {"epoch": 2, "bad": lambda: 0})
    assert checkpoints.load(path)["epoch"] == 1 and os.listdir(tmp_path) == ["c.pth"]


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, kind):
    path, witness = tmp_path / "c.pth", tmp_path / "executed"
    content = {"model": {"w": torch.zeros(2)}, "args": Attack(witness)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="is refused") as error:
        tensor_files.load_file(path)
    assert not witness.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "c.pth"
    checkpoints.save(path, {"model": {"w": torch.randn(2000)}})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: keep if isinstance(keep, int) else int(size * keep)])
    with pytest.raises(UserError) as error:
        checkpoints.load(path)
    assert "c.pth" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_foreign_files(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("none.pth", "list.pth", "text.pth", "text.pth/c.pth", "."):
        with pytest.raises(UserError, match=str(tmp_path / name)):
            tensor_files.load_file(tmp_path / name)
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="plain.pth"):
        checkpoints.load(tmp_path / "plain.pth")


def test_backbone_weights_of_each_kind_of_file():
    weights = ResNet8(4).state_dict()
    zeros = {k: torch.zeros_like(v) for k, v in weights.items()}
    ours = {
        "format": checkpoints.FORMAT,
        "model": {f"backbone.{k}": v for k, v in weights.items()} | {"head.linear.weight": 0},
    }
    dino = {
        "teacher": {f"backbone.{k}": v for k, v in weights.items()} | {"head.mlp.0.weight": torch.zeros(1)},
        "student": {f"module.backbone.{k}": v for k, v in zeros.items()} | {"module.head.mlp.0.weight": torch.zeros(1)},
    }
    timm_file = weights | {"head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    for state in (ours, dino, timm_file, {"state_dict": weights}):
        found = checkpoints.backbone_weights(state)
        assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)
    assert checkpoints.backbone_weights(dino, "student")["blocks.0.conv1.weight"].abs().sum() == 0


def test_a_dino_checkpoint_with_its_namespace_loads_safely(tmp_path):
    """DINO saves its argparse.Namespace: data, and the only class that is let through."""
    weights = ResNet8(4).state_dict()
    state = {
        "teacher": {f"backbone.{k}": v for k, v in weights.items()},
        "args": Namespace(arch="x", lr=0.1),
        "epoch": 3,
    }
    torch.save(state, tmp_path / "dino.pth")
    found = checkpoints.backbone_weights(tensor_files.load_file(tmp_path / "dino.pth", checkpoints.DINO_CLASSES))
    assert all(torch.equal(found[k], weights[k]) for k in weights)


def test_keys_that_do_not_fit_are_named():
    model = ResNet8(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = model.state_dict() | {"extra": torch.zeros(1), "blocks.0.conv1.weight": torch.zeros(8, 3, 3, 3)}
    del weights["blocks.1.conv1.bias"]
    with pytest.raises(UserError) as error:
        checkpoints.load_into(model, weights, "c.pth")
    text = str(error.value)
    assert "1 keys missing (blocks.1.conv1.bias)" in text and "1 unknown keys (extra)" in text
    assert "blocks.0.conv1.weight (8, 3, 3, 3) instead of (4, 3, 3, 3)" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing half loaded


# --- what is kept -------------------------------------------------------------------------------------


def test_the_checkpoint_before_is_kept_and_used_when_the_newest_is_damaged(tmp_path):
    assert checkpoints.load_run(tmp_path) is None
    for step in range(3):
        checkpoints.save_run(tmp_path, {"step": step, "model": {"w": torch.full((500,), float(step))}})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "checkpoint_previous.pth"]
    state, path, problem = checkpoints.load_run(tmp_path)
    assert (state["step"], path.name, problem) == (2, "checkpoint.pth", None)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((3,), 2.0).numpy().tobytes())] ^= 1  # one bit of a weight
    path.write_bytes(bytes(content))
    assert torch.load(path, weights_only=True)["step"] == 2  # torch alone does not notice
    state, path, problem = checkpoints.load_run(tmp_path)
    assert (state["step"], path.name) == (1, "checkpoint_previous.pth") and "checksum" in problem
    path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint.pth is damaged.*checkpoint_previous.pth is truncated"):
        checkpoints.load_run(tmp_path)


def save_and_die(folder, others, calls):
    """Save in a real process that ends, as by kill -9, before this call that renames or links. Returns its code."""

    def save():
        done = []

        def limited(function):
            def call(*args):
                if len(done) == calls:
                    os._exit(9)
                done.append(function(*args))

            return call

        os.replace, os.link = limited(os.replace), limited(os.link)
        checkpoints.save_run(folder, {"step": 3}, others)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_killed_at_any_rename(tmp_path, calls, damaged):
    for step in (1, 2):
        checkpoints.save_run(tmp_path, {"step": step})
    if damaged:  # the newest; what is resumed then moves it out of the way
        os.replace(tmp_path / "checkpoint.pth", tmp_path / "checkpoint_damaged.pth")
    known = checkpoints.load_run(tmp_path)[0]["step"]
    assert save_and_die(tmp_path, [], calls) == (0 if damaged and calls >= 2 else 9)
    assert damaged or checkpoints.load(tmp_path / "checkpoint.pth")["step"] == 2  # there at every moment
    state, _, problem = checkpoints.load_run(tmp_path)
    assert state["step"] >= known and problem is None
    checkpoints.finish_writing(tmp_path)
    assert checkpoints.load_run(tmp_path)[0]["step"] == (3 if calls else known)
    if calls and not damaged:
        assert checkpoints.load(tmp_path / "checkpoint_previous.pth")["step"] == 2
    assert {p.name for p in tmp_path.iterdir()} <= {
        "checkpoint.pth",
        "checkpoint_previous.pth",
        "checkpoint_damaged.pth",
    }


@pytest.mark.parametrize("calls", range(9))
def test_killed_while_the_same_gets_several_names(tmp_path, calls):
    """Numbered and best come first, so that whoever has the latest has them; each is whole or not there."""
    others = ["checkpoint0003.pth", "checkpoint_best.pth"]
    for step in (1, 2):
        checkpoints.save_run(tmp_path, {"step": step}, ["checkpoint_best.pth"])
    assert save_and_die(tmp_path, others, calls) == (9 if calls < 8 else 0)
    checkpoints.finish_writing(tmp_path)
    latest, best = (checkpoints.load(tmp_path / name)["step"] for name in ("checkpoint.pth", "checkpoint_best.pth"))
    assert latest == (3 if calls > 4 else 2) and best == (3 if calls > 2 else 2)
    assert (tmp_path / others[0]).exists() == (calls > 0)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.new"))
    if latest == 3:
        assert checkpoints.load(tmp_path / others[0])["step"] == 3
        assert checkpoints.load(tmp_path / "checkpoint_previous.pth")["step"] == 2


def test_a_reader_always_finds_a_checkpoint(tmp_path):
    """A real process saves again and again, and the file is looked for as often as this one can."""
    checkpoints.save_run(tmp_path, {"step": 0})

    def save():
        for step in range(1, 60):
            checkpoints.save_run(tmp_path, {"step": step})
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    looked = 0
    while process.is_alive():
        for _ in range(100):
            assert (tmp_path / "checkpoint.pth").exists()
        looked += 100
    process.join()
    assert looked > 1000 and process.exitcode == 0 and checkpoints.load_run(tmp_path)[0]["step"] == 59


def test_without_hard_links_it_is_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # what FAT and some network file systems answer

    monkeypatch.setattr(os, "link", refuse)
    for step in range(3):
        checkpoints.save_run(tmp_path, {"step": step}, ["checkpoint_best.pth"])
    steps = {path.stem: checkpoints.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"checkpoint": 2, "checkpoint_previous": 1, "checkpoint_best": 2}


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path):
    """/proc/self/mem answers a real EIO. The one before it is whole, but nobody knows that the newest is not."""
    checkpoints.save(tmp_path / "checkpoint_previous.pth", {"step": 1})
    (tmp_path / "checkpoint.pth").symlink_to("/proc/self/mem")
    with pytest.raises(ReadError, match="checkpoint.pth .*Input/output error"):
        checkpoints.load_run(tmp_path)


LITTLE_MEMORY = """
import resource, sys
import torch
from cplearn import tensor_files
from cplearn.errors import ReadError

used = int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
for function in (tensor_files.load_file, tensor_files.load_file_and_hash):
    try:
        function(sys.argv[1])
    except ReadError as error:
        print(error)
"""


def test_too_little_memory_is_no_damage(tmp_path):
    checkpoints.save(tmp_path / "c.pth", {"w": torch.zeros(2**25)})
    done = run_script("-c", LITTLE_MEMORY, str(tmp_path / "c.pth"))
    assert done.stdout.count("c.pth cannot be read now (not enough memory)") == 2, done.stderr


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    bomb = tmp_path / "c.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("archive/data.pkl", "archive/data/0"):
            with archive.open(name, "w", force_zip64=True) as f:
                for _ in range(64):
                    f.write(bytes(2**24))
    assert bomb.stat().st_size < 2**23
    unpacked = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *args: unpacked.append(args))
    with pytest.raises(UserError, match="c.pth is refused"):
        tensor_files.load_file(bomb)
    assert not unpacked


@pytest.mark.parametrize(
    ("odd", "word"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), "complex"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.eye(2).to_sparse_csr(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(odd, word, tmp_path):
    torch.save({"student": [{"w": torch.ones(2), "odd": odd}]}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=f"c.pth is refused: it holds tensors that are .*{word}"):
        tensor_files.load_file(tmp_path / "c.pth")


@pytest.mark.parametrize("state", [{"format": checkpoints.FORMAT, "model": None}, {"model": None}, {"teacher": 3}, {}])
def test_a_file_without_weights_is_refused(state):
    with pytest.raises(UserError, match="x.pth"):
        checkpoints.load_backbone(ResNet8(8), state, "x.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    module = torch.nn.Linear(3, 2)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    weights["weight"][1, 2] = value
    before = module.weight.clone()
    with pytest.raises(UserError, match="c.pth .* in weight"):
        checkpoints.load_into(module, weights, "c.pth")
    assert torch.equal(module.weight, before)


def test_a_file_that_may_not_grow_any_more_costs_nothing(tmp_path):
    """RLIMIT_FSIZE: the system refuses to write beyond 100 kB, as a full disk would."""
    checkpoints.save_run(tmp_path, {"step": 1})
    before = (tmp_path / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(WriteError, match="checkpoint.pth.new could not be written: File too large") as error:
            checkpoints.save_run(tmp_path, {"step": 2, "w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and checkpoints.load_run(tmp_path)[0]["step"] == 1


def test_optimizers_that_do_not_fit():
    model, other = ResNet8(4), ResNet8(8)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        m(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    checkpoints.load_optimizer(optimizers[0], optimizers[0].state_dict(), "c.pth")
    short = optimizers[0].state_dict()
    short["param_groups"] = [{**short["param_groups"][0], "params": [0]}]
    for state in (optimizers[1].state_dict(), short, {}, {"param_groups": [], "state": {}}):
        with pytest.raises(UserError, match="c.pth"):
            checkpoints.load_optimizer(optimizers[0], state, "c.pth")


# --- DINO's own ---------------------------------------------------------------------------------------


def test_the_converter_lets_plain_data_through_and_nothing_else(tmp_path):
    """With the flags and paths that DINO pickles; as a user would call it."""
    weights = ResNet8(4).state_dict()
    state = {
        "student": {f"module.backbone.{k}": v + 1 for k, v in weights.items()},
        "teacher": {f"backbone.{k}": v for k, v in weights.items()} | {"head.mlp.0.weight": torch.zeros(1)},
        "args": Namespace(arch="x", lr=0.1, output_dir=pathlib.PosixPath("/checkpoint/me")),
        "epoch": 3,
    }
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="could run code"):
        tensor_files.load_file(tmp_path / "dino.pth")
    convert = ["-m", "cplearn.checkpoints", str(tmp_path / "dino.pth")]
    done = fork_script(tmp_path / "said", *convert, str(tmp_path / "plain.pth"))
    assert done.returncode == 0 and f"{len(weights)} tensors of the teacher" in done.stdout, done.stderr
    student = fork_script(tmp_path / "said", *convert, str(tmp_path / "student.pth"), "--key", "student")
    assert student.returncode == 0, student.stderr
    for name, shift in (("plain", 0), ("student", 1)):
        found = checkpoints.backbone_weights(tensor_files.load_file(tmp_path / f"{name}.pth"))
        assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k] + shift) for k in weights)
    again = fork_script(tmp_path / "said", *convert, str(tmp_path / "plain.pth"))
    assert again.returncode == 2 and "exists: choose another name" in again.stderr
    torch.save({**state, "args": Attack(tmp_path / "executed")}, tmp_path / "dino.pth")
    done = fork_script(tmp_path / "said", *convert, str(tmp_path / "evil.pth"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "could run code" in done.stderr
    assert not (tmp_path / "executed").exists() and not (tmp_path / "evil.pth").exists()
