"""Networks from elsewhere: timm, torchvision, and a user's own Python file. Each is imported only when it is named."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from models3d._options import check_names, nearest, option_names

__all__ = ["SOURCES", "Source"]


# Options of the two libraries that would load weights, from the network as a rule.
_WEIGHTS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "weights", "weights_backbone"}


class Source(Protocol):
    """What serves a prefix. Both raise ValueError for an unknown name; `create` also for what the model refuses."""

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module: ...
    def takes(self, name: str) -> set[str]: ...


class Timm:
    """`timm:NAME`: the image models of timm, (B, in_channels, H, W) -> (B, num_classes)."""

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        timm = _library("timm")
        if not timm.is_model(name):
            raise ValueError(
                f"timm has no model {name!r}{nearest(name, timm.list_models())}; timm.list_models() lists all"
            )

        def build(**chosen: Any) -> nn.Module:
            model: nn.Module = timm.create_model(name, in_chans=in_channels, num_classes=num_classes, **chosen)
            return model

        return _build(f"timm:{name}", build, options)

    def takes(self, name: str) -> set[str]:
        return _class_options(_plain(lambda: self.create(name, 3, 2, {})))


class Torchvision:
    """`torchvision:NAME`: its classifiers of images (B, 3, H, W) and of video (B, 3, T, H, W), -> (B, num_classes)."""

    # Their extra heads make a tuple of the output in training; left out unless asked for.
    _with_extra_heads = ("googlenet", "inception_v3")

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        models = _library("torchvision.models")
        good = [*models.list_models(models), *models.list_models(models.video)]
        if name not in good:
            raise ValueError(
                f"torchvision has no classification model {name!r}{nearest(name, good)}; "
                f"torchvision.models.list_models() lists all"
            )
        if in_channels != 3:
            raise ValueError(
                f"torchvision:{name} takes 3 input channels, not {in_channels}; repeat the channel, or use timm:NAME"
            )
        fixed: dict[str, Any] = {"weights": None, "num_classes": num_classes}
        if name in self._with_extra_heads:
            fixed |= {"aux_logits": False, "init_weights": True}

        def build(**chosen: Any) -> nn.Module:
            model: nn.Module = models.get_model(name, **(fixed | chosen))
            return model

        return _build(f"torchvision:{name}", build, options)

    def takes(self, name: str) -> set[str]:
        return _class_options(_plain(lambda: self.create(name, 3, 2, {})))


class UserFile:
    """`file:PATH.py:NAME`: a class or function of the user's, called with in_channels, num_classes and the options."""

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        path, attribute = _split(name)
        with _importable(path.parent):
            factory = _attribute(path, attribute)
            arguments = {"in_channels": in_channels, "num_classes": num_classes} | options
            _check_call(f"{path}:{attribute}", factory, arguments)
            model = factory(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{path}:{attribute} gave a {type(model).__name__}; it must give a torch.nn.Module")
        return model

    def takes(self, name: str) -> set[str]:
        path, attribute = _split(name)
        with _importable(path.parent):
            return option_names(_attribute(path, attribute))


SOURCES: dict[str, Source] = {"timm": Timm(), "torchvision": Torchvision(), "file": UserFile()}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed here; pip install {error.name}, or use a model of 'hpc models'"
        ) from error


def _class_options(model: nn.Module) -> set[str]:
    """Options with a default in the signature of a built network's class: these libraries pass **kwargs down to it."""
    parameters = inspect.signature(type(model)).parameters
    return {n for n in option_names(type(model)) if parameters[n].default is not inspect.Parameter.empty} - {"in_chans"}


def _plain(build: Callable[[], nn.Module]) -> nn.Module:
    """A network to look at: on the meta device, or for real where its constructor needs values; draws no number."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        with torch.random.fork_rng():
            return build()


def _build(name: str, build: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """build(**options); a TypeError becomes a sentence with the options that the plain network's class has."""
    for option in _WEIGHTS.intersection(options):
        raise ValueError(f"{name} starts from fresh weights here; leave out the option {option!r}")
    try:
        return build(**options)
    except TypeError as error:
        check_names(name, options, _class_options(_plain(build)))
        raise ValueError(f"{name} refuses {options}: {error}") from error


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
