"""Random changes of a batch, on its device: a function of (seed, epoch, sample), in whatever batch or rank it is."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from datasets.order import Stream, random_bits, uniforms

MAX_AXES = 3


@dataclass(frozen=True)
class Augment:
    """flip: spatial axes (0 = x, 1 = y, 2 = z), each mirrored with probability 1/2, label maps too.

    scale, shift: inputs * (1 + a) + b, with a in +-scale and b in +-shift drawn for each sample. noise: Gaussian, its
    standard deviation drawn from 0 to noise. All in units of the normalised intensity. ValueError for bad values.
    """

    flip: tuple[int, ...] = ()
    scale: float = 0.0
    shift: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "flip", tuple(self.flip))
        if set(self.flip) - set(range(MAX_AXES)) or len(set(self.flip)) < len(self.flip):
            raise ValueError(f"augment: flip {list(self.flip)} must name spatial axes once each, from 0, 1 and 2")
        for name in ("scale", "shift", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"augment: {name} {getattr(self, name)} must be 0 (off) or more")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """From the `augment:` of an experiment; ValueError names an unknown key and the nearest valid one."""
        names = [entry.name for entry in fields(cls)]
        for key in options:
            if key not in names:
                close = get_close_matches(str(key), names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(f"augment: {key!r} is unknown; {hint}it takes {', '.join(names)}")
        for key in ("scale", "shift", "noise"):
            if not isinstance(options.get(key, 0.0), (int, float)):
                raise ValueError(f"augment: {key} {options[key]!r} is not a number; write for example {key}: 0.1")
        if not isinstance(options.get("flip", ()), (list, tuple)):
            raise ValueError(f"augment: flip {options['flip']!r} is not a list of axes; write for example flip: [0]")
        return cls(**options)

    def __call__(
        self, inputs: Tensor, samples: np.ndarray[Any, Any], seed: int, epoch: int, maps: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """inputs (B, C, *spatial), float, changed in place or replaced; maps (B, *spatial) follow the flips."""
        if len(samples) == 0:
            return inputs, maps
        draws = np.stack([uniforms(seed, epoch, Stream.AUGMENT, MAX_AXES + 3, int(sample)) for sample in samples])
        inputs, maps = self._flip(inputs, maps, draws[:, :MAX_AXES] < 0.5)
        gain, bias = 2 * draws[:, MAX_AXES : MAX_AXES + 2].T - 1
        inputs = inputs.mul_(_per_sample(1 + self.scale * gain, inputs)).add_(_per_sample(self.shift * bias, inputs))
        if self.noise > 0:
            self._add_noise(inputs, samples, seed, epoch, self.noise * draws[:, MAX_AXES + 2])
        return inputs, maps

    def _flip(self, inputs: Tensor, maps: Tensor | None, flips: Any) -> tuple[Tensor, Tensor | None]:
        for axis in self.flip:
            chosen = torch.from_numpy(np.flatnonzero(flips[:, axis])).to(inputs.device)
            if len(chosen) == 0:
                continue
            inputs[chosen] = inputs[chosen].flip(axis + 2)
            if maps is not None:
                maps[chosen] = maps[chosen].flip(axis + 1)
        return inputs, maps

    def _add_noise(self, inputs: Tensor, samples: Any, seed: int, epoch: int, deviations: Any) -> None:
        generator = torch.Generator(inputs.device)
        for row, sample in enumerate(samples.tolist()):
            # 63 bits: manual_seed takes a signed number
            generator.manual_seed(int(random_bits(seed, epoch, Stream.NOISE, 1, sample)[0] >> np.uint64(1)))
            drawn = torch.randn(inputs.shape[1:], generator=generator, device=inputs.device, dtype=inputs.dtype)
            inputs[row].add_(drawn.mul_(float(deviations[row])))


def _per_sample(values: Any, inputs: Tensor) -> Tensor:
    """(B,) to a tensor that broadcasts over (B, C, *spatial)."""
    column = torch.as_tensor(values, dtype=inputs.dtype, device=inputs.device)
    return column.reshape(-1, *[1] * (inputs.ndim - 1))
