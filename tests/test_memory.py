"""The estimate of a step's memory beside what torch's profiler sees a real step allocate."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hpc.optimisation import Ema as EmaSettings
from hpc.training import Optimizer
from jobs.cuda_casts import CudaCasts
from jobs.ema import Ema
from jobs.memory import Estimate, Shards, Step, estimate, largest_batch
from jobs.optimize import build_optimizer
from models3d import create_model, takes
from tests.tiny_run import CONTEXT

ADAMW = partial(build_optimizer, Optimizer(name="adamw"))
SGD = partial(build_optimizer, Optimizer(name="sgd"))


def made(name: str, shape: tuple[int, ...], **options: object) -> nn.Module:
    size = {"input_size": shape[2:]} if "input_size" in takes(name) else {}
    return create_model(name, shape[1], 3, **size, **options).train()


def estimated(name: str, shape: tuple[int, ...], step: Step, **options: object) -> Estimate:
    with torch.device("meta"):
        model = made(name, shape, **options)
    return estimate(model, shape, step)


@cache
def aside() -> ProcessPoolExecutor:
    """A process of its own: should torch's profiler crash it, a test fails, and the others go on in another."""
    return ProcessPoolExecutor(1, mp_context=CONTEXT)


@pytest.fixture(autouse=True, scope="module")
def _ends_aside() -> Iterator[None]:
    yield
    aside().shutdown()
    aside.cache_clear()


def measured(name: str, shape: tuple[int, ...], step: Step, **options: object) -> int:
    """Bytes at the peak of the second step, by the profiler's events of the CPU allocator."""
    try:
        return aside().submit(profiled, name, shape, step, **options).result()
    except BrokenProcessPool:
        aside.cache_clear()
        raise


def profiled(name: str, shape: tuple[int, ...], step: Step, **options: object) -> int:
    torch.set_num_threads(1)  # oneDNN's convolutions take other workspace on more
    torch.manual_seed(0)
    model = made(name, shape, **options)
    optimizer = step.optimizer(model) if step.optimizer else None

    average = Ema(EmaSettings(), model) if step.ema else None

    def run() -> None:
        x = torch.randn(shape[0] * step.passes, *shape[1:])
        for part in x.chunk(step.passes):
            with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bf16"):
                y = model(part)
            F.cross_entropy(y.float(), torch.zeros(len(y), *y.shape[2:], dtype=torch.long)).backward()
            del y
        if optimizer:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if average:
            average.update()

    run()
    states = optimizer.state.values() if optimizer else ()
    held = [*model.parameters(), *model.buffers(), *(v for state in states for v in state.values() if v is not None)]
    held += [*average.model.parameters(), *average.model.buffers()] if average else []
    return sum(tensor.untyped_storage().nbytes() for tensor in held) + allocated(run)


def allocated(run: Callable[[], object]) -> int:
    """Bytes at the peak, beside what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


SEEDS = [("resnet3d", (1, 1, n, n, n)) for n in (16, 24, 32)]
SEEDS += [("transformer3d", (1, 1, n, n, 10)) for n in (30, 60, 90)]


@pytest.mark.parametrize(("name", "shape"), SEEDS, ids=str)
def test_the_seeds_networks_at_three_sizes(name: str, shape: tuple[int, ...]) -> None:
    step = Step(optimizer=ADAMW)
    assert estimated(name, shape, step).peak == pytest.approx(measured(name, shape, step), rel=0.05)


FULL: list[tuple[str, tuple[int, ...], dict[str, Any], Step]] = [
    ("resnet3d", (2, 1, 16, 16, 16), {}, Step(optimizer=ADAMW, precision="bf16")),
    ("resnet3d", (1, 1, 24, 24, 24), {"checkpoint": True}, Step(optimizer=ADAMW, precision="bf16", ema=True)),
    ("resnet3d", (1, 1, 16, 16, 16), {}, Step(optimizer=SGD, passes=2)),
    ("transformer3d", (2, 1, 30, 30, 10), {}, Step(optimizer=ADAMW, precision="bf16", ema=True)),
    ("transformer3d", (2, 1, 30, 30, 10), {"checkpoint": True}, Step(optimizer=ADAMW)),
    ("transformer3d", (2, 1, 30, 30, 10), {}, Step(optimizer=ADAMW, passes=3)),
]


@pytest.mark.parametrize(("name", "shape", "options", "step"), FULL, ids=[str(number) for number in range(len(FULL))])
def test_the_seeds_networks_in_other_ways(
    name: str, shape: tuple[int, ...], options: dict[str, Any], step: Step
) -> None:
    found = estimated(name, shape, step, **options).peak
    assert found == pytest.approx(measured(name, shape, step, **options), rel=0.1)


WAYS: list[tuple[str, tuple[int, ...], dict[str, Any], Step]] = [
    ("resnet3d", (2, 1, 24, 24, 24), {"hidden": [8]}, Step(optimizer=SGD, precision="bf16")),
    ("resnet3d", (2, 1, 24, 24, 24), {"hidden": [8], "checkpoint": True}, Step(optimizer=ADAMW)),
    ("transformer3d", (8, 1, 60, 60, 10), {"depth": 6, "checkpoint": True}, Step(optimizer=ADAMW, precision="bf16")),
    ("transformer3d", (8, 1, 60, 60, 10), {"depth": 6, "drop_path": 0.1}, Step(precision="bf16")),
    ("resnet3d_18", (2, 1, 48, 48, 48), {"width": 16}, Step(optimizer=ADAMW)),
    ("unet3d", (2, 1, 48, 48, 40), {"depth": 4, "width": 8}, Step(optimizer=SGD)),
    ("unet3d", (2, 1, 48, 48, 40), {"depth": 4, "width": 8, "checkpoint": True}, Step(optimizer=SGD)),
    ("unet2d", (2, 3, 96, 96), {"depth": 4, "width": 16}, Step(optimizer=ADAMW)),
    ("timm:test_vit", (4, 3, 160, 160), {}, Step(optimizer=ADAMW)),
]


@pytest.mark.parametrize(
    ("name", "shape", "options", "step"),
    [pytest.param(*way, id=way[0] + str(n)) for n, way in enumerate(WAYS)],
)
def test_other_networks_and_ways(name: str, shape: tuple[int, ...], options: dict[str, Any], step: Step) -> None:
    found = estimated(name, shape, step, **options).peak
    assert found == pytest.approx(measured(name, shape, step, **options), rel=0.1)


class Doubled(nn.Module):
    """In fp64, of which oneDNN has no convolution: as in bf16 on a CPU without instructions for it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x.double())
        return found


NATIVE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3d": (lambda: nn.Conv3d(8, 4, 3, padding=1), (3, 8, 10, 10, 10)),
    "strides": (lambda: nn.Conv3d(8, 4, 2, stride=2), (3, 8, 10, 10, 10)),
    "points": (lambda: nn.Conv3d(8, 4, 1), (3, 8, 10, 10, 10)),
    "groups": (lambda: nn.Conv3d(8, 8, 3, padding=1, groups=2), (3, 8, 10, 10, 10)),
    "dilated": (lambda: nn.Conv3d(8, 4, 3, padding=2, dilation=2), (3, 8, 10, 10, 10)),
    "transposed": (lambda: nn.ConvTranspose3d(8, 4, 2, stride=2), (3, 8, 10, 10, 10)),
    "2d": (lambda: nn.Conv2d(8, 4, 3, padding=1), (3, 8, 40, 40)),
    "2d-dilated": (lambda: nn.Conv2d(8, 4, 3, padding=2, dilation=2), (3, 8, 40, 40)),
    "2d-transposed": (lambda: nn.ConvTranspose2d(8, 4, 2, stride=2), (3, 8, 40, 40)),
}


def step_in_fp64(which: str) -> int:
    torch.set_num_threads(1)
    layer, shape = NATIVE[which]
    model = Doubled(layer())

    def run() -> None:
        x = torch.randn(shape)
        y = model(x)
        F.cross_entropy(y.float(), torch.zeros(len(y), *y.shape[2:], dtype=torch.long)).backward()
        del y
        model.zero_grad(set_to_none=True)

    run()
    return sum(p.nbytes for p in model.parameters()) + allocated(run)


@pytest.mark.parametrize("which", NATIVE)
def test_convolutions_without_onednn_unfold_their_input(which: str) -> None:
    layer, shape = NATIVE[which]
    assert estimate(Doubled(layer()), shape).peak == pytest.approx(
        aside().submit(step_in_fp64, which).result(), rel=0.01
    )


def test_the_parts_are_what_they_are_by_hand() -> None:
    """A linear layer: input and output are kept, nothing else."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 10))
    weights = 4 * (1000 * 2000 + 2000 + 2000 * 10 + 10)
    found = estimate(model, (64, 1000), Step(optimizer=ADAMW), groups=["0", "2"])
    assert (found.parameters, found.gradients, found.buffers) == (weights, weights, 0)
    assert found.optimizer == 2 * weights + 4 * 4
    assert found.inputs == 4 * 64 * 1000
    # of ReLU its output is kept, which the last layer keeps too; its input is freed
    assert found.activations == 4 * 64 * (2000 + 10)
    assert found.groups == {"2": 4 * 64 * 10}
    # AdamW's denominator and the root that it is made of, for the largest weight, beside batch and outputs
    assert found.peak == found.fixed + 4 * 64 * (1000 + 10) + 2 * 4 * 1000 * 2000


def test_what_changes_memory_changes_the_estimate() -> None:
    shape = (2, 1, 32, 32, 32)
    plain = estimated("unet3d_tiny", shape, Step(optimizer=ADAMW))
    assert estimated("unet3d_tiny", shape, Step()).optimizer == 0
    half = estimated("unet3d_tiny", shape, Step(optimizer=SGD)).optimizer
    assert half == pytest.approx(plain.optimizer / 2, rel=0.01)
    assert estimated("unet3d_tiny", shape, Step(precision="bf16")).activations < 0.7 * plain.activations
    assert estimated("unet3d_tiny", shape, Step(), checkpoint=True).peak < 0.8 * plain.peak
    small = (2, 1, 8, 8, 8)
    cuda = estimated("resnet3d_tiny", small, Step(optimizer=ADAMW, device="cuda"))
    assert cuda.parameters % 512 == 0 and cuda.peak > estimated("resnet3d_tiny", small, Step(optimizer=ADAMW)).peak


LAYERS: list[tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = [
    (nn.Conv3d(4, 4, 2), (2, 4, 8, 8, 8)),
    (nn.ConvTranspose2d(4, 4, 2), (2, 4, 8, 8)),
    (nn.Linear(8, 8), (2, 8)),
    (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 4, 8, 8)),
    (nn.BatchNorm3d(4), (2, 4, 8, 8, 8)),
    (nn.InstanceNorm3d(4), (2, 4, 8, 8, 8)),
    (nn.GroupNorm(2, 4), (2, 4, 8, 8, 8)),
    (nn.LayerNorm(8), (2, 4, 8)),
    (nn.MaxPool3d(2), (2, 4, 8, 8, 8)),
    (nn.AvgPool3d(2), (2, 4, 8, 8, 8)),
    (nn.AdaptiveAvgPool3d(2), (2, 4, 8, 8, 8)),
    (nn.AdaptiveAvgPool2d(1), (2, 4, 8, 8)),
    (lambda x: x.softmax(-1), (2, 4, 8)),
    (lambda x: x.sum(-1), (2, 4, 8)),
    (lambda x: x.mean((2, 3)), (2, 4, 8, 8)),
    (lambda x: F.interpolate(x, scale_factor=2), (2, 4, 8, 8, 8)),
    (nn.GELU(), (2, 4, 8)),
    (nn.LeakyReLU(), (2, 4, 8)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(number) for number in range(len(LAYERS))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_are_those_of_autocast_on_cuda(
    layer: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Beside torch's own dispatch for tensors that only say that they are on CUDA."""
    with FakeTensorMode(), torch.no_grad():
        there, here = (copy.deepcopy(layer, _on(device, layer)) for device in ("cuda", "cpu"))
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            wanted = there(torch.empty(shape, dtype=dtype, device="cuda")).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16), CudaCasts():
            assert here(torch.empty(shape, dtype=dtype)).dtype == wanted


def _on(device: str, layer: object) -> dict[int, object]:
    """Fake tensors on a device for those of a layer, for deepcopy."""
    tensors = [*layer.parameters(), *layer.buffers()] if isinstance(layer, nn.Module) else []
    return {id(t): torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors}


@pytest.mark.parametrize("name", ["resnet3d_tiny", "unet3d_tiny", "transformer3d_tiny"])
def test_checkpointing_under_the_casts_of_cuda(name: str) -> None:
    shape = (4, 1, 24, 24, 24)
    ways = [estimated(name, shape, Step(precision="bf16", device="cuda"), checkpoint=on) for on in (True, False)]
    assert ways[0].activations < ways[1].activations


def test_frozen_weights_have_no_gradient_and_no_state() -> None:
    with torch.device("meta"):
        model = create_model("resnet3d_tiny")
    for parameter in model.layers.parameters():
        parameter.requires_grad = False
    found = estimate(model, (2, 1, 24, 24, 24), Step(optimizer=ADAMW))
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert found.gradients == trained and found.optimizer == pytest.approx(2 * trained, abs=400)
    assert all(p.is_meta and p.grad is None for p in model.parameters())


def test_groups_make_up_the_activations() -> None:
    with torch.device("meta"):
        model = create_model("resnet3d_tiny")
    names = ["stem", *[f"layers.{name}" for name, _ in model.layers.named_children()], "head"]
    found = estimate(model, (2, 1, 24, 24, 24), groups=names)
    assert list(found.groups) == names and 0.98 * found.activations < sum(found.groups.values()) <= found.activations


@pytest.mark.parametrize(
    "peak",
    [lambda n: 100 + 7 * n, lambda n: max(500 + n, 9 * n), lambda n: 100 + 7 * n + 3 * (n % 2), lambda n: 990 + n],
)
@pytest.mark.parametrize("memory", [50, 107, 113, 114, 999, 1000, 12345])
def test_the_largest_batch_is_the_last_that_fits(peak: Callable[[int], int], memory: int) -> None:
    asked = []

    def counted(batch: int) -> int:
        asked.append(batch)
        return peak(batch)

    found = largest_batch(counted, memory)
    assert (found == 0 or peak(found) <= memory) and peak(found + 1) > memory
    assert len(asked) == len(set(asked)) <= 12


def test_a_step_that_cannot_be_done_is_one_line() -> None:
    with torch.device("meta"):
        model = create_model("timm:test_vit", 3, 2)
    with pytest.raises(ValueError, match=r"no step with an input of \(1, 3, 33, 33\): ") as caught:
        estimate(model, (1, 3, 33, 33))
    assert "\n" not in str(caught.value)


# Several processes, and the validation.


def test_shards_leave_a_share_of_state_gradients_and_weights() -> None:
    shape, world = (2, 1, 24, 24, 24), 4
    whole = estimated("resnet3d", shape, Step(optimizer=ADAMW))
    by_stage = {
        stage: estimated("resnet3d", shape, Step(optimizer=ADAMW, shards=Shards(world, stage))) for stage in (1, 2, 3)
    }
    assert all(one.optimizer == pytest.approx(whole.optimizer / world, rel=0.001) for one in by_stage.values())
    assert by_stage[1].gradients == whole.gradients and by_stage[2].gradients == whole.gradients // world
    assert by_stage[2].parameters == whole.parameters
    assert by_stage[3].parameters == pytest.approx(whole.parameters / world, rel=0.001)
    head = 4 * (256 * 55296 + 256)
    assert by_stage[3].copies > head, "the largest part is gathered whole"
    assert whole.peak > by_stage[1].peak > by_stage[2].peak
    away = estimated("resnet3d", shape, Step(optimizer=ADAMW, shards=Shards(world, 2, offload=True)))
    assert away.optimizer == away.gradients == 0 and away.peak < by_stage[2].peak


def test_deepspeeds_bucket_and_flat_copies_by_hand() -> None:
    """Of two processes that train 2 x 4 MB with AdamW; real runs came within 1 %."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    whole, small = 8 * 10**6, 2 * 10**6

    def found(stage: int, bucket: int = small, **more: Any) -> Estimate:
        shards = Shards(2, stage, bucket=bucket, **more)
        return estimate(model, (1, 1000), Step(optimizer=ADAMW, shards=shards))

    state = whole / 2 + whole  # master weights and moments of a half
    # in the optimizer's step: the half's gradients, flat ones too, and two temporary tensors of a half
    for stage in (1, 2):
        assert found(stage).peak == pytest.approx(whole + state + 4 * whole / 2, rel=0.01)
    assert found(1, bucket=10 * whole).peak == pytest.approx(whole + state + 2 * whole, rel=0.01), "bucket, gradients"
    kept = small + whole  # of two layers each is the largest, gathered while the other computes
    assert found(3).peak == pytest.approx(whole / 2 + kept + state + 5 * whole / 2, rel=0.01)
    away = found(2, offload=True)
    assert away.optimizer == 0 and away.copies == small and away.peak < 2.5 * whole


def test_an_optimizer_is_taken_over_from_an_estimate_of_the_same_parameters() -> None:
    first = estimated("resnet3d_tiny", (4, 1, 16, 16, 16), Step(optimizer=ADAMW, ema=True))
    for options in ({}, {"checkpoint": True}):
        for step in (Step(optimizer=ADAMW), Step(optimizer=ADAMW, precision="bf16", passes=2, validation=2)):
            anew = estimated("resnet3d_tiny", (1, 1, 8, 8, 8), step, **options)
            taken = estimated("resnet3d_tiny", (1, 1, 8, 8, 8), replace(step, like=first), **options)
            assert taken == anew


def test_gradients_in_shards_by_hand() -> None:
    """Two equal linear layers on a batch of one: weights are all that counts, so the peak can be told."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    layer = 4 * 1000 * 1000
    assert estimate(model, (1, 1000)).peak == pytest.approx(4 * layer, rel=0.01)
    halves = estimate(model, (1, 1000), Step(shards=Shards(2, 2)))
    assert halves.peak == pytest.approx(2 * layer + layer / 2 + layer, rel=0.01), "one is whole, the other reduced"
    buckets = estimate(model, (1, 1000), Step(gradient_copies=1))
    assert buckets.peak == pytest.approx(6 * layer, rel=0.01)


def test_fully_shard_gathers_what_is_in_no_block_and_keeps_gradients_whole_between_passes() -> None:
    shape = (2, 1, 24, 24, 24)
    by_block = Shards(4, 3, by_block=True)
    found = estimated("resnet3d", shape, Step(optimizer=ADAMW, shards=by_block))
    with torch.device("meta"):
        model = create_model("resnet3d", 1, 3)
    block = sum(p.numel() for p in model.layers.layer4[0].parameters())
    rest = sum(p.numel() for part in (model.stem, model.head) for p in part.parameters())
    assert found.copies == 4 * (2 * block + rest)
    several = estimated("resnet3d", shape, Step(optimizer=ADAMW, shards=by_block, passes=2))
    reduced = estimated("resnet3d", shape, Step(optimizer=ADAMW, shards=Shards(4, 3), passes=2))
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert several.peak > several.parameters + several.optimizer + several.copies + whole
    assert several.peak > reduced.peak


def test_a_validation_of_the_whole_batch_may_be_the_peak() -> None:
    shape = (1, 1, 32, 32, 32)
    plain = estimated("unet3d_tiny", shape, Step(passes=64), checkpoint=True)
    both = estimated("unet3d_tiny", shape, Step(passes=64, validation=64), checkpoint=True)
    assert plain.validation == 0 and both.validation == both.peak > plain.peak


def test_checkpointing_the_seeds_resnet_at_full_size_keeps_a_third_or_less() -> None:
    shape = (1, 1, 190, 190, 190)
    plain, less = (estimated("resnet3d", shape, Step(), checkpoint=on).activations for on in (False, True))
    assert plain >= 3 * less
