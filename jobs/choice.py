"""What train.autotune has chosen: as data, in the run's folder, in a cache for later runs, and put into an experiment.

The run's autotune.json is written once, before the first step, by rank 0: later attempts, evaluate and predict read it.
The cache has a file for each (device, torch, cuDNN, model and its options, shape, batch, ...). A file there is never
replaced: of runs that measure at the same time, as those of a drill do, the first to end decides for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.rundir import RunDir, read_json, write_json
from hpc.training import Train

PRECISIONS: tuple[str, ...] = get_args(Train.model_fields["precision"].annotation)
COMPILES: tuple[str, ...] = get_args(Train.model_fields["compile"].annotation)


@dataclass(frozen=True)
class Choice:
    """One way to compute the same steps."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: str = "off"
    checkpoint: bool = False
    """Activations computed again: the model's option of this name."""
    threads: int = 2
    """Of the loader."""

    @staticmethod
    def of(experiment: Experiment) -> Choice:
        """As the experiment's file has it."""
        train, options = experiment.train, experiment.model.options
        checkpoint = options.get("checkpoint") is True
        return Choice(train.precision, train.channels_last, train.compile, checkpoint, experiment.data.threads)

    @staticmethod
    def read(values: Mapping[str, Any]) -> Choice:
        """From JSON. Raises ValueError for what is none."""
        try:
            found = replace(Choice(), **{str(key): value for key, value in values.items()})
        except TypeError as error:
            raise ValueError(str(error)) from None
        if [type(value) for value in asdict(found).values()] != [str, bool, str, bool, int]:
            raise ValueError(f"{values} is no choice")
        if found.precision not in PRECISIONS or found.compile not in COMPILES or found.threads < 0:
            raise ValueError(f"{values} is no choice")
        return found

    def codes(self) -> list[int]:
        """Numbers that ranks can agree on by their maximum."""
        numbers = [PRECISIONS.index(self.precision), self.channels_last, COMPILES.index(self.compile), self.checkpoint]
        return [*map(int, numbers), self.threads]

    @staticmethod
    def decode(codes: list[int]) -> Choice:
        precision, layout, compiled, checkpoint, threads = codes
        return Choice(PRECISIONS[precision], bool(layout), COMPILES[compiled], bool(checkpoint), threads)

    def put_into(self, experiment: Experiment) -> Experiment:
        """The experiment as if its file said so."""
        train = {"precision": self.precision, "channels_last": self.channels_last, "compile": self.compile}
        extra = {"checkpoint": self.checkpoint} if self.checkpoint != Choice.of(experiment).checkpoint else {}
        return experiment.model_copy(
            update={
                "train": experiment.train.model_copy(update=train),
                "data": experiment.data.model_copy(update={"threads": self.threads}),
                "model": type(experiment.model).model_validate({**experiment.model.model_dump(), **extra}),
            }
        )

    def __str__(self) -> str:
        parts = [self.precision, "channels last" if self.channels_last else "channels first"]
        parts += [] if self.compile == "off" else [f"{self.compile} compiled"]
        parts += ["checkpointed"] if self.checkpoint else []
        return ", ".join([*parts, "1 thread" if self.threads == 1 else f"{self.threads} threads"])


def recall(run: RunDir) -> Choice | None:
    """Of this run. Raises UserError for a damaged file."""
    found = read_json(run.autotune)
    if not found:
        return None
    try:
        return Choice.read(found["choice"])
    except (KeyError, ValueError, AttributeError):
        raise UserError(f"{run.autotune}: holds no choice; remove it to measure anew") from None


def chosen(run: RunDir, experiment: Experiment) -> Experiment:
    """The experiment of a run as it was trained."""
    choice = recall(run) if experiment.train.autotune else None
    return choice.put_into(experiment) if choice else experiment


def remember(run: RunDir, choice: Choice, about: Mapping[str, Any]) -> None:
    write_json(run.autotune, {"choice": asdict(choice), **about})


# The cache.


def cache_folder() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, hpc-batch/autotune in it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    return base / "hpc-batch" / "autotune"


def digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]


def look_up(key: Mapping[str, Any]) -> Choice | None:
    """Of an earlier run; None where there is none that can be read."""
    with suppress(
        OSError, ValueError, LookupError, TypeError, AttributeError, UserError, RuntimeError
    ):  # no home; a damaged file
        return Choice.read(read_json(cache_folder() / f"{digest(key)}.json")["choice"])
    return None


def publish(key: Mapping[str, Any], choice: Choice, about: Mapping[str, Any]) -> Choice:
    """Put a choice into the cache, where none is yet; what is there then. A cache that fails costs nothing else."""
    with suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{secrets.token_hex(8)}"
        try:
            aside.write_text(json.dumps({"choice": asdict(choice), "key": dict(key), **about}, default=str, indent=1))
            os.link(aside, folder / f"{digest(key)}.json")
        except FileExistsError:
            return look_up(key) or choice
        finally:
            aside.unlink(missing_ok=True)
    return choice
