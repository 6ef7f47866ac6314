"""Changes of intensity: filters, gamma, colour, levels, noise and holes, of float32 batches (n, C, *shape).

Gamma, contrast and brightness refer to a sample's own least, greatest and mean intensity, so they mean the same
whatever the normalisation: of each channel in volumes (channels may be modalities), of all in images (colours stay).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from datasets.augment.chance import Chance, Floats, cosine, sine
from datasets.augment.products import product
from datasets.order import Stream, random_bits

SERIAL = 16384
"""elements that torch leaves to one thread: at the end of a thread's share its pow rounds in another way"""
LUMA = np.array([0.213, 0.715, 0.072])
HUE = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
"""the matrices of saturate and hueRotate in W3C, Filter Effects Module Level 1"""


def filtered(inputs: Tensor, chance: Chance) -> Tensor:
    """Blur, then low resolution, to a new tensor.

    Both are linear along each axis, so an axis costs one product with a (size, size) matrix (TF32, where a script has
    switched it on for products, rounds the result to 10 bits).
    """
    sigmas, factors = chance.within("blur", 0.0), chance.within("low_resolution", 1.0)
    shape, out = inputs.shape, inputs
    for size in shape[2:]:
        if size == 1:
            continue
        matrix = coarsened(blurring(size, sigmas, inputs.device), factors)
        # (n * C, size, rest): this axis goes to the end, so that after all of them the order is the old one
        columns = out.reshape(shape[0] * shape[1], size, -1).transpose(1, 2)
        out = product(columns, matrix.transpose(1, 2).repeat_interleave(shape[1], dim=0))
    return out.reshape(shape)


def blurring(size: int, sigmas: Floats, device: torch.device) -> Tensor:
    """(n, size, size) Gaussian filters cut at 4 sigma, edge voxels repeated: scipy's gaussian_filter1d, "nearest"."""
    radii = (4 * sigmas + 0.5).astype(np.int64)
    reach = np.arange(-radii.max(), radii.max() + 1)
    bell = np.exp(-0.5 * (reach / np.maximum(sigmas, 1e-6)[:, None]) ** 2) * (abs(reach) <= radii[:, None])
    weights = torch.from_numpy((bell / bell.sum(1, keepdims=True)).astype(np.float32)).to(device)
    matrix = torch.zeros(len(sigmas), size, size, device=device)
    places = torch.arange(size, device=device)
    for step, weight in zip(reach.tolist(), weights.T, strict=True):
        matrix[:, places, (places + step).clamp_(0, size - 1)] += weight[:, None]
    return matrix


def coarsened(matrix: Tensor, factors: Floats) -> Tensor:
    """(n, size, size), then only every factor-th voxel (nearest to a coarse one), linear interpolation between."""
    size = matrix.shape[1]
    coarse = np.maximum(np.rint(size / factors), 1.0)[:, None]
    place = np.clip((np.arange(size) + 0.5) * coarse / size - 0.5, 0, coarse - 1)
    left = np.floor(place)
    part = torch.from_numpy((place - left).astype(np.float32)).to(matrix.device)[:, :, None]
    low, high = (
        torch.from_numpy(np.floor((index + 0.5) * size / coarse).astype(np.int64)).to(matrix.device)[:, :, None]
        for index in (left, np.minimum(left + 1, coarse - 1))
    )
    return torch.take_along_dim(matrix, low, 1) * (1 - part) + torch.take_along_dim(matrix, high, 1) * part


def apply_gamma(inputs: Tensor, chance: Chance) -> Tensor:
    """least + range * ((x - least) / range) ** gamma, to a new tensor."""
    least, most = _joined(inputs, inputs.flatten(2).amin(2), "amin"), _joined(inputs, inputs.flatten(2).amax(2), "amax")
    width = most - least
    width = torch.where(width > 0, width, torch.ones_like(width))
    curve = inputs.sub(least).div_(width).contiguous()
    gammas = chance.within("gamma", 1.0, log=True)
    if inputs.device.type == "cpu":
        for sample, gamma in zip(curve, gammas.tolist(), strict=True):
            for piece in sample.view(-1).split(SERIAL):
                piece.pow_(gamma)
    else:
        curve.pow_(spread(gammas, inputs))
    return curve.mul_(width).add_(least)


def apply_colour(inputs: Tensor, chance: Chance) -> Tensor:
    """Saturation (1: as is, 0: grey), then hue (turns) of images (n, 3, H, W), to a new tensor. Grey stays as it is."""
    saturation = chance.within("saturation", 1.0)[:, None, None]
    angle = 2 * np.pi * chance.amount("hue", 1)[:, :, None]
    grey = np.broadcast_to(LUMA, (3, 3))
    chroma = np.eye(3) - grey
    turned = grey + cosine(angle) * chroma + sine(angle) * HUE
    matrix = turned @ (grey + saturation * chroma)
    shares = torch.from_numpy(matrix.astype(np.float32)).to(inputs.device)[..., None, None]
    mixed = shares[:, :, 0] * inputs[:, :1]
    for colour in (1, 2):
        mixed.add_(shares[:, :, colour] * inputs[:, colour : colour + 1])
    return mixed


def apply_levels(inputs: Tensor, chance: Chance) -> Tensor:
    """Brightness, contrast, scale and shift: together one product and one sum, in place."""
    options, signed = chance.options, 2 * chance.levels - 1
    gain = spread(1 + options.scale * signed[:, 0] * chance.happens["scale"], inputs)
    bias = spread(options.shift * signed[:, 1] * chance.happens["shift"], inputs)
    if chance.any("brightness", "contrast").any():
        bright = spread(chance.within("brightness", 1.0), inputs)
        contrast = spread(chance.within("contrast", 1.0), inputs)
        least = _joined(inputs, inputs.flatten(2).amin(2), "amin")
        mean = _joined(inputs, _means(inputs), "mean")
        middle = least + bright * (mean - least)
        bias = bias + gain * (contrast * (1 - bright) * least + (1 - contrast) * middle)
        gain = gain * contrast * bright
    return inputs.mul_(gain).add_(bias)


def _means(inputs: Tensor) -> Tensor:
    """(n, C), axis by axis: the sum of a whole channel at once would be split by the number of threads."""
    for _ in range(inputs.ndim - 2):
        inputs = inputs.mean(-1)
    return inputs


def _joined(inputs: Tensor, channels: Tensor, how: str) -> Tensor:
    """(n, C) figures of channels, for images brought together into (n, 1), as they broadcast over inputs."""
    if inputs.ndim == 4:
        channels = getattr(channels, how)(1, keepdim=True)
    return channels.reshape(*channels.shape, *[1] * (inputs.ndim - 2))


def spread(values: Floats, inputs: Tensor) -> Tensor:
    """(n,) to a tensor that broadcasts over (n, C, *shape)."""
    column = torch.as_tensor(values, dtype=inputs.dtype, device=inputs.device)
    return column.reshape(-1, *[1] * (inputs.ndim - 1))


def add_noise(inputs: Tensor, chance: Chance) -> None:
    """Gaussian noise in place, from a generator of its own for each sample."""
    deviations = chance.options.noise * chance.levels[:, 2]
    rows = np.flatnonzero(chance.happens["noise"]).tolist()
    for row, drawn in zip(rows, _normals(inputs, chance.samples[rows].tolist(), chance), strict=True):
        inputs[row].add_(drawn.mul_(float(deviations[row])))


def _normals(inputs: Tensor, samples: list[int], chance: Chance) -> Iterator[Tensor]:
    """A sample of normal numbers each; on the CPU, where one is drawn by one thread, as many at a time as threads."""

    def draw(sample: int) -> Tensor:
        # 63 bits: manual_seed takes a signed number
        bits = int(random_bits(chance.seed, chance.epoch, Stream.NOISE, 1, sample)[0] >> np.uint64(1))
        generator = torch.Generator(inputs.device).manual_seed(bits)
        return torch.randn(inputs.shape[1:], generator=generator, device=inputs.device, dtype=inputs.dtype)

    threads = min(torch.get_num_threads(), len(samples)) if inputs.device.type == "cpu" else 1
    if threads < 2:
        yield from map(draw, samples)
        return
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(samples), threads):
            yield from pool.map(draw, samples[first : first + threads])


def cut_out(inputs: Tensor, chance: Chance) -> None:
    """Boxes of one intensity, wholly inside, in place. Label maps keep what is under them."""
    cutout, shape = chance.options.cutout, np.array(inputs.shape[2:])
    axes = len(shape)
    drawn = chance.stream(Stream.CUTOUT, cutout.holes * 2 * axes).reshape(-1, cutout.holes, 2, axes)
    low, high = cutout.size
    sizes = np.clip(np.rint((low + (high - low) * drawn[:, :, 0]) * shape), 1, shape).astype(np.int64)
    starts = (drawn[:, :, 1] * (shape - sizes + 1)).astype(np.int64)
    for row in np.flatnonzero(chance.happens["cutout"]):
        for start, size in zip(starts[row], sizes[row], strict=True):
            hole = inputs[int(row)]
            for axis in range(axes):
                hole = hole.narrow(axis + 1, int(start[axis]), int(size[axis]))
            hole.fill_(cutout.fill)
