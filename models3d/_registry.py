"""Names to networks: the registered ones, and with a prefix timm, torchvision, smp, MONAI and `file:PATH.py:NAME`.

A registered network is tested on the day it is registered: tests/test_models3d.py runs over list_models().
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from models3d._foreign import SOURCES, Source
from models3d._options import check_names, nearest, option_names, whole

__all__ = ["create_model", "list_models", "register_model", "takes"]

Factory = Callable[..., nn.Module]
_factories: dict[str, Factory] = {}
_signatures: dict[str, Callable[..., Any]] = {}
_examples: dict[str, tuple[int, ...]] = {}


def register_model(options: Callable[..., Any], example: tuple[int, ...]) -> Callable[[Factory], Factory]:
    """Decorator: `create_model(f.__name__)` shall call `f(in_channels=, num_classes=, **options)`.

    options: the class or function whose signature names the valid options, as f only passes them on.
    example: a usual input, (C, *spatial), for `hpc models`.
    Raises ValueError when the name is taken by another module.
    """

    def register(factory: Factory) -> Factory:
        name = factory.__name__
        owner = _factories[name].__module__ if name in _factories else factory.__module__
        if owner != factory.__module__:
            raise ValueError(f"model {name!r} is already registered by {owner}; choose another name")
        _factories[name], _signatures[name], _examples[name] = factory, options, example
        return factory

    return register


def list_models() -> list[str]:
    """Names of the registered models, sorted; timm:, torchvision:, smp:, monai: and file: come on top of them."""
    return sorted(_factories)


def example_input(name: str) -> tuple[int, ...] | None:
    """A usual input of a model, (C, *spatial); None for those with a prefix."""
    return _examples.get(name)


def create_model(name: str, in_channels: int = 1, num_classes: int = 2, **options: Any) -> nn.Module:
    """Build a network with fresh weights, from torch's current generator and on torch's current default device.

    name: one of list_models(), or timm:NAME, torchvision:NAME, smp:NAME, monai:NAME, file:PATH.py:NAME.
    in_channels: channels of the input, (B, in_channels, *spatial).
    num_classes: width of the logits, (B, num_classes), for segmentation (B, num_classes, *spatial).
    options: what `takes(name)` lists.

    Raises ValueError for an unknown name, an unknown option, or a value that the model refuses.
    """
    whole("in_channels", in_channels)
    whole("num_classes", num_classes)
    source, rest = _source(name)
    if source is not None:
        return source.create(rest, in_channels, num_classes, options)
    check_names(name, options, option_names(_signatures[name]))
    return _factories[name](in_channels=in_channels, num_classes=num_classes, **options)


def takes(name: str) -> set[str]:
    """Names of the options of a model, e.g. to pass input_size=(D, H, W) only to those that need it.

    Raises ValueError for an unknown name.
    """
    source, rest = _source(name)
    return option_names(_signatures[name]) if source is None else source.takes(rest)


def _source(name: str) -> tuple[Source | None, str]:
    """Who serves a name, None for the registered ones, and the name without its prefix."""
    prefix, colon, rest = name.partition(":")
    if prefix in SOURCES and colon:
        return SOURCES[prefix], rest
    if name not in _factories:
        raise ValueError(
            f"model {name!r} is not known{nearest(name, _factories)}; 'hpc models' lists all, "
            f"and timm:NAME, torchvision:NAME, smp:NAME, monai:NAME and file:PATH.py:NAME reach others"
        )
    return None, name
