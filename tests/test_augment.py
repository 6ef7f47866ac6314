"""Augmentation as a whole: the same in any batch, what follows what, how often, and what is refused."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.augment import Augment, draw, draw_moves
from datasets.augment.options import PRESETS
from datasets.augment.products import product

EVERYTHING = {
    "flip": [0, 1],
    "scale": 0.1,
    "shift": 0.2,
    "noise": 0.1,
    "rotate": 20,
    "zoom": [0.8, 1.3],
    "shear": 5,
    "translate": 0.1,
    "elastic": {"spacing": 8, "magnitude": 2},
    "blur": 1.0,
    "low_resolution": 2,
    "gamma": [0.7, 1.5],
    "contrast": 0.3,
    "brightness": 0.3,
    "cutout": {"holes": 2, "size": 0.2},
}
IMAGES = {**EVERYTHING, "crop": 0.3, "saturation": 0.5, "hue": 0.1}
HALF = dict.fromkeys(EVERYTHING, 0.5)
KINDS = {"image": (IMAGES, (3, 18, 21)), "volume": (EVERYTHING, (2, 10, 12, 13))}


def batch(shape, count=7):
    draws = torch.Generator().manual_seed(1)
    maps = torch.randint(0, 5, (count, *shape[1:]), generator=draws, dtype=torch.uint8)
    return torch.randn(count, *shape, generator=draws), maps


@pytest.mark.parametrize("chances", [{}, HALF], ids=["always", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_bits_in_any_batch(kind, chances):
    options, shape = KINDS[kind]
    augment = Augment(**options, p=chances)
    inputs, maps = batch(shape)
    samples = np.array([5, 2**40, 0, 77, 8, 1, 31])
    whole, labels = augment(inputs.clone(), samples, 9, 4, maps.clone())
    order = [3, 0, 6, 2, 5, 1, 4]
    for parts in ([order], [[row] for row in range(7)], [[6, 0], [1, 5, 4], [2, 3]]):
        for rows in parts:
            some, few = augment(inputs[rows], samples[rows], 9, 4, maps[rows])
            assert torch.equal(some, whole[rows]) and torch.equal(few, labels[rows])
    assert not any(torch.equal(inputs[row], whole[row]) for row in range(7)) or chances
    later, _ = augment(inputs.clone(), samples, 9, 5)
    assert not torch.equal(later, whole)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, (1, 41, 43, 45)) for name in EVERYTHING] + [("crop", (3, 203, 211))],
)
def test_the_number_of_threads_changes_no_bit(name, shape):
    """On samples large enough for torch to share out; a resumed run may have another number of cores."""
    augment, before = Augment(**{name: IMAGES[name]}), torch.get_num_threads()
    inputs, maps = batch(shape, 2)
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(augment(inputs.clone(), np.arange(2), 0, 0, maps.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, results[0][0]) and torch.equal(labels, results[0][1]) for out, labels in results)


def test_a_product_is_the_same_with_any_number_of_threads_and_in_any_batch():
    """Shapes drawn by a seed: on CPUs with AVX2 alone a quarter of them differs where torch.bmm is called as it is."""
    before, draw = torch.get_num_threads(), random.Random(7)
    try:
        for _ in range(60):
            inner, columns = draw.randint(2, 200), draw.randint(2, 200)
            left = torch.randn(draw.randint(1, 4), draw.choice([1, 33, 100, 1935]), inner)
            right = torch.randn(len(left), inner, columns)
            torch.set_num_threads(1)
            one = product(left, right)
            torch.testing.assert_close(one, torch.bmm(left, right), rtol=1e-4, atol=1e-4)
            for threads in (2, 3, 4, 8):
                torch.set_num_threads(threads)
                assert torch.equal(product(left, right), one), (left.shape, columns, threads)
                assert torch.equal(product(left[-1:], right[-1:]), one[-1:]), (left.shape, columns, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_changed_together_are_those_changed_alone(kind):
    """A GPU takes many rows at a time: the same up to rounding, and spared rows are not touched."""
    options, shape = KINDS[kind]
    augment = Augment(**{**options, "noise": 0, "cutout": None, "p": {}})
    augment = Augment(**{**vars(augment), "p": {name: 0.5 for name in HALF if name not in ("noise", "cutout")}})
    inputs, maps = batch(shape)
    alone, labels = augment(inputs.clone(), np.arange(7), 9, 4, maps.clone())
    together = inputs.clone(), maps.clone()
    chance = draw(augment, np.arange(7), 9, 4)
    augment._change(*together, chance, draw_moves(chance, shape[1:]), slice(0, 7))
    torch.testing.assert_close(together[0], alone, atol=1e-4, rtol=1e-4)
    assert (together[1] == labels).float().mean() > 0.999


def test_the_state_of_torch_and_numpy_is_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for options, shape in KINDS.values():
        inputs, maps = batch(shape)
        Augment(**options)(inputs, np.arange(7), 0, 0, maps)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.sampled_from(sorted(set(EVERYTHING) - {"p"})), max_size=6),
    st.sampled_from(["image", "volume"]),
    st.integers(0, 2**63),
)
def test_labels_are_only_moved(names, kind, seed):
    shape = KINDS[kind][1]
    inputs, maps = batch(shape, 2)
    maps = maps * 50
    augment = Augment(**{name: EVERYTHING[name] for name in names})
    _, moved = augment(inputs.clone(), np.arange(2), seed, 1, maps.clone())
    assert moved.dtype == torch.uint8 and set(moved.unique().tolist()) <= set(maps.unique().tolist())
    if not names & {"flip", "rotate", "zoom", "shear", "translate", "elastic"}:
        assert torch.equal(moved, maps)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_moves_as_its_image(kind):
    """Two values: where linear interpolation is clear of the middle, nearest neighbour took the same side."""
    options, shape = KINDS[kind]
    moves = {name: options[name] for name in ("flip", "rotate", "zoom", "shear", "translate", "elastic")}
    whole = torch.zeros(4, 1, *[4 * size for size in shape[1:]])
    whole[(slice(None), slice(None), *[slice(size, 2 * size) for size in shape[1:]])] = 1
    image, mask = Augment(**moves)(whole.clone(), np.arange(4), 3, 3, whole[:, 0].to(torch.uint8))
    assert 0.01 < mask.float().mean() < 0.5
    assert (mask[image[:, 0] > 0.999] == 1).all() and (mask[image[:, 0] < 0.001] == 0).all()
    assert ((image[:, 0] > 0.5) == mask.bool()).float().mean() > 0.99


@pytest.mark.parametrize("name", ["gamma", "rotate", "noise", "flip", "cutout", "elastic"])
def test_p_says_how_often(name):
    augment = Augment(**{name: EVERYTHING[name], "p": {name: 0.3}})
    inputs = torch.rand(600, 1, 6, 7)
    out, _ = augment(inputs.clone(), np.arange(600), 0, 0)
    hit = (out != inputs).flatten(1).any(1).float().mean()
    expected = 1 - 0.7**2 if name == "flip" else 0.3
    assert abs(hit - expected) < 0.06
    never = Augment(**{name: EVERYTHING[name], "p": {name: 0}})
    assert torch.equal(never(inputs.clone(), np.arange(600), 0, 0)[0], inputs)


def test_options_are_drawn_apart():
    chance = draw(Augment(**EVERYTHING, p=HALF), np.arange(2000), 0, 0)
    hits = np.stack([chance.happens[name] for name in EVERYTHING if name != "flip"]).astype(float)
    assert abs(np.corrcoef(hits) - np.eye(len(hits))).max() < 0.1
    for name, low, high, middle in (("zoom", 0.8, 1.3, np.sqrt(0.8 * 1.3)), ("contrast", 0.7, 1.3, 1.0)):
        drawn = draw(Augment(**EVERYTHING), np.arange(2000), 0, 0).within(name, 1.0, log=name == "zoom")
        assert low <= drawn.min() < low + 0.01 and high - 0.01 < drawn.max() < high
        assert abs(np.median(drawn) - middle) < 0.02


def test_switching_an_option_on_leaves_the_others_draws():
    inputs, _ = batch((1, 8, 9, 10))
    first, _ = Augment(noise=0.1)(inputs.clone(), np.arange(7), 0, 0)
    second, _ = Augment(noise=0.1, blur=1.0, p={"blur": 0})(inputs.clone(), np.arange(7), 0, 0)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32_and_rounded_once(dtype):
    options, shape = KINDS["volume"]
    inputs, _ = batch(shape)
    rounded = inputs.to(dtype)
    out, _ = Augment(**options)(rounded, np.arange(7), 0, 0)
    expected, _ = Augment(**options)(rounded.float(), np.arange(7), 0, 0)
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype))


def test_no_sample_is_no_work():
    inputs, maps = torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.uint8)
    out, labels = Augment(**IMAGES)(inputs, np.zeros(0, np.int64), 0, 0, maps)
    assert out.shape == (0, 3, 8, 8) and labels.shape == (0, 8, 8)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_that_can_be_overridden(name):
    augment = Augment.from_mapping({"preset": name})
    augment.check(*{"volumes": (3, 1), "images": (2, 3)}[name])
    assert augment == Augment(**PRESETS[name])
    quieter = Augment.from_mapping({"preset": name, "contrast": 0, "brightness": [0.5, 1.0], "p": {"brightness": 1}})
    assert quieter.contrast == () and quieter.brightness == (0.5, 1.0) and quieter.p["brightness"] == 1
    assert "contrast" not in quieter.p


REFUSED = {
    "{rotat: 5}": "'rotat' is unknown; did you mean 'rotate'. it takes flip, ",
    "{rotate: 200}": "rotate 200 must be a number from 0 to 180",
    "{rotate: -5}": "rotate -5 must be",
    "{rotate: yes}": "rotate True must be",
    "{rotate: .nan}": "rotate nan must be",
    "{translate: [0.1, 2]}": r"translate \[0.1, 2\] must be a number from 0 to 1, or a list of one for each axis",
    "{zoom: [1.2, 0.8]}": r"zoom \[1.2, 0.8\] must lie in 0.1 to 10, the smaller number first",
    "{zoom: big}": "zoom 'big' is no range; write for example zoom: 0.2 or",
    "{gamma: [0, 1]}": r"gamma \[0, 1\] must lie in 0.1 to 10",
    "{gamma: [1, 2, 3]}": "is no range",
    "{blur: -1}": "blur .* must lie in 0 to 32",
    "{low_resolution: 0.5}": "low_resolution .* must lie in 1 to 32",
    "{crop: 2}": "crop .* must lie in 0.01 to 1",
    "{hue: 0.7}": "hue 0.7 must be a number from 0 to 0.5",
    "{elastic: 4}": "elastic 4 is no mapping; it takes spacing, magnitude",
    "{elastic: {spacing: 32}}": "elastic lacks magnitude",
    "{elastic: {spaceing: 32, magnitude: 1}}": "elastic: 'spaceing' is unknown; did you mean 'spacing'",
    "{elastic: {spacing: 1, magnitude: 0.2}}": "elastic spacing 1 must be a number of 2 or more",
    "{elastic: {spacing: 8, magnitude: 0}}": "elastic magnitude 0 does nothing",
    "{cutout: {holes: 0}}": "cutout holes 0 must be a whole number",
    "{cutout: {size: 0}}": "cutout size .* must lie in",
    "{cutout: {fill: grey}}": "cutout fill 'grey' is not a number",
    "{p: 0.5}": "p 0.5 is no mapping",
    "{gamma: 0.2, p: {gama: 0.5}}": "p names 'gama', which is not on; did you mean 'gamma'",
    "{p: {gamma: 0.5}}": "p names 'gamma', which is not on; on are: none",
    "{gamma: 0.2, p: {gamma: 2}}": "p of gamma, 2, is a probability",
    "{spacing: [1, 1, 3], zoom: 0.2}": "spacing serves rotate and shear",
    "{preset: strong}": "preset 'strong' is unknown; presets are volumes, images",
    "{scale: .inf}": "scale inf",
    "{flip: [true]}": "flip .* must name spatial axes",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_meant_is_refused(text):
    import yaml

    with pytest.raises(ValueError, match=REFUSED[text]) as caught:
        Augment.from_mapping(yaml.safe_load(text))
    assert str(caught.value).startswith("augment: ") and "\n" not in str(caught.value)


UNFIT = [
    ({"flip": [2]}, (2, 1), "flip axis 2 is over the spatial axes of images, 0 to 1"),
    ({"crop": 0.5}, (3, 1), "crop is for images, and these are volumes; use zoom or translate"),
    ({"saturation": 0.5}, (3, 3), "saturation is for images"),
    ({"hue": 0.1}, (2, 1), r"hue needs 3 channels \(red, green, blue\), and these have 1"),
    ({"hue": [0.1, 0.2]}, (2, 3), "hue .* has 2 numbers; images take 1 number"),
    ({"rotate": [5, 5, 5]}, (2, 1), "rotate .* has 3 numbers; images take 1 number"),
    ({"rotate": [5, 5]}, (3, 1), "rotate .* has 2 numbers; volumes take 1 number or 3"),
    ({"rotate": 5, "spacing": [1, 2]}, (3, 1), "spacing .* has 2 numbers"),
    ({"elastic": {"spacing": [8, 8], "magnitude": 1}}, (3, 1), "elastic spacing"),
    ({"elastic": {"spacing": 10, "magnitude": 5}}, (3, 1), "magnitude 5 can fold the sample; with spacing 10 .* 4.03"),
]


@pytest.mark.parametrize(("options", "samples", "message"), UNFIT)
def test_what_cannot_take_effect_on_these_samples_is_refused(options, samples, message):
    augment = Augment(**options)
    with pytest.raises(ValueError, match=message):
        augment.check(*samples)
    axes, channels = samples
    with pytest.raises(ValueError, match=message):
        augment(torch.zeros(1, channels, *[8] * axes), np.array([0]), 0, 0)


IDLE = [
    ({"cutout": {}}, r"cutout {} says nothing; it takes holes, size, fill, or null for none"),
    ({"elastic": {}}, r"elastic {} says nothing"),
    ({"gamma": [1, 1]}, r"gamma \[1, 1\] does nothing; leave it out"),
    ({"blur": [0, 0]}, r"blur \[0, 0\] does nothing"),
    ({"low_resolution": 1}, r"low_resolution \[1, 1\] does nothing"),
    ({"rotate": [0, 0, 0]}, r"rotate \[0, 0, 0\] does nothing; leave it out"),
]


@pytest.mark.parametrize(("options", "message"), IDLE)
def test_what_does_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augment.from_mapping(options)
    off = {"preset": "volumes", **dict.fromkeys(options)}
    assert not any(getattr(Augment.from_mapping(off), name) for name in options)
