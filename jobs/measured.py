"""Rates that `hpc bench` has measured, kept for `hpc plan` in the user's cache folder: a JSON file for each.

A rate holds for one process with its share of a batch, on one kind of instance. What else it depends on is its key: of
the loader the data file's fingerprint, patch, dtype, threads and augmentation; of the model its options, the shape of a
sample, precision, layout and compilation.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from hpc import instances
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.rundir import read_json, write_json
from jobs.setup import Parts

Key = dict[str, Any]


def folder() -> Path:
    """XDG_CACHE_HOME/hpc/bench, else ~/.cache/hpc/bench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpc" / "bench"


def processes(experiment: Experiment) -> int:
    """Tasks of the run. Raises UserError for an instance that is not known."""
    return instances.find(experiment.launch.instance).request(experiment.launch).world_size


def loader_key(experiment: Experiment, parts: Parts, threads: int) -> Key:
    """Of what one process reads with so many threads. Raises UserError."""
    data = experiment.data
    return {
        "rate": "loader",
        "instance": experiment.launch.instance,
        "data": parts.volumes.fingerprint,
        "dtype": str(parts.volumes.dtype),
        "shape": list(parts.shape),
        "patch": data.patch,
        "foreground": data.foreground,
        "augment": data.augment,
        "verify": data.verify,
        "batch": data.batch_size // processes(experiment),
        "threads": threads,
    }


def model_key(experiment: Experiment, parts: Parts) -> Key:
    """Of what one process trains. Raises UserError."""
    train = experiment.train
    return {
        "rate": "model",
        "instance": experiment.launch.instance,
        "model": experiment.model.name,
        "options": parts.model_options,
        "shape": list(parts.shape),
        "classes": parts.num_classes,
        "batch": experiment.data.batch_size // processes(experiment),
        "accumulate": train.accumulate,
        "precision": train.precision,
        "channels_last": train.channels_last,
        "compile": train.compile,
        "optimizer": train.optimizer.name,
        "deterministic": train.deterministic,
        "device": train.device,
    }


def _file(key: Key) -> Path:
    text = json.dumps(key, sort_keys=True, default=str)
    return folder() / f"{key['rate']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def keep(key: Key, samples_per_second: float, **facts: Any) -> Path:
    """Write the rate; a later one of the same key takes its place. Raises OSError."""
    path = _file(key)
    known = json.loads(json.dumps(key, default=str))
    write_json(path, {"key": known, "samples_per_second": samples_per_second, "time": time.time(), **facts})
    return path


def find(key: Key) -> dict[str, Any] | None:
    """What was kept, {samples_per_second, time (seconds since 1970), ...}; None where nothing was."""
    try:
        found = read_json(_file(key))
    except (UserError, OSError):
        return None
    return found if isinstance(found.get("samples_per_second"), int | float) and "time" in found else None
