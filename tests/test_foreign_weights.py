"""A user's weights: what fits is loaded and told, what does not is one line, and no code in a file is executed."""

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.torch_version import TorchVersion

from hpc.errors import UserError
from jobs import foreign_weights


def network(classes: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(1, width, 3), nn.BatchNorm3d(width), nn.Flatten(), nn.Linear(width, classes))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(model: nn.Module, weights: dict[str, torch.Tensor], *left: str) -> bool:
    found = model.state_dict()
    return all(torch.equal(found[name], weights[name]) for name in found if name not in left)


def refusal(path: Path, model: nn.Module | None = None) -> str:
    """The one line with which a file is refused; the model is as it was."""
    model = model or network()
    before = weights_of(model)
    with pytest.raises(UserError) as raised:
        foreign_weights.load(path, model)
    assert equal(model, before) and "\n" not in str(raised.value) and str(path) in str(raised.value)
    return str(raised.value)


# What fits.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_a_state_dict_is_loaded(tmp_path: Path, suffix: str) -> None:
    path, weights = tmp_path / f"weights{suffix}", weights_of(network())
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(weights, path)
    model = network()
    assert foreign_weights.load(path, model) == [f"weights{suffix}: 9 of 9 entries loaded"]
    assert equal(model, weights)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_wrapped_one_too_with_what_was_not_read(tmp_path: Path, wrapper: str) -> None:
    path, weights = tmp_path / "last.ckpt.pt", weights_of(network())
    torch.save({"epoch": 3, wrapper: weights, "optimizer": {}}, path)
    model = network()
    lines = foreign_weights.load(path, model)
    assert f"taken from '{wrapper}'; not read: epoch, optimizer" in lines and equal(model, weights)


def test_prefixes_of_parallel_and_compiled_models_go(tmp_path: Path) -> None:
    path, weights = tmp_path / "ddp.pt", weights_of(network())
    torch.save({"model": {f"module._orig_mod.{name}": value for name, value in weights.items()}}, path)
    model = network()
    assert "names without their 'module.'" in foreign_weights.load(path, model) and equal(model, weights)


def test_half_precision_is_cast_and_told(tmp_path: Path) -> None:
    path, weights = tmp_path / "half.safetensors", weights_of(network().half())
    safetensors.torch.save_file(weights, path)
    model = network()
    assert "cast: float16 to float32" in foreign_weights.load(path, model)
    assert equal(model, {name: value.to(model.state_dict()[name].dtype) for name, value in weights.items()})


def test_a_head_of_another_number_of_classes_is_left_and_told(tmp_path: Path) -> None:
    path, weights = tmp_path / "ten.pt", weights_of(network(classes=10))
    torch.save(weights, path)
    model = network(classes=3)
    before = weights_of(model)
    lines = foreign_weights.load(path, model)
    assert lines[0].endswith("7 of 9 entries loaded")
    assert "3.weight is 10x4 there and 3x4 here: left as it was" in lines
    assert "3.bias is 10 there and 3 here: left as it was" in lines
    assert equal(model, weights, "3.weight", "3.bias")
    assert torch.equal(model[3].weight, before["3.weight"]) and torch.equal(model[3].bias, before["3.bias"])


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    path, weights = tmp_path / "old.pt", weights_of(network())
    del weights["1.num_batches_tracked"]
    torch.save(weights, path)
    model = network()
    assert any("counters of batches" in line for line in foreign_weights.load(path, model))
    assert equal(model, weights, "1.num_batches_tracked")


# What does not.


def change(edit: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        weights: dict[str, Any] = weights_of(network())
        edit(weights)
        return weights

    return make


MISFITS = [
    (change(lambda w: w.pop("0.weight")), ["1 of the model's 9 entries are missing (0.weight)"]),
    (change(lambda w: w.update(extra=torch.ones(1))), ["1 are not the model's (extra)"]),
    (lambda: weights_of(network(width=8)), ["have other shapes (0.weight is 8x1x3x3x3, not 4x1x3x3x3", "..."]),
    (dict, ["8 of the model's 9", "hpc models"]),
    (
        lambda: {f"net.{k}": v for k, v in weights_of(network()).items()},
        ["are missing", "not the model's (net.0.weight"],
    ),
    (change(lambda w: w["0.weight"].view(-1)[0].fill_(float("nan"))), ["1 entries hold NaN or Inf (0.weight)"]),
    (change(lambda w: w.update({"0.bias": w["0.bias"].int()})), ["of another kind (0.bias torch.int32)"]),
    (change(lambda w: w.update({"0.bias": w["0.bias"].to_sparse()})), ["of another kind (0.bias"]),
    (change(lambda w: w.update({"0.bias": 3})), ["'0.bias' is a int", "save model.state_dict() there"]),
    (lambda: [1, 2], ["holds a list, not a state_dict"]),
    (lambda: {"model": {"state_dict": {"x": "y"}}}, ["'x' is a str"]),
]


@pytest.mark.parametrize(("make", "words"), MISFITS)
def test_what_does_not_fit_is_one_line_that_names_it(tmp_path: Path, make: Callable[[], Any], words: list[str]) -> None:
    path = tmp_path / "weights.pt"
    torch.save(make(), path)
    line = refusal(path)
    assert all(word in line for word in words), line


def test_what_is_no_such_file_names_those_that_are(tmp_path: Path) -> None:
    safetensors.torch.save_file(weights_of(network()), tmp_path / "good.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    assert "is a folder; in" in refusal(tmp_path) and "good.safetensors" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "god.safetensors")
    assert "did you mean 'good.safetensors'" in refusal(tmp_path / "god.safetensors")
    assert ".safetensors, .pt, .pth, .bin, not from .txt" in refusal(tmp_path / "notes.txt")
    assert "no file with weights" in refusal(tmp_path / "nowhere" / "at.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_line(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(weights_of(network()), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refusal(path)


def test_an_old_torch_reads_safetensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(network())
    torch.save(weights, tmp_path / "weights.pt")
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    for version, refused in (("2.9.1+cu128", True), ("2.10.0", False), ("3.0.0", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        if refused:
            assert "update torch, or save the weights as safetensors" in refusal(tmp_path / "weights.pt")
        else:
            foreign_weights.load(tmp_path / "weights.pt", network())
        foreign_weights.load(tmp_path / "weights.safetensors", network())


# Code in a file.


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.call: tuple[Any, ...] = (Path.touch, (path,))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Shell(Canary):
    def __init__(self, path: Path) -> None:
        self.call = (os.system, (f"touch {path}",))


class Evaluated(Canary):
    def __init__(self, path: Path) -> None:
        self.call = (eval, (f"open({str(path)!r}, 'w')",))


class Built(Canary):
    """By the state of an object, not by a call."""

    def __init__(self, path: Path) -> None:
        self.call = (Module, (), {"path": path})


class Module(nn.Module):
    def __setstate__(self, state: dict[str, Any]) -> None:
        state["path"].touch()


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def with_code_beside(code: bytes) -> bytes:
    """A good archive in which one pickle was replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(weights_of(network())))) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, code if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


def tar(code: bytes) -> bytes:
    """The format before torch 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(code)
            archive.addfile(info, io.BytesIO(code))
    return buffer.getvalue()


def torchscript(code: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in ("constants.pkl", "data.pkl", "code/__torch__.py", "version"):
            target.writestr(f"archive/{name}", b"3\n" if name == "version" else code)
    return buffer.getvalue()


def numpy_objects(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([canary], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PLANTED: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda path: pickle.dumps(Canary(path)),
    "pickle of protocol 2": lambda path: pickle.dumps(Canary(path), protocol=2),
    "pickle of protocol 5": lambda path: pickle.dumps({"w": Canary(path)}, protocol=5),
    "os.system": lambda path: saved({"w": Shell(path)}),
    "eval": lambda path: saved({"state_dict": {"w": Evaluated(path)}}),
    "state of a module": lambda path: saved(Built(path)),
    "whole model": lambda path: saved([network(), Canary(path)]),
    "beside good weights": lambda path: saved({**weights_of(network()), "z": Canary(path)}),
    "as a key": lambda path: saved({"model": weights_of(network()), "by": {3: Canary(path)}}),
    "data.pkl of a good archive": lambda path: with_code_beside(pickle.dumps(Canary(path), protocol=2)),
    "legacy file": lambda path: saved({"w": Canary(path)}, _use_new_zipfile_serialization=False),
    "legacy tar": lambda path: tar(pickle.dumps(Canary(path), protocol=2)),
    "torchscript archive": lambda path: torchscript(pickle.dumps(Canary(path), protocol=2)),
    "numpy object array": lambda path: numpy_objects(Canary(path)),
    "numpy object array in a .pt": lambda path: saved({"w": np.array([Canary(path)], dtype=object)}),
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", PLANTED)
def test_planted_code_is_never_executed(tmp_path: Path, form: str, suffix: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"weights{suffix}"
    path.write_bytes(PLANTED[form](canary))
    line = refusal(path)
    assert not canary.exists()
    assert "weights_only" not in line
    assert "damaged" in line or "could run code" in line


def test_code_after_good_weights_is_never_read(tmp_path: Path) -> None:
    canary, path, weights = tmp_path / "canary", tmp_path / "weights.pt", weights_of(network())
    path.write_bytes(saved(weights) + pickle.dumps(Canary(canary)))
    model = network()
    foreign_weights.load(path, model)
    assert equal(model, weights) and not canary.exists()


def test_the_canaries_live(tmp_path: Path) -> None:
    for kind in (Canary, Shell, Evaluated, Built):
        canary = tmp_path / kind.__name__
        content = io.BytesIO(saved({"w": kind(canary)}))
        torch.load(content, weights_only=False)
        assert canary.exists(), f"{kind.__name__} is dead: the tests above prove nothing"
