"""Prediction pictures: which samples, which slices the right way up, what they say, and errors in their colours."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import open_volumes
from jobs import palette
from jobs.figures import canvas, pictures
from jobs.figures.examples import MOST as MOST_SAMPLES
from jobs.figures.examples import MOST_MAPS, Example, affordable, read_examples, spread, worst
from jobs.pictured import MOST, Gallery
from jobs.tasks.contract import Stored
from tests.drawn import assert_drawn, ink
from tests.inspected import write

NAMES = ["background", "left thing of a long name", "right", "犬"]


def stored(targets, losses, rows=None):
    rows = np.full((len(losses), 2), 0.5) if rows is None else rows
    return Stored(np.arange(len(losses)) * 10, targets, rows, np.array(losses, np.float32))


def test_the_worst_come_first_and_what_is_not_finite_before_all():
    assert worst(stored(None, [0.1, 3.0, np.nan, 2.0]), 3) == [2, 1, 3]


def test_each_class_is_shown_evenly():
    targets = np.array([0] * 10 + [2] * 3)
    assert spread(stored(targets, np.zeros(13)), 3, 6) == [0, 4, 9, 10, 11, 12]
    many = np.arange(100)
    assert len(spread(stored(many, np.zeros(100)), 100, 24)) == 24
    labels = np.array([[1, 1], [0, 0], [0, 1]])
    assert spread(stored(labels, np.zeros(3)), 2, 6) == [0, 2, 1], "a sample of two labels once; one without any"
    assert spread(stored(None, np.zeros(9)), 3, 3) == [0, 4, 8]


def example(truth, said, image=None, **options):
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) if image is None else image
    return Example("id", image, truth, 0.5, None, np.array(said), **options)


@pytest.mark.parametrize(
    ("truth", "said", "right", "lines"),
    [
        (2, [0.1, 0.1, 0.8], True, ["right", "✓ right 0.80"]),
        (2, [0.7, 0.1, 0.2], False, ["right", "✗ background 0.70"]),
        (0, [np.nan, 0.1, 0.2], False, ["background", "✗ not a number"]),
        (np.array([1, 0, 1]), [0.9, 0.1, 0.6], True, ["background, right", "✓"]),
        (np.array([0, 0, 1]), [0.9, 0.1, 0.5], False, ["right", "✗ -right 0.50…round 0.90"]),
        (np.array([0, 0, 0]), [0.1, 0.1, 0.1], True, ["no class", "✓"]),
    ],
)
def test_a_picture_says_truth_prediction_and_probability_with_a_sign(truth, said, right, lines):
    assert pictures._verdict(example(truth, said), NAMES) == (right, lines)
    shown = pictures._picture(example(truth, said), NAMES, pictures.CELL, False, told_loss=False)
    assert tuple(shown.pixels[0, 0]) == (palette.RIGHT if right else palette.WRONG)


@pytest.mark.parametrize("shape", [(1, 8, 9), (3, 8, 9), (1, 8, 9, 10), (2, 8, 9, 10)])
@pytest.mark.parametrize("draw", [pictures.predictions, pictures.worst_samples])
def test_pictures_of_any_input(shape, draw):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    image[0, 0] = np.nan
    found = [example(n % 3, [0.1, 0.2, 0.7], image, spacing=(1.0, 2.0, 0.5)) for n in range(7)]
    found.append(example(1, [0.1, 0.2, 0.7], image, damaged="cannot be read"))
    assert_drawn(draw(found, NAMES, "validation"))
    assert_drawn(draw([], NAMES, "validation"))


def test_the_planes_of_a_volume_lie_as_nibabel_shows_them():
    volume = np.zeros((1, 10, 10, 10), np.uint8)
    volume[0, 6:, :, 6:] = 200  # the patient's right, above
    volume[0, :4, 6:, :4] = 100  # left, front, below
    shown = pictures._three_planes(volume, (1, 1, 1), 64)
    coronal, sagittal = shown[:, 22:42, 0].astype(int), shown[:, 44:, 0].astype(int)
    assert coronal[2, -3] > coronal[2, 2], "right and above"
    assert sagittal[2, 2] == sagittal[2, -3], "above, the same from back to front"


def test_errors_have_their_colours():
    truth, found = np.array([[0, 1, 1, 2, 255]], np.uint8), np.array([[1, 0, 2, 2, 1]], np.uint8)
    shown = pictures._errors(np.zeros((1, 5, 3), np.uint8), truth, found)[0].astype(int)
    colours = [palette.FALSE_POSITIVE, palette.FALSE_NEGATIVE, palette.OTHER_CLASS]
    assert all(np.abs(shown[n] - colour).max() < 30 for n, colour in enumerate(colours))
    assert tuple(shown[3]) == (40, 40, 40) and np.ptp(shown[4]) == 0 and shown[4, 0] > 60, "right; ignored"
    assert pictures._mean_dice(truth, found, 3) == pytest.approx((0 + 2 / 3) / 2)


@pytest.mark.parametrize("spatial", [(8, 9), (8, 9, 6)])
def test_label_maps_show_truth_prediction_and_errors(spatial):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, spatial).astype(np.uint8)
    truth[0, 0] = 255
    image = rng.normal(size=(1, *spatial)).astype(np.float32)
    found = [
        Example("a", image, truth, 0.5, np.roll(truth % 4, 1, 0)),
        Example("empty", image, np.zeros_like(truth), float("nan"), np.zeros_like(truth)),
        Example("no prediction", image, truth, 0.1),
    ]
    shown = assert_drawn(pictures.predictions(found, NAMES, "validation"))
    for colour in (palette.class_colour(1), palette.FALSE_POSITIVE, palette.FALSE_NEGATIVE, palette.OTHER_CLASS):
        assert (np.abs(shown.astype(int) - colour).max(axis=2) < 12).sum() > 60, "in the legend, too"


def test_all_label_maps_of_a_figure_and_their_legend_fit_into_it(monkeypatch):
    """Eight square maps are higher than a figure at their largest size: none is cut, the legend neither."""
    drawn = []
    monkeypatch.setattr(canvas, "of_pixels", lambda pixels: drawn.append(pixels))
    truth = np.zeros((64, 64), np.uint8)
    truth[:9] = 3
    found = [Example(f"{n}", np.zeros((1, 64, 64), np.float32), truth, 0.5, truth) for n in range(MOST_MAPS)]
    pictures.predictions(found, NAMES, "validation")
    (sheet,) = drawn
    assert sheet.shape[0] <= canvas.MOST_PIXELS and sheet.shape[1] <= canvas.MOST_PIXELS
    assert (sheet[-40:] == palette.FALSE_NEGATIVE).all(axis=2).any(), "the legend"
    assert pictures._map_row(found[0], NAMES, set(), 150).heading == "0   loss 0.5, Dice 1.00"
    bare = Example("a", found[0].image, truth * 0, 0.5, truth * 0)
    assert pictures._map_row(bare, NAMES, set(), 150).heading == "a   loss 0.5, Dice –"


@pytest.mark.parametrize("shape", [(16, 16, 16), (8, 8, 40), (3, 16, 16)])
@pytest.mark.parametrize("draw", [pictures.predictions, pictures.worst_samples])
def test_most_samples_fit_into_a_figure(shape, draw, monkeypatch):
    drawn = []
    monkeypatch.setattr(canvas, "of_pixels", lambda pixels: drawn.append(pixels))
    image = np.zeros(shape if shape[0] == 3 else (1, *shape), np.float32)
    said = np.array([0.1, 0.9, 0, 0])
    draw([Example(f"{n}", image, 1, 0.5, None, said) for n in range(MOST_SAMPLES)], NAMES, "validation")
    assert max(drawn[0].shape) <= canvas.MOST_PIXELS


def test_samples_are_read_with_their_predictions(tmp_path, caplog):
    image = np.arange(12, dtype=np.int16).reshape(1, 3, 4)
    volumes = open_volumes(write(tmp_path / "o.h5", [image, image + 1, image + 2], [0, 1, 1]))
    kept = Stored(np.array([0, 2]), np.array([0, 1]), np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0.1, 0.5], "f4"))
    found = read_examples(volumes, kept, [1, 0])
    assert [(one.truth, one.probabilities.tolist()) for one in found] == [(1, [0.4, 0.6]), (0, [0.9, 0.1])]
    assert (found[0].image == image + 2).all() and found[0].id == volumes.ids[2]
    assert affordable(volumes, 5) == 5
    (tmp_path / "o.h5").unlink()
    assert all(one.damaged for one in read_examples(volumes, kept, [1, 0])) and "no picture of" in caplog.text


def test_label_maps_are_kept_evenly_and_by_loss_while_they_are_evaluated():
    gallery, losses = Gallery(), torch.rand(100, generator=torch.Generator().manual_seed(0))
    losses[40] = float("nan")
    targets = torch.zeros(100, 4, 5, 6, dtype=torch.uint8)
    targets[:, :2, :, 3] = 1
    targets[:, :, :, 1] = 255
    logits = torch.zeros(100, 2, 4, 5, 6)
    logits[:, 1, 0] = 1
    for part in range(0, 100, 7):
        cut = slice(part, part + 7)
        gallery.add(torch.arange(100)[cut], torch.ones(100, 1, 4, 5, 6)[cut], logits[cut], targets[cut], losses[cut])
    assert [one.sample for one in gallery.worst][:1] == [40]
    assert sorted(one.sample for one in gallery.worst[1:]) == sorted(
        losses.nan_to_num(-1).topk(MOST - 1).indices.tolist()
    )
    even = [one.sample for one in gallery.evenly()]
    assert len(even) == MOST and even[0] == 0 and even[-1] > 85 and np.ptp(np.diff(even)) <= 8
    shown = gallery.worst[0]
    assert shown.truth.shape == (4, 5, 1) and shown.truth[:2].all() and not shown.truth[2:].any(), "not the ignored"
    assert shown.found[0].all() and not shown.found[1:].any()


def test_a_png_of_a_plot_is_exact_and_of_a_photograph_small():
    plot = np.full((300, 300, 3), 255, np.uint8)
    plot[50:60] = palette.class_colour(3)
    assert tuple(np.asarray(Image.open(_as_file(canvas.encoded(plot))).convert("RGB"))[55, 5]) == palette.class_colour(
        3
    )
    photograph = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    photograph[:4, :300], photograph[:4, 300:] = palette.RIGHT, palette.WRONG
    small = canvas.encoded(photograph)
    assert len(small) < 500_000 < photograph.nbytes
    frame = np.asarray(Image.open(_as_file(small)).convert("RGB"))[0, ::300].astype(int)
    assert np.abs(frame - (palette.RIGHT, palette.WRONG)).max() < 40, "rare colours stay what they are"
    figure = canvas.of_pixels(plot)
    assert np.array_equal(canvas.rendered(figure)[:300, :300], plot) and ink(plot) > 0


def _as_file(content):
    import io

    return io.BytesIO(content)
