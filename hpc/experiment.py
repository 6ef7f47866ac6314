"""The experiment: one small YAML file as typed data, with `base:`, overrides `a.b=c` and the delta from the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from hpc import recipes, yamlfile
from hpc.errors import UserError, nearest
from hpc.metrics import DEFAULT_MONITOR, DIRECTIONS
from hpc.settings import WITH_WEIGHTS, Data, Duration, Launch, Model, Section
from hpc.training import Train


class Experiment(Section):
    name: str
    task: Literal["classification", "multilabel", "segmentation"] = "classification"
    model: Model
    data: Data
    train: Train = Train()
    launch: Launch = Launch()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
            raise ValueError("must be 1 to 80 letters, digits, '.', '_' or '-', and start with a letter or digit")
        return name

    @model_validator(mode="after")
    def _check_task(self) -> Experiment:
        self.train.loss.of_task(self.task)
        for key, metric in {"train.monitor": self.monitor, **self.train.metrics()}.items():
            if metric not in DIRECTIONS[self.task]:
                names = nearest(metric, DIRECTIONS[self.task]) if metric else f"use {', '.join(DIRECTIONS[self.task])}"
                raise ValueError(f"{key} {metric or repr(metric)} is no metric of task {self.task}; {names}")
        return self

    @property
    def monitor(self) -> str:
        """The metric that names the best checkpoint."""
        return DEFAULT_MONITOR[self.task] if self.train.monitor is None else self.train.monitor

    @model_validator(mode="after")
    def _check_batch(self) -> Experiment:
        if fault := self.batch_fault(tasks=1):
            raise ValueError(fault)
        return self

    def batch_fault(self, tasks: int) -> str | None:
        """The sentence where the global batch does not divide by the tasks of a run and the parts of each, or None."""
        size, parts = self.data.batch_size, self.train.accumulate
        if self.train.deterministic == "layout":
            return self._layout_fault(tasks)
        if size % (tasks * parts) == 0:
            return None
        by = " x ".join([f"{tasks} tasks"] * (tasks > 1) + [f"train.accumulate {parts}"] * (parts > 1))
        return f"data.batch_size {size} does not divide by {by}; use a multiple of {tasks * parts}"

    def _layout_fault(self, tasks: int) -> str | None:
        size, virtual = self.data.batch_size, self.train.virtual_ranks
        if virtual & (virtual - 1):
            return f"train.virtual_ranks {virtual} is no power of two; use {1 << virtual.bit_length()}"
        if self.train.accumulate > 1:
            return "train.accumulate has no effect with train.deterministic=layout: virtual_ranks are its parts"
        if size % virtual:
            return f"data.batch_size {size} does not divide by train.virtual_ranks {virtual}"
        if virtual % tasks:
            sizes = ", ".join(str(1 << power) for power in range(virtual.bit_length()))
            return f"train.virtual_ranks {virtual} does not divide by {tasks} tasks; use one of {sizes} tasks"
        return None

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def is_duration(key: str) -> bool:
    """Whether a dotted key takes a time, in which a colon parts hours from minutes."""
    section: type[BaseModel] | None = Experiment
    *sections, last = key.split(".")
    for name in sections:
        field = section.model_fields.get(name) if section else None
        section = field.annotation if field and isinstance(field.annotation, type) else None
    hints = get_type_hints(section, include_extras=True) if section else {}
    return Duration in (hints.get(last), *get_args(hints.get(last)))


def validate(values: dict[str, Any], origin: str) -> Experiment:
    """The experiment in `values`. Raises UserError with one line per fault, with the nearest valid name."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        lines = [f"{origin}: {_sentence(fault)}" for fault in error.errors() if not _of_other_branch(fault)]
        raise UserError("\n".join(lines)) from None


def _in_union(fault: Any) -> bool:
    """Whether a word or a list is asked for (Literal["balanced"] | list[float]): each branch has a fault of its own."""
    return any("[" in str(part) for part in fault["loc"][-1:])


def _of_other_branch(fault: Any) -> bool:
    if not _in_union(fault):
        return False
    return bool(fault["type"] in _LISTS or (fault["type"] == "literal_error" and isinstance(fault["input"], list)))


_LISTS = ("list_type", "tuple_type")


def _sentence(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"] if "[" not in str(part))  # list[float]: a branch of a union
    if fault["type"] == "extra_forbidden":
        section = _section(fault["loc"][:-1])
        return f"{path}: no such key; {nearest(str(fault['loc'][-1]), section.model_fields)}"
    if fault["type"] == "missing":
        return f"{path}: is missing"
    if fault["type"] == "model_type":
        return f"{path}: is a section, 'key: value' lines (got {fault['input']!r})"
    message = "is a list, [one, two]" if fault["type"] in _LISTS else fault["msg"].removeprefix("Value error, ")
    message += " or a list" if _in_union(fault) and fault["type"] == "literal_error" else ""
    given = fault["input"]
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _section(loc: tuple[Any, ...]) -> type[BaseModel]:
    """The section at this place: of a list (train.stages.0) that of its items."""
    section: type[BaseModel] = Experiment
    for key in loc:
        if isinstance(key, str):
            kind = section.model_fields[key].annotation
            found = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
            section = found[0]
    return section


class Source:
    """An experiment's file and its base, read once; any number of variants are resolved from it."""

    def __init__(self, path: Path, tiny: bool = False) -> None:
        """`path`: a file, or the name of a recipe; `tiny`: its tiny form. Raises UserError."""
        self._path = path = recipes.find(str(path), Path()) or path
        self._values, base, files = _read_layers(path, ())
        if tiny:
            base = self._values
            for form in recipes.tiny_form(files):
                change = yamlfile.read(form)
                _resolve_paths(change, Path.cwd())
                self._values = _merge(self._values, change)
            self._values["name"] = f"{base.get('name')}-tiny"
        reference = base if base is not None else self._values
        self._before = flatten(validate(reference, str(path)).as_dict()) if _complete(reference) else {}

    def resolve(self, overrides: Sequence[str] = ()) -> tuple[Experiment, dict[str, Any]]:
        """The experiment with `overrides` (a.b=c), and its delta: what differs from the base, {dotted key: value}.

        Without `base:` the delta is what the overrides change. Raises UserError.
        """
        final = _merge(self._values, {})
        # Another model drops the options of the old one, not those that were asked for with it.
        for override in sorted(overrides, key=lambda text: not text.startswith("model.name=")):
            _apply(final, override)
        experiment = validate(final, str(self._path))
        after = flatten(experiment.as_dict())
        before = self._before
        if before.get("model.name") != after["model.name"]:  # the options of another model are no difference
            before = {key: value for key, value in before.items() if not key.startswith("model.") or key in after}
        keys = sorted(after.keys() | before.keys())
        return experiment, {key: after.get(key) for key in keys if after.get(key) != before.get(key)}


def load(path: Path, overrides: Sequence[str] | None = None, tiny: bool = False) -> tuple[Experiment, dict[str, Any]]:
    """The resolved experiment of a YAML file or recipe, and its delta. Raises UserError."""
    return Source(path, tiny).resolve(overrides or ())


def _complete(values: dict[str, Any]) -> bool:
    """A base may be a fragment that is no experiment by itself."""
    return all(key in values for key in ("name", "model", "data"))


_Layers = tuple[dict[str, Any], dict[str, Any] | None, list[Path]]
"""All values of a file, those of its base, and the files: itself, its base, the base of that ..."""


def _read_layers(path: Path, above: tuple[Path, ...]) -> _Layers:
    path = path.resolve()
    if path in above:
        raise UserError(f"{path}: base: goes in a circle: {' -> '.join(p.name for p in (*above, path))}")
    values = yamlfile.read(path)
    base_name = values.pop("base", None)
    _resolve_paths(values, Path.cwd() if recipes.ours(path) else path.parent)
    if base_name is None:
        return _merge(values, {}), None, [path]
    if not isinstance(base_name, str):
        raise UserError(f"{path}: base: must be a recipe or the path of another experiment (got {base_name!r})")
    below = recipes.find(base_name, path.parent) or Path(_absolute(path.parent, base_name))
    base, _, files = _read_layers(below, (*above, path))
    return _merge(base, values), base, [path, *files]


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    data, model = values.get("data"), values.get("model")
    if isinstance(data, dict) and isinstance(data.get("file"), str):
        data["file"] = _absolute(folder, data["file"])
    if isinstance(model, dict) and isinstance(model.get("weights"), str):
        model["weights"] = _absolute(folder, model["weights"])
    if isinstance(model, dict) and isinstance(model.get("name"), str) and model["name"].startswith("file:"):
        file, _, attribute = model["name"].removeprefix("file:").rpartition(":")
        if not file or not attribute:
            raise UserError(f"model.name {model['name']!r}: write file:PATH.py:CLASS")
        model["name"] = f"file:{_absolute(folder, file)}:{attribute}"


def _absolute(folder: Path, text: str) -> str:
    try:
        return str((folder / Path(text).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a NUL, a circle of links
        raise UserError(f"{text!r} is not a path: {error}") from None


def _merge(low: dict[str, Any], high: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`high` over `low`; null takes a key back to its default; another model drops the options of the old one."""
    given = {key: value for key, value in low.items() if value is not None}
    merged = {key: _merge(value, {}) if isinstance(value, dict) else value for key, value in given.items()}
    for key, value in high.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            mine = merged.get(key)
            below = mine if isinstance(mine, dict) else {}
            if path + key == "model" and value.get("name", below.get("name")) != below.get("name"):
                below = _kept_of(below, str(value.get("name")))
            merged[key] = _merge(below, value, f"{path}{key}.")
        else:
            merged[key] = value
    return merged


def _kept_of(model: dict[str, Any], name: str) -> dict[str, Any]:
    """What another model keeps of the settings of one: to start from its library's own weights, where it has some."""
    return {"pretrained": True} if model.get("pretrained") is True and name.startswith(WITH_WEIGHTS) else {}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"{override!r} is no override; write train.epochs=20")
    change: Any = yamlfile.parse(text, override)
    for part in reversed(key.split(".")):
        change = {part: change}
    _resolve_paths(change, Path.cwd())
    merged = _merge(values, change)
    values.clear()
    values.update(merged)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
