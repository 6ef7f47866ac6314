"""Layout in memory and compilation of a model, in place: parameters, their names and their order stay as they are.

A compiled model trains; validation, an average (train.ema), evaluate and predict compute eagerly: they see other batch
sizes and modes, each of which would be compiled anew, and their scores can then be computed again by anybody.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datasets import Loader
from hpc.allocation import instance_scratch
from hpc.errors import UserError
from hpc.preempt import BrokenOff, StopFlag
from hpc.rundir import RunDir
from hpc.training import Train
from jobs.precision import Precision

if TYPE_CHECKING:
    from jobs.engine import Engine
    from jobs.watchdog import Watchdog

_LOG = logging.getLogger(__name__)
COMPILE_LIMIT_S = 3600.0
"""Silence that is no hang while a model is compiled."""
BACKEND = "inductor"
"""Of torch.compile."""
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


# Layout.


def channels_last(tensor: Tensor) -> Tensor:
    """(B, C, H, W) or (B, C, D, H, W) with its channels beside each other in memory; others as they are."""
    memory_format = _FORMATS.get(tensor.ndim)
    return tensor if memory_format is None else tensor.contiguous(memory_format=memory_format)


def layout(settings: Train) -> Callable[[Tensor], Tensor]:
    """What a model's inputs go through."""
    return channels_last if settings.channels_last else lambda tensor: tensor


def lay_out(model: nn.Module) -> None:
    """Weights of convolutions with their channels last; optimizer state and averages follow the weights' layout."""
    for parameter in model.parameters():
        parameter.data = channels_last(parameter.data)


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """After a checkpoint was read, which knows no layouts: moments as the weights, as a first step makes them."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# Compilation.


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: children of Sequential, ModuleList and ModuleDict, themselves made of several layers, whose
    class occurs at least twice among such children. Of nested ones the outer.
    """
    children = [
        child
        for container in model.modules()
        if isinstance(container, _CONTAINERS)
        for child in container.children()
        if type(child) not in _CONTAINERS and any(True for _ in child.children())
    ]
    counts = Counter(type(child) for child in children)
    repeated = {id(child): child for child in children if counts[type(child)] > 1}
    inner = {id(part) for child in repeated.values() for part in child.modules() if part is not child}
    return [child for key, child in repeated.items() if key not in inner]


def targets(model: nn.Module, kind: str) -> list[nn.Module]:
    """The modules that `train.compile` compiles. Raises UserError where there are none."""
    if kind == "off":
        return []
    found = [model] if kind == "model" else blocks(model)
    if not found:
        raise UserError(
            f"train.compile=blocks: {type(model).__name__} has no repeated blocks (children of nn.Sequential or "
            f"nn.ModuleList of one class); use train.compile=model, or off"
        )
    return found


def accelerate(model: nn.Module, settings: Train, device: torch.device, same_shapes: bool = True) -> nn.Module:
    """The model with the layout and compilation of the settings, in place; it is compiled by its first pass.

    same_shapes: every training batch has one shape; else a graph for any size is tried for the second shape.
    Raises UserError for `compile: blocks` of a model without repeated ones.
    """
    if settings.channels_last:
        lay_out(model)
    if settings.compile != "off":
        _configure()
        for module in targets(model, settings.compile):
            module.compile(dynamic=False if same_shapes else None, backend=BACKEND)
    return model


def _configure() -> None:
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # after the first pass: a stage that fails to compile runs eagerly
    torch._dynamo.config.recompile_limit = 128  # all blocks count together, and each of their shapes
    torch._dynamo.config.optimize_ddp = False  # with blocks the gradients go block by block as they are ready


def restore_eager(model: nn.Module) -> None:
    """Take all compilation back."""
    for module in model.modules():
        module._compiled_call_impl = None


def uncompiled(settings: Train) -> AbstractContextManager[object]:
    """In here compiled modules compute eagerly."""
    return nullcontext() if settings.compile == "off" else torch.compiler.set_stance("force_eager")


def warm_up(
    model: nn.Module,
    inputs: Tensor,
    precision: AbstractContextManager[object],
    agree: Callable[[int], int],
    window: AbstractContextManager[object] | None = None,
) -> bool:
    """Compile by one pass on `inputs` (B, C, *spatial), of which nothing stays but the compiled code.

    Where it fails on any rank (`agree`: the maximum over them), the model is eager again on all; False, and a warning.
    The window may break it off; then False, without one.
    """
    import torch._dynamo

    error: BaseException | None = None
    with untouched(model, inputs.device), torch._dynamo.config.patch(suppress_errors=False):
        try:
            with window or nullcontext():
                with precision:
                    outputs = model(inputs)
                outputs.float().square().mean().backward()
        except (Exception, BrokenOff) as caught:  # whatever a compiler, or its compiler, raises
            error = caught
    bad = agree(0 if error is None else 2 if isinstance(error, BrokenOff) else 1)
    if not bad:
        return True
    restore_eager(model)
    if bad == 2:
        return False
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}" if error else "on another rank"
    _LOG.warning("train.compile has failed, the run goes on without: %s", why)
    return False


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode in here; afterwards buffers, gradients, modes and random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = [device] if device.type == "cuda" else []
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def prepare(
    model: nn.Module, settings: Train, engine: Engine, loader: Loader, watchdog: Watchdog, flag: StopFlag
) -> None:
    """Layout and compilation of a run's model, compiled by a pass of the shape that all its training batches have.

    A stop signal breaks that pass off: the run has to stop before its first step.
    """
    volumes = loader.volumes
    same = loader.patch is not None or not volumes.ragged
    accelerate(model, settings, engine.device, same)
    heard = engine.max([int(flag.cause is not None)])[0]  # on any rank: the others need not compile
    if settings.compile == "off" or not same or heard:
        return
    pieces = settings.virtual_ranks // engine.world_size if settings.deterministic == "layout" else settings.accumulate
    shape = (volumes.channels, *loader.patch) if loader.patch else volumes.shape
    with watchdog.phase("compile", COMPILE_LIMIT_S):
        inputs = layout(settings)(torch.zeros(loader.rows // pieces, *shape, device=engine.device))
        autocast = Precision(settings, engine.device).autocast()
        warm_up(model, inputs, autocast, lambda bad: engine.max([bad])[0], flag.breaks_off())


def use_cache(run: RunDir, settings: Train) -> Path | None:
    """Where compiled code is kept, and found by the next attempt: TORCHINDUCTOR_CACHE_DIR if the user has set it, else
    the instance's scratch, else the run's own folder. Compiled code is executed: a folder of somebody else is not used.
    """
    if settings.compile == "off" and not settings.autotune:
        return None
    if named := os.environ.get(_CACHE):
        return Path(named)
    scratch = instance_scratch()
    own = Path(scratch) / f"hpc-compiled-{os.getuid()}" if scratch else None
    folder = own if own and _is_ours(own) else run.compiled
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_CACHE] = str(folder)
    return folder


def _is_ours(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and folder.is_dir() and not folder.is_symlink()
