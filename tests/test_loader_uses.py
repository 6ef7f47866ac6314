"""What a user of the Loader runs into: loops left early, ranks and foreground, failures that hold memory, odd files."""

import numpy as np
import pytest

from datasets import Loader, open_volumes
from datasets.prefetch import foreground_rows
from datasets.writer import VolumeWriter


def write(path, samples=12, task="classification", classes=("a", "b"), **options):
    shape = (1, 6, 6, 6)
    with VolumeWriter(
        path, shape=shape, dtype="int16", num_samples=samples, class_names=classes, task=task, **options
    ) as file:
        for number in range(samples):
            split = "train" if number < samples - 4 else "validation"
            target = np.zeros(shape[1:], np.uint8) if task == "segmentation" else number % 2
            file.add(np.full(shape, number, np.int16), target, id=f"s{number}", split=split)
    return open_volumes(path)


def seen(loader):
    return [int(sample) for batch in loader for sample in batch.samples]


def test_a_loop_left_early_costs_no_sample_of_the_next(tmp_path):
    loader = Loader(write(tmp_path / "v.h5"), split="validation", batch_size=1)
    next(iter(loader))
    assert seen(loader) == [8, 9, 10, 11]
    for _ in loader:
        break
    assert seen(loader) == [8, 9, 10, 11] and seen(loader) == [8, 9, 10, 11]
    loader.seek(0, 2)
    assert seen(loader) == [10, 11] and seen(loader) == [8, 9, 10, 11]


@pytest.mark.parametrize(("world", "share"), [(2, 0.5), (4, 0.5), (3, 1 / 3), (2, 0.25), (1, 0.1)])
def test_every_rank_has_its_part_of_the_foreground(world, share):
    batch, steps = 12, 200
    rows = np.stack([foreground_rows(3, 1, step, batch, share) for step in range(steps)])
    assert rows.sum() == round(steps * batch * share)
    assert all(abs(rows[:, rank::world].mean() - share) < 0.1 for rank in range(world))
    assert np.array_equal(rows[7], foreground_rows(3, 1, 7, batch, share))


def test_a_read_that_fails_in_the_calling_thread_holds_no_memory(tmp_path):
    volumes = write(tmp_path / "v.h5")
    place = volumes.shards[0].inputs.offset
    with (tmp_path / "v.h5").open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 432 * 8)
    volumes = open_volumes(tmp_path / "v.h5")
    loader = Loader(volumes, batch_size=2, threads=0, verify=1.0)
    for _ in range(5):
        with pytest.raises(OSError, match="is damaged"):
            seen(loader)
    assert not any(slot.busy for slot in loader._ring.slots)


def test_a_score_is_never_of_another_sample(tmp_path):
    with pytest.raises(ValueError, match="would score another sample"):
        Loader(write(tmp_path / "v.h5"), split="validation", on_bad_sample="skip")


def test_classes_that_cannot_be_told_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two classes have the name 'a'"):
        write(tmp_path / "v.h5", classes=("a", "b", "a"))
    with pytest.raises(ValueError, match="label maps are bytes: 300 classes"):
        write(tmp_path / "v.h5", task="segmentation", classes=tuple(map(str, range(300))))


def test_foreground_places_outside_of_a_sample_name_it(tmp_path):
    places = np.full((12, 2, 3), 6**3, np.int32)
    volumes = write(tmp_path / "v.h5", task="segmentation", foreground=places)
    loader = Loader(volumes, batch_size=4, patch=(3, 3, 3), foreground=1.0)
    with pytest.raises(OSError, match=r"v.h5: sample 's\d+' .*a foreground place lies outside"):
        seen(loader)
