"""Small volume files for the tests of `hpc inspect`."""

import json
from pathlib import Path

import numpy as np

from datasets.writer import VolumeWriter
from jobs import inspect

NAMES = ("left", "right", "neither")


def write(path, samples, targets, names=NAMES, task="classification", **rows):
    """A file of these samples. rows: per sample, as `VolumeWriter.add` takes them (split, group, fold, affine...)."""
    samples = [np.asarray(sample) for sample in samples]
    first = samples[0]
    same = len({sample.shape for sample in samples}) == 1
    storage = {name: rows.pop(name) for name in ("chunk", "codec") if name in rows}
    with VolumeWriter(
        path,
        shape=first.shape if same else None,
        dtype=first.dtype,
        num_samples=len(samples),
        class_names=names,
        task=task,
        folds="fold" in rows,
        **storage,
    ) as writer:
        for number, (sample, target) in enumerate(zip(samples, targets, strict=True)):
            own = {name: values[number] for name, values in rows.items()}
            writer.add(sample, target, **({"id": f"s{number:02d}"} | own))
    return path


def volumes_of(num, shape=(1, 12, 11, 10), dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (num, *shape)).astype(dtype)


def run(*arguments):
    return inspect.main([str(argument) for argument in arguments])


def facts_of(capsys, *arguments, code=0):
    """What --json prints; refused if it holds a number that JSON lacks."""
    capsys.readouterr()
    assert run(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest_fail(text))


def pytest_fail(text):
    raise AssertionError(f"{text} is no JSON")


def damage(path: Path, offset: int, data: bytes = b"\xff\xfe"):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
