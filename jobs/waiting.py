"""Which one will wait, the loader or the model: for `hpc plan` out of what was measured, and for `hpc bench all`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from hpc import instances, steptimes
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.instances import Instance
from jobs import measured
from jobs.flops import per_sample
from jobs.setup import Parts

_ASSUMED = (0.1, 0.5)
"""MFU of a network that was not measured: 3D convolutions reach less than the 0.46 of large language models (Chowdhery
et al., arXiv 2204.02311)."""
_NEAR = 1.1
"""A loader that is less than this faster than the model leaves no room for a slow moment of the file system."""

REMEDY = "more data.threads (with cores for them), patches, or a file packed with smaller numbers would help"


@dataclass(frozen=True)
class Word:
    """What `hpc plan` says."""

    kind: Literal["passed", "cautions", "unchecked"]
    text: str


def number(rate: float) -> str:
    """Samples/s with three digits, whole from 100 on."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def verdict(loader: float, model: float, device: str) -> tuple[bool, str]:
    """Whether the device is kept busy, and that in words; samples/s of one process each."""
    if loader >= model:
        close = ", with little to spare" if loader < _NEAR * model else ""
        return True, f"the {device} is kept busy{close}"
    share = f"{1 - loader / model:.0%}".replace("%", " %")
    return False, f"the {device} will wait for data, {share} of the time"


def compare(experiment: Experiment, parts: Parts) -> Word | None:
    """The loader's rate against the model's need, of each GPU; None where there is no GPU and nothing was measured."""
    try:
        instance = instances.find(experiment.launch.instance)
        loader = measured.find(measured.loader_key(experiment, parts, experiment.data.threads))
        model = measured.find(measured.model_key(experiment, parts))
    except UserError:  # the instance's own check tells that
        return None
    on_gpu = bool(instance.request(experiment.launch).gpus) and experiment.train.device != "cpu"
    device = "GPU" if on_gpu else "CPU"
    if loader and model:
        return _both(experiment, loader, model, device)
    if not on_gpu:
        return None
    need = None if model else _need(experiment, parts, instance)
    if loader and need:
        return _bounded(experiment, instance, loader, need)
    return Word("unchecked", f"{_unknown(loader, model, need)}: {_command(instance)}")


def _both(experiment: Experiment, loader: dict[str, Any], model: dict[str, Any], device: str) -> Word:
    rates = loader["samples_per_second"], model["samples_per_second"]
    good, words = verdict(*rates, device)
    given = _given(experiment, loader)
    text = f"{given}, the model takes {number(rates[1])} (measured {_day(loader, model)}): {words}"
    return Word("passed", text) if good else Word("cautions", f"{text}; {REMEDY}")


def _given(experiment: Experiment, loader: dict[str, Any]) -> str:
    rate, threads = loader["samples_per_second"], experiment.data.threads
    return f"the loader gives {number(rate)} samples/s with data.threads={threads}"


def _day(*records: dict[str, Any]) -> str:
    """Of the older one."""
    return time.strftime("%Y-%m-%d", time.localtime(min(record["time"] for record in records)))


def _need(experiment: Experiment, parts: Parts, instance: Instance) -> tuple[float, float, str] | None:
    """Samples/s of one GPU at the least and the most MFU that are assumed, and that in words."""
    known = instance.gpu_tflops and instance.gpu_tflops.of(experiment.train.precision)
    if not known:
        return None
    try:
        flops = max(per_sample(experiment, parts))
    except Exception:  # whatever a user's model raises on the meta device
        return None
    if not flops:
        return None
    least, most = (share * known * 1e12 / flops for share in _ASSUMED)
    low, high = (f"{100 * share:.0f}" for share in _ASSUMED)
    words = (
        f"the model takes {number(least)} to {number(most)} samples/s a GPU at {low} to {high} % of {known:g} TFLOP/s"
    )
    return least, most, f"{words} (assumed; {steptimes.rate(flops).removesuffix('/s')} a sample)"


def _bounded(
    experiment: Experiment, instance: Instance, loader: dict[str, Any], need: tuple[float, float, str]
) -> Word:
    rate, (least, most, words) = loader["samples_per_second"], need
    text = f"{_given(experiment, loader)} (measured {_day(loader)}), {words}"
    if rate >= most:
        return Word("passed", f"{text}: the GPU is kept busy")
    if rate < least:
        return Word("cautions", f"{text}: the GPU will wait for data; {REMEDY}")
    return Word("unchecked", f"{text}: which one will wait is open; {_command(instance)}")


def _unknown(loader: Any, model: Any, need: tuple[float, float, str] | None) -> str:
    question = "whether the GPU will wait for data"
    if loader:
        return f"{question}: the loader is measured, the model is not"
    if model:
        return (
            f"{question}: the model takes {number(model['samples_per_second'])} samples/s, the loader is not measured"
        )
    return f"{question}: nothing is measured{f'; {need[2]}' if need else ''}"


def _command(instance: Instance) -> str:
    return f"'srun hpc bench all EXPERIMENT' in an allocation of {instance.name} measures both"
