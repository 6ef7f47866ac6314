"""The networks beyond the seeds' beside their references: torchvision's r3d_18, MONAI's ResNet-50, DynUNet and UNet."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from models3d import create_model
from models3d._layers import DropPath


def copy_in_order(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> None:
    with torch.no_grad():
        for own, other in zip(ours, theirs, strict=True):
            own.copy_(other)  # raises where the shapes differ


def in_order(module: nn.Module, names: Iterable[str]) -> list[torch.Tensor]:
    """Parameters of the named parts, each part's in its own order."""
    return [p for name in names for p in module.get_submodule(name).parameters()]


# --- resnet3d_18, 34, 50 ---


@pytest.mark.parametrize(("name", "options"), [("resnet3d_18", {}), ("resnet3d_34", {"blocks": [2, 2, 2, 2]})])
def test_resnet3d_18_is_torchvisions_with_its_stem(name: str, options: dict[str, object]) -> None:
    theirs = create_model("torchvision:r3d_18", 3, 4)
    stem = {"stem_kernel": [3, 7, 7], "stem_stride": [1, 2, 2], "stem_pool": False}
    ours = create_model(name, 3, 4, **stem, **options)
    copy_in_order(ours.parameters(), theirs.parameters())
    copy_in_order(ours.buffers(), theirs.buffers())
    x = torch.randn(2, 3, 9, 33, 35)
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-3, atol=1e-4)


def test_resnet3d_50_is_monais() -> None:
    common = {"block": "bottleneck", "layers": [3, 4, 6, 3], "block_inplanes": [64, 128, 256, 512]}
    theirs = create_model("monai:ResNet", 1, 3, **common, conv1_t_stride=2, bias_downsample=False)
    ours = create_model("resnet3d_50", 1, 3)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    copy_in_order(ours.parameters(), theirs.parameters())
    x = torch.randn(2, 1, 33, 40, 35)
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-3, atol=1e-4)


def test_resnet3d_34_has_the_papers_layers() -> None:
    with torch.device("meta"):
        model = create_model("resnet3d_34")
        assert model.stem(torch.empty(1, 1, 64, 64, 64)).shape == (1, 64, 16, 16, 16)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv3d) and m.kernel_size != (1, 1, 1)]
    assert len(convs) + 1 == 34 and not [c for c in convs if c.bias is not None]
    assert [stage[0].branch.conv1.stride[0] for stage in model.stages] == [1, 2, 2, 2]


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_resnet3d_norms(norm: str) -> None:
    model = create_model("resnet3d_18_tiny", 2, 3, norm=norm, width=32).train()
    x = torch.randn(2, 2, 17, 18, 19)
    together = model(x)
    torch.testing.assert_close(together, torch.cat([model(one[None]) for one in x]), rtol=1e-4, atol=1e-5)
    kinds = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == {"InstanceNorm3d" if norm == "instance" else "GroupNorm"}
    if norm == "group":
        assert model.stem.norm.num_groups == 2


def test_instance_norm_says_when_one_voxel_is_left() -> None:
    with pytest.raises(ValueError, match=r"norm: instance has one voxel left .*larger inputs, fewer strides"):
        create_model("resnet3d_18_tiny", norm="instance")(torch.randn(2, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="one voxel left"):
        create_model("unet2d_tiny")(torch.randn(2, 1, 4, 4))
    assert create_model("unet2d_tiny")(torch.randn(2, 1, 5, 4)).shape == (2, 2, 5, 4)


def test_resnet3d_options_take_effect() -> None:
    model = create_model("resnet3d_18_tiny", blocks=[1, 2], bottleneck=True, width=4, drop_path=0.5, dropout=0.3)
    assert [len(stage) for stage in model.stages] == [1, 2] and model.num_features == 32
    assert [m.rate for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0, 0.25, 0.5])
    assert model.dropout.p == 0.3
    strided = create_model("resnet3d_18_tiny", stem_stride=(1, 2, 4), stem_kernel=(1, 3, 5))
    assert strided.stem(torch.randn(1, 1, 9, 9, 9)).shape == (1, 8, 9, 5, 3)


# --- unet3d, unet2d ---


@pytest.mark.parametrize("axes", [2, 3])
def test_unet_is_dynunet(axes: int) -> None:
    """MONAI's port of nnU-Net; its transposed convs with a bias, as nnU-Net's."""
    depth = 4
    anisotropic = [[1] * axes, [2] * axes, [2] * (axes - 1) + [1], [1] + [2] * (axes - 1)]
    theirs = create_model(
        "monai:DynUNet", 2, 3, spatial_dims=axes, kernel_size=[3] * depth, strides=anisotropic,
        upsample_kernel_size=anisotropic[1:], filters=[8, 16, 20, 20], trans_bias=True,
        norm_name=["INSTANCE", {"affine": True}],
    )  # fmt: skip
    ours = create_model(f"unet{axes}d", 2, 3, depth=depth, width=8, widest=20, strides=anisotropic)
    parts = ["input_block", *[f"downsamples.{i}" for i in range(depth - 2)], "bottleneck"]
    decoder = [f"upsamples.{i}" for i in range(depth - 1)]
    parts += [f"{up}.{part}" for up in decoder for part in ("transp_conv", "conv_block")] + ["output_block"]
    copy_in_order(_convs_then_norms(ours), in_order(theirs, parts))
    x = torch.randn(2, 2, *[16, 24, 32][:axes])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)


def _convs_then_norms(model: nn.Module) -> list[torch.Tensor]:
    """DynUNet's blocks hold their convs first, then their norms."""
    ordered: list[torch.Tensor] = []
    for convs in model.encoder:
        ordered += _sorted(convs)
    for up in model.decoder:
        ordered += [*up.up.parameters(), *_sorted(up.convs)]
    return [*ordered, *model.head.parameters()]


def _sorted(convs: nn.Module) -> list[torch.Tensor]:
    weights = list(convs.parameters())
    return [p for p in weights if p.ndim > 1] + [p for p in weights if p.ndim == 1]


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (17, 13, 9), (31, 8, 1)])
def test_unet_gives_every_size_back(size: tuple[int, ...]) -> None:
    model = create_model("unet3d", 1, 2, depth=4, width=2, strides=[1, 2, [3, 2, 1], 2], norm="batch").eval()
    assert model(torch.randn(1, 1, *size)).shape == (1, 2, *size)
    flat = create_model("unet2d", 1, 2, depth=4, width=2, kernels=[3, [1, 3], 3, 5], norm="batch").eval()
    assert flat(torch.randn(1, 1, *size[:2])).shape == (1, 2, *size[:2])


def test_unet_uses_its_skips_and_sees_far() -> None:
    """A voxel's score depends on its own value at once, and on far ones through the lower resolutions."""
    model = create_model("unet2d", 1, 2, depth=5, width=4, norm="batch").eval()
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    model(x)[0, 0, 32, 32].backward()
    reached = x.grad[0, 0].abs()
    assert reached[32, 32] > 0 and reached[4, 4] > 0


def test_unet_widths_dropout_and_default() -> None:
    with torch.device("meta"):
        model = create_model("unet3d", 1, 4)
        assert [convs[0].out_channels for convs in model.encoder] == [32, 64, 128, 256, 320, 320]
        dropping = create_model("unet3d_tiny", dropout=0.2, convs=3)
    kinds = [type(m).__name__ for m in dropping.encoder[0]]
    assert kinds == ["Conv3d", "Dropout3d", "InstanceNorm3d", "LeakyReLU"] * 3
