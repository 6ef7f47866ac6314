"""Pickles planted in every file that is read from a run or from a user: none of them is ever executed."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.torch
import torch
from torch import nn

from datasets import layout
from hpc import experiment
from hpc.rundir import RunDir, read_json
from jobs import checkpoint, durable, foreign_weights
from tests.faults.storage_states import Place, Saving
from tests.tiny_run import make_data, make_run

Read = Callable[[], Any]
Variant = tuple[str, Read]
"""What was planted, and how the toolkit comes to read it."""
CANARY = "canary"


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def forms(canary: Path) -> dict[str, bytes]:
    """The ways in which a pickle lies in a file."""
    new, old, tensors = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Canary(canary), new)
    torch.save(Canary(canary), old, _use_new_zipfile_serialization=False)
    torch.save({"weight": torch.ones(3, 2), "bias": Canary(canary)}, tensors)
    return {
        "pickle": pickle.dumps(Canary(canary), protocol=2),
        "torch.save": new.getvalue(),
        "old torch.save": old.getvalue(),
        "torch.save among tensors": tensors.getvalue(),
    }


def forge(folder: Path) -> None:
    """Make the manifest fit the files as they are: sums protect from disks, not from people."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        parts = range(0, len(content), durable.BLOCK)
        entry |= {"size": len(content), "crc32": [zlib.crc32(content[at : at + durable.BLOCK]) for at in parts]}
    text = json.dumps({**manifest, "sum": "0" * 8}, indent=1)
    path.write_text(text.replace("0" * 8, f"{zlib.crc32(text.encode()):08x}", 1))
    checkpoint.verify(folder)  # or the forgery proves nothing


def in_checkpoints(base: Path, canary: Path) -> Iterator[Variant]:
    good = Place.new(base / "good")
    with Saving(good, 1) as saving:
        saving.save(3)
    [whole] = checkpoint.newest_first(good.checkpoints)
    names = sorted(path.name for path in whole.iterdir())
    _resume(good)
    for name in [*names, ".metadata", "optimizer.pt"]:  # the last two: as other libraries have them
        for form in ("pickle", "torch.save"):
            for forged in (False, True) if name in names and name != "manifest.json" else (False,):
                what = f"{form} as {name}{', its sums forged' if forged else ''}"
                place = Place(base / what.replace(" ", "-"))
                shutil.copytree(good.run, place.run)
                (place.checkpoints / whole.name / name).write_bytes(forms(canary)[form])
                if forged:
                    forge(place.checkpoints / whole.name)
                yield what, lambda place=place: _resume(place)


def _resume(place: Place) -> None:
    found = checkpoint.load_newest(place.checkpoints, place.quarantine)
    assert found is not None
    for part in (found.model, found.optimizer, found.state):
        part()


def in_weights(base: Path, canary: Path) -> Iterator[Variant]:
    planted = forms(canary)
    files = {f"{form.replace(' ', '-')}.pt": content for form, content in planted.items()}
    files |= {"weights.pth": planted["torch.save"], "weights.bin": planted["pickle"]}
    files |= {
        "weights.safetensors": planted["pickle"],
        "zip.safetensors": planted["torch.save"],
        "tar.pt": _tar(planted),
    }
    tensors = {key: value.clone() for key, value in nn.Linear(2, 3).state_dict().items()}
    safetensors.torch.save_file(tensors, base / "good.safetensors")
    foreign_weights.load(base / "good.safetensors", nn.Linear(2, 3))
    files["tail.safetensors"] = (base / "good.safetensors").read_bytes() + planted["pickle"]
    for name, content in files.items():
        (base / name).write_bytes(content)
        yield f"weights {name}", lambda name=name: foreign_weights.load(base / name, nn.Linear(2, 3))


def _tar(planted: dict[str, bytes]) -> bytes:
    """The format of torch before 0.2."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(planted["pickle"])
            archive.addfile(entry, io.BytesIO(planted["pickle"]))
    return file.getvalue()


def in_volumes(base: Path, canary: Path) -> Iterator[Variant]:
    content = np.frombuffer(forms(canary)["pickle"], np.uint8)
    opaque = np.void(content.tobytes())
    for name in (layout.IDS, layout.TARGETS, layout.SOURCE_ATTR, layout.PACKING_ATTR):
        folder = base / f"volumes-{name.strip('/')}"
        folder.mkdir()
        path = make_data(folder)
        layout.open_volumes(path)
        with h5py.File(path, "r+") as file:
            if name in file:
                count = len(file[name])
                del file[name]
                file.create_dataset(name, data=np.array([opaque] * count))
            else:
                file.attrs[name] = opaque
        yield f"opaque {name} of the volumes", lambda path=path: layout.open_volumes(path)


def in_runs(base: Path, canary: Path) -> Iterator[Variant]:
    run = make_run(base / "run", make_data(base))
    experiment.load(run.experiment)
    code = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{canary}]]\n"
    for number, (path, read) in enumerate(
        {
            run.experiment: lambda path: experiment.load(path),
            run.state: lambda path: read_json(path),
            run.stop: lambda path: read_json(path),
            run.metrics: lambda path: RunDir(path.parent).read_metrics(),
        }.items()
    ):
        folder = base / f"run{number}"
        shutil.copytree(run.path, folder)
        (folder / path.name).write_bytes(forms(canary)["pickle"])
        yield f"pickle as {path.name}", lambda read=read, path=folder / path.name: read(path)
    yaml = base / "code.yaml"
    yaml.write_text(f"name: {code}")
    yield "code in an experiment", lambda: experiment.load(yaml)


def planted_pickles(folder: Path, number: int) -> str:
    canary, base, variants, refused = folder / CANARY, folder / "planted", 0, 0
    base.mkdir()
    for group in (in_checkpoints, in_weights, in_volumes, in_runs):
        for what, read in group(base, canary):
            variants += 1
            try:
                read()
            except Exception:  # each format refuses in its own words
                refused += 1
            assert not canary.exists(), f"{what}: it was executed"
    for form, content in forms(canary).items():
        with io.BytesIO(content) as file:
            pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
        assert canary.exists(), f"{form}: the canary itself is dead"
        canary.unlink()
    assert variants >= 25
    return f"{variants} variants: {refused} refused, {variants - refused} not read, 0 executed"
