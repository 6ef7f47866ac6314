"""Pretrained weights out of the libraries' caches, and files matched by order; no test reaches the network."""

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from torch import nn

from hpc.errors import UserError
from hpc.settings import Model
from jobs import foreign_weights, setup
from jobs import models as cli
from models3d import create_model, fetch, pretrained
from models3d._pretrained import _place


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty ones, and a network whose use is an error."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address) or _no_network())
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or _no_network())
    yield tmp_path
    assert not asked


def _no_network() -> None:
    raise OSError("no network")


def put(name: str, weights: dict[str, torch.Tensor], options: dict[str, object] | None = None) -> Path:
    """The file where the error says that it belongs."""
    path = _place(name, True, options or {}).file
    path.parent.mkdir(parents=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def rows(name: str, channels: int, classes: int, **options: object) -> tuple[nn.Module, list[str]]:
    model = create_model(name, channels, classes, **options)
    return model, foreign_weights.load_pretrained(pretrained(name, channels, options), model)


def test_timms_weights_with_other_classes_and_channels() -> None:
    source = create_model("timm:test_resnet", 3, 1000)
    put("timm:test_resnet", source.state_dict())
    before = create_model("timm:test_resnet", 1, 5).state_dict()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = pretrained("timm:test_resnet", 1, {"drop_rate": 0.1})
    assert torch.equal(state, torch.get_rng_state()) and found.heads == ("fc",)
    model, lines = rows("timm:test_resnet", 1, 5, drop_rate=0.1)
    weights = model.state_dict()
    for key, value in source.state_dict().items():
        if key == "conv1.0.weight":
            torch.testing.assert_close(weights[key], value.sum(1, keepdim=True))  # a gray image looks the same
        elif not key.startswith("fc."):
            assert torch.equal(weights[key], value), key
    assert weights["fc.weight"].shape == before["fc.weight"].shape == (5, source.fc.in_features)
    assert any("fc.weight is 1000x" in line and line.endswith("left as it was") for line in lines)
    assert torch.equal(rows("timm:test_resnet", 3, 1000)[0].fc.weight, source.fc.weight)


def test_torchvisions_weights() -> None:
    source = create_model("torchvision:squeezenet1_1", 3, 1000)
    put("torchvision:squeezenet1_1", source.state_dict())
    model, lines = rows("torchvision:squeezenet1_1", 3, 4)
    assert torch.equal(model.features[0].weight, source.features[0].weight)
    assert model.classifier[1].out_channels == 4 and sum("left as it was" in line for line in lines) == 2


def test_smps_weights_are_the_encoders() -> None:
    options = {"encoder_name": "mobilenet_v2"}
    source = create_model("smp:Unet", 3, 2, **options)
    put("smp:Unet", source.encoder.state_dict(), options)
    model, lines = rows("smp:Unet", 4, 7, **options)
    for key, value in source.encoder.state_dict().items():
        if value.ndim != 4 or value.shape[1] != 3:
            assert torch.equal(model.encoder.state_dict()[key], value), key
    assert any("entries that the file has not keep their own values (decoder." in line for line in lines)
    assert model.eval()(torch.randn(1, 4, 32, 32)).shape == (1, 7, 32, 32)


@pytest.mark.parametrize("tag", [True, "r160_in1k"])
def test_timms_weights_of_an_encoder_of_smp(tag: str | bool) -> None:
    """As timm keeps them, with its head, which a decoder has no use for."""
    options = {"encoder_name": "tu-test_resnet", "decoder_channels": [8, 8, 4, 4, 4]}
    source = create_model("timm:test_resnet", 3, 1000)
    put("smp:Unet", source.state_dict(), options)
    model = create_model("smp:Unet", 1, 7, **options)
    lines = foreign_weights.load_pretrained(pretrained("smp:Unet", 1, options, tag), model)
    theirs, ours = source.state_dict(), model.encoder.state_dict()
    assert sum(key.removeprefix("model.") in theirs for key in ours) == len(ours) > 20
    for key, value in ours.items():
        own = theirs[key.removeprefix("model.")]
        torch.testing.assert_close(value, own.sum(1, keepdim=True) if key.endswith("conv1.0.weight") else own)
    assert any("keep their own values (decoder." in line for line in lines)
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 7, 32, 32)


def test_an_unknown_encoder_of_timm_is_told_with_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no encoder 'tu-resnetxx', as timm has no model 'resnetxx'.*resnet"):
        create_model("smp:Unet", 3, 2, encoder_name="tu-resnetxx")


def test_a_run_starts_from_them() -> None:
    source = create_model("torchvision:squeezenet1_1", 3, 1000)
    put("torchvision:squeezenet1_1", source.state_dict())
    parts: Any = SimpleNamespace(shape=(3, 64, 64), model_options={})
    for given, tag in ((True, True), ("IMAGENET1K_V1", "IMAGENET1K_V1"), (False, False)):
        experiment: Any = SimpleNamespace(model=Model(name="torchvision:squeezenet1_1", pretrained=given))
        model = create_model("torchvision:squeezenet1_1", 3, 4)
        lines = setup.load_weights(experiment, parts, model)
        assert bool(lines) == bool(tag)
        assert torch.equal(model.features[0].weight, source.features[0].weight) == bool(tag)


MISSING = [
    ("timm:test_resnet", {}, r"models--timm--test_resnet.r160_in1k/snapshots/main/model.safetensors$"),
    (
        "torchvision:r3d_18",
        {},
        r"'hpc models torchvision:r3d_18 --fetch' .*https://download.pytorch.org/models/r3d_18-",
    ),
    ("smp:Unet", {"encoder_name": "resnet34"}, r"--fetch --option encoder_name=resnet34' .*smp-hub/resnet34.imagenet"),
    ("smp:Unet", {"encoder_name": "tu-resnet18"}, r"encoder_name=tu-resnet18' .*/timm/resnet18.a1_in1k/"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISSING, ids=[row[2][-20:] for row in MISSING])
def test_a_missing_file_says_what_to_put_where(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pretrained(name, 3, options)
    text = str(caught.value)
    assert "\n" not in text and "a job downloads nothing" in text and "login node" in text
    assert f"save {_place(name, True, options).url} as {_place(name, True, options).file}" in text


BAD = [
    ("timm:test_resnt", True, {}, "no model 'test_resnt'"),
    ("timm:resnet18", "a9_in1k", {}, r"timm:resnet18 has no weights 'a9_in1k'; it has a1_in1k, "),
    ("torchvision:r3d_18", "IMAGENET", {}, r"has no weights 'IMAGENET'; it has KINETICS400_V1"),
    ("smp:Unet", "imagenett", {}, r"smp's encoder resnet34 has no weights 'imagenett'; it has imagenet"),
    ("smp:Unet", "a9_in1k", {"encoder_name": "tu-resnet18"}, r"timm:resnet18 has no weights 'a9_in1k'; it has a1_in1k"),
    ("monai:SwinUNETR", True, {}, r"monai:SwinUNETR has no pretrained weights to fetch: only timm:NAME"),
]


@pytest.mark.parametrize(("name", "tag", "options", "message"), BAD, ids=[f"{row[0]}-{row[1]}" for row in BAD])
def test_unknown_weights_list_the_good_ones(
    name: str, tag: str | bool, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fetch(name, tag, options)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line() -> None:
    put("torchvision:squeezenet1_1", {"wrong": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"squeezenet1_1-\w+.pth cannot be loaded .*delete it and fetch it again"
    ) as at:
        pretrained("torchvision:squeezenet1_1", 3, {})
    assert "\n" not in str(at.value)


def test_fetch(caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def download(url: str, path: str) -> None:
        if "squeezenet1_1" not in url:
            raise OSError("Temporary failure in name resolution\nand more")
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert cli.main(["torchvision:squeezenet1_1", "--fetch"]) == 0
    assert str(caches / "torch/hub/checkpoints/squeezenet1_1-b8a52dc0.pth") in capsys.readouterr().out
    assert cli.main(["torchvision:squeezenet1_1", "--fetch"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert cli.main(["torchvision:r3d_18", "--fetch", "KINETICS400_V1"]) == 2
    error = capsys.readouterr().err
    assert "gives nothing (Temporary failure in name resolution); where there is internet, save it as" in error
    assert error.count("\n") == 1
    assert cli.main(["--fetch"]) == 2 and "--fetch needs the NAME" in capsys.readouterr().err


def test_a_hub_that_is_not_there_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def nothing(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", nothing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("its own retries"))
    assert cli.main(["timm:test_resnet", "--fetch"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gives nothing ([Errno -2] Name or service not known)" in error
    assert len(asked) == 1 and asked[0][0].startswith("https://huggingface.co/timm/test_resnet.r160_in1k/resolve/")


# --- a file under other names ---


def renamed(model: nn.Module) -> dict[str, torch.Tensor]:
    """As another implementation would name them, without counters of batches."""
    items = [(k, v) for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")]
    return {f"part{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(items)}


def test_a_file_by_order(tmp_path: Path) -> None:
    source, model = create_model("resnet3d_tiny", 1, 5), create_model("resnet3d_tiny", 1, 5)
    torch.save(renamed(source), tmp_path / "w.pt")
    torch.save({f"net.{key}": value for key, value in source.state_dict().items()}, tmp_path / "counted.pt")
    safetensors.torch.save_file(renamed(source), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"entries are missing"):
        foreign_weights.load(tmp_path / "w.pt", model)
    with pytest.raises(UserError, match=r"safetensors sorts its entries: .* order needs a \.pt"):
        foreign_weights.load(tmp_path / "w.safetensors", model, "order")
    assert not any("counters" in line for line in foreign_weights.load(tmp_path / "counted.pt", model, "order"))
    lines = foreign_weights.load(tmp_path / "w.pt", model, "order")
    assert "matched by order, not by name" in lines
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    other = create_model("resnet3d_tiny", 1, 3)
    assert sum("left as it was" in line for line in foreign_weights.load(tmp_path / "w.pt", other, "order")) == 2


def test_a_file_by_order_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = create_model("resnet3d_tiny", 1, 5)
    weights = renamed(source)
    names = list(weights)
    torch.save({k: weights[k] for k in names[1:]}, tmp_path / "short.pt")
    swapped = [names[0], names[2], names[1], *names[3:]]  # weight and bias of a norm: of one shape
    torch.save({k: weights[k] for k in swapped}, tmp_path / "swapped.pt")
    for file, message in (
        ("short.pt", r"has \d+ entries, the model \d+"),
        ("swapped.pt", r"stands where the model has"),
    ):
        with pytest.raises(UserError, match=message):
            foreign_weights.load(tmp_path / file, create_model("resnet3d_tiny", 1, 5), "order")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "resnet3d", "pretrained": True}, "pretrained has no effect with resnet3d: timm:NAME"),
        ({"name": "timm:resnet18", "pretrained": True, "weights": "a.pt"}, "both given"),
        ({"name": "resnet3d", "weights_match": "order"}, "weights_match has no effect without weights"),
    ],
)
def test_what_has_no_effect_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(**values)
