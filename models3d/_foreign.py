"""Networks of others: timm, torchvision, segmentation_models_pytorch, MONAI. Each is imported only when it is named."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from models3d._options import check_names, nearest, on_device, option_names
from models3d._userfile import UserFile

__all__ = ["SOURCES", "Source", "library"]


# Options of the libraries that would load weights, from the network as a rule.
_WEIGHTS = {
    "checkpoint_path",
    "encoder_weights",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "weights",
    "weights_backbone",
}
_PACKAGES = {"segmentation_models_pytorch": "segmentation-models-pytorch"}


class Source(Protocol):
    """What serves a prefix. Both raise ValueError for an unknown name; `create` also for what the model refuses."""

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module: ...
    def takes(self, name: str) -> set[str]: ...


class Timm:
    """`timm:NAME`: the image models of timm, (B, in_channels, H, W) -> (B, num_classes)."""

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        timm = library("timm")
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
        models = library("torchvision.models")
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


class Smp:
    """`smp:NAME`: segmentation_models_pytorch, (B, in_channels, H, W) -> (B, num_classes, H, W).

    encoder_name is an option. Its encoders want sizes that divide by 32 as a rule.
    """

    # Not options here: what the registry fills in, a second head, and scores that are no longer logits.
    _hidden = ("activation", "aux_params", "classes", "in_channels")

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        kind = self._kind(name)
        smp = library("segmentation_models_pytorch")
        _refuse_weights(f"smp:{name}", options)
        encoder = options.get("encoder_name", "")
        if not str(encoder).startswith("tu-"):  # those take any option of timm's
            check_names(f"smp:{name}", options, self.takes(name))
        if encoder and not encoder.startswith("tu-") and encoder not in (good := smp.encoders.encoders):
            raise ValueError(
                f"smp:{name} has no encoder {encoder!r}{nearest(encoder, good)}; "
                f"segmentation_models_pytorch.encoders.get_encoder_names() lists all, and tu-NAME takes timm's"
            )
        timm, theirs = library("timm"), str(encoder).removeprefix("tu-")
        if theirs != encoder and not timm.is_model(theirs):
            raise ValueError(
                f"smp:{name} has no encoder {encoder!r}, as timm has no model {theirs!r}"
                f"{nearest(theirs, timm.list_models())}"
            )

        def build(**chosen: Any) -> nn.Module:
            model: nn.Module = kind(encoder_weights=None, in_channels=in_channels, classes=num_classes, **chosen)
            return model

        return _build(f"smp:{name}", build, options)

    def takes(self, name: str) -> set[str]:
        return option_names(self._kind(name)) - {*self._hidden, *_WEIGHTS}

    def _kind(self, name: str) -> Any:
        smp = library("segmentation_models_pytorch")
        good = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
        if name not in good:
            raise ValueError(f"smp has no model {name!r}{nearest(name, good)}; its models: {', '.join(sorted(good))}")
        return good[name]


class Monai:
    """`monai:CLASS`: a class of monai.networks.nets, (B, in_channels, *spatial) -> what that class gives.

    Its arguments for channels, classes and number of axes are filled in under the names that it has for them. The
    option input_size, (D, H, W) or (H, W), gives spatial_dims and img_size where it has these; without it there are 3
    axes.
    """

    _channels = ("in_channels", "n_input_channels")
    _classes = ("out_channels", "num_classes")

    def create(self, name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
        kind, parameters = self._kind(name)
        _refuse_weights(f"monai:{name}", options)
        check_names(f"monai:{name}", options, self.takes(name))
        chosen = dict(options)
        size = chosen.pop("input_size", None)
        filled: dict[str, Any] = {self._name(parameters, self._channels): in_channels}
        filled[self._name(parameters, self._classes)] = num_classes
        if "spatial_dims" in parameters:
            filled["spatial_dims"] = 3 if size is None else len(size)
        if "img_size" in parameters and size is not None:
            filled["img_size"] = tuple(size)
        if "pretrained" in parameters:
            filled["pretrained"] = False
        arguments = filled | chosen
        own = inspect.signature(kind).parameters  # a base's may be given by the class itself
        missing = [n for n, p in parameters.items() if n in own and p.default is p.empty and n not in arguments]
        if missing:
            raise ValueError(f"monai:{name} needs the options {', '.join(missing)}; its options: {self._listed(name)}")
        return _build(f"monai:{name}", lambda **given: kind(**(filled | given)), chosen)

    def takes(self, name: str) -> set[str]:
        _, parameters = self._kind(name)
        hidden = {self._name(parameters, self._channels), self._name(parameters, self._classes), *_WEIGHTS}
        sized = {"input_size"} if {"spatial_dims", "img_size"} & set(parameters) else set()
        return (set(parameters) - hidden) | sized

    def _listed(self, name: str) -> str:
        return ", ".join(sorted(self.takes(name)))

    def _kind(self, name: str) -> tuple[Any, dict[str, inspect.Parameter]]:
        """The class, and its parameters; those of its bases too where it hands **kwargs on to them."""
        nets = library("monai.networks.nets")
        classes = {v.__name__: v for v in vars(nets).values() if inspect.isclass(v) and issubclass(v, nn.Module)}
        good = {n: kind for n, kind in classes.items() if self._maps_channels_to_classes(_parameters(kind))}
        if name not in good:
            what = "has no model" if name not in classes else "reads no channels and gives no classes by its signature:"
            raise ValueError(f"monai {what} {name!r}{nearest(name, good)}; monai.networks.nets lists all")
        return good[name], _parameters(good[name])

    def _maps_channels_to_classes(self, parameters: dict[str, inspect.Parameter]) -> bool:
        return bool({*self._channels} & set(parameters)) and bool({*self._classes} & set(parameters))

    def _name(self, parameters: dict[str, inspect.Parameter], names: tuple[str, ...]) -> str:
        return next(name for name in names if name in parameters)


SOURCES: dict[str, Source] = {
    "timm": Timm(),
    "torchvision": Torchvision(),
    "smp": Smp(),
    "monai": Monai(),
    "file": UserFile(),
}


def library(name: str) -> Any:
    """A library that not everyone has. Raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        raise ValueError(
            f"{missing} is not installed here; pip install {_PACKAGES.get(missing, missing)}, "
            f"or use a model of 'hpc models'"
        ) from error


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Named parameters of a class's constructor; of its bases' too where it hands **kwargs on."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is nn.Module:
            continue
        own = inspect.signature(vars(base)["__init__"]).parameters
        found = {n: p for n, p in own.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return {n: p for n, p in found.items() if n != "self"}


def _class_options(model: nn.Module) -> set[str]:
    """Options with a default in the signature of a built network's class: these libraries pass **kwargs down to it."""
    parameters = inspect.signature(type(model)).parameters
    return {n for n in option_names(type(model)) if parameters[n].default is not inspect.Parameter.empty} - {"in_chans"}


def _plain(build: Callable[[], nn.Module]) -> nn.Module:
    """A network to look at, on the meta device; draws no number."""
    with torch.device("meta"):
        return on_device(build)


def _refuse_weights(name: str, options: dict[str, Any]) -> None:
    for option in _WEIGHTS.intersection(options):
        raise ValueError(
            f"{name} starts from fresh weights here; leave out the option {option!r}: in an experiment, "
            f"'model.pretrained: true' or 'model.weights: FILE' loads weights"
        )


def _build(name: str, build: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """build(**options); what a library refuses becomes a sentence, with the options of the plain network's class."""
    _refuse_weights(name, options)
    try:
        return on_device(lambda: build(**options))
    except TypeError as error:
        if not name.startswith(("monai:", "smp:")):  # whose options are known, and were looked at
            check_names(name, options, _class_options(_plain(build)))
        raise ValueError(f"{name} refuses {options}: {_line(error)}") from error
    except (AssertionError, AttributeError, RuntimeError, ValueError, LookupError) as error:
        raise ValueError(f"{name} refuses {options}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
