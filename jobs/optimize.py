"""Optimizers: torch's and timm's, over groups of parameters by rate and decay.

Their state is in the checkpoint, bit by bit, as tensors and JSON: what cannot be kept so is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import Optimizer as TorchOptimizer

from hpc.errors import UserError, nearest
from hpc.optimisation import Optimizer

_REFUSED = {
    "adahessian": "needs second derivatives, which no step here computes",
    "adafactorbv": "keeps a type in its state, which no checkpoint holds; use timm:adafactor",
    "cadafactorbv": "keeps a type in its state, which no checkpoint holds; use timm:cadafactor",
    "bnb": "needs bitsandbytes and a GPU; use the optimizer of the same name without it",
    "fused": "needs NVIDIA's APEX; use the optimizer of the same name without it",
    "kron": "draws random numbers that differ between ranks",
}
"""By the beginning of the name in timm.optim."""
_OURS = {"params", "lr", "weight_decay"}
"""Options of a timm optimizer that have a place of their own in the file."""
_NO_OPTIONS = {"capturable", "differentiable", "maximize"}
"""For CUDA graphs (an error at the first step elsewhere), for gradients of steps, and to make the loss large."""


def build_optimizer(settings: Optimizer, model: nn.Module, rates: Mapping[str, float] | None = None) -> TorchOptimizer:
    """An optimizer with one group per rate and decay. `rates`: the highest of each parameter that is trained, by name.

    None: all that the model trains, at settings.lr. Biases and normalisation weights (one dimension) are not decayed.
    Raises UserError.
    """
    if rates is None:
        rates = {name: settings.lr for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = _groups(model, rates, settings.weight_decay)
    if settings.timm is not None:
        return _timm(settings, settings.timm, groups)
    if settings.name == "sgd":
        nesterov = settings.momentum > 0
        return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
    kind = AdamW if settings.name == "adamw" else Adam
    return kind(groups, lr=settings.lr, betas=settings.betas)


def _groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    groups = []
    for rate in dict.fromkeys(rates.values()):
        chosen = [parameters[name] for name, own in rates.items() if own == rate]
        matrices, others = [p for p in chosen if p.ndim > 1], [p for p in chosen if p.ndim <= 1]
        groups += [(matrices, rate, weight_decay), (others, rate, 0.0)]
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in groups if params]


def timm_optimizers() -> list[str]:
    """Names in timm.optim whose state a checkpoint keeps. Raises UserError without timm."""
    return [name for name in _library().list_optimizers() if not name.startswith(tuple(_REFUSED))]


def _library() -> Any:
    try:
        import timm.optim
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed here: pip install {error.name}, or use adamw or sgd") from None
    return timm.optim


def _timm(settings: Optimizer, name: str, groups: list[dict[str, Any]]) -> TorchOptimizer:
    library, good = _library(), timm_optimizers()
    if reason := next((why for start, why in _REFUSED.items() if name.startswith(start)), None):
        raise UserError(f"train.optimizer.name {settings.name}: {reason}")
    if name not in good:
        raise UserError(f"train.optimizer.name {settings.name}: timm.optim has no such; {nearest(name, good)}")
    valid = _options(library.get_optimizer_class(name, bind_defaults=False))
    for option in settings.options:
        if option not in valid:
            raise UserError(f"train.optimizer.options: {settings.name} has no {option!r}; {nearest(option, valid)}")
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay, **settings.options}
    try:
        optimizer: TorchOptimizer = library.create_optimizer_v2(groups, name, **options)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(f"train.optimizer: {settings.name} refuses {settings.options}: {error}") from None
    return optimizer


def _options(kind: Callable[..., TorchOptimizer]) -> set[str]:
    return {*inspect.signature(kind).parameters} - _OURS - _NO_OPTIONS
