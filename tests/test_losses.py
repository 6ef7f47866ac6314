"""Each loss against a reference: torch's, torchvision's, MONAI's, or the formula of its paper in NumPy."""

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from jobs.tasks import losses
from tests.toy_tasks import samples, toy

WEIGHTS = (0.2, 1.0, 3.0)


def close(found: torch.Tensor, wanted: object) -> None:
    torch.testing.assert_close(found.double(), torch.as_tensor(wanted).double(), rtol=1e-5, atol=1e-6)


def softmax(logits: torch.Tensor) -> np.ndarray:
    exponents = np.exp(logits.double().numpy())
    return exponents / exponents.sum(1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_torchs_summed_and_divided_by_the_samples(smoothing: float, weights: object) -> None:
    outputs, targets = samples("classification", 9)
    tensor = None if weights is None else torch.tensor(weights)
    wanted = functional.cross_entropy(outputs, targets, tensor, label_smoothing=smoothing, reduction="sum") / 9
    close(toy("classification", weights=weights, label_smoothing=smoothing).loss(outputs, targets), wanted)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_the_papers(gamma: float) -> None:
    outputs, targets = samples("classification", 9)
    p = softmax(outputs)[np.arange(9), targets]
    wanted = np.array(WEIGHTS)[targets] * (1 - p) ** gamma * -np.log(p)
    close(toy("classification", name="focal", gamma=gamma, weights=WEIGHTS).losses(outputs, targets), wanted)


def test_focal_of_gamma_0_is_cross_entropy() -> None:
    outputs, targets = samples("classification", 9)
    focal = toy("classification", name="focal", gamma=0.0, weights=WEIGHTS)
    close(focal.losses(outputs, targets), toy("classification", weights=WEIGHTS).losses(outputs, targets))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_of_a_sample_beyond_doubt_has_a_finite_gradient(gamma: float) -> None:
    outputs = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    losses.focal(outputs, torch.tensor([0, 0]), None, gamma).sum().backward()
    labels = torch.tensor([[200.0, -200.0]], requires_grad=True)
    losses.binary_focal(labels, torch.tensor([[1, 1]]), gamma, None).sum().backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()
    assert labels.grad is not None and torch.isfinite(labels.grad).all()


@pytest.mark.parametrize("positive", [None, WEIGHTS])
def test_bce_is_torchs(positive: object) -> None:
    outputs, targets = samples("multilabel", 9)
    tensor = None if positive is None else torch.tensor(positive)
    wanted = functional.binary_cross_entropy_with_logits(outputs, targets.float(), pos_weight=tensor)
    close(toy("multilabel", positive=positive).loss(outputs, targets), wanted)


def test_weighted_bce_weighs_both_terms() -> None:
    outputs, targets = samples("multilabel", 9)
    positive, negative = np.array(WEIGHTS), np.array([2.0, 0.0, 0.5])
    p, y = 1 / (1 + np.exp(-outputs.double().numpy())), targets.numpy()
    wanted = -(positive * y * np.log(p) + negative * (1 - y) * np.log(1 - p)).mean(1)
    task = toy("multilabel", name="weighted_bce", positive=tuple(positive), negative=tuple(negative))
    close(task.losses(outputs, targets), wanted)


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_of_labels_is_torchvisions(alpha: float | None) -> None:
    outputs, targets = samples("multilabel", 9)
    wanted = sigmoid_focal_loss(outputs, targets.float(), -1 if alpha is None else alpha, 1.5).mean(1)
    close(toy("multilabel", name="focal", gamma=1.5, alpha=alpha).losses(outputs, targets), wanted)
    both = toy("multilabel", name="focal_bce", gamma=1.5, alpha=alpha).losses(outputs, targets)
    close(both, wanted + toy("multilabel").losses(outputs, targets))


# Label maps.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_voxels_is_the_mean_of_those_that_count(smoothing: float) -> None:
    outputs, targets = samples("segmentation", 4)
    task = toy("segmentation", name="cross_entropy", weights=WEIGHTS, label_smoothing=smoothing)
    voxels = functional.cross_entropy(
        outputs,
        targets.long(),
        torch.tensor(WEIGHTS),
        ignore_index=255,
        label_smoothing=smoothing,
        reduction="none",
    )
    close(task.losses(outputs, targets), voxels.sum((1, 2)) / (targets != 255).sum((1, 2)))


def test_focal_of_voxels_is_the_papers() -> None:
    outputs, targets = samples("segmentation", 4)
    p = torch.from_numpy(softmax(outputs)).gather(1, targets.long().clamp(max=2)[:, None])[:, 0]
    known = targets != 255
    wanted = torch.where(known, (1 - p) ** 2 * -p.log(), 0).sum((1, 2)) / known.sum((1, 2))
    close(toy("segmentation", name="focal").losses(outputs, targets), wanted)


@pytest.mark.parametrize("background", [False, True])
def test_dice_is_monais_where_all_voxels_count(background: bool) -> None:
    outputs, targets = samples("segmentation", 4)
    targets[targets == 255] = 0
    targets[0] = 0  # no foreground at all
    reference = DiceLoss(
        include_background=background, to_onehot_y=True, softmax=True, reduction="none", smooth_nr=1e-5, smooth_dr=1e-5
    )
    wanted = reference(outputs, targets[:, None].long()).flatten(1).mean(1)
    close(toy("segmentation", name="dice", include_background=background).losses(outputs, targets), wanted)


def test_dice_and_cross_entropy_are_added() -> None:
    outputs, targets = samples("segmentation", 4)
    apart = [toy("segmentation", name=name).losses(outputs, targets) for name in ("dice", "cross_entropy")]
    close(toy("segmentation").losses(outputs, targets), apart[0] + apart[1])


NAMES = ["dice", "cross_entropy", "focal", "dice_ce"]


@pytest.mark.parametrize("name", NAMES)
def test_voxels_that_do_not_count_change_nothing(name: str) -> None:
    """Whatever the network says there: of 255, of an ignored class, and they have no gradient."""
    task = toy("segmentation", name=name, ignore=["three"])
    outputs, targets = samples("segmentation", 4)
    hidden = ((targets == 255) | (targets == 2))[:, None].expand_as(outputs)
    other = torch.where(hidden, torch.randn_like(outputs), outputs).requires_grad_()
    close(task.losses(outputs, targets), task.losses(other, targets).detach())
    assert torch.equal(task.count(outputs, targets), task.count(other, targets))
    task.loss(other, targets).backward()
    assert other.grad is not None and not other.grad[hidden].any() and other.grad[~hidden].any()
    assert not task.count(outputs, targets).view(3, 3)[2].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_map_of_255_alone_has_a_finite_loss_without_gradient(name: str) -> None:
    outputs, targets = torch.randn(1, 3, 4, 5, requires_grad=True), torch.full((1, 4, 5), 255, dtype=torch.uint8)
    loss = toy("segmentation", name=name).loss(outputs, targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6) and outputs.grad is not None and not outputs.grad.any()


def test_volumes_have_the_loss_of_their_slices() -> None:
    """Three spatial axes, as two."""
    outputs, targets = samples("segmentation", 2)
    task = toy("segmentation")
    deep = task.losses(outputs.unsqueeze(-1), targets.unsqueeze(-1))
    close(deep, task.losses(outputs, targets))
