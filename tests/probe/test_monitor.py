"""The use of codes over windows against a loop; the probe of a real run; that looking changes nothing."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
from helpers import log_of, model_of, run_in_processes, same_weights, train, views_of
from PIL import Image

import main_cplearn
from cplearn import checkpoints
from cplearn.data import augmentations, sources
from cplearn.data.datasets import ImageDataset
from cplearn.data.pixels import Pixels
from cplearn.errors import CollapseError, LocalError, UserError
from cplearn.methods import build_method
from cplearn.metrics import collapse
from cplearn.probe import verdict
from cplearn.probe.monitor import CodeUsage, Monitor, Probe, ProbeResult

CPU = torch.device("cpu")


def assignments(steps, codes=6, seed=0):
    x = torch.randn(steps, codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * x).softmax(1)


def entropy_of(shares):
    return -(shares * shares.log()).sum().item()


# --- the use of codes ---------------------------------------------------------------------------------------


def use_of(rows, images=4, skipped=(), use=None):
    use = use or CodeUsage()
    for i, row in enumerate(rows):
        use.add(row, images, torch.tensor(i in skipped))
    return use


def test_windows_against_a_loop():
    rows = assignments(2 * CodeUsage.STEPS + 7)
    windows = [rows[:20].mean(0), rows[20:40].mean(0)]  # the seven steps after them are left out
    used = [(80 * w >= 0.5).sum().item() for w in windows]
    found = use_of(rows).average()
    assert found["usage_entropy"] == pytest.approx(np.mean([entropy_of(w) for w in windows]))
    assert found["codes_used"] == pytest.approx(np.mean(used))


def test_a_short_epoch_is_one_window_and_skipped_steps_do_not_count():
    rows = assignments(5)
    rows[2] = math.nan
    found = use_of(rows, skipped=[2]).average()["usage_entropy"]
    assert found == pytest.approx(entropy_of(rows[[0, 1, 3, 4]].mean(0)))
    assert math.isnan(use_of(rows, skipped=range(5)).average()["usage_entropy"])
    assert CodeUsage().average() == {} and CodeUsage().read() == {}


@pytest.mark.parametrize(
    ("row", "entropy", "used"), [(torch.eye(8)[3], 0, 1), (torch.full((8,), 1 / 8), math.log(8), 8)]
)
def test_one_code_has_entropy_zero_and_uniform_has_log_c(row, entropy, used):
    use = use_of([row] * CodeUsage.STEPS, 16)
    assert use.read() == {"perplexity": pytest.approx(math.exp(entropy))}  # what a step's line says
    found = use.average()
    assert found["usage_entropy"] == pytest.approx(entropy, abs=1e-6) and found["codes_used"] == used


@pytest.mark.parametrize("cut", [7, 20, 33])
def test_the_use_of_codes_goes_on_where_it_was(cut):
    rows, after = assignments(45).float(), CodeUsage()
    after.load(use_of(rows[:cut]).state(), CPU)
    assert use_of(rows[cut:], use=after).average() == use_of(rows).average()


def _use_of_two(rank):
    return use_of(assignments(2 * CodeUsage.STEPS).float()[rank::2], 8).average()


def test_two_processes_count_together(tmp_path):
    results = run_in_processes(tmp_path, _use_of_two)
    expected = assignments(40).mean(0)
    assert results[0] == results[1]
    assert results[0]["usage_entropy"] == pytest.approx(entropy_of(expected), abs=1e-6)
    assert results[0]["codes_used"] == (8 * 20 * expected >= 0.5).sum()


# --- the probe ----------------------------------------------------------------------------------------------


class Images(ImageDataset):
    """So many random images; `broken` cannot be read."""

    def __init__(self, count, broken=()):
        self.names, self.labels = [str(i) for i in range(count)], [i % 3 for i in range(count)]
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def read(self, i, reduction=None):
        if i in self.broken:
            raise LocalError("cannot read")
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels), i % 3


def probe_of(count, local=0, size=32, **more):
    views = views_of(size, n_local=local)
    return Probe(Pixels(Images(count, **more), views), views, seed=0, steps_per_epoch=10)


@pytest.mark.parametrize("count", [100, 1_000, 10_000, 50_000, 200_000])
@pytest.mark.parametrize("local", [0, 8])
def test_the_probe_costs_no_more_than_it_may(count, local):
    probe = probe_of(count, local)
    n = len(probe.samples)
    assert len(set(probe.samples)) == n and min(256, count) <= n <= 2000
    work = 3 * count * (2 + local / 4)  # forward and backward of an epoch, in forward passes of a global crop
    assert 2 * n / probe.every <= 0.021 * work
    assert probe.every == 1 or n == min(256, count)
    assert [e for e in range(1, 200) if probe.due(e)] == list(range(3, 200, probe.every))  # from step 30 on


def test_large_crops_are_kept_in_bounded_memory():
    probe = probe_of(1_000_000, size=224)
    assert 500 < len(probe.samples) and 2 * len(probe.samples) * 3 * 224**2 <= 2**28


def test_images_that_cannot_be_read_are_left_out_of_the_probe():
    crops, params, labels = probe_of(10, broken=(2, 5))._read()
    whole, all_params, all_labels = probe_of(10)._read()
    same = [i for i in range(10) if i not in (2, 5)]
    assert len(labels) == 8 and torch.equal(labels, all_labels[same]) and torch.equal(params, all_params[same])
    assert all(torch.equal(x, y[same]) for x, y in zip(crops, whole, strict=True))


def test_knn_of_the_probe_is_leave_one_out():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    codes = torch.zeros(60, dtype=torch.int64)
    look = ProbeResult(x, x, x, x, codes, codes, None, labels)
    hits = 0
    for i in range(60):
        cosine = torch.nn.functional.cosine_similarity(x[i : i + 1], x)
        cosine[i] = -9
        votes = [0.0] * 4
        for j in cosine.argsort(descending=True)[:20].tolist():
            votes[labels[j]] += math.exp(cosine[j].item() / 0.07)
        hits += max(range(4), key=lambda c: votes[c]) == labels[i]
    assert look.knn() == pytest.approx(hits / 60)


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cplearn", "dino", "swav", "barlow_twins", "gedi", "self_classifier"])
def test_every_method_is_monitored(tmp_path, image_folder, method):
    train(tmp_path, "--data_path", str(image_folder), "--epochs", "1", "--method", method, "--knn_freq", "1")
    (record,) = log_of(tmp_path)
    assert record["probe_images"] == 48 and 0 <= record["probe_knn20"] <= 1
    assert 1 <= record["probe_features_rank"] <= 8 and 1 <= record["probe_codes_used"] <= 40
    assert ("usage_perplexity" in record) == (method not in ("swav", "barlow_twins"))
    if "usage_perplexity" in record:
        assert 1 <= record["usage_perplexity"] <= 40.001 and -1e-6 <= record["information"] <= math.log(40)
    assert (record["probe_code_cosine"] is None) == (method == "barlow_twins")
    counted = [record[name] for name in ("probe_unique_prototypes", "start_unique_prototypes", "probe_prototypes")]
    if method in ("dino", "swav"):
        assert counted == [40] * 3
    assert method != "cplearn" or counted[2] is None  # fixed codes are not compared


def test_looking_changes_no_bit(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "3", "--arch", "vit_tiny", "--drop_path_rate", "0.5")
    train(tmp_path / "often", *common, "--knn_freq", "1")
    train(tmp_path / "once", *common)
    assert ["probe_images" in r for r in log_of(tmp_path / "often")] == [True, True, True]
    assert not any("probe_images" in r for r in log_of(tmp_path / "once"))  # 9 steps: too early
    assert same_weights(model_of(tmp_path / "often"), model_of(tmp_path / "once"))


def test_the_probe_sees_the_weights_of_its_epoch(tmp_path, image_folder):
    record = train(tmp_path, "--data_path", str(image_folder), "--epochs", "1", "--knn_freq", "1")
    state = checkpoints.load(tmp_path / "checkpoint.pth")
    args = argparse.Namespace(**state["args"])
    method = build_method(args)
    checkpoints.load_into(method, state["model"], "it")
    dataset = sources.build_dataset("folder", str(image_folder), "train", None)
    views = views_of(32, name=args.augmentation, global_scale=args.global_crops_scale)
    found = Probe(Pixels(dataset, views), views, args.seed, 3).measure(method, CPU, batch=7).metrics()
    assert method.training
    for name in ("features_rank", "features_cosine", "within_code", "agreement", "code_cosine"):
        assert record[f"probe_{name}"] == pytest.approx(found[name], rel=1e-4), name


def test_knn_needs_labels(tmp_path, image_folder):
    with pytest.raises(UserError, match="--knn_freq"):
        train(tmp_path, "--data_path", str(image_folder / "train" / "ant"), "--knn_freq", "1")


# --- the verdict in a run ------------------------------------------------------------------------------------


class Blind(torch.nn.Module):
    """All images get the same features."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.same = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.same.expand(len(x), 8)


@pytest.fixture
def early(monkeypatch):
    """As if running statistics were settled at once, and a look at each epoch were cheap."""
    monkeypatch.setattr(Probe, "SETTLED", 1)
    monkeypatch.setattr(Probe, "COST", 2.0)


def test_a_run_says_its_verdict_each_epoch(tmp_path, image_folder, capsys, early, monkeypatch):
    monkeypatch.setattr(Probe, "COST", 0.2)  # a look in every other epoch
    train(tmp_path, "--data_path", str(image_folder), "--epochs", "4")
    said, log = capsys.readouterr().out.splitlines(), log_of(tmp_path)
    assert ["probe_images" in r for r in log] == [True, False, True, True]  # and after the last
    assert all(any(r["verdict_line"] in x for x in said) for r in log if "probe_images" in r)
    assert log[1]["verdict_line"] == log[0]["verdict_line"] + " (epoch 1)"
    assert any(x.endswith(f"{log[1]['verdict']} (epoch 1)") for x in said)  # its numbers are not said again
    assert log[2]["verdict_line"] != log[0]["verdict_line"]


def test_a_run_too_short_says_so_once_at_its_end(tmp_path, image_folder, capsys):
    flags = ("--data_path", str(image_folder), "--epochs", "3")
    train(tmp_path, *flags, "--max_steps", "4")
    said = capsys.readouterr().out
    assert said.count("too short to judge: 4 steps; a verdict takes 30 and a whole epoch") == 1
    assert "WARNING: too short" not in said and "verdict" not in log_of(tmp_path)[-1]  # it goes on
    train(tmp_path, *flags)
    log = log_of(tmp_path)
    assert capsys.readouterr().out.count("too short to judge: 9 steps") == 1
    assert [r.get("verdict") for r in log[-2:]] == [None, "too short to judge"] and log[-1]["step"] == 9


def test_only_collapses_and_being_stuck_stop_a_run(image_folder):
    monitor, _ = monitor_of(image_folder / "train")
    monitor.alarms = monitor.PATIENCE
    for name in ("losing dimensions", "no better than at the start", "no alarm", "learning"):
        monitor.check({"verdict": name, "verdict_line": ""}, 9)
    for name in ("cluster", "stuck at uniform"):
        with pytest.raises(CollapseError, match="Alarm number 2"):
            monitor.check({"verdict": name, "verdict_line": ""}, 9)


def test_copies_among_the_prototypes_are_found(image_folder):
    monitor, method = monitor_of(image_folder / "train", "--method", "dino")
    weight = method.teacher["head"].last_layer.weight_v
    weight.data[10:] = 2 * weight.data[0]
    found = monitor.probe.measure(method, CPU, 16).metrics()
    assert (found["unique_prototypes"], found["prototypes"]) == (10, 40)


@pytest.mark.parametrize("method, cost, epochs", [("cplearn", 2.0, 2), ("swav", 0.2, 3)])
def test_a_backbone_that_sees_nothing_is_named_and_stopped(
    tmp_path, image_folder, monkeypatch, capsys, early, method, cost, epochs
):
    monkeypatch.setattr("cplearn.methods.build_backbone", lambda *_, **__: Blind())
    monkeypatch.setattr(Probe, "COST", cost)  # 0.2: a look in every other epoch, which must not forget the last
    flags = ("--data_path", str(image_folder), "--epochs", "4", "--method", method)
    with pytest.raises(CollapseError, match="representation collapse.*Alarm number 2 in a row; saved after step"):
        train(tmp_path, *flags, "--on_collapse", "stop")
    assert [r["verdict"] for r in log_of(tmp_path)] == ["representation"] * epochs
    assert "WARNING: representation collapse" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "checkpoint.pth")["epoch"] == epochs  # nothing is lost
    with pytest.raises(CollapseError, match="representation"):  # also in an epoch without a look
        train(tmp_path, *flags, "--on_collapse", "stop")
    assert len(log_of(tmp_path)) == epochs + 1
    if epochs == 2:
        assert train(tmp_path, *flags)["epoch"] == 3  # warn goes on to the end


def test_features_that_are_not_finite_are_an_alarm():
    x, codes = torch.full((40, 3), math.nan), torch.zeros(40, dtype=torch.int64)
    found = ProbeResult(x, x, x, x, codes, codes, None, codes).metrics()
    assert verdict.judge({f"probe_{k}": v for k, v in found.items()}, 10).name == "representation"


def _look_of_two(rank, broken):
    """With the images of one rank unreadable all give up together."""
    args = main_cplearn.parse_args(["--arch", "resnet8_w8", "--image_size", "16", "--out_dim", "40"])
    torch.manual_seed(0)
    look = probe_of(8, size=16, broken=broken).measure(build_method(args), CPU, batch=3)
    return None if look is None else [look.features, look.codes]


def test_two_processes_look_together(tmp_path):
    assert run_in_processes(tmp_path, _look_of_two, (1, 3, 5, 7)) == [None, None]
    (first, codes), (second, _) = run_in_processes(tmp_path, _look_of_two, (3,))
    (alone, codes_alone) = _look_of_two(0, (3,))
    assert torch.equal(first, second) and len(first) == 7
    # rank 0 has images 0, 2, 4, 6 of the probe, rank 1 the rest: rows come interleaved, without the broken one
    order = [0, 1, 2, 4, 3, 6, 5]
    assert torch.allclose(first, alone[order], atol=1e-5) and torch.equal(codes, codes_alone[order])


# --- before the first step ---------------------------------------------------------------------------------


def monitor_of(image_folder, *more):
    """A monitor, its method, and all its images in both views."""
    flags = ["--data_path", str(image_folder), "--arch", "resnet8bn_w8", "--image_size", "32", "--out_dim", "40",
             "--device", "cpu", "--knn_freq", "1", *more]  # fmt: skip
    args = main_cplearn.parse_args(flags)
    dataset, views = main_cplearn.find_images(args)
    torch.manual_seed(0)
    return Monitor(Pixels(dataset, views), views, 0, 3, knn_freq=1, best_by="score"), build_method(args)


def test_an_untrained_network_is_measured_with_the_statistics_of_the_probe(image_folder):
    monitor, method = monitor_of(image_folder / "train")
    before = copy.deepcopy(method.state_dict())
    monitor.begin(method, CPU, batch=10**6)
    assert same_weights(before, method.state_dict()) and method.training
    assert all(m.momentum == 0.1 for m in method.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    crops, params, labels = monitor.probe._kept
    views = augmentations.color_views(crops, params, monitor.probe.views, CPU)
    with torch.no_grad():  # one batch: what batch norm does in training, but for its unbiased variance
        features = method.backbone(views[0])
    assert monitor.start["features_rank"] == pytest.approx(collapse.rankme(features), rel=0.02)
    method.load_state_dict(before)
    unfair = monitor.probe.measure(method, CPU, 10**6).metrics()
    assert monitor.start["score"] != unfair["score"]
    again = monitor.probe.measure(method, CPU, 10**6, untrained=True)
    assert again.metrics()["score"] == monitor.start["score"] and again.knn() == monitor.start["knn20"]


def test_norms_that_have_seen_batches_keep_their_statistics(image_folder):
    monitor, method = monitor_of(image_folder / "train")
    method([torch.rand(16, 3, 32, 32)] * 2)
    one, two = (monitor.probe.measure(method, CPU, 8, untrained=x).metrics() for x in (False, True))
    assert one == two


def test_the_start_stands_beside_later_numbers_and_survives_resuming(tmp_path, image_folder):
    flags = ("--data_path", str(image_folder), "--epochs", "13", "--knn_freq", "1")
    train(tmp_path / "whole", *flags, "--max_steps", "99")
    for steps in ("1", "32", "99"):
        train(tmp_path / "parts", *flags, "--max_steps", steps)
    whole, parts = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    starts = [{k: v for k, v in r.items() if k.startswith("start_")} for r in (*whole, parts[-1])]
    assert set(starts[0]) >= {"start_view_nearness", "start_features_rank", "start_knn20"}
    assert all(start == starts[0] for start in starts)
    assert len(whole) == 13 and whole[-1]["best_epoch"] == parts[-1]["best_epoch"] >= 10
    assert "verdict" not in whole[0] and whole[-1]["verdict"] in (*verdict.WARNINGS, "learning")  # it has a start


def _start_of(rank, folder):
    monitor, method = monitor_of(folder)
    monitor.begin(method, CPU, batch=4)
    return [monitor.start["features_rank"], monitor.start["knn20"]]


@pytest.mark.dist
def test_two_processes_measure_the_same_start(tmp_path, image_folder):
    one, two = run_in_processes(tmp_path, _start_of, image_folder / "train")
    assert one == two and one[0] > 1


def test_init_from_is_measured_before_it_is_trained(tmp_path, image_folder):
    flags = ("--data_path", str(image_folder), "--epochs", "2", "--knn_freq", "1", "--arch", "resnet8bn_w8")
    train(tmp_path / "first", *flags)
    train(tmp_path / "more", *flags, "--init_from", str(tmp_path / "first" / "checkpoint.pth"))
    first, more = log_of(tmp_path / "first")[-1], log_of(tmp_path / "more")[0]
    assert more["start_knn20"] == first["probe_knn20"]  # the backbone's norms keep what they have learnt


# --- the best epoch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "name"), [("score", "probe_view_nearness"), ("knn", "probe_knn20")])
def test_the_best_epoch_is_kept(tmp_path, image_folder, by, name):
    flags = ("--data_path", str(image_folder), "--epochs", "13", "--lr", "0.05", "--knn_freq", "1", "--best_by", by)
    monitored = []
    train(tmp_path, *flags, "--max_steps", "99", "--saveckp_freq", "1")
    for record in log_of(tmp_path):
        settled = record["step"] >= Probe.SETTLED
        monitored.append(record[name] if settled else -math.inf)
        if not settled:
            assert "best_epoch" not in record
            continue
        best = int(np.argmax(monitored)) + 1  # the first of equals
        assert (record["best_epoch"], record[f"best_{by}"]) == (best, max(monitored))
    assert max(monitored) > -math.inf
    kept = checkpoints.load(tmp_path / "checkpoint_best.pth")
    assert kept["epoch"] == best
    assert same_weights(kept["model"], checkpoints.load(tmp_path / f"checkpoint{best:04}.pth")["model"])


def test_the_best_may_be_left_out(tmp_path, image_folder):
    flags = ("--data_path", str(image_folder), "--epochs", "11", "--knn_freq", "1", "--max_steps", "99")
    train(tmp_path, *flags, "--best_by", "none")
    assert not (tmp_path / "checkpoint_best.pth").exists() and "best_epoch" not in log_of(tmp_path)[-1]


def test_a_best_epoch_by_an_older_score_is_forgotten(image_folder):
    """Versions before had other scores, one in nats, which one of at most 1 would never reach."""
    state = {**monitor_of(image_folder / "train")[0].state(), "best": {"by": "score", "epoch": 3, "value": 3.4}}
    for start, best in (({"score": 2.0}, {}), ({"score": 2.0, "view_nearness": 0.5}, state["best"])):
        monitor, _ = monitor_of(image_folder / "train")
        monitor.load(state | {"start": start}, CPU)
        assert monitor.best == best


def test_weights_of_skipped_steps_are_not_the_best(image_folder):
    monitor, method = monitor_of(image_folder / "train")
    record = {"epoch": 50, "train_entropy": 0.0}
    assert "best_epoch" not in monitor.end_epoch(method, CPU, 16, record, sound=False) and not monitor.improved
    assert monitor.end_epoch(method, CPU, 16, record)["best_epoch"] == 51 and monitor.improved
