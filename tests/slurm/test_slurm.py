"""Jobs on a real Slurm of two nodes: submitted, preempted, out of time, crashed, killed, followed by evaluations.

`make test-slurm` where sbatch works. The partition `preemptible`, below the default one, is used if it is there.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import time

import helpers
import pytest
from helpers import ROOT, log_of, run_script, same_state, under_torchrun, without_time, write_splits

import run_with_submitit
from cplearn.errors import UserError
from cplearn.slurm.status import LIVE, account_of, ask, show_job, status


def slurm_answers() -> str | None:
    """Why these tests cannot run here, if so."""
    if shutil.which("sbatch") is None:
        return "no Slurm here"
    nodes = ask("sinfo", "-h", "-N", "-o", "%N")
    return None if len(set(nodes.split())) >= 2 else "no Slurm of two nodes answers"


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(slurm_answers() is not None, reason=slurm_answers() or ""),
]

SIZE = ["--cpu", "--nodes", "2", "--ngpus", "2", "--cpus_per_task", "1", "--mem", "2G", "--timeout", "20"]
TRAIN = ["--arch", "resnet8_w8", "--image_size", "32", "--out_dim", "40", "--batch_size_per_gpu", "1", "--epochs", "12",
         "--warmup_epochs", "0", "--saveckp_freq", "0", "--print_freq", "2"]  # fmt: skip


wait_for = functools.partial(helpers.wait_for, pause=0.2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, image_folder):
    """The same run in four processes which nobody disturbs."""
    flags = [*TRAIN, "--data_path", str(image_folder)]
    return under_torchrun(tmp_path_factory.mktemp("undisturbed"), *flags, processes=4)


@pytest.fixture(autouse=True)
def no_jobs_left():
    yield
    mine = ask("squeue", "-h", "-o", "%A", "-u", str(os.getuid())).split()
    subprocess.run(["scancel", *mine]) if mine else None
    wait_for(lambda: not ask("squeue", "-h", "-u", str(os.getuid())).strip(), "an empty queue")


def submit(out, image_folder, *more) -> list[str]:
    argv = [*SIZE, *TRAIN, "--data_path", str(image_folder), "--output_dir", str(out), *more]
    return run_with_submitit.main([str(x) for x in argv])


def wait_end(job: str, out, seconds: float = 240) -> dict:
    """scontrol's words on a job that ended; fails with what --status and the log say if it does not."""
    try:
        return wait_for(lambda: (now := show_job(job))["JobState"] not in LIVE and now, job, seconds)
    except AssertionError:
        raise AssertionError("\n".join([*status(out), log(out, job)])) from None


def log(out, job: str, rank: int = 0) -> str:
    path = out / "slurm" / f"{job}_{rank}_log.out"
    return path.read_text() if path.exists() else ""


def wait_step(out, job: str, epoch: int) -> None:
    wait_for(lambda: re.search(rf"(?m)^epoch {epoch}/\d+  loss", log(out, job)), f"epoch {epoch}")


def the_line(out, job: str) -> str:
    return next(line for line in status(out) if line.split()[0] == job)


def started(out, image_folder, *more) -> str:
    """A job that has trained two epochs."""
    (job,) = submit(out, image_folder, *more)
    wait_step(out, job, 2)
    return job


def assert_completed(job: str, out, undisturbed=None, restarts: int | None = None) -> None:
    """It ended well, after so many restarts, and left what the undisturbed run left."""
    ended = wait_end(job, out)
    assert ended["JobState"] == "COMPLETED" and ended["ExitCode"] == "0:0", log(out, job)
    assert restarts is None or ended["Restarts"] == str(restarts), log(out, job)
    if undisturbed is not None:
        assert same_state(out, undisturbed)
        assert without_time(log_of(out)) == without_time(log_of(undisturbed))


def test_two_nodes_to_the_end_like_torchrun(tmp_path, image_folder, undisturbed):
    argv = [*SIZE, *TRAIN, "--data_path", str(image_folder), "--output_dir", str(tmp_path)]
    shown = run_script("run_with_submitit.py", *argv, "--dry_run")
    assert shown.returncode == 0 and not (tmp_path / "slurm").exists()
    done = run_script("run_with_submitit.py", *argv)
    assert done.returncode == 0, done.stderr
    job = re.search(r"Submitted job (\d+): main_cplearn, 2 x 2 processes", done.stdout)[1]
    assert (tmp_path / "slurm" / f"{job}_submission.sh").read_text() in shown.stdout
    assert "PENDING" in the_line(tmp_path, job) or "RUNNING" in the_line(tmp_path, job)
    wait_step(tmp_path, job, 2)
    assert re.search(r"RUNNING +on \S+ for \S+  epoch \d+ of 12.*  ETA [\d.]+ (s|min)", the_line(tmp_path, job))
    with pytest.raises(UserError, match=rf"has job {job} \(main_cplearn\), which is RUNNING: scancel {job}, or"):
        submit(tmp_path, image_folder)
    assert_completed(job, tmp_path, undisturbed)
    assert the_line(tmp_path, job).split() == f"{job} main_cplearn COMPLETED epoch 12 of 12".split()
    hosts = re.findall(r"(?m)^\| (\d) +\| +(\S+) \| +(\d) \|", log(tmp_path, job))
    assert [(rank, local) for rank, _, local in hosts] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert hosts[0][1] == hosts[1][1] != hosts[2][1] == hosts[3][1]
    assert not list(tmp_path.glob("slurm/*address"))
    (again,) = submit(tmp_path, image_folder)
    assert_completed(again, tmp_path)
    assert "Nothing left to do" in log(tmp_path, again)


@pytest.mark.parametrize("how", ["USR2", "TERM", "scontrol requeue"])
def test_a_signal_in_mid_epoch_requeues_and_ends_like_an_undisturbed_run(tmp_path, image_folder, undisturbed, how):
    (job,) = submit(tmp_path / "with a space" / "%j", image_folder)
    out = tmp_path / "with a space" / job
    stop = ["scontrol", "requeue", job] if how == "scontrol requeue" else ["scancel", f"--signal={how}", job]
    saved, sent = 0, 0
    while saved % 12 == 0 and sent < 3:  # one signal in twelve falls on an epoch's end: once more
        wait_step(out, job, 2 * sent + 2)
        time.sleep(0.7)
        subprocess.run(stop)
        sent += 1
        wait_for(lambda words=f"requeued {sent} time": words in the_line(out, job), "the requeue")
        wait_for(lambda sent=sent: log(out, job).count("Resuming ") == sent, "the second start")
        saved = int(re.findall(r"saved after step (\d+)", log(out, job))[-1])
    assert_completed(job, out, undisturbed, restarts=sent)
    assert saved > 24 and saved % 12, "the signal should come inside an epoch"  # or nothing is shown of mid-epoch
    assert f"after epoch {saved // 12} and {saved % 12} of 12 steps" in log(out, job)
    assert [path.name for path in out.parent.iterdir()] == [job]


def test_a_time_limit_requeues(tmp_path, image_folder):
    """Too long for any machine: cancelled once it goes on, and compared with a run cut after the same step."""
    endless, out = ("--epochs", "20000"), tmp_path / "out"
    (job,) = submit(out, image_folder, *endless, "--timeout", "2", "--signal_delay_s", "15")
    wait_for(lambda: "requeued 1 time" in the_line(out, job), "the time limit", 600)
    saved = int(re.search(r"SIGUSR2: stopped after step (\d+)", log(out, job))[1])
    wait_step(out, job, saved // 12 + 3)
    subprocess.run(["scancel", job], check=True)
    assert wait_end(job, out)["JobState"] == "CANCELLED"
    step = re.search(r"SIGTERM: stopped after step (\d+)", log(out, job))[1]
    assert int(step) > saved > 0
    flags = [*TRAIN, "--data_path", str(image_folder), *endless, "--max_steps", step]
    undisturbed = under_torchrun(tmp_path / "undisturbed", *flags, processes=4)
    assert same_state(out, undisturbed)
    whole = log_of(out)  # a run cut by --max_steps also has a line of the epoch it was cut in
    assert without_time(whole) == without_time(log_of(undisturbed)[: len(whole)])


def test_a_real_preemption(tmp_path, image_folder, undisturbed):
    if "preemptible" not in ask("sinfo", "-h", "-o", "%P"):
        pytest.skip("no partition called preemptible")
    job = started(tmp_path, image_folder, "--partition", "preemptible")
    other = subprocess.run(["sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"],
                           capture_output=True, text=True).stdout.strip()  # fmt: skip
    wait_for(lambda: "PENDING" in the_line(tmp_path, job), "the preemption")
    wait_for(lambda: show_job(other)["JobState"] == "COMPLETED", "the other job")
    assert_completed(job, tmp_path, undisturbed, restarts=1)


def returned(node: str) -> bool:
    """Ask the node back, and look. Slurm refuses while it clears it of the job, and if it came back by itself."""
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True)
    return not re.search(r"State=\S*DOWN", ask("scontrol", "show", "node", "-o", node))


def test_a_node_that_fails(tmp_path, image_folder, undisturbed):
    job = started(tmp_path, image_folder)
    node = ask("scontrol", "show", "hostnames", show_job(job)["NodeList"]).split()[1]
    down = subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], capture_output=True)
    if down.returncode:
        pytest.skip("only the administrator may take a node away")
    try:
        wait_for(lambda: "requeued 1 time" in the_line(tmp_path, job), "the requeue")
    finally:
        wait_for(lambda: returned(node), "the node's return", 120)
    assert_completed(job, tmp_path, undisturbed)


def kill_a_rank(out, job: str) -> None:
    """kill -9 to the last one, wherever Slurm has put it: the table at the start names node and process."""
    node, pid = re.search(r"(?m)^\| 3 +\| +(\S+) \| +1 \| +cpu \| +(\d+) \|", log(out, job)).groups()
    subprocess.run(["srun", f"--jobid={job}", "--overlap", "-N1", "-n1", "-w", node, "kill", "-9", pid], check=True)


def test_a_killed_process_requeues_what_was_saved(tmp_path, image_folder, undisturbed):
    (job,) = submit(tmp_path, image_folder)
    wait_step(tmp_path, job, 3)
    kill_a_rank(tmp_path, job)
    assert_completed(job, tmp_path, undisturbed, restarts=1)
    assert re.search(r"no last message of rank [\d, ]*3 of 4, .*; requeueing it, 1 of 20", log(tmp_path, job))


def test_a_process_killed_before_anything_is_saved_fails(tmp_path, image_folder):
    (job,) = submit(tmp_path, image_folder, "--epochs", "1000", "--saveckp_minutes", "0", "--batch_size_per_gpu", "4",
                    "--arch", "vit_tiny", "--patch_size", "4")  # fmt: skip
    wait_for(lambda: "steps_per_epoch" in log(tmp_path, job), "the start")
    kill_a_rank(tmp_path, job)
    assert wait_end(job, tmp_path)["JobState"] == "FAILED"
    assert re.search(r"no last message of rank [\d, ]*3 of 4, .* before anything was saved", log(tmp_path, job))
    assert "FAILED" in the_line(tmp_path, job) and "exit 6" in the_line(tmp_path, job)


def test_a_crash_is_reported(tmp_path, image_folder):
    jobs = submit(tmp_path / "out", image_folder, "--data_path", tmp_path / "nowhere", "--then", "eval")
    ended = wait_end(jobs[0], tmp_path / "out")
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0"
    line = the_line(tmp_path / "out", jobs[0])
    assert "FAILED" in line and re.search(r"exit 2 on rank \d \(\S+\): .*--data_path .* is not a folder", line)
    if ask("sacct"):  # what is left when scontrol has forgotten
        account = wait_for(lambda: account_of(jobs[0]), "the accounting")
        assert account["JobState"] == "FAILED" and account["ExitCode"] == "2:0"
    for job in jobs[1:]:
        assert wait_end(job, tmp_path / "out")["JobState"] == "CANCELLED"
        assert "never started: the job before it did not end well" in the_line(tmp_path / "out", job)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_the_limit_of_requeues(tmp_path, image_folder, undisturbed):
    job = started(tmp_path, image_folder, "--max_requeues", "0")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    ended = wait_end(job, tmp_path)
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "75:0"
    assert "not requeued: --max_requeues 0 is reached, submit again" in log(tmp_path, job)
    assert re.search(r"FAILED .*exit 75: SIGUSR2: stopped after step .*--max_requeues 0 is", the_line(tmp_path, job))
    (job,) = submit(tmp_path, image_folder)
    assert_completed(job, tmp_path, undisturbed)


def test_a_signal_while_ranks_wait_for_one_another_requeues(tmp_path, image_folder, undisturbed):
    """Rank 3 is frozen before it has come, the others wait for it; all are told to stop."""
    (job,) = submit(tmp_path, image_folder)
    wait_for(lambda: "submitit" in log(tmp_path, job, 3), "the start")
    find = f"tr '\\0' '\\n' < /proc/$p/environ | grep -qx SLURM_JOB_ID={job} && " \
           "tr '\\0' '\\n' < /proc/$p/environ | grep -qx SLURM_PROCID=3"  # fmt: skip
    loop = "for p in $(pgrep -f submitit.core._submit); do " + find + " && kill -{} $p; done; true"
    subprocess.run(["bash", "-c", loop.format("STOP")], check=True)
    time.sleep(12)
    if "steps_per_epoch" in log(tmp_path, job):
        pytest.skip("rank 3 is on another machine, or had come already")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    subprocess.run(["bash", "-c", loop.format("CONT")], check=True)
    wait_for(lambda: "requeued 1 time" in the_line(tmp_path, job), "the requeue", 30)
    assert_completed(job, tmp_path, undisturbed)


def test_a_folder_that_cannot_be_written_any_more(tmp_path, image_folder):
    job = started(tmp_path / "out", image_folder)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert wait_end(job, tmp_path / "elsewhere")["JobState"] == "FAILED"
    assert not (tmp_path / "out" / "slurm").exists()


def test_a_cancelled_job_stays_cancelled_and_its_state_is_saved(tmp_path, image_folder, undisturbed):
    job = started(tmp_path, image_folder)
    subprocess.run(["scancel", job], check=True)
    assert wait_end(job, tmp_path)["JobState"] == "CANCELLED"
    assert "SIGTERM: stopped after step" in the_line(tmp_path, job)
    (job,) = submit(tmp_path, image_folder)
    assert_completed(job, tmp_path, undisturbed)


def test_two_jobs_at_once_and_the_job_number_in_the_folder(tmp_path, image_folder, undisturbed):
    found = [submit(tmp_path / "%j", image_folder)[0] for _ in range(2)]
    for job in found:
        assert_completed(job, tmp_path / job, undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == set(found)


@pytest.fixture(scope="module")
def more_images(tmp_path_factory):
    """As many as the linear probe's batch needs."""
    return write_splits(tmp_path_factory.mktemp("more"), train=100, val=10)


def test_evaluations_follow(tmp_path, more_images):
    more = ("--then", "eval", "--nodes", "1", "--epochs", "2", "--batch_size_per_gpu", "20")
    jobs = submit(tmp_path, more_images, *more)
    assert len(jobs) == 5 and "PENDING     (Dependency)" in the_line(tmp_path, jobs[1])
    for job in jobs:
        assert_completed(job, tmp_path)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    scripts = ["eval_knn", "eval_linear", "eval_cluster", "eval_collapse", "eval_collapse"]  # and random init
    assert [one["script"] for one in results] == scripts
    assert all(one["weights"] == f"{tmp_path}/checkpoint.pth" and one["epoch"] == 2 for one in results)
    single = run_script("eval_knn.py", "--pretrained_weights", str(tmp_path / "checkpoint.pth"), "--device", "cpu",
                        "--output_dir", str(tmp_path / "single"))  # fmt: skip
    assert single.returncode == 0, single.stderr
    there = json.loads((tmp_path / "single" / "results.jsonl").read_text())
    assert there["metrics"] == results[0]["metrics"]


def test_an_evaluation_told_to_stop_starts_again(tmp_path, more_images, undisturbed):
    argv = ["--script", "eval_linear", "--pretrained_weights", undisturbed / "checkpoint.pth", "--output_dir", tmp_path]
    argv += ["--data_path", more_images, "--epochs", "3000", "--cpu", "--ngpus", "2", *SIZE[5:9]]
    (job,) = run_with_submitit.main([str(x) for x in argv])
    wait_for(lambda: "epoch " in log(tmp_path, job), "the probe")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for(lambda: "requeued 1 time" in the_line(tmp_path, job), "the requeue")
    wait_for(lambda: "Resuming" in log(tmp_path, job), "the second start")
    assert "SIGUSR2: stopped before there was anything to save; requeueing it, 1 of 20" in log(tmp_path, job)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--nodes", "99"), "--nodes 99: partition .* gives a job .* at most"),
        (("--partition", "nope"), "Slurm refused the job: invalid partition specified: nope"),
        (("--mem", "9999T"), "Slurm refused the job: Memory specification can not be satisfied"),
        (("--constraint", "h900"), "Slurm refused the job: Invalid feature specification"),
        (("--exclude", "nowhere"), "Slurm refused the job: Invalid node name specified"),
        (("--sbatch", "reservation=none"), "Slurm refused the job: .*[Rr]eservation"),
    ],
)
def test_what_slurm_cannot_do_is_one_line(tmp_path, image_folder, capfd, more, words):
    with pytest.raises(UserError, match=words) as caught:
        submit(tmp_path / "out", image_folder, *more)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""
    assert not (tmp_path / "out").exists()


def test_gpus_that_are_not_there(tmp_path, image_folder):
    """The batch asks for GPUs; a node without any fails at once instead of training on its CPU."""
    import torch

    if torch.cuda.is_available() or "gpu" not in ask("sinfo", "-h", "-o", "%G"):
        pytest.skip("needs a Slurm that promises GPUs which torch does not see")
    argv = ["--ngpus", "1", "--mem", "2G", *TRAIN, "--data_path", str(image_folder), "--output_dir", str(tmp_path)]
    (job,) = run_with_submitit.main(argv)
    assert wait_end(job, tmp_path)["JobState"] == "FAILED"
    assert "--device cuda, but torch sees no GPU" in the_line(tmp_path, job)


def test_a_grid_stands_in_line(tmp_path):
    """reproduce_table3.py: a job per cell, one after the other; told to stop, a cell saves, requeues and goes on."""

    def grid(*more: str) -> str:
        cells = "--methods cplearn swav --out_dims 16 --epochs 8 --scale small --dataset digits --output_dir".split()
        launch = "--launcher slurm --jobs 1 --ngpus 2 --cpu --cpus_per_task 1 --timeout 10 --train_flags".split()
        small = "--arch timm:test_resnet --image_size 16 --warmup_epochs 0"
        command = [str(ROOT / "reproduce_table3.py"), *cells, str(tmp_path), *launch, small, *more]
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "cplearn_c16_s0"
    (first, second), again = re.findall(r"(?m)^\S+: job (\d+)", grid()), grid()
    assert ask("squeue", "-h", "-j", second, "-o", "%E").strip().replace("(unfulfilled)", "") == f"afterany:{first}"
    assert "0 jobs submitted" in again and again.count("there already") == 2
    assert re.search(r"swav_c16_s0 +\| +queued", grid("--status"))
    wait_for((out / "checkpoint_previous.pth").exists, f"the first epochs: {log(out, first)}")
    subprocess.run(["scancel", "--signal=USR2", first], check=True)
    assert show_job(first)["NumTasks"] == "1"
    wait_for(lambda: show_job(first).get("Restarts") == "1", "the requeue")
    for job, name in ((first, "cplearn_c16_s0"), (second, "swav_c16_s0")):
        assert wait_end(job, tmp_path / name, 600)["JobState"] == "COMPLETED", log(tmp_path / name, job)
        results = [json.loads(x) for x in (tmp_path / name / "trained" / "results.jsonl").read_text().splitlines()]
        assert [x["script"] for x in results] == ["eval_knn", "eval_linear", "eval_cluster", "eval_collapse"]
    assert "SIGUSR2: stopped after step" in log(out, first) and "Resuming" in log(out, first)
    assert "2 cells: 2 done" in grid("--status") and "0 jobs submitted" in grid()
    assert (tmp_path / "table3.csv").exists()
