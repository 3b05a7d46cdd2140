"""Averages, the plain lines of a log file, and the bar of a real terminal."""

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest
import torch
from helpers import ROOT

from cplearn.training.meters import DeferredRead, Meter, Progress


def test_meter_reads_recent_and_averages_all():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value)})
    assert meter.read() == {"loss": 3.0}
    meter.add({"loss": torch.tensor(11.0)})
    assert meter.read() == {"loss": 11.0}
    meter.add({"loss": torch.tensor(0.0)})  # not read yet, but part of the average
    assert meter.average() == {"loss": 4.0} and meter.average() == {"loss": 4.0}


def test_meter_leaves_out_skipped_steps_and_goes_on_from_its_state():
    meter, other = Meter(), Meter()
    for value, skipped in ((1.0, False), (float("nan"), True), (3.0, False)):
        meter.add({"loss": torch.tensor(value)}, torch.tensor(skipped))
    assert meter.read() == {"loss": 2.0}
    meter.add({"loss": torch.tensor(5.0)})
    other.load(meter.state(), torch.device("cpu"))
    for m in (meter, other):
        m.add({"loss": torch.tensor(0.1)})
        assert m.read() == {"loss": pytest.approx(2.55)} and m.average() == {"loss": pytest.approx(9.1 / 4)}
    meter.add({"loss": torch.tensor(1.0)}, torch.tensor(True))
    assert meter.read()["loss"] != meter.average()["loss"] and meter.average() == other.average()


def test_a_deferred_read_hands_out_the_step_before():
    deferred = DeferredRead()
    assert deferred.flush() is None and deferred.push(torch.tensor([1.0])) is None
    assert deferred.push(torch.tensor([2.0])) == [1.0] and deferred.flush() == [2.0] and deferred.flush() is None


def test_plain_lines_come_at_intervals(capsys):
    progress = Progress(0, 3, 20)
    progress.show(5, {"loss": 1.25}, 0.1, 30.0, 0.02)
    assert capsys.readouterr().out == ""  # ten seconds have not passed
    progress.SECONDS = 0.0
    progress.show(10, {"loss": 1.25, "prior": 0.5}, 0.1, 30.0, 0.02)
    assert capsys.readouterr().out == "epoch 1/3  step 10/20  loss 1.25  prior 0.5  lr 0.1  30 img/s  wait 2%\n"


@pytest.mark.slow
def test_a_terminal_gets_a_bar():
    script = (
        "import time; from cplearn.training.meters import Progress; p = Progress(0, 3, 20)\n"
        "for done in (10, 20): time.sleep(0.2); p.show(done, {'loss': 1.25}, 0.1, 30.0, 0.02)\n"
        "p.close(); print('end')"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", script])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    said = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux reports the end of a closed terminal so
            break
        if not part:
            break
        said += part
    assert os.waitpid(pid, 0)[1] == 0
    text = said.decode()
    assert "epoch 1/3:  50%" in text and "loss 1.25  lr 0.1  30 img/s  wait 2%" in text and "end" in text
