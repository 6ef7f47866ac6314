"""Layers of a model by the names of their parameters: what a stage freezes, and the rate of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hpc.errors import UserError, nearest
from hpc.optimisation import Stage

_HEADS = ("classifier", "fc", "head", "heads")
"""What classifiers are called at the top of a model (torchvision, timm, MONAI)."""
_ENCODER, _SEGMENTATION_HEAD = "encoder", "segmentation_head"
"""Of segmentation_models_pytorch."""


@dataclass(frozen=True)
class Layers:
    """What a stage trains, and how fast."""

    rates: dict[str, float]
    """The highest rate of each trained parameter, in the model's order."""
    norms: Sequence[nn.Module]
    """Frozen layers with running statistics: they stay in eval mode, and their statistics as they are."""

    def freeze(self, model: nn.Module) -> None:
        """Only what has a rate is trained from now on."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.rates)
            parameter.grad = None


def resolve(stage: Stage, where: str, model: nn.Module, lr: float, trained: Iterable[str]) -> Layers:
    """The layers of a stage. `where`: its place in the file; `lr`: of the run; `trained`: all that the model trains.

    Raises UserError for names that the model does not have, rates without effect, and a backbone that nobody can tell.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted = set(trained)
    frozen = _frozen(stage, where, model, names)
    found = dict.fromkeys((name for name in names if name in wanted and not frozen(name)), stage.lr or lr)
    if not found:
        raise UserError(f"{where}.freeze: {_shown(stage.freeze)} leaves nothing to train: freeze less")
    if stage.backbone_lr is not None:
        heads = head_of(model, f"{where}.backbone_lr")
        found |= {name: stage.backbone_lr for name in found if not _within(name, heads)}
    for prefix in sorted(stage.layer_lrs, key=len):
        _check_prefix(prefix, f"{where}.layer_lrs", names)
        inside = [name for name in found if _within(name, [prefix])]
        if not inside:
            raise UserError(f"{where}.layer_lrs: {prefix} has no effect, these layers are frozen: leave it out")
        found |= dict.fromkeys(inside, stage.layer_lrs[prefix])
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and frozen(f"{name}.running_mean")
    ]
    return Layers(found, norms)


def _frozen(stage: Stage, where: str, model: nn.Module, names: Sequence[str]) -> Callable[[str], bool]:
    if stage.freeze == "backbone":
        heads = head_of(model, f"{where}.freeze")
        return lambda name: not _within(name, heads)
    for prefix in stage.freeze:
        _check_prefix(prefix, f"{where}.freeze", names)
    return lambda name: _within(name, stage.freeze)


def _within(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _check_prefix(prefix: str, where: str, names: Sequence[str]) -> None:
    if any(_within(name, [prefix]) for name in names):
        return
    depth = prefix.count(".") + 1
    good = dict.fromkeys(".".join(name.split(".")[:deep]) for name in names for deep in range(1, depth + 1))
    raise UserError(f"{where}: the model has no layer {prefix!r}; {nearest(prefix, good)}")


def head_of(model: nn.Module, where: str = "backbone") -> list[str]:
    """Names of the layers that make the classes' scores; all others are the backbone.

    In this order: what `get_classifier()` of a timm model gives; all but the encoder of a model with encoder and
    segmentation head (smp); the one layer called classifier, fc, head or heads; the last layer, if it is linear.
    Raises UserError where none of these is there.
    """
    ways = (_given_head, _beside_encoder, _named_head, _last_layer)
    if found := next(filter(None, (way(model) for way in ways)), None):
        return found
    children = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
    raise UserError(
        f"{where}: which layers of {type(model).__name__} are the backbone cannot be told: name them by freeze or "
        f"layer_lrs; it has {children}"
    )


def _given_head(model: nn.Module) -> list[str]:
    if not callable(given := getattr(model, "get_classifier", None)):
        return []
    found = given()
    heads = found if isinstance(found, tuple | list) else [found]
    return [name for name, module in model.named_modules() if any(module is h for h in heads) and _holds(module)]


def _beside_encoder(model: nn.Module) -> list[str]:
    children = [name for name, module in model.named_children() if _holds(module)]
    return [name for name in children if name != _ENCODER] if {_ENCODER, _SEGMENTATION_HEAD} <= {*children} else []


def _named_head(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_children() if name in _HEADS and _holds(module)]
    return found if len(found) == 1 else []


def _last_layer(model: nn.Module) -> list[str]:
    layers = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return layers[-1:] if layers and isinstance(model.get_submodule(layers[-1]), nn.Linear) else []


def _holds(module: nn.Module) -> bool:
    return any(isinstance(parameter, Tensor) for parameter in module.parameters())


def _shown(freeze: str | Sequence[str]) -> str:
    return freeze if isinstance(freeze, str) else ", ".join(freeze)
