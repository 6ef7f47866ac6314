"""Autocast of CUDA on tensors that are on the CPU: which operators compute in which type, for jobs/memory.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class CudaCasts(TorchFunctionMode):
    """Where autocast does otherwise on CUDA than on a CPU, which is asked here: poolings stay in the type that they
    are given there, and norms, softmax, sums and interpolation compute in float32.
    """

    _kept = re.compile(r"_?(adaptive_)?(max|avg)_pool[123]d")
    _float = frozenset(
        {"group_norm", "interpolate", "layer_norm", "log_softmax", "norm", "pow", "prod", "softmax", "sum"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if self._kept.fullmatch(name):
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            if name in self._float:
                args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **kwargs)


def with_cuda_casts(forward: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with CudaCasts():
            return forward(*args, **kwargs)

    return inside


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
