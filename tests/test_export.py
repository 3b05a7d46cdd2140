"""Exports, loaded back by the libraries themselves as a user does, against the checkpoint."""

import json
import os
import re
import runpy
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, train
from PIL import Image

import eval_knn
import export
from cplearn import checkpoints, load_backbone, tensor_files
from cplearn.errors import UserError, WriteError
from cplearn.export import common, hf_folder, timm_folder
from cplearn.load import EvalTransform, load_pretrained
from cplearn.text import printable

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def vit(tmp_path_factory, image_folder) -> Path:
    """The checkpoint of two steps of a ViT-Ti/8 at 32 pixels. To be read only."""
    out = tmp_path_factory.mktemp("vit")
    train(out, "--arch", "vit_tiny", "--patch_size", "8", "--data_path", str(image_folder), "--max_steps", "2")
    return out / "checkpoint.pth"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pixels(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.abs().max() > 0.1
    return float((ours - theirs).abs().max() / ours.abs().max())


def photo(width: int = 333, height: int = 250) -> Image.Image:
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


# --- timm --------------------------------------------------------------------------------------------------


def test_timm_by_folder_and_by_name(vit, tmp_path, no_network, capsys):
    result = export.main([str(vit), "--to", "timm", "--out", str(tmp_path / "net")])
    assert result["difference"] <= 1e-5 and f'timm.create_model("local-dir:{tmp_path}/net"' in capsys.readouterr().out
    ours, transform, _ = load_backbone(str(vit))
    options = {"patch_size": 8, "img_size": 32, "num_classes": 0}
    overlay = {"file": str(tmp_path / "net" / "model.safetensors"), "custom_load": False}
    models = [timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **options)]
    models.append(timm.create_model("vit_tiny_patch16_224", checkpoint_path=overlay["file"], **options))
    models.append(timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True))
    with torch.no_grad():
        assert models[-1].eval()(pixels(1, 64)).shape == (1, 192)  # other sizes, as in training here
    assert timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True, num_classes=5).head.out_features == 5
    config = timm.data.resolve_data_config({}, model=models[-1])
    assert torch.allclose(timm.data.create_transform(**config)(photo()), transform(photo()), atol=1e-5)
    with torch.no_grad():
        for model in models:
            assert apart(ours(pixels(2, 32)), model.eval()(pixels(2, 32))) < 1e-5
    with pytest.raises(UserError, match="--arch"):  # a file without our metadata
        load_backbone(overlay["file"])
    _, transform, width = load_backbone(overlay["file"], arch="vit_tiny", patch_size=8)
    assert transform.size == 224 and width == 192


@pytest.mark.parametrize("size", [32, 95, 96, 128, 160, 224, 225, 384])
def test_timm_prepares_images_as_we_do(vit, size):
    model = replace(load_pretrained(str(vit)), image_size=size)
    cfg = timm_folder.preprocessing(model)
    transform = timm.data.create_transform((3, size, size), is_training=False, **cfg)
    ours = EvalTransform(size)(photo())
    assert ours.std() > 0.3 and torch.allclose(transform(photo()), ours, atol=1e-5)


def test_a_timm_network_with_batch_norm_keeps_its_keys(tmp_path, image_folder):
    train(tmp_path, "--arch", "timm:resnet10t", "--data_path", str(image_folder), "--epochs", "1")
    knn = ["--pretrained_weights", str(tmp_path / "checkpoint.pth"), "--device", "cpu", "--num_workers", "0"]
    trained, untrained = (eval_knn.main([*knn, *more])["knn20_top1"] for more in ([], ["--random_init"]))
    export.main([str(tmp_path / "checkpoint.pth"), "--to", "timm"])
    card = (tmp_path / "checkpoint_timm" / "README.md").read_text()
    assert f"| 20-NN, top-1 | val |  {trained:.4f} |    {untrained:.4f} |" in card
    assert f"- images: 48 of {image_folder.name}\n- epochs: 1\n- settings: `--out_dim 40`" in card
    config = json.loads((tmp_path / "checkpoint_timm" / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=0)
    weights = tensor_files.load_file(tmp_path / "checkpoint_timm" / "model.safetensors")["state_dict"]
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        ours = load_backbone(str(tmp_path / "checkpoint.pth")).model
        assert apart(ours(pixels(2, 32)), model.eval()(pixels(2, 32))) < 1e-5
        assert config["num_features"] == 512 and "img_size" not in config["model_args"]
        transformers = pytest.importorskip("transformers", minversion="5")
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "checkpoint_timm").eval()(pixels(2, 32))
        assert apart(ours(pixels(2, 32)), theirs.pooler_output.flatten(1)) < 1e-5


# --- Hugging Face ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 224])
def test_hugging_face(vit, tmp_path, no_network, size):
    transformers = pytest.importorskip("transformers")
    flags = ["--image_size", str(size), "--out", str(tmp_path / "net")]
    assert export.main([str(vit), "--to", "hf", *flags])["difference"] <= 1e-5
    model = transformers.ViTModel.from_pretrained(tmp_path / "net", add_pooling_layer=False).eval()
    ours, transform, _ = load_backbone(str(vit), image_size=size)
    with torch.no_grad():  # at 224 the position embeddings are those that our forward pass interpolates
        theirs = model(pixel_values=pixels(2, size)).last_hidden_state[:, 0]
        assert apart(ours(pixels(2, size)), theirs) < 1e-5
    new = int(transformers.__version__.partition(".")[0]) >= 5
    options = {"backend": "pil"} if new else {"use_fast": False}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "net", **options)
    got = torch.as_tensor(processor(images=photo(), return_tensors="np")["pixel_values"])[0]
    assert torch.allclose(got, transform(photo()), atol=1e-5)  # 341 - 224 is 1 more than a multiple of 4
    assert model.config.image_size == size and model.config.layer_norm_eps == 1e-6


# --- safetensors -------------------------------------------------------------------------------------------


def test_safetensors_say_what_they_are(run, tmp_path, image_folder, no_network):
    """To `load_backbone` and to the evaluations, which need no --arch."""
    out = tmp_path / "w.safetensors"
    export.main(["--pretrained_weights", str(run / "checkpoint.pth"), "--to", "safetensors", "--out", str(out)])
    from safetensors import safe_open

    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(load_backbone(str(run / "checkpoint.pth")).model.state_dict())
    whole = load_pretrained(str(run / "checkpoint.pth"))
    assert (metadata["arch"], metadata["image_size"], metadata["epoch"]) == ("resnet8_w8", "32", "2")
    assert metadata["weights_sha256"] == whole.weights_sha256
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    alone = load_pretrained(str(out))
    assert (alone.arch, alone.image_size, alone.epoch) == ("resnet8_w8", 32, 2)
    assert torch.equal(alone.backbone(pixels(2, 32)), whole.backbone(pixels(2, 32)))
    with pytest.raises(UserError, match="--arch resnet8_w16, .* resnet8_w8"):
        load_backbone(str(out), arch="resnet8_w16")
    flags = ["--data_path", str(image_folder), "--nb_knn", "5", "--num_workers", "0", "--device", "cpu"]
    of = [
        eval_knn.main(["--pretrained_weights", str(path), "--output_dir", str(tmp_path), *flags])
        for path in (run / "checkpoint.pth", out)
    ]
    assert of[0] == of[1]


def test_damaged_safetensors_are_refused(run, tmp_path):
    out = tmp_path / "w.safetensors"
    export.main([str(run / "checkpoint.pth"), "--to", "safetensors", "--out", str(out)])
    content = bytearray(out.read_bytes())
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    size = content.replace(b'"image_size":"32"', b'"image_size":"3x"')
    for damaged in (flipped, size, content[:-20], content[:50], b"", b"\xff" * 99, b"\x02" + bytes(7) + b"[]"):
        out.write_bytes(damaged)
        with pytest.raises(UserError, match="w.safetensors"):
            load_backbone(str(out))


# --- ONNX --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["run", pytest.param("vit", marks=pytest.mark.slow)]
)  # tracing a ViT takes 30 s of CPU
def test_onnx_with_any_batch(source, request, tmp_path, no_network):
    onnxruntime = pytest.importorskip("onnxruntime")
    given = request.getfixturevalue(source)
    weights = given if source == "vit" else given / "checkpoint.pth"
    out = tmp_path / "net.onnx"
    export.main([str(weights), "--to", "onnx", "--out", str(out), "--with_preprocessing"])
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["input"] == "0..1" and metadata["image_size"] == "32"
    ours = load_backbone(str(weights)).model
    mean, std = (torch.tensor(json.loads(metadata[name])).view(1, 3, 1, 1) for name in ("mean", "std"))
    for n in (1, 5):
        x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        (theirs,) = session.run(["features"], {"pixels": x.numpy()})
        assert apart(ours((x - mean) / std), torch.from_numpy(theirs)) < 1e-5
    common.check_target(out, "onnx", folder=False)  # it is ours, and may be replaced


# --- the head ----------------------------------------------------------------------------------------------


def docs_code() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), flags=re.DOTALL)
    return code


@pytest.mark.parametrize("more", [[], ["--dictionary", "hadamard", "--activation", "tanh", "--embed_dim", "24"]])
def test_codes_by_the_lines_of_the_document(more, tmp_path, image_folder):
    train(tmp_path, "--data_path", str(image_folder), "--max_steps", "4", "--out_dim", "100", *more)
    export.main([str(tmp_path / "checkpoint.pth"), "--to", "head"])
    (tmp_path / "lines.py").write_text(docs_code())
    lines = runpy.run_path(str(tmp_path / "lines.py"))
    model = load_pretrained(str(tmp_path / "checkpoint.pth"))
    real = model.backbone(pixels(3, 32))  # all alike: a code or two
    features = real.mean(0) + real.std() * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    numbers = lines["assign"](tmp_path / "checkpoint_head", features.numpy(), block=7)
    assert len(set(numbers.tolist())) > 5
    assert numbers.tolist() == model.method.predict(features).tolist()
    assert (tmp_path / "checkpoint_head" / "codes.py").read_text() == docs_code()
    about = json.loads((tmp_path / "checkpoint_head" / "head.json").read_text())
    h = lines["embed"](load_numpy(tmp_path / "checkpoint_head"), about, features.numpy())
    w = lines["dictionary"](load_numpy(tmp_path / "checkpoint_head"), about, 0, 100)
    logits = model.method.head.logits(model.method.embed(features))
    assert np.allclose(about["logit_scale"] * h @ w.T, logits.numpy(), atol=1e-4)


def load_numpy(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "head.safetensors")


def test_teacher_and_student(tmp_path, image_folder):
    more = ["--method", "dino", "--lr", "0.1"]
    train(tmp_path, "--data_path", str(image_folder), "--max_steps", "2", *more)
    for flags, name in (([], "checkpoint"), (["--checkpoint_key", "student"], "checkpoint_student")):
        export.main([str(tmp_path / "checkpoint.pth"), "--to", "safetensors", *flags])
        ours = load_backbone(str(tmp_path / "checkpoint.pth"), checkpoint_key=name.partition("_")[2] or None).model
        assert torch.equal(load_backbone(f"{tmp_path}/{name}.safetensors").model(pixels(2, 32)), ours(pixels(2, 32)))
    weights = [(tmp_path / f"checkpoint{x}.safetensors").read_bytes() for x in ("", "_student")]
    assert weights[0] != weights[1]
    with pytest.raises(UserError, match="--method dino"):
        export.main([str(tmp_path / "checkpoint.pth"), "--to", "head"])


# --- what is refused, and what is left ---------------------------------------------------------------------


def test_other_features_leave_nothing_behind(vit, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    right = hf_folder.renamed

    def wrong(state):  # query for key, as one might
        swap = {"query": "key", "key": "query"}
        return {re.sub(r"\b(query|key)\b", lambda m: swap[m[0]], k): v for k, v in right(state).items()}

    export.main([str(vit), "--to", "hf", "--out", str(tmp_path / "net")])
    kept = (tmp_path / "net" / "model.safetensors").read_bytes()
    monkeypatch.setattr(hf_folder, "renamed", wrong)
    for name in ("net", "other"):
        with pytest.raises(WriteError, match="transformers"):
            export.main([str(vit), "--to", "hf", "--out", str(tmp_path / name)])
    assert os.listdir(tmp_path) == ["net"] and (tmp_path / "net" / "model.safetensors").read_bytes() == kept


def test_a_difference_is_relative_and_sees_nan():
    ours = torch.tensor([[1.0, -4.0]])
    assert common.relative_difference(ours, ours + 0.5) == pytest.approx(0.125)
    assert common.relative_difference(ours, ours[:, :1]) == float("inf")
    assert common.relative_difference(ours, ours * float("nan")) == float("inf")


def test_only_an_earlier_export_is_replaced(run, tmp_path):
    weights = str(run / "checkpoint.pth")
    for to, name in (("head", "net"), ("safetensors", "net.safetensors")):
        out = tmp_path / name
        for _ in range(2):
            export.main([weights, "--to", to, "--out", str(out)])
    with pytest.raises(UserError, match="net"):
        common.check_target(tmp_path / "net", "timm", folder=True)
    exported = tmp_path / "net.safetensors"  # whose default --out it would be itself
    with pytest.raises(UserError, match="--out .*net.safetensors"):
        export.main([str(exported), "--to", "safetensors", "--image_size", "64"])
    (tmp_path / "net" / "mine.txt").write_text("mine")
    os.symlink(exported, tmp_path / "link.safetensors")
    os.symlink(tmp_path / "net", tmp_path / "linked")
    (tmp_path / "empty").mkdir()
    checkpoints.write(tmp_path / "w.safetensors", {"x": torch.zeros(2)})
    before = (tmp_path / "w.safetensors").read_bytes()
    for to, name in (
        ("head", "net"),
        ("head", "empty"),
        ("head", "linked"),
        ("head", os.fsdecode(b"\xe9")),
        ("safetensors", "link.safetensors"),
        ("safetensors", "w.safetensors"),
        ("safetensors", "nowhere/w.safetensors"),
        ("safetensors", "w.bin"),
    ):
        with pytest.raises(UserError, match=f"--out .*{re.escape(printable(name))}"):
            export.main([weights, "--to", to, "--out", str(tmp_path / name)])
    assert (tmp_path / "net" / "mine.txt").exists() and (tmp_path / "w.safetensors").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--to", "timm"], "--to timm.* resnet8_w8"),
        (["--to", "hf"], "--to hf.* resnet8_w8"),
        (["--to", "head", "--with_preprocessing"], "--with_preprocessing"),
        (["--to", "head", "--pretrained_weights", "x"], "--pretrained_weights"),
        (["--to", "head", "--out", "/proc/head"], "--out /proc"),
    ],
)
def test_wrong_flags(run, flags, named):
    before = sorted(os.listdir(run))
    with pytest.raises(UserError, match=named):
        export.main([str(run / "checkpoint.pth"), *flags])
    assert sorted(os.listdir(run)) == before


def test_wrong_weights(run, tmp_path):
    weights = checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth"))
    checkpoints.write(tmp_path / "bare.pth", {"state_dict": weights})
    for arguments, named in (
        (["--to", "head"], "python export.py CKPT"),
        ([str(tmp_path / "bare.pth"), "--to", "safetensors"], "bare.pth .*--arch"),
        ([str(tmp_path / "bare.pth"), "--to", "head", "--arch", "resnet8_w8"], "bare.pth"),
    ):
        with pytest.raises(UserError, match=named):
            export.main(arguments)
    assert os.listdir(tmp_path) == ["bare.pth"]


def test_a_missing_package_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime.*pip install"):
        export.main([str(run / "checkpoint.pth"), "--to", "onnx", "--out", str(tmp_path / "x.onnx")])
    assert os.listdir(tmp_path) == []
