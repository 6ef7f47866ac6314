"""A user's own network (`model.name=file:net.py:Net`) that paces itself, and misbehaves where its options say so."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from hpc.allocation import Allocation
from models3d import create_model

HERE = Path(__file__).parent


class Net(nn.Module):
    """A small ResNet; its weights and gradients are the same whatever the options are.

    Args:
        pause: seconds that each training step sleeps, so that signals find it at work and it costs no processor.
        linger: seconds that an attempt stays in its first step, in building the model and in the first validation
            batch; a file GENERATION-PHASE beside this one says that it is there.
        late: seconds by rank that a process takes to leave, once it has decided to.
        crash_at, hog_at: the step at which it raises, each time; at which its last rank takes 1 GB, on the first
            attempt; 0 for never.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        pause: float = 0.0,
        linger: float = 0.0,
        late: tuple[float, ...] = (),
        crash_at: int = 0,
        hog_at: int = 0,
    ) -> None:
        super().__init__()
        small = {"width": 4, "layers": 1, "downsample": [], "stem_stride": 2, "dropout": 0.3}
        self.body = create_model("resnet3d_tiny", in_channels=in_channels, num_classes=num_classes, **small)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.pause, self.linger, self.crash_at, self.hog_at = pause, linger, crash_at, hog_at
        self.place = Allocation.current()
        self.been: set[str] = set()
        if late:
            _leave_late(late[self.place.rank])
        if torch.get_default_device().type != "meta":  # the login node's look at it
            self._stay("build")

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return self.body(x)
        self._stay("step" if self.training else "validation")
        if self.training:
            self.steps += 1
            self._misbehave(int(self.steps))
            time.sleep(self.pause)
        return self.body(x)

    def _stay(self, phase: str) -> None:
        if self.linger and phase not in self.been:
            self.been.add(phase)
            (HERE / f"{self.place.generation}-{phase}").touch()
            time.sleep(self.linger)

    def _misbehave(self, step: int) -> None:
        if step == self.crash_at:
            raise RuntimeError(f"the network of the fault rows raises at step {step}")
        if step == self.hog_at and self.place.generation == 1 and self.place.rank == self.place.world_size - 1:
            bytearray(os.urandom(1 << 20)) * 1024


class Maps(nn.Module):
    """A score for each class and voxel of a picture; `pause` as of Net."""

    def __init__(self, in_channels: int, num_classes: int, pause: float = 0.0) -> None:
        super().__init__()
        first, then = nn.Conv2d(in_channels, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), then, nn.Dropout(0.1), nn.ReLU())
        self.head = nn.Conv2d(6, num_classes, 1)
        self.pause = pause

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta:
            time.sleep(self.pause)
        return self.head(self.body(x))


def _leave_late(seconds: float) -> None:
    leave = os._exit

    def late(code: int) -> None:
        time.sleep(seconds)
        leave(code)

    os._exit = late  # type: ignore[assignment]
