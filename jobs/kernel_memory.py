"""Memory that torch's own convolutions on a CPU take for themselves: the input unfolded, a copy for each kernel place.

They are taken where oneDNN's cannot be: in bf16 on a CPU without instructions for it. The CPU asked is this machine's.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["columns"]

_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
_BATCHED = ("Slow2d", "Slow3d")
_BY_SAMPLE = ("SlowDilated2d", "SlowDilated3d", "SlowTranspose2d", "SlowTranspose3d")


def columns(func: Any, args: Any) -> int:
    """Bytes that an operator has beside what it is given and returns, on this machine's CPU; 0 for most."""
    if func is _FORWARD:
        inputs, weight, options = args[0], args[1], args[3:9]
    elif func is _BACKWARD:
        inputs, weight, options = args[1], args[2], args[4:10]
    else:
        return 0
    backend = torch._C._select_conv_backend(inputs, weight, None, *options).name
    if backend not in (*_BATCHED, *_BY_SAMPLE) or math.prod(weight.shape[2:]) == 1:
        return 0
    stride, padding, dilation, transposed, _, groups = options
    if transposed:
        channels, places = groups * weight.shape[1], math.prod(inputs.shape[2:])
    else:
        channels, places = inputs.shape[1], 1
        for size, kernel, *how in zip(inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
            places *= (size + 2 * how[1] - how[2] * (kernel - 1) - 1) // how[0] + 1
    batched = backend in _BATCHED or (backend == "SlowTranspose2d" and func is _FORWARD)
    samples = inputs.shape[0] if batched else 1
    return int(samples * channels * math.prod(weight.shape[2:]) * places * inputs.element_size())
