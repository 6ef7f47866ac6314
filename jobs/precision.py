"""The numbers that a run computes in: autocast, TF32, and for fp16 a loss scaler whose state is in each checkpoint.

This is the one place that spells autocast: training, validation, `hpc evaluate` and `hpc predict` ask here.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from hpc.errors import UserError
from hpc.training import Train

_LOG = logging.getLogger(__name__)
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_REMEMBERED = 64
"""Steps whose scale is known until they are logged."""
SCALE_TAG = "step/loss_scale"


class Fault(IntEnum):
    """What is wrong with a step on a rank; of all ranks the highest counts."""

    NONE = 0
    OVERFLOW = 1
    """The scaled gradients do not fit into fp16: a smaller scale is tried."""
    NOT_FINITE = 2


class Scaler:
    """The loss scale of fp16: halved by each overflow, doubled after `interval` steps without (Micikevicius et al.,
    arXiv 1710.03740, section 3.2). Its sequence is that of torch.amp.GradScaler, but that it never falls below 1.
    """

    START, _MOST = 2.0**16, 2.0**127

    def __init__(self, start: float = START, interval: int = 2000) -> None:
        self.scale, self._interval = start, interval
        self._good = 0
        self.overflows = 0
        """Steps skipped so far."""

    def update(self, overflow: bool) -> None:
        """After a step."""
        if overflow:
            self.scale, self._good, self.overflows = max(self.scale / 2, 1.0), 0, self.overflows + 1
            return
        self._good += 1
        if self._good == self._interval:
            self.scale, self._good = min(self.scale * 2, self._MOST), 0

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"scale": self.scale, "good": self._good, "overflows": self.overflows}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self._good = float(state["scale"]), int(state["good"])
        self.overflows = int(state["overflows"])


class Precision:
    """`train.precision` on a device. Sets torch's use of TF32, which is the whole process's.

    torch's own default computes convolutions of fp32 in TF32 on CUDA; here fp32 is fp32, and tf32 is for both
    convolutions and matrix products. Parameters, gradients and optimizer stay fp32 in all of them.
    """

    def __init__(self, settings: Train, device: torch.device) -> None:
        """Raises UserError for `auto` that no probing has replaced."""
        if settings.precision == "auto":
            raise UserError("train.precision auto: nothing was found for this run yet; write fp32, tf32, bf16 or fp16")
        self.name, self._device = settings.precision, device
        self.dtype = _HALF.get(self.name)
        """Of the forward pass under autocast; None: as the tensors are."""
        self.scaler = Scaler() if self.name == "fp16" else None
        self._shown: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        if device.type == "cuda":
            _use_tf32(self.name == "tf32")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    # A step: scale the loss, unscale the gradients, judge them, update.

    def scale(self, loss: Tensor) -> Tensor:
        """What the backward pass begins with."""
        return loss * self.scaler.scale if self.scaler else loss

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor], step: int | None = None) -> None:
        """Gradients, summed over parts and ranks, as without a scale; before their norm is taken."""
        if self.scaler is None:
            return
        if step is not None:
            self._shown.append((step, self.scaler.scale))
        if gradients:
            torch._foreach_mul_(list(gradients), 1 / self.scaler.scale)

    def fault(self, loss: float, norm: float) -> Fault:
        """Of this rank's loss and the norm of the unscaled gradients. At scale 1 an overflow is no scale's matter."""
        if math.isfinite(loss) and math.isfinite(norm):
            return Fault.NONE
        scaled = self.scaler is not None and self.scaler.scale > 1
        return Fault.OVERFLOW if scaled and math.isfinite(loss) else Fault.NOT_FINITE

    def update(self, overflow: bool) -> None:
        """After a step that counts, or one that was skipped for an overflow on any rank."""
        if self.scaler:
            self.scaler.update(overflow)

    def shown(self, step: int) -> dict[str, float]:
        """What TensorBoard gets of a step: the scale that it was computed with."""
        return next(({SCALE_TAG: scale} for at, scale in reversed(self._shown) if at == step), {})

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return self.scaler.state() if self.scaler else {}

    def load(self, state: dict[str, Any]) -> None:
        """As it was; {} (another precision, or none before) leaves a new one."""
        if self.scaler and state:
            self.scaler.load(state)


def emulates_bf16(device: torch.device) -> bool:
    """Whether this is a CPU without instructions for bf16: its convolutions then take a hundred times as long."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def say_idle(settings: Train, device: torch.device) -> None:
    """Tell what of these settings takes no effect on this device, once at the start of a run."""
    if settings.precision == "tf32" and device.type != "cuda":
        _LOG.info("train.precision tf32 has no effect on %s, which computes in fp32; bf16 is for both", device)
    if settings.precision == "fp16" and device.type == "cpu":
        _LOG.info("train.precision fp16 is emulated on many CPUs, and slow there; bf16 needs no loss scale")
    if settings.precision == "bf16" and emulates_bf16(device):
        _LOG.warning("train.precision bf16 is emulated on this CPU, and very slow; use train.precision=fp32 here")


def _use_tf32(on: bool) -> None:
    """By the flags that set torch's newer ones (fp32_precision) too: those alone leave these unreadable."""
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
