"""Weights that come from elsewhere: safetensors, or a .pt file's tensors; code in a file is never executed.

`torch.load(weights_only=True)` and no fallback; torch before 2.10 could be made to write outside its memory by such a
file (CVE-2026-24747), and is refused for them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hpc.errors import UserError, nearest
from models3d import Pretrained

_TENSORS, _PICKLED = (".safetensors",), (".pt", ".pth", ".bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
"""Of DistributedDataParallel and of torch.compile."""
_COUNTER = "num_batches_tracked"
_SAFE_TORCH = "2.10"
_SHOWN = 3
_DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)


def load(path: Path, model: nn.Module, match: str = "name") -> list[str]:
    """Fill the model with a file's weights; lines that tell what was loaded and what was left as it was.

    The last layer may have another number of classes: it keeps its own values. All else must fit by name and shape;
    with match "order" by place, shape and the last word of the name (weight, bias, running_mean, ...).
    Raises UserError with one line; then the model is as it was.
    """
    weights, lines = _unwrapped(path, _read(path))
    if match == "order":
        weights = _in_order(path, model.state_dict(), weights)
        lines.append("matched by order, not by name")
    return _fill(path, model, weights, lines, _other_head(model, model.state_dict(), weights))


def load_pretrained(found: Pretrained, model: nn.Module) -> list[str]:
    """As `load`, of weights that a library has read: its heads may differ, and a decoder keeps its own values."""
    own, weights = model.state_dict(), dict(found.weights)
    heads = [name for name in own if name.rpartition(".")[0] in found.heads and name in weights]
    other = any(own[name].shape != weights[name].shape for name in heads)
    if not found.partial:
        return _fill(found.file, model, weights, [], heads if other else [])
    rest = [name for name in own if name not in weights]
    lines = [f"{len(rest)} entries that the file has not keep their own values ({_some(rest)})"]
    return _fill(found.file, model, weights | {name: own[name] for name in rest}, lines, rest)


def _in_order(path: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the model's names, one after the other. Raises UserError where places do not fit."""
    if path.suffix in _TENSORS:
        raise UserError(
            f"{path}: safetensors sorts its entries: model.weights_match: order needs a .pt that keeps theirs"
        )
    there = list(weights)
    counted = any(name.endswith(_COUNTER) for name in there)
    names = [name for name in own if counted or not name.endswith(_COUNTER)]
    if len(names) != len(there):
        raise UserError(f"{path} has {len(there)} entries, the model {len(names)}: they cannot be matched by order")
    for name, other in zip(names, there, strict=True):
        same_word = name.rpartition(".")[2] == other.rpartition(".")[2]
        if not same_word or own[name].dim() != weights[other].dim():
            raise UserError(
                f"{path}: {other} ({_shape(weights[other])}) stands where the model has {name} ({_shape(own[name])}): "
                f"they cannot be matched by order"
            )
    return {name: weights[other] for name, other in zip(names, there, strict=True)}


def _fill(
    path: Path, model: nn.Module, weights: Mapping[str, Tensor], lines: list[str], left: Sequence[str]
) -> list[str]:
    """All entries but `left`, if they fit. Raises UserError."""
    own = model.state_dict()
    counters = [name for name in own if name.endswith(_COUNTER) and name not in weights]
    _compare(path, own, weights, {*left, *counters})
    fitting = {name: value for name, value in weights.items() if name not in left}
    cast = {f"{value.dtype} to {own[name].dtype}" for name, value in fitting.items() if value.dtype != own[name].dtype}
    model.load_state_dict(fitting, strict=False)
    lines = [f"{path.name}: {len(fitting)} of {len(own)} entries loaded", *lines]
    lines += [f"cast: {', '.join(sorted(cast)).replace('torch.', '')}"] if cast else []
    other = [name for name in left if own[name].shape != weights[name].shape]
    lines += [f"{name} is {_shape(weights[name])} there and {_shape(own[name])} here: left as it was" for name in other]
    return lines + ([f"{len(counters)} counters of batches are not in the file: left as they were"] if counters else [])


def _read(path: Path) -> Any:
    """What the file holds. Raises UserError."""
    suffixes = (*_TENSORS, *_PICKLED)
    kinds = ", ".join(suffixes)
    if path.suffix not in suffixes and path.is_file():
        raise UserError(f"{path}: weights are read from {kinds}, not from {path.suffix or 'files without a suffix'}")
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        files = [item.name for item in folder.iterdir() if item.suffix in suffixes] if folder.is_dir() else []
        there = nearest(path.name, files) if files else f"there is no file with weights ({kinds})"
        raise UserError(f"{path} {what}; in {folder}: {there}")
    try:
        if path.suffix in _TENSORS:
            return safetensors.torch.load_file(path)
        if torch.__version__ < _SAFE_TORCH:  # compared as versions
            raise UserError(
                f"{path}: torch {torch.__version__} is not safe with such files, "
                f"{_SAFE_TORCH} and newer are: update torch, or save the weights as safetensors"
            )
        with warnings.catch_warnings(action="ignore"):  # of torch about formats that it goes on to refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, safetensors.SafetensorError, OSError, *_DAMAGE) as error:
        if "weights_only" in str(error) or isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} holds more than tensors ({_found(error)}) and could run code, so it is not loaded: where it "
                f"was made, save model.state_dict() alone, best by safetensors.torch.save_file"
            ) from None
        raise UserError(
            f"{path} is damaged, incomplete or no such file ({_first_line(error)}): copy it again, and compare its size"
        ) from None


def _found(error: Exception) -> str:
    """What torch met, without its advice to load the file all the same."""
    text = str(error)
    for start in ("GLOBAL ", "Unsupported class "):
        if start in text:
            return text.partition(start)[2].split()[0].strip(".,`'")
    return next((kind for kind in ("TorchScript", ".tar") if kind in text), "a program")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _unwrapped(path: Path, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict out of what it is usually wrapped in. Raises UserError."""
    lines = []
    while isinstance(content, Mapping) and (
        inner := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    ):
        others = [str(key) for key in content if key != inner]
        lines.append(f"taken from {inner!r}" + (f"; not read: {_some(others)}" if others else ""))
        content = content[inner]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict: save model.state_dict() there")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = ", ".join(repr(key) for key in _WRAPPERS)
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__}, and a state_dict holds tensors by name: save "
                f"model.state_dict() there, alone or under {found}"
            )
    weights = {str(name): value for name, value in content.items()}
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
            lines.append(f"names without their {prefix!r}")
    return weights, lines


def _other_head(model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Entries of the model's last layer when the file's differ in the number of classes alone."""
    last = next((name.rpartition(".")[0] for name, _ in reversed(list(model.named_parameters()))), "")
    names = [name for name in own if name.rpartition(".")[0] == last and name in weights]
    other = [name for name in names if own[name].shape != weights[name].shape]
    same_rest = all(own[name].shape[1:] == weights[name].shape[1:] for name in other)
    return other if same_rest and all(own[name].dim() for name in other) else []


def _compare(path: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], left: set[str]) -> None:
    """Raises UserError for what does not fit, all of it in one line."""
    faults = []
    if missing := [name for name in own if name not in weights and name not in left]:
        faults.append(f"{len(missing)} of the model's {len(own)} entries are missing ({_some(missing)})")
    if unknown := [name for name in weights if name not in own]:
        faults.append(f"{len(unknown)} are not the model's ({_some(unknown)})")
    both = [name for name in own if name in weights and name not in left]
    if shapes := [name for name in both if own[name].shape != weights[name].shape]:
        texts = [f"{name} is {_shape(weights[name])}, not {_shape(own[name])}" for name in shapes]
        faults.append(f"{len(shapes)} have other shapes ({_some(texts)})")
    if kinds := [name for name in both if not _same_kind(weights[name], own[name])]:
        faults.append(f"{len(kinds)} are of another kind ({_some([f'{n} {weights[n].dtype}' for n in kinds])})")
    if faults:
        raise UserError(
            f"{path} does not fit the model: {'; '.join(faults)}. Set model.name and its options as they were when "
            f"the file was made ('hpc models' lists them), or leave model.weights out"
        )
    if odd := [name for name in both if not bool(torch.isfinite(weights[name]).all())]:
        raise UserError(
            f"{path}: {len(odd)} entries hold NaN or Inf ({_some(odd)}): take weights from before that, or leave "
            f"model.weights out"
        )


def _same_kind(there: Tensor, here: Tensor) -> bool:
    """Numbers that can be copied without losing what they are."""
    plain = there.layout == torch.strided and not there.is_quantized
    return plain and there.is_floating_point() == here.is_floating_point() and there.is_complex() == here.is_complex()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
