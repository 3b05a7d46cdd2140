"""Every --method: two processes against one, resuming, evaluations, half precision, skipped steps, wrong values."""

import math

import pytest
import torch
from helpers import (
    GEN,
    FakeBackbone,
    arguments,
    log_of,
    make,
    randn,
    run_in_processes,
    same_state,
    same_weights,
    spoil,
    train,
    without_time,
)

import eval_cluster
import eval_knn
import main_cplearn
from cplearn import checkpoints
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.methods import METHODS, base, build_method, method_class
from cplearn.methods.barlow_twins import BarlowTwins

BASELINES = ("dino", "swav", "barlow_twins", "gedi", "gedi_gen", "self_classifier")


def step(rank, world, method_name, more):
    """Two steps on this rank's share of 8 images; what must not depend on the number of processes."""
    method = make(method_name, *more)
    model = collectives.wrap(method, torch.device("cpu"))
    losses = []
    for i in range(2):
        views = [randn(8, 3, s, s, seed=10 * i + v) for v, s in enumerate((16, 16, 8))]
        method.zero_grad()
        method.before_step(i + 1, 1, 10)
        loss, _, *_ = model([v[rank::world] for v in views])
        loss.backward()
        losses.append(collectives.mean_over_ranks(loss.detach()))
        with torch.no_grad():
            for p in method.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        method.after_step(None, torch.tensor(False))
    state = {k: v for k, v in method.state_dict().items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    queue = state.pop("queue", state.pop("replay", None))  # hold the same rows in another order
    return {"losses": torch.stack(losses), "grads": torch.cat([g.flatten() for g in grads]), "state": state,
            "queue": None if queue is None else queue.sum(1)}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dino", ["--use_bn_in_head", "true", "--freeze_last_layer", "0"]),
        ("swav", ["--queue_length", "8", "--epoch_queue_starts", "1", "--freeze_prototypes_epochs", "0"]),
        ("barlow_twins", ["--projector_width", "40"]),
        ("gedi", []),
        ("self_classifier", []),
        ("self_classifier", ["--head", "cplearn"]),
        ("gedi_gen", GEN),
    ],
)
def test_two_processes_equal_one(tmp_path, name, more):
    one = step(0, 1, name, more)
    two = run_in_processes(tmp_path, step, 2, name, more)
    for rank in two:
        assert torch.allclose(rank["losses"], one["losses"], rtol=1e-10)
        assert torch.allclose(rank["grads"], one["grads"], rtol=1e-7, atol=1e-10)
        assert rank["state"].keys() == one["state"].keys()
        assert all(torch.allclose(v, one["state"][k], rtol=1e-7, atol=1e-9) for k, v in rank["state"].items())
        if one["queue"] is not None:
            assert torch.allclose(rank["queue"], one["queue"], atol=1e-9)
    assert all(torch.equal(v, two[1]["state"][k]) for k, v in two[0]["state"].items())


@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_features_give_float32_losses(name):
    method = build_method(arguments(name))
    views = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(v)) for v in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms, *_ = method(views)
    assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in terms.values())


@pytest.mark.parametrize("name", BASELINES)
def test_reference_losses_are_finite_and_ordered(name):
    refs = make(name).references(8)
    assert math.isfinite(refs.uniform) and math.isfinite(refs.floor) and refs.floor < refs.uniform


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_interrupted_equals_uninterrupted_and_all_evaluations_read_it(tmp_path, image_folder, name, capsys):
    small = ("--image_size", "32", "--sgld_buffer", "40", "--sgld_steps", "2") if name == "gedi_gen" else ()
    more = {"dino": ("--momentum_teacher", "0.9", "--warmup_teacher_temp_epochs", "3", "--teacher_temp", "0.07"),
            "swav": ("--queue_length", "20", "--epoch_queue_starts", "1")}.get(name, ())  # fmt: skip
    common = ("--method", name, "--data_path", str(image_folder), "--epochs", "4", *small, *more)
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "7")
    train(tmp_path / "cut", *common)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))
    weights = ["--pretrained_weights", str(tmp_path / "whole" / "checkpoint.pth"), "--num_workers", "0"]
    rows = eval_cluster.main([*weights, "--shuffles", "2"])
    assert {"codes", "codes_shuffled", "kmeans"} <= rows.keys() and rows["codes"]["used_codes"] >= 1
    assert 0 <= eval_knn.main([*weights, "--nb_knn", "3"])["knn3_top1"] <= 1


def test_flags_of_another_method_are_refused():
    for method in ("cplearn", "swav", "barlow_twins", "gedi", "self_classifier"):
        with pytest.raises(UserError, match=f"--teacher_temp .*--method dino.*{method}"):
            arguments(method, "--teacher_temp", "0.07")
    with pytest.raises(UserError, match="--beta .*--method cplearn or gedi or gedi_gen.*dino"):
        arguments("dino", "--beta", "0.1")
    for unknown in (lambda: arguments("moco"), lambda: method_class("moco")):
        with pytest.raises(UserError, match="moco.*" + ".*".join(METHODS)):
            unknown()


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("barlow_twins", ("--out_dim", "4000000"), "--out_dim 4000000 --projector_width 2048: .* 33 GB"),
        ("dino", ("--out_dim", "100000000"), "--method dino --out_dim 100000000: .* 205 GB"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch, name, more, words):
    monkeypatch.setattr(base, "physical_memory", lambda: 24 * 10**9)
    with pytest.raises(UserError, match=words):
        make(name, *more)


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path, image_folder, monkeypatch, name):
    common = ("--method", name, "--data_path", str(image_folder), "--epochs", "2", "--image_size", "32",
              *{"swav": ("--queue_length", "40", "--epoch_queue_starts", "0"), "dino": ("--momentum_teacher", "0.9"),
                "gedi_gen": ("--sgld_buffer", "40", "--sgld_steps", "2")}.get(name, ()))  # fmt: skip
    train(tmp_path / "two", *common, "--max_steps", "2")
    with monkeypatch.context() as patch:
        spoil(patch, {2})  # the third of three
        assert train(tmp_path / "three", *common, "--max_steps", "3")["skipped_steps"] == 1
    two, three = (checkpoints.load(tmp_path / x / "checkpoint.pth")["model"] for x in ("two", "three"))
    counters = {k for k in two if k.endswith("num_batches_tracked")}
    assert same_weights(*({k: v for k, v in x.items() if k not in counters} for x in (two, three)))
    assert train(tmp_path / "three", *common)["skipped_steps"] == 0  # and on it goes


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("dino", ("--freeze_last_layer", "-1")),
        ("dino", ("--warmup_teacher_temp_epochs", "500")),
        ("dino", ("--momentum_teacher", "1.5")),
        ("dino", ("--teacher_temp", "0")),
        ("swav", ("--freeze_prototypes_epochs", "-1")),
        ("swav", ("--epsilon", "0")),
        ("swav", ("--queue_length", "-1")),
        ("swav", ("--epoch_queue_starts", "-1")),
        ("barlow_twins", ("--projector_width", "0")),
        ("barlow_twins", ("--lambd", "0")),
        ("gedi", ("--beta", "0")),
        ("gedi_gen", ("--accum", "2")),
        ("gedi_gen", ("--gen_weight", "-1")),
        ("gedi_gen", ("--sgld_step_size", "-1")),
        ("gedi_gen", ("--gen_limit", "-5")),
        ("self_classifier", ("--row_temp", "0")),
        ("self_classifier", ("--out_dim", "1")),
    ],
)
def test_bad_values_are_refused_by_name(name, flags):
    with pytest.raises(UserError, match=flags[0]):
        make(name, *flags)


def test_references_at_lambda_above_one_and_gedis_warning():
    barlow = BarlowTwins(FakeBackbone(4), out_dim=40, projector_width=8, lambd=3.0)
    assert barlow.references(8).floor == 40 - 8 + 1  # min(1, lambda) times what rank N - 1 leaves
    assert "above 1" in make("gedi", "--beta", "5").warnings()[0] and not make("gedi").warnings()
    assert "forward prior" in make("gedi", "--beta", "5").warnings()[1]


@pytest.mark.parametrize(("name", "value"), [("beta", "0.25"), ("beta", None), ("n_ref", None), ("eps", [1e-8])])
def test_a_damaged_flag_of_a_checkpoint_is_named(name, value):
    args = main_cplearn.parse_args(["--arch", "resnet8_w8", "--image_size", "32", "--out_dim", "40"])
    setattr(args, name, value)
    with pytest.raises(UserError, match=f"--{name} "):
        build_method(args)
