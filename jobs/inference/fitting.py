"""Whether a window that is asked for can be: its memory from shapes alone, before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpc.errors import UserError
from hpc.sampler import Cgroup
from jobs.inference.members import Manner, Member
from jobs.memory import Step, estimate


def check_window(members: Sequence[Member], manner: Manner) -> None:
    """Raises UserError where one --window surely takes more than the device has; what cannot be told is left."""
    for member in members if manner.window is not None else ():
        have, peak = device_memory(member.device), window_memory(member, manner.window or ())
        if peak > have:
            told, size = ",".join(map(str, manner.window or ())), member.trained_size
            usual = f"; it was trained on {','.join(map(str, size))}" if size else ""
            raise UserError(
                f"--window {told} takes {peak / 1e9:,.1f} GB in {member.run.name}, and {member.device} has "
                f"{have / 1e9:,.1f}: name a smaller one{usual}"
            )


def window_memory(member: Member, window: Sequence[int]) -> int:
    """Bytes of weights, one window and its forward pass; of the window alone where shapes tell nothing of the rest."""
    alone = 4 * member.facts.channels * math.prod(window)
    step = Step(precision=member.experiment.train.precision, device=member.device.type, loss=_none, targets=torch.zeros)
    try:
        return max(alone, estimate(_Asked(member.model), (1, member.facts.channels, *window), step).peak)
    except (RuntimeError, ValueError):  # of a window that it does not take the network itself tells more
        return alone


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine, or those that the SLURM job may take of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Cgroup.of_job()
        limit = group.limit_gb() if group else None
    except OSError:
        limit = None
    return whole if limit is None else min(whole, int(limit * 1e9))


def _none(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that costs nothing."""
    return torch.zeros((), requires_grad=True)


class _Asked(nn.Module):
    """A network in evaluation mode, whatever mode it is set to, and without gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _Asked:
        return super().train(False)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = self.model(inputs)
        return outputs
