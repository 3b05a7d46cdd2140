"""A cell: one command that trains and evaluates, whatever is killed, and folders of earlier versions."""

import json
import os
import shlex
import shutil
import signal
import subprocess

import pytest
from grids import finish, grid_of, start, wait_for
from helpers import ROOT, children_of, fork_script, log_of, run_script, without_time

from cplearn.errors import Interrupted, NonFiniteError, PeerError, UserError
from cplearn.tables import cell as cell_command
from cplearn.tables.child import Children
from cplearn.tables.grid import Cell, is_random, script_of
from cplearn.tables.status import State, status_lines

FLAGS = "--dataset digits --methods swav --out_dims 16"
TRAIN = "--arch timm:test_resnet --local_crops_number 0 --image_size 16 --warmup_epochs 0"
SMALL = f"{FLAGS} --epochs 6 --train_flags '{TRAIN}'"


def one_cell(folder, flags: str = SMALL) -> Cell:
    """Begin the cell of a grid, and return it."""
    folder.mkdir(exist_ok=True)
    grid = grid_of(folder, flags).save()
    grid.cells[0].write(grid.settings.ngpus)
    return grid.cells[0]


def run_cell(cell: Cell) -> subprocess.Popen:
    return start(cell.folder / "cell.out", "-m", "cplearn.tables.cell", str(cell.folder), "--num_workers", "0")


def evaluated(cell: Cell) -> dict[tuple[str, bool], dict]:
    """Return the metrics of every evaluation; each has one line."""
    lines = [line for random in (False, True) for line in cell.results(random=random)]
    metrics = {(line["script"], line["random_init"]): line["metrics"] for line in lines}
    assert len(metrics) == len(lines)
    return metrics


ALL = {("eval_cluster", False), ("eval_collapse", False), ("eval_knn", False), ("eval_linear", False),
       ("eval_cluster", True), ("eval_knn", True), ("eval_linear", True)}  # fmt: skip


@pytest.mark.slow
def test_a_killed_cell_goes_on(tmp_path):
    """kill -9 to the training, then to the cell, SIGTERM while it evaluates: like a cell that nobody disturbed."""
    cell, calm = (one_cell(tmp_path / name) for name in "ab")
    assert run_cell(calm).wait(300) == 0

    run = run_cell(cell)
    wait_for((cell.folder / "checkpoint_previous.pth").exists, run)
    (training,) = children_of(run.pid)
    os.kill(training, signal.SIGKILL)
    assert run.wait(60) == PeerError.exit_code
    failure = json.loads((cell.folder / "failed.json").read_text())
    assert (failure["stage"], failure["code"], failure["times"]) == ("train", PeerError.exit_code, 1)
    assert "SIGKILL" in failure["line"]

    epochs = len(log_of(cell.folder))
    run = run_cell(cell)
    wait_for(lambda: len(log_of(cell.folder)) > epochs, run)
    (training,) = children_of(run.pid)
    run.kill()  # and nobody but the kernel tells the training
    run.wait()
    run = run_cell(cell)
    wait_for((cell.folder / "trained" / "results.jsonl").exists, run)
    assert not os.path.exists(f"/proc/{training}") and not (cell.folder / "failed.json").exists()
    run.terminate()
    assert run.wait(60) == Interrupted.exit_code
    done = len(cell.results())
    assert run_cell(cell).wait(300) == 0
    assert 0 < done < 4 and evaluated(cell) == evaluated(calm) and evaluated(cell).keys() == ALL
    assert without_time(log_of(cell.folder)) == without_time(log_of(calm.folder))
    assert not list(cell.folder.rglob(".kept_features")) and State(cell).complete


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "names"), [("timm:test_resnet", ("random linear", "cluster")), ("vit_tiny", ("linear",))]
)
def test_evaluations_in_one_process_are_those_of_the_scripts(tmp_path, arch, names):
    """To the digit; the linear probe of a ViT takes other tokens than the rest."""
    train = f"--arch {arch} --max_steps 2 --local_crops_number 0 --image_size 16 --patch_size 8"
    cell = one_cell(tmp_path / "grid", f"{FLAGS} --epochs 1 --train_flags '{train}'")
    assert run_cell(cell).wait(300) == 0, (cell.folder / "cell.out").read_text()
    assert evaluated(cell).keys() == ALL
    for name in names:
        random, script = is_random(name), script_of(name)
        argv = ["--pretrained_weights", cell.folder / "checkpoint.pth", *["--random_init"] * random,
                "--output_dir", tmp_path / name, *cell.evaluate[name], "--num_workers", "0"]  # fmt: skip
        assert fork_script(tmp_path / "printed", f"{script}.py", *argv).returncode == 0
        (alone,) = map(json.loads, (tmp_path / name / "results.jsonl").read_text().splitlines())
        (line,) = [x for x in cell.results(random=random) if x["script"] == script]
        ours, theirs = ({k: v for k, v in x.items() if k not in ("flags", "commit")} for x in (line, alone))
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.dist
def test_a_cell_of_two_processes(tmp_path):
    """A signal lets both save, a kill of one ends the other; then it goes on to its end."""
    cell = one_cell(tmp_path / "grid", f"{SMALL} --ngpus 2")
    run = run_cell(cell)
    wait_for((cell.folder / "checkpoint_previous.pth").exists, run)
    run.send_signal(signal.SIGUSR2)
    assert run.wait(60) == Interrupted.exit_code
    assert "cell.py: SIGUSR2: stopped after step" in (cell.folder / "cell.out").read_text().replace("_", "")
    epochs = len(log_of(cell.folder))
    run = run_cell(cell)
    wait_for(lambda: len(log_of(cell.folder)) > epochs, run)
    os.kill(children_of(run.pid)[1], signal.SIGKILL)
    assert run.wait(60) == PeerError.exit_code and not children_of(run.pid)
    assert run_cell(cell).wait(300) == 0
    assert evaluated(cell).keys() == ALL and "2 processes on 1 host" in (cell.folder / "cell.out").read_text()


def test_what_fails_is_counted_with_its_own_code(tmp_path):
    train = "--lr 1e25 --max_skipped_steps 1 --clip_grad 0"
    cell = one_cell(tmp_path / "grid", f"{FLAGS} --epochs 2 --train_flags '{train}'")
    for times in (1, 2):
        with pytest.raises(cell_command.PartError) as error:
            cell_command.main([str(cell.folder), "--num_workers", "0"])
        assert error.value.exit_code == NonFiniteError.exit_code
        failure = json.loads((cell.folder / "failed.json").read_text())
        assert (failure["stage"], failure["code"], failure["times"]) == ("train", NonFiniteError.exit_code, times)
    assert f"failed | train, exit code {NonFiniteError.exit_code}: " in status_lines([State(cell)])[0]


def test_another_runs_checkpoint_is_refused(tmp_path, run):
    cell = one_cell(tmp_path / "grid", f"{FLAGS} --epochs 2")
    shutil.copy(run / "checkpoint.pth", cell.folder)
    cell.mark_trained()
    with pytest.raises(UserError, match="--method cplearn, not swav"):
        cell_command.main([str(cell.folder)])
    assert not (cell.folder / "trained").exists()


def test_a_folder_that_is_no_cell(tmp_path):
    for content in (None, "{}"):
        if content:
            (tmp_path / "cell.json").write_text(content)
        with pytest.raises(UserError, match="cell.json"):
            cell_command.main([str(tmp_path)])


def test_a_childs_end_comes_from_its_file(tmp_path):
    """Not from what it prints, nor from the order in which processes end."""
    with open(tmp_path / "out", "wb") as out:
        end = Children("eval_knn", ["--nb_knn", "0"], out=out).wait()
        assert end == (UserError.exit_code, "--nb_knn 0 must be positive")
        end = Children("no_such_script", [], out=out).wait()
    assert end.code == 1 and "no_such_script" in end.line


# --- folders of earlier versions --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_of_an_earlier_version_goes_on(tmp_path):
    """It has no cell.json, and its recipes lie elsewhere. One cell was finished there, one killed in its training."""
    folder, flags = tmp_path / "grid", SMALL.replace("--epochs 6", "--epochs 2 --seeds 0 1")
    folder.mkdir()
    finished, killed = grid_of(folder, flags).save().cells
    content = json.loads((folder / "grid.json").read_text().replace(f"@{ROOT}", "@/elsewhere"))
    for name in ("tune", "tune_out_dim", "tune_epochs"):  # older still
        assert content["settings"].pop(name) is None
    assert [list(x) for x in content["cells"]] == [["row", "seed", "name", "train", "evaluate"]] * 2
    (folder / "grid.json").write_text(json.dumps(content, indent=1))

    metrics = {f"eval_{x}": {"knn20_top1": 0.5} for x in ("knn", "linear", "cluster", "collapse")}
    finish(finished, metrics, metrics)
    (finished.folder / "trained.json").write_text('{"commit": "a4194c1b0a62"}\n')
    argv = [*killed.train, "--output_dir", str(killed.folder), "--num_workers", "0", "--max_steps", "30"]
    assert run_script("main_cplearn.py", *argv).returncode == 0
    before = {path: path.read_bytes() for path in finished.folder.rglob("*.json*")}

    done = run_script("reproduce_table3.py", "--output_dir", str(folder), "--scale", "small", *shlex.split(flags))
    assert done.returncode == 0 and "1 of 2 cells are finished" in done.stdout, done.stdout + done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "after epoch 1 and 8 of 22 steps" in (killed.folder / "cell.out").read_text()
    assert {name for name, _ in evaluated(killed)} == {name for name, _ in ALL}
    assert not (finished.folder / "cell.json").exists()
    assert "2 cells: 2 done" in run_script("reproduce_table3.py", "--output_dir", str(folder), "--status").stdout
