"""What every task promises (jobs/tasks/contract.py): losses of single samples, exact counts, small rows, metrics."""

from typing import Any

import numpy as np
import pytest
import torch

from hpc.errors import UserError
from hpc.metrics import DEFAULT_MONITOR, DIRECTIONS, STEP_METRIC
from hpc.training import LOSSES, Loss
from tests.toy_tasks import samples, scores_of, seen, toy

WEIGHTS = (0.2, 1.0, 3.0)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("classification", {}),
    "smoothed": ("classification", {"label_smoothing": 0.1}),
    "weighted": ("classification", {"weights": WEIGHTS}),
    "a class of no weight": ("classification", {"weights": (0.0, 1.0, 1.0)}),
    "weighted and smoothed": ("classification", {"weights": WEIGHTS, "label_smoothing": 0.1}),
    "focal": ("classification", {"name": "focal", "weights": WEIGHTS, "gamma": 1.5}),
    "multilabel": ("multilabel", {}),
    "pos_weight": ("multilabel", {"positive": WEIGHTS}),
    "both terms weighted": ("multilabel", {"name": "weighted_bce", "positive": WEIGHTS, "negative": (2.0, 0.0, 0.5)}),
    "focal of labels": ("multilabel", {"name": "focal", "alpha": 0.25}),
    "focal and bce": ("multilabel", {"name": "focal_bce", "gamma": 1.0}),
    "segmentation": ("segmentation", {}),
    "voxels": ("segmentation", {"name": "cross_entropy", "weights": WEIGHTS, "label_smoothing": 0.1}),
    "a voxel class of no weight": ("segmentation", {"weights": (1.0, 1.0, 0.0)}),
    "an ignored class": ("segmentation", {"ignore": ["three"]}),
    "dice": ("segmentation", {"name": "dice", "include_background": True}),
    "focal of voxels": ("segmentation", {"name": "focal", "ignore": ["one"]}),
}


def test_every_loss_of_every_task_is_among_the_cases() -> None:
    cases = {(task, toy(task, **options)._options.name) for task, options in CASES.values()}  # type: ignore[attr-defined]
    assert cases == {(task, loss) for task, losses in LOSSES.items() for loss in losses}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_of_single_samples_and_in_float32(case: str, dtype: torch.dtype) -> None:
    name, options = CASES[case]
    task, (outputs, targets) = toy(name, **options), samples(name, 6)
    outputs = outputs.to(dtype)
    losses = task.losses(outputs, targets)
    assert losses.shape == (6,) and losses.dtype == torch.float32 and torch.isfinite(losses).all() and losses.any()
    alone = [task.loss(outputs[k : k + 1], targets[k : k + 1]) for k in range(6)]
    torch.testing.assert_close(losses, torch.stack(alone))
    whole = task.loss(outputs, targets)
    assert whole.shape == () and whole.dtype == torch.float32
    torch.testing.assert_close(whole, losses.sum() / 6)
    assert task.probabilities(outputs).dtype == torch.float32 and task.probabilities(outputs).shape == outputs.shape


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradient_of_accumulated_parts_is_that_of_the_whole(case: str, parts: int) -> None:
    name, options = CASES[case]
    task, (whole, targets) = toy(name, **options), samples(name, 12, seed=4)
    whole.requires_grad_()
    task.loss(whole, targets).backward()
    apart = whole.detach().clone().requires_grad_()
    for x, y in zip(apart.chunk(parts), targets.chunk(parts), strict=True):
        (task.loss(x, y) / parts).backward()
    assert whole.grad is not None and apart.grad is not None and whole.grad.any()
    torch.testing.assert_close(apart.grad, whole.grad)


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_depend_on_how_the_samples_are_cut(case: str) -> None:
    name, options = CASES[case]
    task, (outputs, targets) = toy(name, **options), samples(name, 15, seed=3)
    whole, stored = seen(task, outputs, targets, [15])
    for sizes in ([1] * 15, [4, 4, 4, 3], [15, 0], [2, 13]):
        cut, rows = seen(task, outputs, targets, sizes)
        assert torch.equal(cut.cells, whole.cells) and cut.samples == 15
        assert float(cut.loss) == pytest.approx(float(whole.loss), rel=1e-6), f"batches of {sizes}"
        assert np.array_equal(rows.samples, stored.samples) and len(rows) == 15
        np.testing.assert_allclose(rows.rows, stored.rows, rtol=1e-6)
        np.testing.assert_allclose(rows.losses, stored.losses, rtol=1e-5)
    ranks = [seen(task, outputs[rank::4], targets[rank::4], [len(outputs[rank::4])])[0] for rank in range(4)]
    assert torch.equal(torch.stack([counts.cells for counts in ranks]).sum(0), whole.cells)
    assert sum(float(counts.loss) for counts in ranks) == pytest.approx(float(whole.loss), rel=1e-6)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_metric_has_a_direction_and_can_be_monitored(name: str) -> None:
    task, (outputs, targets) = toy(name), samples(name, 9)
    scores = scores_of(task, outputs, targets)
    found = scores.metrics()
    assert set(found) == set(DIRECTIONS[name]) and all(isinstance(value, float) for value in found.values())
    assert scores.task == name == task.name and scores.samples == 9
    counts, _ = seen(task, outputs, targets, [9])
    without = task.scores(counts.cells.numpy(), found["loss"], 9, None)
    assert STEP_METRIC[name] in without.metrics() and DEFAULT_MONITOR[name] in DIRECTIONS[name]
    assert without.metrics().items() <= found.items(), "training shows the same numbers where it has them"
    assert set(scores.baseline) <= set(found) - {"loss"} and DEFAULT_MONITOR[name] in scores.baseline
    rows = scores.per_class()
    assert [row["name"] for row in rows] == list(task.class_names)
    assert all(isinstance(row["support"], int) and 0 <= row["recall"] <= 1 for row in rows)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_no_sample_has_rows_of_no_sample(name: str) -> None:
    task, (outputs, targets) = toy(name), samples(name, 3)
    kept, rows = task.nothing()
    assert rows.shape[1:] == task.rows(outputs, targets).shape[1:]
    assert rows.dtype == task.rows(outputs, targets).dtype and len(kept) == 0
    found = scores_of(task, *samples(name, 0))
    assert found.samples == 0 and not any(value > 0 for value in found.metrics().values())


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_state_of_counts_comes_back_bit_by_bit(name: str) -> None:
    task, (outputs, targets) = toy(name), samples(name, 7)
    counts, _ = seen(task, outputs, targets, [3, 4])
    other, _ = seen(task, *samples(name, 0), [0])
    other.load(counts.state())
    assert torch.equal(other.cells, counts.cells) and torch.equal(other.loss, counts.loss) and other.samples == 7


OUTPUTS = [
    ("classification", (2, 4), "(4,)", "(3,)"),
    ("classification", (2, 3, 5), "(3, 5)", "(3,)"),
    ("multilabel", (2, 1), "(1,)", "(3,)"),
    ("segmentation", (2, 3), "(3,)", "(3, 8, 8)"),
    ("segmentation", (2, 3, 4, 4), "(3, 4, 4)", "(3, 8, 8)"),
]


@pytest.mark.parametrize(("name", "shape", "given", "wanted"), OUTPUTS)
def test_outputs_that_do_not_fit_are_told(name: str, shape: tuple[int, ...], given: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        toy(name).check_outputs(shape, (2, 1, 8, 8))
    assert given in str(caught.value) and wanted in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_outputs_that_fit_are_let_through(name: str) -> None:
    toy(name).check_outputs((2, 3, 8, 8) if name == "segmentation" else (2, 3), (2, 1, 8, 8))


# What a task does not have is refused, in a line that names what it has.

REFUSED = [
    ("multilabel", {"name": "cross_entropy"}, ["cross_entropy", "multilabel", "bce, weighted_bce, focal, focal_bce"]),
    ("classification", {"name": "dice"}, ["dice", "cross_entropy, focal"]),
    ("multilabel", {"class_weights": "balanced"}, ["class_weights", "bce", "task classification, task segmentation"]),
    ("classification", {"pos_weight": "balanced"}, ["pos_weight", "cross_entropy", "task multilabel"]),
    ("classification", {"gamma": 3.0}, ["gamma", "cross_entropy", "belongs to focal"]),
    ("multilabel", {"name": "weighted_bce", "pos_weight": [1.0]}, ["pos_weight", "weighted_bce", "bce"]),
    ("classification", {"ignore": ["a"]}, ["ignore", "task segmentation"]),
    ("segmentation", {"name": "dice", "class_weights": [1.0]}, ["class_weights", "dice_ce, cross_entropy, focal"]),
    ("segmentation", {"alpha": 0.5}, ["alpha", "dice_ce", "task multilabel"]),
]


@pytest.mark.parametrize(("task", "loss", "words"), REFUSED)
def test_what_a_task_does_not_have_is_refused(task: str, loss: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Loss(**loss).of_task(task)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value
