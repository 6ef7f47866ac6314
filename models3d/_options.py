"""Options of models: their names, and checks that give the value in one form or say in a ValueError what would do."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

__all__ = [
    "Triple",
    "along_axes",
    "check_input",
    "check_names",
    "fraction",
    "nearest",
    "on_device",
    "one_of",
    "option_names",
    "per_axis",
    "whole",
    "wholes",
]

Triple = int | Sequence[int]
_ORDER = {2: "H, W", 3: "D, H, W"}


def whole(name: str, value: object, least: int = 1) -> int:
    """`value` as an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")
    return value


def wholes(name: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple of positive whole numbers; one number is a tuple of one."""
    if isinstance(value, int):
        return (whole(name, value),)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; give a list of whole numbers, e.g. [3, 6]")
    return tuple(whole(name, item) for item in value)


def per_axis(name: str, value: object) -> tuple[int, int, int]:
    """`value` as three whole numbers, one per axis (D, H, W); one number serves all three."""
    d, h, w = along_axes(name, value, 3)
    return d, h, w


def along_axes(name: str, value: object, axes: int) -> tuple[int, ...]:
    """`value` as a whole number for each of 2 or 3 axes; one number serves all."""
    numbers = wholes(name, value)
    if isinstance(value, int):
        numbers *= axes
    if len(numbers) != axes:
        count = {2: "two", 3: "three"}[axes]
        raise ValueError(f"{name} is {value!r}; give one whole number or {count}, in the order {_ORDER[axes]}")
    return numbers


def one_of(name: str, value: str, good: Sequence[str]) -> str:
    """`value`, which must be one of `good`."""
    if value not in good:
        raise ValueError(f"{name} is {value!r}; give {' or '.join(good)}")
    return value


def fraction(name: str, value: object) -> float:
    """`value` as a probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; give a number from 0 up to, but not including, 1")
    return float(value)


def check_input(model: str, x: torch.Tensor, channels: int, axes: int = 3) -> None:
    """Raise ValueError unless `x` is (B, channels, D, H, W), or (B, channels, H, W) with two axes."""
    if x.ndim != axes + 2 or x.shape[1] != channels:
        what = {2: "images", 3: "volumes"}[axes]
        raise ValueError(
            f"{model} takes {what} of shape (batch, {channels}, {_ORDER[axes]}), got {tuple(x.shape)}; "
            f"the number of channels is set by in_channels"
        )


def on_device(build: Callable[[], nn.Module]) -> nn.Module:
    """build() on torch's default device; where that is meta and a constructor needs values, for real and then there."""
    if torch.get_default_device().type != "meta":
        return build()
    try:
        return build()
    except (NotImplementedError, RuntimeError):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return build().to("meta")


def option_names(function: Callable[..., Any]) -> set[str]:
    """Parameters of a class or function that a model's options can set."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind in named} - {"in_channels", "num_classes"}


def check_names(model: str, options: Iterable[str], good: set[str]) -> None:
    """Raise ValueError for the first option that is not in `good`."""
    for option in options:
        if option not in good:
            names = ", ".join(sorted(good)) or "none"
            raise ValueError(f"{model} has no option {option!r}{nearest(option, good)}; its options: {names}")


def nearest(word: str, good: Iterable[str]) -> str:
    """'; nearest: a, b' for a message, or nothing."""
    close = get_close_matches(word, list(good), n=3)
    return f"; nearest: {', '.join(close)}" if close else ""
