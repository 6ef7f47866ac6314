"""What the ranks of a run hold of model, gradients and optimizer (`train.strategy`), behind one interface.

`Strategy` (whole.py) is the contract, kept by tests/test_strategies.py: nothing outside this package asks which one it
has. All of them save one full state, so that a run may change strategy and number of ranks between two attempts.
With one task every strategy is the whole model in one process.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from hpc.errors import UserError
from hpc.training import Train
from jobs.engine import Engine
from jobs.strategies.whole import Ddp, Strategy

__all__ = ["Strategy", "check", "make_strategy"]


def check(settings: Train, model: nn.Module) -> None:
    """Raises UserError for a model that the strategy cannot hold, and where its library is missing."""
    scalars = [name for name, parameter in model.named_parameters() if not parameter.ndim]
    if settings.strategy == "fsdp" and scalars:
        raise UserError(f"train.strategy: fsdp cannot cut the scalar {scalars[0]}; give it one dimension, or use ddp")
    if settings.strategy == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError("train.strategy: deepspeed is not installed here: pip install deepspeed, or use fsdp")


def make_strategy(settings: Train, engine: Engine, model: nn.Module) -> Strategy:
    """That of `train.strategy`. Raises UserError for what it cannot do.

    With train.sync_batchnorm the model's BatchNorm layers are replaced by those over all ranks.
    """
    if engine.world_size == 1 or settings.deterministic == "layout":  # layout: jobs/virtual.py adds gradients up
        return Strategy(settings, engine, model)
    check(settings, model)
    if settings.sync_batchnorm:
        if engine.device.type == "cpu":
            raise UserError("train.sync_batchnorm: torch has it on CUDA alone; leave it out to train on the CPU")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return _kind(settings.strategy)(settings, engine, model)


def _kind(name: str) -> type[Strategy]:
    """Those in shards are imported where they are asked for: deepspeed takes seconds."""
    if name == "fsdp":
        from jobs.strategies.fsdp import Fsdp

        return Fsdp
    if name == "deepspeed":
        from jobs.strategies.zero import Zero

        return Zero
    return Ddp
