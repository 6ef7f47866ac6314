"""Networks for volumes, and the one registry that also reaches timm, torchvision, smp, MONAI and a user's own file.

from models3d import create_model, list_models
model = create_model("resnet3d", in_channels=1, num_classes=3, width=16)
"""

from models3d import resnet3d, resnet3d_he, transformer3d, unet  # importing a family registers it
from models3d._pretrained import PRETRAINED, Pretrained, fetch, pretrained
from models3d._registry import create_model, example_input, list_models, register_model, takes

__all__ = [
    "PRETRAINED",
    "Pretrained",
    "create_model",
    "example_input",
    "fetch",
    "list_models",
    "pretrained",
    "register_model",
    "resnet3d",
    "resnet3d_he",
    "takes",
    "transformer3d",
    "unet",
]
