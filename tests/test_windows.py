"""Sliding windows against MONAI's, the loader's padding, and flips against doing it by hand."""

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from datasets import Loader, open_volumes
from datasets.writer import VolumeWriter
from jobs.inference.flips import check_axes, flipped
from jobs.inference.windows import Windows, centre, importance, mean_over_windows, slide

CPU = torch.device("cpu")


def network(axes, channels=2, classes=3):
    torch.manual_seed(0)
    conv = nn.Conv3d if axes == 3 else nn.Conv2d
    return nn.Sequential(
        conv(channels, 4, 3, padding=1), nn.ReLU(), conv(4, classes, 3, padding=1), nn.Softmax(1)
    ).eval()


CASES = [
    ((20, 17, 23), (8, 8, 8), 0.5),
    ((20, 17, 23), (9, 7, 23), 0.25),
    ((16, 16, 16), (16, 16, 16), 0.5),
    ((5, 30, 11), (8, 8, 5), 0.6),
    ((33, 40), (16, 12), 0.5),
    ((31, 10), (7, 12), 0.9),
    ((8, 9), (1, 1), 0.0),
]


@pytest.mark.parametrize(("shape", "size", "overlap"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_as_monai_does_it(shape, size, overlap, batch):
    model = network(len(shape))
    odd = tuple(have - (have < want and (want - have) % 2) for have, want in zip(shape, size, strict=True))
    volume = torch.randn(2, *odd, generator=torch.Generator().manual_seed(1))
    options = {"overlap": overlap, "mode": "gaussian", "padding_mode": "replicate"}
    theirs = sliding_window_inference(volume[None], size, batch, model, **options)[0]
    ours = slide(volume, model, Windows(size, overlap, batch), CPU)
    assert ours.shape == (3, *odd) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, model(volume[None])[0], atol=1e-4) or size == odd, "windows see borders"


@torch.inference_mode()
def test_one_window_is_the_network_itself():
    model, volume = network(3), torch.randn(2, 8, 9, 10)
    assert torch.equal(slide(volume, model, Windows((8, 9, 10)), CPU), model(volume[None])[0])


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 3, 12), (9, 11, 2)])
def test_small_volumes_are_padded_as_the_loader_does(tmp_path, shape):
    """What a window of the training's size shows is what the validation of the training showed."""
    size = (8, 8, 8)
    volume = np.random.default_rng(0).integers(0, 99, (1, *shape)).astype(np.int16)
    with VolumeWriter(tmp_path / "a.h5", shape=None, dtype="int16", num_samples=1, class_names=["a"]) as writer:
        writer.add(volume, 0, id="a", split="validation")
    loader = Loader(open_volumes(tmp_path / "a.h5"), "validation", 1, dtype=torch.float32, patch=size, threads=0)
    (batch,) = loader
    whole = torch.from_numpy(volume).float()
    assert torch.equal(centre(whole, size), batch.inputs[0])
    seen = []
    slide(whole, lambda x: seen.append(x) or x, Windows(size), CPU)
    if max(shape) <= 8:
        assert len(seen) == 1 and torch.equal(seen[0][0], batch.inputs[0])
    assert torch.equal(slide(whole, lambda x: x, Windows(size), CPU), whole) or max(shape) > 8
    torch.testing.assert_close(slide(whole, lambda x: x, Windows(size), CPU), whole)


def test_every_voxel_is_in_a_window_and_no_window_is_outside():
    generator = np.random.default_rng(3)
    for _ in range(200):
        size = tuple(generator.integers(1, 12, 3).tolist())
        shape = tuple(int(length + generator.integers(0, 25)) for length in size)
        windows = Windows(size, float(generator.uniform(0, 0.95)))
        covered = np.zeros(shape, bool)
        for start in windows.starts(shape):
            ends = [first + length for first, length in zip(start, size, strict=True)]
            assert min(start) >= 0 and all(end <= have for end, have in zip(ends, shape, strict=True))
            covered[tuple(slice(first, end) for first, end in zip(start, ends, strict=True))] = True
        assert covered.all()


def test_importance_falls_from_the_middle_and_is_symmetric():
    weights = importance((9, 6))
    assert weights.argmax() == 4 * 6 + 2 and weights.min() == pytest.approx(1e-3)
    assert torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))


def test_windows_that_cannot_be_are_refused():
    for options in ({"size": (0, 4)}, {"size": (4, 4), "overlap": 1.0}, {"size": (4, 4), "batch": 0}):
        with pytest.raises(ValueError, match=r"none|below 1"):
            Windows(**options)


def test_the_mean_over_windows_of_a_classifier():
    volume = torch.randn(1, 10, 11, 9)
    windows = Windows((4, 4, 4), 0.5, 5)
    predict = lambda x: torch.stack([x.mean((1, 2, 3, 4)), x.amax((1, 2, 3, 4))], 1)  # noqa: E731
    boxes = [volume[:, a : a + 4, b : b + 4, c : c + 4] for a, b, c in windows.starts((10, 11, 9))]
    wanted = torch.stack([torch.stack([box.mean(), box.max()]) for box in boxes]).mean(0)
    torch.testing.assert_close(mean_over_windows(volume, predict, windows, CPU), wanted)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
@torch.inference_mode()
def test_flips_are_the_mean_over_all_mirror_images(axes):
    model, inputs = network(3), torch.randn(2, 2, 5, 6, 7)
    wanted = torch.zeros(2, 3, 5, 6, 7)
    for mask in range(2 ** len(axes)):
        dims = [2 + axis for bit, axis in enumerate(axes) if mask >> bit & 1]
        wanted += model(inputs.flip(dims)).flip(dims)
    torch.testing.assert_close(flipped(model, axes, maps=True)(inputs), wanted / 2 ** len(axes))
    pooled = nn.Sequential(model, nn.Flatten(2)).eval()
    classify = lambda x: pooled(x)[:, :, 0]  # noqa: E731  a corner: it does see flips
    told = flipped(classify, axes, maps=False)(inputs)
    sides = [classify(inputs.flip([2 + a for b, a in enumerate(axes) if m >> b & 1])) for m in range(2 ** len(axes))]
    torch.testing.assert_close(told, torch.stack(sides).mean(0))
    assert flipped(model, (), maps=True) is model


def test_axes_that_are_not_there_are_refused():
    check_axes((0, 2), 3)
    for axes, count in (((3,), 3), ((2,), 2), ((-1,), 3), ((0, 0), 3)):
        with pytest.raises(ValueError, match=r"--flips .* axes are 0"):
            check_axes(axes, count)
