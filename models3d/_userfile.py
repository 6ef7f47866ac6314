"""A user's own Python file as a network: `file:PATH.py:NAME`."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from models3d._options import check_names, on_device, option_names

__all__ = ["UserFile"]


class UserFile:
    """`file:PATH.py:NAME`: a class or function of the user's, called with in_channels, num_classes and the options."""

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        path, attribute = _split(name)
        with _importable(path.parent):
            factory = _attribute(path, attribute)
            arguments = {"in_channels": in_channels, "num_classes": num_classes} | options
            _check_call(f"{path}:{attribute}", factory, arguments)
            model = on_device(lambda: factory(**arguments))
        if not isinstance(model, nn.Module):
            raise ValueError(f"{path}:{attribute} gave a {type(model).__name__}; it must give a torch.nn.Module")
        return model

    def takes(self, name: str) -> set[str]:
        path, attribute = _split(name)
        with _importable(path.parent):
            return option_names(_attribute(path, attribute))


def _split(name: str) -> tuple[Path, str]:
    path, _, attribute = name.rpartition(":")
    if not path or not attribute.isidentifier():
        raise ValueError(f"model 'file:{name}' names no class; write file:PATH.py:NAME")
    if not Path(path).is_file():
        raise ValueError(f"model file {path} does not exist (looked for from {Path.cwd()}); write file:PATH.py:NAME")
    return Path(path).resolve(), attribute


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The file's neighbours can be imported inside, and its folder is gone from sys.path afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _attribute(path: Path, attribute: str) -> Callable[..., Any]:
    module = _load(path)
    found = getattr(module, attribute, None)
    if not callable(found):
        callables = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise ValueError(f"{path} has no class or function {attribute!r}; it has {', '.join(callables) or 'none'}")
    function: Callable[..., Any] = found
    return function


def _check_call(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> None:
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        check_names(name, set(arguments) - {"in_channels", "num_classes"}, option_names(factory))
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} cannot be called with {', '.join(arguments)}: {error}") from error


def _load(path: Path) -> ModuleType:
    """The file as a module, under a name of its own in sys.modules (dataclasses and pickle look there)."""
    name = f"_model_file_{path.stem}_{hashlib.sha1(path.read_bytes() + str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; write file:PATH.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
