"""Samplers: exact counts in every epoch, the same global batches for any ranks, nothing seen twice before all is."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import Loader, open_volumes
from datasets.order import Stream, philox_bits, philox_table, random_bits, uniform_table, uniforms
from datasets.sampling import Balanced, Weighted, class_weights, count_before, rarity
from datasets.writer import VolumeWriter

CLASSES = ["often", "seldom", "rare", "held"]
COUNTS = {"often": 40, "seldom": 9, "rare": 2}
WAYS = {"balanced": {"sampler": "balanced"}, "weighted": {"sampler": "weighted"}, "views": {"views": 3}, "uniform": {}}


def label_of(number):
    bounds = itertools.accumulate(COUNTS.values())
    return next(label for label, bound in enumerate(bounds) if number < bound)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """51 training samples, of each class one validation sample, of the last no other."""
    path, train = tmp_path_factory.mktemp("data") / "v.h5", sum(COUNTS.values())
    options = {"shape": (1, 2, 2, 2), "dtype": "int16", "num_samples": train + 4, "class_names": CLASSES}
    with VolumeWriter(path, **options) as writer:
        for number in range(train):
            writer.add(np.full((1, 2, 2, 2), number, np.int16), label_of(number), id=f"s{number}")
        for label in range(4):
            writer.add(np.zeros((1, 2, 2, 2), np.int16), label, id=f"v{label}", split="validation")
    return open_volumes(path)


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    """10 samples of the first label, one of both, one of none."""
    path = tmp_path_factory.mktemp("multi") / "m.h5"
    options = {"shape": (1, 2, 2, 2), "dtype": "int16", "num_samples": 12, "class_names": ["a", "b"]}
    with VolumeWriter(path, task="multilabel", **options) as writer:
        for number in range(12):
            target = [int(number < 11), int(number == 10)]
            writer.add(np.full((1, 2, 2, 2), number, np.int16), target, id=f"s{number}")
    return open_volumes(path)


def options_of(way, volumes):
    weights = {"weights": class_weights(volumes, {"rare": 5, "often": 0.5})} if way == "weighted" else {}
    return {**WAYS[way], **weights, "seed": 3}


def batches(loader):
    return [batch.samples.tolist() for batch in loader]


def drawn(loader):
    return list(itertools.chain(*batches(loader)))


@pytest.mark.parametrize("way", WAYS)
def test_the_ranks_of_a_global_batch_are_the_batch_of_one_rank(volumes, way):
    options = options_of(way, volumes)
    alone = Loader(volumes, batch_size=8, threads=0, **options)
    ranks = {
        size: [Loader(volumes, batch_size=8, rank=rank, world_size=size, **options) for rank in range(size)]
        for size in (2, 4)
    }
    for _ in range(2):
        whole = batches(alone)
        for loaders in ranks.values():
            parts = [batches(loader) for loader in loaders]
            woven = [list(itertools.chain(*zip(*step, strict=True))) for step in zip(*parts, strict=True)]
            assert woven == whole


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_begun_in_its_middle_goes_on_as_it_would_have(volumes, way):
    loader = Loader(volumes, batch_size=5, threads=0, **options_of(way, volumes))
    epochs = [batches(loader) for _ in range(2)]
    for step in range(0, len(loader) + 1, 3):
        loader.seek(1, step)
        assert batches(loader) == epochs[1][step:]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("batch_size", [8, 5, 51])
def test_balanced_draws_all_classes_equally_often_in_every_prefix(volumes, batch_size):
    loader = Loader(volumes, batch_size=batch_size, threads=0, sampler="balanced")
    for _ in range(4):
        labels = volumes.targets[drawn(loader)]
        assert len(labels) == 51 // batch_size * batch_size
        seen = np.cumsum(labels[:, None] == np.arange(3), axis=0)
        assert (np.ptp(seen, axis=1) <= 1).all()


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), total=st.integers(1, 40), seed=st.integers(0, 9))
def test_balanced_repeats_no_sample_before_all_of_its_class_have_come(sizes, total, seed):
    labels = np.repeat(np.arange(len(sizes)) * 2, sizes)  # numbers with gaps
    sampler = Balanced(seed, labels, total)
    order = np.concatenate([sampler.draw(epoch) for epoch in range(5)])
    for label, size in zip(np.unique(labels), sizes, strict=True):
        of_class = order[labels[order] == label].tolist()
        for first in range(0, len(of_class), size):
            cycle = of_class[first : first + size]
            assert len(set(cycle)) == len(cycle)
    counts = np.bincount(np.searchsorted(np.unique(labels), labels[order]), minlength=len(sizes))
    assert np.ptp(counts) <= 1  # over all epochs, too


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(any),
    total=st.integers(1, 200),
    seed=st.integers(0, 2**64 - 1),
)
def test_weighted_counts_are_exact_to_within_one(weights, total, seed):
    weights = np.array(weights)
    counts = np.bincount(Weighted(seed, weights, total).draw(epoch=2), minlength=len(weights))
    wanted = weights / weights.sum() * total
    assert counts.sum() == total and (np.abs(counts - wanted) < 1 + 1e-9).all()
    assert not counts[weights == 0].any()


def test_weights_by_class_are_how_often_a_sample_comes(volumes):
    weights = class_weights(volumes, {"rare": 5, "often": 0.0})
    loader = Loader(volumes, batch_size=19, threads=0, sampler="weighted", weights=weights)
    for _ in range(3):
        counts = Counter(drawn(loader))
        assert not any(volumes.targets[sample] == 0 for sample in counts)
        for sample in range(40, 51):  # 9 of weight 1 and 2 of weight 5 share 38 places
            assert abs(counts[sample] - 2 * weights[sample]) <= 1


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """12 label maps in two shards: ground in all, `often` in the first 8, `rare` in numbers 3 and 9."""
    folder = tmp_path_factory.mktemp("maps")
    for shard in range(2):
        held = np.zeros((6, 3), bool)
        for row in range(6):
            number = 6 * shard + row
            held[row] = True, number < 8, number in (3, 9)
        places = np.where(held[:, :, None], 0, -1).astype(np.int32).repeat(2, axis=2)
        options = {
            "shape": (1, 2, 2, 2),
            "dtype": "int16",
            "num_samples": 6,
            "class_names": ["ground", "often", "rare"],
        }
        with VolumeWriter(folder / f"m{shard}.h5", task="segmentation", foreground=places, **options) as writer:
            for row in range(6):
                image = np.full((1, 2, 2, 2), 6 * shard + row, np.int16)
                writer.add(image, np.zeros((2, 2, 2), np.uint8), id=f"s{6 * shard + row}")
    return open_volumes([folder / "m0.h5", folder / "m1.h5"])


def test_label_maps_are_balanced_by_the_rarest_class_that_they_hold(maps):
    loader = Loader(maps, batch_size=12, threads=0, sampler="balanced", seed=1)
    for _ in range(3):
        counts = np.bincount(drawn(loader), minlength=12)
        wanted = np.full(12, 1 / 8)  # as often as `often` is there
        wanted[8:], wanted[[3, 9]] = 1 / 12, 1 / 2
        assert (np.abs(counts - wanted / wanted.sum() * 12) < 1).all()


def test_label_maps_come_by_the_highest_weight_of_their_classes(maps):
    assert class_weights(maps, {"rare": 5, "often": 2}).tolist() == [2, 2, 2, 5, 2, 2, 2, 2, 1, 5, 1, 1]
    with pytest.raises(ValueError, match="no class 'rar'"):
        class_weights(maps, {"rar": 5})


def test_label_maps_without_stored_voxels_have_no_classes_to_draw_by(tmp_path):
    options = {"shape": (1, 2, 2, 2), "dtype": "int16", "num_samples": 2, "class_names": ["ground", "rare"]}
    with VolumeWriter(tmp_path / "m.h5", task="segmentation", **options) as writer:
        for number in range(2):
            writer.add(np.zeros((1, 2, 2, 2), np.int16), np.zeros((2, 2, 2), np.uint8), id=f"s{number}")
    with pytest.raises(ValueError, match=r"m\.h5 has no stored voxels of each class; pack it again"):
        Loader(open_volumes(tmp_path / "m.h5"), batch_size=1, sampler="balanced")


def test_balanced_of_several_labels_goes_by_the_rarest(multilabel):
    assert np.allclose(rarity(multilabel.targets) * 11, [1] * 10 + [11, 11])
    counts = Counter(drawn(Loader(multilabel, batch_size=12, threads=0, sampler="balanced")))
    assert counts[10] in (4, 5) and counts[11] in (4, 5)
    assert class_weights(multilabel, {"a": 0.5, "b": 3.0}).tolist() == [0.5] * 10 + [3.0, 1.0]


def test_views_of_a_sample_are_counted_and_augmented_anew(volumes):
    import torch

    loader = Loader(volumes, batch_size=51, threads=0, views=3, dtype=torch.float32, augment={"shift": 1.0})
    assert len(loader) == 3
    values = {}
    for batch in loader:
        for sample, pixels in zip(batch.samples.tolist(), batch.inputs, strict=True):
            values.setdefault(sample, set()).add(float(pixels.flatten()[0]))
    assert len(values) == 51 and all(len(seen) == 3 for seen in values.values())


def test_views_are_numbered_by_how_often_the_sample_came():
    assert count_before(np.array([4, 1, 4, 4, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]
    assert count_before(np.array([], np.int64)).tolist() == []


def test_a_cycle_of_a_class_is_found_by_its_counter():
    """What lets the n-th draw of a class be computed without those before it."""
    wanted = random_bits(5, 0, Stream.SAMPLER, 40, sample=7)[12:32]
    assert np.array_equal(philox_bits((5, 0), (3, 0, 7, int(Stream.SAMPLER)), 20), wanted)


REFUSED = [
    ({"sampler": "even"}, "sampler 'even' is unknown; use uniform, balanced, weighted"),
    ({"sampler": "weighted"}, "weights belong to sampler 'weighted', which needs them"),
    ({"weights": np.ones(55)}, "weights belong to sampler 'weighted'"),
    ({"sampler": "weighted", "weights": [1.0, 2.0]}, r"weights have shape \(2,\): give one for each of the 55 samples"),
    ({"sampler": "weighted", "weights": np.zeros(55)}, "not all 0"),
    ({"sampler": "weighted", "weights": np.full(55, -1.0)}, "0 or more"),
    ({"views": 0}, "views 0 must be 1 or more"),
    ({"split": "validation", "sampler": "balanced"}, "sampler 'balanced' has no effect where nothing is shuffled"),
    ({"split": "validation", "views": 2}, "views 2 has no effect"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_samplers_that_cannot_work_are_refused(volumes, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(volumes, batch_size=2, **options)


def test_weights_of_an_unknown_class_are_refused(volumes):
    with pytest.raises(ValueError, match="no class 'rar'; classes are often, seldom, rare, held"):
        class_weights(volumes, {"rar": 2.0})


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("key", [(0, 0), (3, 2), (2**64 - 1, 2**63 + 5)])
def test_a_table_of_draws_is_numpys_philox_row_by_row(key, count):
    samples = np.array([0, 1, 77, 2**40, 2**62] * 6)
    table = philox_table(key, Stream.PATCH, samples, count)
    for row, sample in zip(table, samples.tolist(), strict=True):
        assert np.array_equal(row, philox_bits(key, (0, 0, sample, int(Stream.PATCH)), count))
    for rows in (samples, samples[:3], samples[:0]):
        draws = uniform_table(*key, Stream.PATCH, count, rows)
        assert draws.shape == (len(rows), count)
        for row, sample in zip(draws, rows.tolist(), strict=True):
            assert np.array_equal(row, uniforms(*key, Stream.PATCH, count, sample))
