"""The floor of a training step: FLOPs and bytes by hand, and the page that shows them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hpc import instances
from hpc.errors import UserError
from jobs.flops import counter
from jobs.memory import Step, estimate
from jobs.roofline import Traffic, floor, main, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
A100 = instances.find("cedia-a100-40gb")


def traffic(model: nn.Module, shape: tuple[int, ...]) -> Traffic:
    found = Traffic()
    estimate(model, shape, Step(loss=lambda outputs, _: outputs.sum(), watched=found))
    return found


def test_a_linear_layer_by_hand() -> None:
    rows = traffic(nn.Linear(100, 50, bias=False), (8, 100)).rows
    x, w, y = 8 * 100, 50 * 100, 8 * 50
    products = [row for row in rows if row[2]]
    assert [row[2] for row in products] == [2 * 8 * 100 * 50] * 2, "forward, and the gradient of the weight"
    assert products[0][3] == 4 * (x + w + y)
    # the gradient of a sum is one number, expanded: it is read as such
    assert products[1][3] == 4 * (x + w + 1)
    assert sum(row[3] for row in rows if row[0] == "sum") == 4 * (y + 1)


def test_what_moves_no_bytes_and_what_moves_them_in_place() -> None:
    with Traffic() as found:
        x = torch.ones(10, 10)
        x.t().reshape(100).view(10, 10)[2:]
        x.add_(1.0)
    sizes = [(name, size) for name, _, _, size in found.rows]
    assert ("add_", 2 * 400) in sizes
    assert not {"t", "view", "slice", "empty"} & {name for name, _ in sizes}


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_conv_is_three_times_its_forward_pass_with_backward(kind: type[nn.Conv3d], groups: int) -> None:
    first, second = (kind(4, 4, 3, padding=1, groups=groups, bias=False) for _ in range(2))
    model = nn.Sequential(first, second)
    flops = [row[2] for row in traffic(model, (1, 4, 8, 8, 8)).rows if row[2]]
    one = 2 * 4 * 4 * 27 * 8**3 // groups
    assert flops == [one, one, 2 * one, one], "the first conv needs no gradient of its input"
    with counter() as counted:
        model(torch.ones(1, 4, 8, 8, 8)).sum().backward()
    assert counted.get_total_flops() == 5 * one


@pytest.mark.parametrize(("name", "checkpoint"), [("resnet3d", False), ("resnet3d", True), ("transformer3d", False)])
def test_the_page_shows_what_the_code_says(name: str, checkpoint: bool) -> None:
    """Those that are recommended; all rows are those of `python -m jobs.roofline`."""
    (row,) = table([floor(name, "bf16", checkpoint, A100)]).replace("**", "").splitlines()[2:]
    shown = PAGE.read_text()
    assert row in shown.replace("**", ""), f"docs/performance.md is older than the code; now: {row}"
    bold = f"| **`{name}`** | **bf16** | **{'on' if checkpoint else 'off'}** |"
    assert (bold in shown) is not checkpoint


def test_an_instance_that_does_not_say_what_its_gpu_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="gpu_tflops with fp32, tf32 and bf16"):
        floor("resnet3d", "bf16", False, A100.model_copy(update={"gpu_tflops": None}))
    assert main(["--instance", "cedia-a100"]) == 2
    assert "did you mean" in capsys.readouterr().err
