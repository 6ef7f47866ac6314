"""Names, options, foreign networks and a user's own file, and `hpc models`: what is built, and what a mistake says."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn

from jobs import models as cli
from jobs.models_figure import parts_figure
from models3d import create_model, list_models, register_model, takes


def test_takes_names_the_options() -> None:
    assert {"width", "layers", "checkpoint", "deterministic_pooling"} <= takes("resnet3d")
    assert "input_size" in takes("transformer3d") and "input_size" not in takes("resnet3d")
    assert not {"in_channels", "num_classes", "self"} & (takes("resnet3d") | takes("transformer3d_tiny"))


BAD = [
    ("resnt3d", {}, r"'resnt3d' is not known; nearest: resnet3d, .*'hpc models' lists all"),
    ("keras:vit", {}, r"'keras:vit' is not known.*timm:NAME"),
    ("resnet3d", {"widht": 8}, r"no option 'widht'; nearest: width; its options: checkpoint, .*width"),
    ("resnet3d", {"in_channels": 0}, r"in_channels is 0"),
    ("resnet3d", {"num_classes": True}, r"num_classes is True"),
    ("resnet3d", {"width": [8, 16]}, r"give one number, or 4, for stages that begin at \[1, 4, 7, 10\]"),
    ("resnet3d", {"layers": 3, "downsample": [4, 7]}, r"the layers are 2 to 4"),
    ("resnet3d", {"pool_size": [2, 2]}, r"pool_size is \[2, 2\]; give one whole number or three"),
    ("resnet3d", {"pool_size": [2]}, r"pool_size is \[2\]; give one whole number or three"),
    ("resnet3d", {"hidden": "256"}, r"hidden is '256'; give a list"),
    ("resnet3d", {"dropout": 1.0}, r"dropout is 1.0; give a number from 0"),
    ("transformer3d", {"taps": [3, 6]}, r"the last layer, 18"),
    ("transformer3d", {"depth": 0}, r"depth is 0"),
    ("transformer3d", {"pooling": "max"}, r"pooling is 'max'; give mean or flatten"),
    ("transformer3d", {"stem": "conv"}, r"stem is 'conv'; give pointwise or literal"),
    ("resnet3d_18", {"norm": "layer"}, r"norm is 'layer'; give batch or instance or group"),
    ("resnet3d_18", {"stem_kernel": [7, 6, 7]}, r"stem_kernel is \[7, 6, 7\]; give odd numbers"),
    ("resnet3d_18", {"blocks": [2, 0]}, r"blocks is 0"),
    ("unet3d", {"strides": [1, 2]}, r"strides is \[1, 2\]; give a list of 6, one for each resolution of depth: 6"),
    ("unet3d", {"depth": 2, "strides": [2, 2]}, r"strides begin with \(2, 2, 2\); the first must be 1"),
    ("unet2d", {"depth": 2, "strides": [1, [2, 2, 1]]}, r"give one whole number or two, in the order H, W"),
    ("unet3d", {"kernels": 4}, r"kernels is 4; give odd numbers"),
    ("unet3d", {"axes": 2}, r"no option 'axes'"),
    ("timm:resnt18", {}, r"timm has no model 'resnt18'; nearest: resnet18"),
    ("timm:resnet18", {"drop_rat": 0.1}, r"no option 'drop_rat'; nearest: drop_rate"),
    (
        "timm:resnet18",
        {"pretrained": True},
        r"starts from fresh weights here; leave out the option 'pretrained': .*pretrained: true",
    ),
    ("torchvision:resnet18", {}, r"takes 3 input channels, not 1"),
    ("torchvision:fcn_resnet50", {"in_channels": 3}, r"no classification model 'fcn_resnet50'"),
    ("smp:Unett", {}, r"smp has no model 'Unett'; nearest: Unet.*its models: DPT, .*Unet, UnetPlusPlus"),
    ("smp:Unet", {"encoder_nam": "resnet34"}, r"no option 'encoder_nam'; nearest: encoder_name"),
    ("smp:Unet", {"encoder_name": "resnt34"}, r"no encoder 'resnt34'; nearest: resnet34"),
    ("smp:Unet", {"encoder_weights": "imagenet"}, r"leave out the option 'encoder_weights': .*pretrained: true"),
    ("smp:Unet", {"activation": "sigmoid"}, r"no option 'activation'"),
    ("smp:Unet", {"decoder_channels": [8, 8]}, r"smp:Unet refuses .*decoder"),
    ("monai:SwinUNETER", {}, r"monai has no model 'SwinUNETER'; nearest: SwinUNETR"),
    ("monai:Discriminator", {}, r"gives no classes by its signature: 'Discriminator'"),
    ("monai:UNet", {}, r"monai:UNet needs the options channels, strides; its options: .*kernel_size"),
    ("monai:SwinUNETR", {"feature_sise": 12}, r"no option 'feature_sise'; nearest: feature_size"),
    ("monai:SwinUNETR", {"feature_size": 13}, r"monai:SwinUNETR refuses .*feature.size"),
    ("monai:EfficientNetBN", {"model_name": "b9"}, r"monai:EfficientNetBN refuses .*b9"),
    ("torchvision:r3d_18", {"in_channels": 3, "zero_init": True}, r"no option 'zero_init'; .*zero_init_residual"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_mistake_is_one_line(name: str, options: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)


def test_a_name_is_registered_by_one_module() -> None:
    def resnet3d() -> nn.Module:
        return nn.Identity()

    with pytest.raises(ValueError, match=r"already registered by models3d\.resnet3d"):
        register_model(options=resnet3d, example=(1, 8, 8, 8))(resnet3d)


def test_native_networks_import_no_library() -> None:
    code = (
        "import sys, models3d; models3d.create_model('resnet3d_tiny'); "
        "print({'timm', 'torchvision', 'segmentation_models_pytorch', 'monai'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parents[1]
    )
    assert done.stdout.strip() == "set()"


def test_timm_and_torchvision() -> None:
    model = create_model("timm:test_resnet", in_channels=1, num_classes=5, drop_rate=0.1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert {"drop_rate", "drop_path_rate"} <= takes("timm:test_resnet")
    with torch.device("meta"):
        video = create_model("torchvision:r3d_18", in_channels=3, num_classes=4)
        assert video(torch.empty(2, 3, 8, 32, 32)).shape == (2, 4)
        image = create_model("torchvision:googlenet", in_channels=3, num_classes=4)
        assert image.train()(torch.empty(2, 3, 64, 64)).shape == (2, 4)
    state = torch.get_rng_state()
    assert "zero_init_residual" in takes("torchvision:r3d_18") and "stem_width" in takes("torchvision:regnet_y_400mf")
    assert torch.equal(state, torch.get_rng_state())


def test_smp() -> None:
    model = create_model("smp:Unet", 2, 7, encoder_name="resnet18", decoder_channels=[16, 8, 8, 4, 4])
    assert model(torch.randn(2, 2, 64, 32)).shape == (2, 7, 64, 32)
    assert {"encoder_name", "encoder_depth", "decoder_channels"} <= takes("smp:Unet")
    assert not {"classes", "in_channels", "encoder_weights", "activation", "input_size"} & takes("smp:FPN")


MONAI = [
    ("SwinUNETR", (64, 64, 32), {"feature_size": 12}, True),
    ("UNETR", (32, 32, 16), {"hidden_size": 24, "mlp_dim": 32, "num_heads": 2}, True),
    ("UNet", (16, 16), {"channels": [4, 8], "strides": [2]}, True),
    ("SegResNet", (16, 16, 16), {"init_filters": 8}, True),
    ("ResNet", (24, 24, 24), {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 8, 8]}, False),
    ("DenseNet121", (32, 32), {}, False),
    ("EfficientNetBN", (32, 32, 32), {"model_name": "efficientnet-b0"}, False),
    ("SEResNet50", (32, 32, 32), {}, False),
]


@pytest.mark.parametrize(("name", "size", "options", "segments"), MONAI, ids=[row[0] for row in MONAI])
def test_monai(name: str, size: tuple[int, ...], options: dict[str, object], segments: bool) -> None:
    """Channels, classes, axes and sizes arrive under the names that each class has for them."""
    assert "input_size" in takes(f"monai:{name}")
    with torch.device("meta"):
        model = create_model(f"monai:{name}", 2, 3, input_size=size, **options)
        assert model(torch.empty(2, 2, *size)).shape == (2, 3, *(size if segments else ()))


# --- a user's own file ---

MINE = """
from dataclasses import dataclass
from torch import nn
from neighbour_of_mine import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class MyNet(nn.Module):
    def __init__(self, in_channels, num_classes, width=WIDTH):
        super().__init__()
        from neighbour_of_mine import WIDTH as late
        self.body = nn.Sequential(nn.Conv3d(in_channels, width, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.body(x))

def anything(in_channels, num_classes, **options):
    return MyNet(in_channels, num_classes, **options)

def three(in_channels, num_classes):
    return 3

def narrow(in_channels):
    return MyNet(in_channels, 2)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 6\n")
    return tmp_path / "mine.py"


def test_a_users_file(mine: Path) -> None:
    before = list(sys.path)
    model = create_model(f"file:{mine}:MyNet", in_channels=2, num_classes=3, width=4)
    assert model(torch.randn(3, 2, 7, 6, 5)).shape == (3, 3)
    assert create_model(f"file:{mine}:anything", 1, 2, width=5).body[0].out_channels == 5
    assert takes(f"file:{mine}:MyNet") == {"width"}
    assert copy.deepcopy(model).body[0].out_channels == 4
    assert sys.path == before


@pytest.mark.parametrize(
    ("rest", "options", "message"),
    [
        ("mine.py:MyNte", {}, r"no class or function 'MyNte'; it has Settings, MyNet, anything, three, narrow"),
        ("mine.py:MyNet", {"widht": 1}, r"no option 'widht'; nearest: width"),
        ("mine.py:three", {}, r"three gave a int; it must give a torch.nn.Module"),
        ("mine.py:narrow", {}, r"narrow cannot be called with in_channels, num_classes: .*num_classes"),
        ("mine.py", {}, r"names no class; write file:PATH.py:NAME"),
        ("other.py:MyNet", {}, r"other.py does not exist"),
        ("broken.py:MyNet", {}, r"broken.py cannot be imported: SyntaxError"),
        ("notes.txt:MyNet", {}, r"notes.txt is not a Python file"),
    ],
)
def test_a_users_file_with_a_mistake(mine: Path, rest: str, options: dict[str, object], message: str) -> None:
    (mine.parent / "broken.py").write_text("class MyNet(:\n")
    (mine.parent / "notes.txt").write_text("no code\n")
    before = list(sys.path)
    with pytest.raises(ValueError, match=message) as caught:
        create_model(f"file:{mine.parent}/{rest}", **options)
    assert "\n" not in str(caught.value) and sys.path == before


# --- hpc models ---


def test_card_counts_every_parameter_and_flop_once() -> None:
    """By hand: a multiply-add is 2 FLOPs."""
    tokens, dim, heads, head_dim, mlp = 361, 256, 4, 256, 512
    stem = tokens * (1000 * 2048 + 2048 * 1024 + 1024 * 512 + 512 * 256)
    layer = tokens * (4 * dim * heads * head_dim + 2 * dim * mlp) + 2 * heads * tokens * tokens * head_dim
    head = 1536 * 128 + 128 * 3
    seed = cli.card("transformer3d", (2, 1, 190, 190, 10), 3, {})
    assert seed.output == [2, 3] and seed.flops == 2 * 2 * (stem + 18 * layer + head)
    resnet = cli.card("resnet3d", (1, 1, 64, 64, 64), 3, {})
    assert resnet.groups[0].flops == 2 * 64**3 * 27 * 32
    for c in (seed, resnet, cli.card("timm:test_vit", None, 3, {})):
        assert c.parameters == sum(g.parameters for g in c.groups)
    assert resnet.flops == sum(g.flops or 0 for g in resnet.groups)


def test_models_command(capsys: pytest.CaptureFixture[str], mine: Path) -> None:
    assert cli.main(["--input", "1,64,48,40", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in cards] == [name for name in list_models() if "2d" not in name]
    assert all(c["output"][:2] == [1, 2] and c["memory"]["peak"] > 4 * 4 * c["parameters"] for c in cards)
    assert cli.main(["resnet3d", "--classes", "3", "--option", "hidden=[8, 8]", "--option", "pool_size=2"]) == 0
    assert "1,114,827" in capsys.readouterr().out.replace("\n", " ")
    assert cli.main([f"file:{mine}:MyNet", "--input", "2,9,9,9", "--batch", "4", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert card["input"] == [4, 2, 9, 9, 9] and card["output"] == [4, 2] and card["flops"] > 0


def test_models_command_on_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    way = ["resnet3d_18_tiny", "--memory", "20MB", "--optimizer", "sgd", "--checkpoint", "--device", "cpu"]
    assert cli.main([*way, "--layers", "--png", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    fit = re.search(r"resnet3d_18_tiny fits 0.02 GB up to batch (\d+), with sgd, fp32, checkpointing", text)
    assert fit and "stages.stage2" in text and "peak" in text
    peaks = []
    for batch in (int(fit[1]), int(fit[1]) + 1):
        assert cli.main([*way[:1], *way[3:], "--batch", str(batch), "--json"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)[0]["memory"]["peak"])
    assert peaks[0] <= 20e6 < peaks[1]
    picture = matplotlib.image.imread(tmp_path / "resnet3d_18_tiny.png")
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05
    assert cli.main(["unet2d", "--memory", "5MB"]) == 0 and "not even with one sample" in capsys.readouterr().out


def test_a_figure_of_many_parts_draws_the_rest_as_one() -> None:
    card = cli.card("transformer3d_tiny", (1, 1, 16, 16, 8), 2, {"depth": 60})
    (axis, *_) = parts_figure(card).axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert len(names) == 40 and re.fullmatch(r"\d+ other parts", names[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt3d"], "nearest: resnet3d"),
        (["resnet3d", "--input", "1,0,4,4"], "'0' is not a whole number"),
        (["resnet3d", "--input", "1,32,32"], "takes volumes of shape"),
        (["resnet3d", "--option", "width"], "not of the form k=v"),
        (["resnet3d", "--option", "depth=3"], "no option 'depth'"),
        (["--option", "width=3"], "needs the NAME"),
        (["--size", "3"], "hpc models --help"),
        (["--layers"], "--layers needs the NAME"),
        (["timm:test_vit", "--memory", "40GB"], "--memory needs --input for timm:test_vit"),
        (["unet2d", "--memory", "much"], "'much' is not a size"),
        (["unet2d", "--optimizer", "adagrad"], "invalid choice: 'adagrad'"),
        (["timm:test_vit", "--checkpoint", "--input", "3,32,32"], "no option 'checkpoint'"),
        (["timm:test_vit", "--input", "3,33,33"], "does not take an input of (1, 3, 33, 33)"),
    ],
)
def test_models_command_with_a_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


def test_a_model_by_name_shows_its_options_and_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resnet3d_tiny"]) == 0
    told = capsys.readouterr().out
    assert "options: checkpoint, " in told and "width" in told and "--input" not in told
    assert cli.main(["smp:Unet"]) == 0
    assert "add --input C,D,H,W" in capsys.readouterr().out
