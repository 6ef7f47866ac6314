"""Classification's metrics against scikit-learn's, exact over batches and ranks; the loss likewise."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from sklearn.utils.class_weight import compute_class_weight

from hpc.training import Loss
from jobs.tasks.classification import DIRECTION, METRICS, Classification, Counts, Scores, class_weights

CPU = torch.device("cpu")


@st.composite
def samples(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Classes (1 to 6), truths and predictions of 1 to 40 samples; some classes never occur."""
    classes = draw(st.integers(1, 6))
    occurring = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=3))
    size = draw(st.integers(1, 40))
    truths = draw(st.lists(st.sampled_from(occurring), min_size=size, max_size=size))
    calls = draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size))
    return classes, truths, calls


def matrix_of(classes: int, truths: list[int], calls: list[int]) -> np.ndarray:
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (truths, calls), 1)
    return matrix


@given(samples())
@settings(deadline=None)
def test_metrics_are_those_of_scikit_learn(given_samples: tuple[int, list[int], list[int]]) -> None:
    classes, truths, calls = given_samples
    scores = Scores(matrix_of(classes, truths, calls), 0.25)
    found = scores.metrics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that only the predictions have
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(truths, calls),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truths, calls),
            "f1_macro": sklearn_metrics.f1_score(truths, calls, average="macro", zero_division=0),
            "loss": 0.25,
        }
        labels = list(range(classes))
        columns = sklearn_metrics.precision_recall_fscore_support(truths, calls, labels=labels, zero_division=0)
    assert found == pytest.approx(expected)
    table = scores.per_class([f"class {label}" for label in labels])
    for key, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[key] for row in table] == pytest.approx(list(column))
    assert [row["name"] for row in table] == [f"class {label}" for label in labels]
    assert scores.samples == len(truths)
    assert scores.majority == pytest.approx(np.bincount(truths).max() / len(truths))


def test_no_sample_at_all_is_no_error() -> None:
    scores = Scores(np.zeros((3, 3), dtype=np.int64), 0.0)
    assert scores.metrics() == {"accuracy": 0.0, "balanced_accuracy": 0.0, "f1_macro": 0.0, "loss": 0.0}
    assert (scores.samples, scores.majority) == (0, 0.0)


def test_every_metric_has_a_direction_and_is_offered_as_a_monitor() -> None:
    found = Scores(np.eye(2, dtype=np.int64), 0.0).metrics()
    assert set(found) == set(METRICS) == set(DIRECTION)


# Counts: however the samples are cut into batches and ranks, the sum is the same.

LOSSES = {
    "plain": Loss(),
    "smoothed": Loss(label_smoothing=0.1),
    "weighted": Loss(class_weights=[0.2, 1.0, 3.0]),
    "a class of no weight": Loss(class_weights=[0.0, 1.0, 1.0]),
    "weighted and smoothed": Loss(class_weights=[0.2, 1.0, 3.0], label_smoothing=0.1),
}


def count(task: Classification, outputs: torch.Tensor, targets: torch.Tensor, sizes: list[int]) -> Counts:
    counts = Counts(3, CPU)
    for x, y in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        if len(y):
            counts.add(x, y, task.loss(x, y))
    return counts


@pytest.mark.parametrize("name", LOSSES)
def test_counts_do_not_depend_on_how_the_samples_are_cut(name: str) -> None:
    task = Classification(LOSSES[name], class_weights(LOSSES[name], [5, 5, 5]), CPU)
    torch.manual_seed(3)
    outputs, targets = torch.randn(15, 3), torch.tensor([0, 0, 0, 1, 2] * 3)
    whole = count(task, outputs, targets, [15])
    assert int(whole.matrix.sum()) == 15 and torch.isfinite(whole.loss)
    for sizes in ([1] * 15, [4, 4, 4, 3], [15, 0], [2, 13]):
        cut = count(task, outputs, targets, sizes)
        assert torch.equal(cut.matrix, whole.matrix)
        assert float(cut.loss) == pytest.approx(float(whole.loss), rel=1e-6), f"batches of {sizes}"
    ranks = [count(task, outputs[rank::4], targets[rank::4], [len(outputs[rank::4])]) for rank in range(4)]
    assert torch.equal(sum(counts.matrix for counts in ranks), whole.matrix)
    assert sum(float(counts.loss) for counts in ranks) == pytest.approx(float(whole.loss), rel=1e-6)


def test_counts_place_truth_in_rows() -> None:
    counts = Counts(3, CPU)
    counts.add(torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]), torch.tensor([0, 2]), torch.tensor(1.5))
    assert counts.matrix.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert float(counts.loss) == 3.0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradient_of_accumulated_parts_is_that_of_the_whole(name: str, parts: int) -> None:
    task = Classification(LOSSES[name], class_weights(LOSSES[name], [5, 5, 5]), CPU)
    torch.manual_seed(4)
    whole = torch.randn(12, 3, requires_grad=True)
    targets = torch.tensor([0] * 6 + [1, 2] * 3)
    task.loss(whole, targets).backward()
    apart = whole.detach().clone().requires_grad_()
    for x, y in zip(apart.chunk(parts), targets.chunk(parts), strict=True):
        (task.loss(x, y) / parts).backward()
    assert whole.grad is not None and apart.grad is not None
    torch.testing.assert_close(apart.grad, whole.grad)


def test_the_loss_without_weights_is_cross_entropy_in_fp32() -> None:
    outputs, targets = torch.randn(5, 3).bfloat16(), torch.tensor([0, 1, 2, 0, 1])
    loss = Classification(Loss(), None, CPU).loss(outputs, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(outputs.float(), targets))


def test_a_batch_of_only_unweighted_samples_has_a_finite_loss() -> None:
    task = Classification(Loss(class_weights=[0.0, 1.0]), [0.0, 1.0], CPU)
    assert float(task.loss(torch.randn(2, 2), torch.tensor([0, 0]))) == 0.0


# Weights of classes.


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 10 + [1] * 3 + [2] * 7
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(Loss(class_weights="balanced"), [10, 3, 7]) == pytest.approx(list(expected))


def test_a_class_that_never_occurs_gets_no_weight() -> None:
    found = class_weights(Loss(class_weights="balanced"), [10, 0, 5])
    assert found == pytest.approx([15 / 20, 0.0, 15 / 10])


def test_balanced_weights_leave_the_mean_at_one() -> None:
    counts = [40, 8, 2]
    found = class_weights(Loss(class_weights="balanced"), counts)
    assert found and sum(w * n for w, n in zip(found, counts, strict=True)) / 50 == pytest.approx(1.0)


def test_given_weights_count() -> None:
    assert class_weights(Loss(), [3, 4]) is None
    assert class_weights(Loss(class_weights=[1, 2]), [3, 4]) == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"class_weights has 3 weights, but the data has 2 classes"):
        class_weights(Loss(class_weights=[1, 2, 3]), [3, 4])
