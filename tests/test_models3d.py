"""Every registered network on the day it is registered; the seeds' exactly. Names: test_models3d_registry.py."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models3d import create_model, example_input, list_models, takes
from models3d._layers import DropPath, adaptive_avg_pool, max_pool
from models3d.transformer3d import PatchConv

TINY = [name for name in list_models() if name.endswith("_tiny")]
ODD = (17, 13, 9)
SEGMENTING = ("unet",)


def odd(name: str) -> tuple[int, ...]:
    """A size of as many axes as the network reads."""
    return ODD[: len(example_input(name)) - 1]


def batch_of(name: str, batch: int = 3, channels: int = 2) -> torch.Tensor:
    return volumes(batch, channels, odd(name))


def make(name: str, seed: int = 0, classes: int = 3, channels: int = 2, **options: object) -> nn.Module:
    size = {"input_size": ODD} if "input_size" in takes(name) else {}
    torch.manual_seed(seed)
    return create_model(name, channels, classes, **(size | options))


def volumes(batch: int = 3, channels: int = 2, size: tuple[int, ...] = ODD) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor, seed: int = 2) -> torch.Tensor:
    """One training forward and backward; the logits."""
    torch.manual_seed(seed)
    y = model.train()(x)
    F.cross_entropy(y.float(), target_of(x, y)).backward()
    return y.detach()


def target_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A class for each sample, or for each voxel where the network scores them."""
    if y.ndim == 2:
        return torch.arange(len(x)) % y.shape[1]
    return (x[:, 0] > 0).long()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- what every registered network keeps ---


def test_every_family_registers_a_tiny_network() -> None:
    with torch.device("meta"):
        kinds = {name: type(create_model(name)) for name in list_models()}
    assert TINY and set(kinds.values()) == {kinds[name] for name in TINY}


@pytest.mark.parametrize("name", [name for name in list_models() if name not in TINY])
def test_at_full_size_it_steps_repeats_and_is_restored(name: str) -> None:
    norm = {"norm": "batch"} if name.startswith(SEGMENTING) else {}  # one voxel is left at the lowest resolution
    model, other = make(name, **norm), make(name, **norm)
    assert same(model.state_dict(), other.state_dict())
    y = step(model, batch_of(name))
    assert y.shape == (3, 3, *(odd(name) if name.startswith(SEGMENTING) else ())) and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(9)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(batch_of(name)), other.eval()(batch_of(name)))


@pytest.mark.parametrize("name", TINY)
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = make(name)
    y = step(model, batch_of(name))
    assert y.shape == (3, 3, *(odd(name) if name.startswith(SEGMENTING) else ())) and y.isfinite().all()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    zero = [n for n, g in gradients(model).items() if not g.any()]
    assert not missing and not zero


@pytest.mark.parametrize("name", TINY)
def test_seed_fixes_weights_and_step(name: str) -> None:
    one, two, other = make(name), make(name), make(name, seed=5)
    assert same(one.state_dict(), two.state_dict())
    assert not same(one.state_dict(), other.state_dict())
    assert torch.equal(step(one, batch_of(name)), step(two, batch_of(name)))
    assert same(gradients(one), gradients(two))


@pytest.mark.parametrize("name", TINY)
def test_evaluation_repeats_and_treats_samples_alone(name: str) -> None:
    model = make(name)
    step(model, batch_of(name))
    model.eval()
    with torch.no_grad():
        together, again = model(batch_of(name)), model(batch_of(name))
        alone = torch.cat([model(x[None]) for x in batch_of(name)])
    assert torch.equal(together, again)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_state_dict_round_trip(name: str, tmp_path: Path) -> None:
    model, other = make(name), make(name, seed=9)
    step(model, batch_of(name))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch_of(name)), other.eval()(batch_of(name)))


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_neither_gradients_nor_statistics(name: str) -> None:
    """With dropout and drop path on, so that the random numbers of the recomputation must be those of the forward."""
    noise = {k: 0.3 for k in ("dropout", "drop_path") if k in takes(name)}
    plain, saving = make(name, **noise), make(name, checkpoint=True, **noise)
    assert torch.equal(step(plain, batch_of(name)), step(saving, batch_of(name)))
    assert same(gradients(plain), gradients(saving))
    assert same(plain.state_dict(), saving.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_keeps_fewer_activations(name: str) -> None:
    def kept(model: nn.Module) -> int:
        total = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(batch_of(name))
        return total - size_of(model)

    assert kept(make(name, checkpoint=True)) < 0.5 * kept(make(name))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_bf16_autocast(name: str, checkpoint: bool) -> None:
    model = make(name, checkpoint=checkpoint)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch_of(name))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(g.isfinite().all() for g in gradients(model).values())
    torch.testing.assert_close(y.float(), make(name)(batch_of(name)), rtol=0.1, atol=0.15)


@pytest.mark.parametrize("name", TINY)
def test_a_few_steps_of_adam_separate_two_classes(name: str) -> None:
    model = make(name, classes=2, channels=1, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = batch_of(name, batch=8, channels=1)
    slope = torch.linspace(-1, 1, ODD[0]).reshape(-1, *[1] * (x.ndim - 3))
    x[1::2] += slope
    with torch.no_grad():
        target = target_of(x, model(x))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", TINY)
def test_wrong_input_is_named(name: str) -> None:
    model = make(name)
    size = odd(name)
    axes = ", ".join("DHW"[-len(size) :])
    with pytest.raises(ValueError, match=rf"takes \w+ of shape \(batch, 2, {axes}\), got \(1, 5, {size[0]}, "):
        model(torch.randn(1, 5, *size))
    with pytest.raises(ValueError, match=rf"got \(1, {size[0]}, "):
        model(torch.randn(1, *size))


# --- the seed's ResNet ---


def test_resnet3d_is_the_seeds() -> None:
    with torch.device("meta"):
        model = create_model("resnet3d", 1, 3)
        assert size_of(model) == 15_335_267
        for n in range(184, 200):
            assert model.forward_features(torch.empty(1, 1, n, n, n)).shape == (1, 55_296)
    strides = {n for n, m in model.named_modules() if isinstance(m, nn.Conv3d) and m.stride == (2, 2, 2)}
    assert strides == {f"layers.layer{i}.0.{conv}" for i in (4, 7, 10) for conv in ("conv1", "shortcut.0")}
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Conv3d) and m.bias is not None]


@pytest.mark.parametrize("n", [184, 187, 191])
def test_adaptive_pooling_equals_average_pooling_of_2_up_to_191(n: int) -> None:
    """A cube of n voxels is 24^3 before the pooling, where the seed's AveragePool3D of 2 gives 12^3."""
    with torch.device("meta"):
        model = create_model("resnet3d", 1, 3)
        x = model.layers(model.stem(torch.empty(1, 1, n, n, n)))
    assert x.shape[2:] == (24, 24, 24)
    y = torch.randn(1, 4, 24, 24, 24)
    torch.testing.assert_close(F.adaptive_avg_pool3d(y, 12), F.avg_pool3d(y, 2))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [("resnet3d", (20, 20, 20), {}), ("transformer3d", (30, 30, 10), {"input_size": (30, 30, 10)})],
)
def test_seed_networks_run_forward_and_backward(name: str, size: tuple[int, ...], options: dict[str, object]) -> None:
    model = create_model(name, 1, 3, **options)
    assert step(model, volumes(2, 1, size)).shape == (2, 3)
    assert len(gradients(model)) == len(list(model.parameters()))


def test_resnet3d_options_take_effect() -> None:
    model = make("resnet3d_tiny", layers=4, downsample=[3, 5], width=[4, 6, 8], hidden=[], pool_size=(3, 2, 1))
    assert [layer[0].conv1.out_channels for layer in model.layers] == [4, 6, 6, 8]
    assert [layer[0].conv1.stride[0] for layer in model.layers] == [1, 2, 1, 2]
    assert model.num_features == 8 * 6 and len(model.head) == 1
    step(model, volumes())
    strided = make("resnet3d_tiny", stem_stride=(1, 2, 2))
    assert strided.stem(volumes()).shape == (3, 8, 18, 8, 6)
    rates = [m.rate for m in make("resnet3d_tiny", drop_path=0.5).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert make("resnet3d_tiny", dropout=0.4).head[2].p == 0.4


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 1, 1, 1)
    drop = DropPath(0.25)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3]) and torch.equal(y[:, 0], y[:, 1])
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(x), x)


# --- deterministic pooling ---


def assert_same_pooling(ours: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor, exact: bool) -> None:
    weight = torch.randn_like(theirs)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
    (mine,) = torch.autograd.grad(ours, x, weight)
    (library,) = torch.autograd.grad(theirs, x, weight)
    torch.testing.assert_close(mine, library)


@pytest.mark.parametrize("window", [(2, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("values", [7, 2, 1])
def test_max_pool_equals_the_librarys(values: int, window: tuple[int, int, int]) -> None:
    """Few distinct values make ties, which decide where the gradient goes."""
    x = torch.randint(values, (2, 3, 5, 6, 7)).double().requires_grad_()
    assert_same_pooling(max_pool(x, *window), F.max_pool3d(x, *window), x, exact=True)


@pytest.mark.parametrize("window", [(2, 1, 1), (3, 2, 1)])
def test_max_pool_passes_nan_and_infinity_on(window: tuple[int, int, int]) -> None:
    x = torch.randn(1, 1, 6, 6, 6)
    x[0, 0, 1, 2, 3], x[0, 0, 4, 4, 4], x[0, 0, 5, 0, 0] = math.nan, -math.inf, math.inf
    torch.testing.assert_close(max_pool(x, *window), F.max_pool3d(x, *window), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(24, 24, 24), (25, 25, 25), (4, 13, 30), (1, 12, 11)])
def test_adaptive_pool_equals_the_librarys(shape: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    assert_same_pooling(adaptive_avg_pool(x, (12, 12, 12)), F.adaptive_avg_pool3d(x, 12), x, exact=False)


def test_adaptive_pool_sums_in_float32_under_autocast() -> None:
    x = torch.randn(1, 2, 25, 25, 25).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adaptive_avg_pool(x, (12, 12, 12))
    assert y.dtype == torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits: rounded once, at the end
    torch.testing.assert_close(y.float(), F.adaptive_avg_pool3d(x.float(), 12), rtol=1.01 * 2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [("resnet3d_tiny", {}), ("resnet3d_18_tiny", {"stem_pool": True})], ids=lambda v: str(v)
)
def test_deterministic_pooling_is_the_same_network(name: str, options: dict[str, object]) -> None:
    usual, other = make(name, **options), make(name, deterministic_pooling=True, **options)
    x = volumes()
    torch.testing.assert_close(step(usual, x), step(other, x))
    for name, gradient in gradients(usual).items():
        torch.testing.assert_close(gradient, gradients(other)[name], rtol=1e-3, atol=1e-5)


# --- the seed's transformer ---


def test_transformer3d_is_the_seeds() -> None:
    with torch.device("meta"):
        model = create_model("transformer3d", 1, 3, input_size=(190, 190, 10), patch_size=10)
        assert model.num_tokens == 361 and size_of(model) == 28_782_083
        assert size_of(create_model("transformer3d", 1, 3, head_dim=64)) == 14_584_835
        assert model.forward_features(torch.empty(2, 1, 190, 190, 10)).shape == (2, 361, 1536)
    assert model.taps == (3, 6, 9, 12, 15, 18)


def test_literal_stem_contradicts_361_tokens() -> None:
    """Why `pointwise` is the default: the text as it stands leaves one token, with 2.1 G weights in the second conv."""
    with torch.device("meta"):
        model = create_model("transformer3d", 1, 3, stem="literal")
    assert model.num_tokens == 1
    assert model.stem[2].weight.numel() == 2048 * 1024 * 1000


def test_literal_stem_runs_at_a_small_size() -> None:
    model = make("transformer3d_tiny", stem="literal", patch_size=(2, 2, 1))
    assert model.grid == (2, 1, 9)
    assert step(model, volumes()).shape == (3, 3) and all(g.any() for g in gradients(model).values())


@pytest.mark.parametrize("patch", [(4, 4, 4), (5, 3, 2), (1, 1, 1)])
def test_patch_conv_is_a_conv_with_same_padding(patch: tuple[int, int, int]) -> None:
    conv = PatchConv(2, 6, patch).double()
    x = volumes().double().requires_grad_()
    missing = [-n % p for n, p in zip(ODD, patch, strict=True)]
    sides = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
    theirs = F.conv3d(F.pad(x, sides), conv.weight, conv.bias, stride=patch)
    assert_same_pooling(conv(x), theirs, x, exact=False)


def test_attention_is_the_written_formula() -> None:
    attention = make("transformer3d_tiny").layers[0].attention.double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (t.reshape(2, 5, 2, 8).transpose(1, 2) for t in attention.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(attention(x), attention.out((weights @ v).transpose(1, 2).reshape(2, 5, 16)))


def test_transformer3d_options_take_effect() -> None:
    model = make("transformer3d_tiny", depth=5, taps=[2, 5], pooling="flatten", patch_size=4, mlp_dim=7, hidden=3)
    assert model.grid == (5, 4, 3) and model.norm.num_features == 2 * 16
    assert model.head[0].in_features == 60 * 32 and model.head[0].out_features == 3
    assert model.layers[0].mlp[0].out_features == 7
    assert step(model, volumes()).shape == (3, 3)
    assert make("transformer3d_tiny", depth=7).taps == (3, 6, 7)
    rates = [layer.drop_path.rate for layer in make("transformer3d_tiny", depth=3, drop_path=0.4).layers]
    assert rates == pytest.approx([0, 0.2, 0.4])


def test_transformer3d_takes_other_sizes_of_the_same_grid_only() -> None:
    model = make("transformer3d_tiny").eval()
    assert model(volumes(size=(24, 16, 16))).shape == (3, 3)
    with pytest.raises(ValueError, match=r"12 tokens, got \(25, 16, 16\); build it with input_size=\(25, 16, 16\)"):
        model(volumes(size=(25, 16, 16)))
