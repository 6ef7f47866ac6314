"""Pretrained weights of timm, torchvision and smp out of these libraries' own caches. Nothing here asks the network but
`fetch`, which is for a machine that has one: compute nodes have none, and a library would try for minutes.

The files lie where the library itself puts them: timm's and smp's in Hugging Face's cache (HF_HOME), torchvision's and
timm's old ones in torch's (TORCH_HOME). The library does the conversion, e.g. of the first layer to another number of
channels; the last layer and a decoder come with it as they are, and the caller leaves them out where they do not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models3d._options import nearest

__all__ = ["PRETRAINED", "Pretrained", "fetch", "pretrained"]

PRETRAINED = ("timm", "torchvision", "smp")
"""Prefixes whose libraries have weights."""
TIMMS = "tu-"
"""What smp has before the name of an encoder that is timm's."""
_ANSWER_S = 10
"""until the hub must have answered: its own download would ask five times more, and tell each"""
_HUB_FILE = "model" + ".safetensors"  # Hugging Face's usual name; ours for a checkpoint's is spelt elsewhere


@dataclass(frozen=True)
class Pretrained:
    """Weights as the library loads them into a network of its own."""

    file: Path
    weights: Mapping[str, Tensor]
    heads: tuple[str, ...]
    """Modules whose entries may have another shape in the model, as its classes are others."""
    partial: bool
    """There are entries of the model that no file has: those of a decoder."""


@dataclass(frozen=True)
class _Place:
    """Where a library keeps a file, and where it comes from; `repo` is None outside of Hugging Face's hub."""

    tag: str
    url: str
    folder: Path
    file: Path
    repo: tuple[str, str, str] | None = None

    def found(self) -> Path | None:
        """The file, if it is there; in a snapshot of any commit where the hub's own record of it is missing."""
        if self.repo is None:
            return self.file if self.file.is_file() else None
        name, revision, filename = self.repo
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(path, str):
            return Path(path)
        snapshots = self.file.parent.parent
        return next((p for p in (self.file, *sorted(snapshots.glob(f"*/{filename}"))) if p.is_file()), None)


def pretrained(name: str, in_channels: int, options: dict[str, Any], tag: str | bool = True) -> Pretrained:
    """The weights of `timm:NAME`, `torchvision:NAME` or `smp:NAME` (its encoder's) from the library's cache.

    tag: which ones, True for the library's own choice. options: those of the model.
    Raises ValueError for an unknown tag, and where the file is not there: with the command that fetches it, its address
    and its place.
    """
    place = _place(name, tag, options)
    path = place.found()
    if path is None:
        given = "" if tag is True else f" {place.tag}"
        raise ValueError(
            f"the pretrained weights of {name} ({place.tag}) are not in {place.folder}, and a job downloads nothing: "
            f"run 'hpc models {name} --fetch{given}{_typed(name, options)}' on a login node with internet (same "
            f"HF_HOME and TORCH_HOME), or save {place.url} as {place.file}"
        )
    prefix, _, rest = name.partition(":")
    load = {"timm": _timm, "torchvision": _torchvision, "smp": _smp}[prefix]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return load(rest, in_channels, options, tag, path)
    except (AssertionError, OSError, RuntimeError, LookupError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be loaded into {name} ({line[:200]}): delete it and fetch it again") from error


def fetch(name: str, tag: str | bool = True, options: dict[str, Any] | None = None) -> list[str]:
    """Download the weights of a model into its library's cache, if they are not there; lines that tell it.

    Raises ValueError for an unknown model or tag, and where the network does not give the file.
    """
    place = _place(name, tag, options or {})
    path = place.found()
    if path is not None:
        return [f"{name}: {place.tag} is there already: {path}"]
    try:
        if place.repo is None:
            place.folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(place.url, str(place.file))
            path = place.file
        else:
            from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

            repo, revision, filename = place.repo
            get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=_ANSWER_S)  # asks once
            path = Path(hf_hub_download(repo, filename, revision=revision))
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: {place.url} gives nothing ({line[:200]}); where there is internet, save it as {place.file}"
        ) from error
    return [f"{name}: {place.tag} from {place.url}", f"into {path}"]


def _typed(name: str, options: dict[str, Any]) -> str:
    encoder = options.get("encoder_name")
    return f" --option encoder_name={encoder}" if name.startswith("smp:") and encoder else ""


def _place(name: str, tag: str | bool, options: dict[str, Any]) -> _Place:
    prefix, _, rest = name.partition(":")
    places = {"timm": _timm_place, "torchvision": _torchvision_place, "smp": _smp_place}
    if prefix not in places:
        raise ValueError(
            f"model {name} has no pretrained weights to fetch: only {', '.join(f'{p}:NAME' for p in places)} have; "
            f"model.weights takes a file of your own"
        )
    return places[prefix](rest, tag, options)


def _hub(tag: str, repo: str, filename: str, revision: str | None) -> _Place:
    from huggingface_hub import constants

    folder, at = Path(constants.HF_HUB_CACHE), revision or "main"
    path = folder / f"models--{repo.replace('/', '--')}" / "snapshots" / at / filename
    url = f"https://huggingface.co/{repo}/resolve/{at}/{filename}"
    return _Place(tag, url, folder, path, (repo, at, filename))


def _torch_hub(tag: str, url: str) -> _Place:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return _Place(tag, url, folder, folder / url.rpartition("/")[2])


# timm


def _timm_place(name: str, tag: str | bool, options: dict[str, Any]) -> _Place:
    from models3d._foreign import library

    timm = library("timm")
    library("huggingface_hub")
    architecture, _, own = name.partition(".")
    tags = [str(one).partition(".")[2] for one in timm.list_models(f"{architecture}.*", pretrained=True)]
    wanted = own if tag is True else str(tag)
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    if not tags or (wanted and wanted not in tags):
        what = f"no weights {wanted!r}; it has {', '.join(tags)}" if tags else "no pretrained weights"
        raise ValueError(f"timm:{architecture} has {what}")
    config = timm.get_pretrained_cfg(f"{architecture}.{wanted}" if wanted else architecture)
    if config.hf_hub_id:
        repo, _, revision = str(config.hf_hub_id).partition("@")
        return _hub(config.tag, repo, config.hf_hub_filename or _HUB_FILE, revision or None)
    return _torch_hub(config.tag, config.url)


def _timm(name: str, in_channels: int, options: dict[str, Any], tag: str | bool, path: Path) -> Pretrained:
    import timm

    architecture = name.partition(".")[0]
    full = name if tag is True else f"{architecture}.{tag}"
    donor: nn.Module = timm.create_model(
        full, pretrained=True, in_chans=in_channels, pretrained_cfg_overlay={"file": str(path)}, **options
    )
    heads = donor.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return Pretrained(path, donor.state_dict(), (heads,) if isinstance(heads, str) else tuple(heads), partial=False)


# torchvision


def _torchvision_place(name: str, tag: str | bool, options: dict[str, Any]) -> _Place:
    weights = _torchvision_weights(name, tag)
    return _torch_hub(weights.name, weights.url)


def _torchvision_weights(name: str, tag: str | bool) -> Any:
    from models3d._foreign import library

    models = library("torchvision.models")
    good = [*models.list_models(models), *models.list_models(models.video)]
    if name not in good:
        raise ValueError(f"torchvision has no classification model {name!r}{nearest(name, good)}")
    weights = models.get_model_weights(name)
    if tag is True:
        return weights.DEFAULT
    if tag not in weights.__members__:
        raise ValueError(f"torchvision:{name} has no weights {tag!r}; it has {', '.join(weights.__members__)}")
    return weights[tag]


def _torchvision(name: str, in_channels: int, options: dict[str, Any], tag: str | bool, path: Path) -> Pretrained:
    import torchvision

    # it looks in its cache first, where the file is
    donor = torchvision.models.get_model(name, weights=_torchvision_weights(name, tag), **options)
    last = [key.rpartition(".")[0] for key, _ in donor.named_parameters()][-1:]
    heads = ("AuxLogits.", "aux1.", "aux2.")  # of googlenet and inception, which are built without them here
    weights = {key: value for key, value in donor.state_dict().items() if not key.startswith(heads)}
    return Pretrained(path, weights, tuple(last), partial=False)


# smp


def _smp_place(name: str, tag: str | bool, options: dict[str, Any]) -> _Place:
    from models3d._foreign import SOURCES, library

    SOURCES["smp"].takes(name)  # a ValueError for an unknown one
    library("huggingface_hub")
    encoders = library("segmentation_models_pytorch").encoders.encoders
    encoder = str(options.get("encoder_name", "resnet34"))
    if encoder.startswith(TIMMS):
        return _timm_place(encoder.removeprefix(TIMMS), tag, {})
    if encoder not in encoders:
        raise ValueError(f"smp has no weights for the encoder {encoder!r}{nearest(encoder, encoders)}")
    settings = encoders[encoder]["pretrained_settings"]
    wanted = ("imagenet" if "imagenet" in settings else next(iter(settings), "")) if tag is True else tag
    if wanted not in settings:
        raise ValueError(f"smp's encoder {encoder} has no weights {wanted!r}; it has {', '.join(settings) or 'none'}")
    place = settings[wanted]
    return _hub(str(wanted), place["repo_id"], _HUB_FILE, place["revision"])


def _smp(name: str, in_channels: int, options: dict[str, Any], tag: str | bool, path: Path) -> Pretrained:
    import safetensors.torch
    import segmentation_models_pytorch as smp

    kind = {one.__name__: one for one in smp.MODEL_ARCHITECTURES_MAPPING.values()}[name]
    encoder = str(options.get("encoder_name", ""))
    if encoder.startswith(TIMMS):  # timm loads them, and converts the first layer
        chosen = options if tag is True else {**options, "encoder_name": f"{encoder.partition('.')[0]}.{tag}"}
        donor = kind(
            encoder_weights=True, in_channels=in_channels, pretrained_cfg_overlay={"file": str(path)}, **chosen
        )
    else:
        donor = kind(encoder_weights=None, in_channels=3, **options)
        donor.encoder.load_state_dict(safetensors.torch.load_file(path))
        donor.encoder.set_in_channels(in_channels, pretrained=True)
    weights = {f"encoder.{key}": value for key, value in donor.encoder.state_dict().items()}
    return Pretrained(path, weights, (), partial=True)
