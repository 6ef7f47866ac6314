"""The payload of the batch script: `python -m jobs.run RUN`, one process per task; its exit code says how it ended."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc.preempt import ExitCode, StopFlag

_FLAG = StopFlag().install()  # before torch is imported: a signal in the warm-up must be heard, too

from hpc import health, instances  # noqa: E402
from hpc.allocation import Allocation  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.experiment import Experiment, load  # noqa: E402
from hpc.rundir import RunDir  # noqa: E402
from hpc.sampler import Sampler  # noqa: E402
from jobs import step  # noqa: E402

if TYPE_CHECKING:  # torch is imported late: a signal in the warm-up must be heard
    from jobs.train import Trainer

_BUILD_LIMIT_S = 1800.0
"""Silence that is no hang while model and data are made and a checkpoint is read."""


def run(path: str) -> ExitCode:
    """Train one run to its end or to a clean stop; of each node, one task looks at the node first."""
    folder, allocation = RunDir(path), Allocation.current()
    logging.basicConfig(
        level=logging.INFO if allocation.rank == 0 else logging.WARNING,
        format=f"%(asctime)s [{allocation.rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    logging.info("attempt %d of %s on %s", allocation.generation, folder.name, allocation.node)
    try:
        experiment, _ = load(folder.experiment)
        if allocation.local_rank == 0 and (faults := _look_at_node(experiment, allocation)):
            return _leave_node(folder, allocation, "; ".join(faults))
    except UserError as error:
        return _fail(folder, allocation, error, ExitCode.BAD_INPUT)
    if allocation.local_rank:
        return _train(folder, experiment, allocation)
    sampler = Sampler(folder, allocation, _asked(experiment)).start()
    try:
        if folder.step.exists():
            return step.run(folder, _FLAG, allocation.generation)
        return _train(folder, experiment, allocation, sampler)
    finally:
        sampler.close()


def _look_at_node(experiment: Experiment, allocation: Allocation) -> list[str]:
    gpus = 0 if experiment.train.device == "cpu" else allocation.gpus or 0
    report = health.check(gpus, exclusive=bool(allocation.job_id))
    for line in report.unchecked:
        logging.info("node check: %s", line)
    return report.faults


def _leave_node(folder: RunDir, allocation: Allocation, reason: str) -> ExitCode:
    """Leave word of a bad node: the batch script's tail decides by it."""
    try:
        writer = f"rank{allocation.rank}"
        folder.event("bad-node", writer, allocation.generation, node=allocation.node, reason=reason)
    except OSError as error:
        logging.warning("the bad node is not recorded: %s", error)
    print(f"bad node {allocation.node}: {reason}", file=sys.stderr)
    return ExitCode.BAD_NODE


def _asked(experiment: Experiment) -> dict[str, int | float]:
    """The job's request, {} where the instance's file is not on this machine."""
    try:
        return asdict(instances.find(experiment.launch.instance).request(experiment.launch))
    except UserError:
        return {}


def _train(folder: RunDir, experiment: Experiment, allocation: Allocation, sampler: Sampler | None = None) -> ExitCode:
    import torch

    from jobs.checkpoint import Damaged
    from jobs.engine import BadNode
    from jobs.rendezvous import RendezvousError

    fail = partial(_fail, folder, allocation)
    try:
        trainer: Trainer = _build(folder, experiment, allocation)
        if trainer.recorder and sampler:
            trainer.recorder.sample_usage = sampler.update
    except Damaged as error:
        return fail(error, ExitCode.STORAGE, retry=False)
    except OSError as error:
        return fail(error, ExitCode.STORAGE)
    except (UserError, ValueError) as error:
        return fail(error, ExitCode.BAD_INPUT)
    except RendezvousError as error:
        return fail(error, ExitCode.CRASH)
    except BadNode as error:
        if torch.version.cuda is None:  # so it would be on every node
            return fail(UserError(f"{error}: this torch was built without CUDA"), ExitCode.BAD_INPUT)
        return _leave_node(folder, allocation, str(error).removeprefix(f"{allocation.node}: "))
    try:
        return _fit(folder, allocation, trainer)
    finally:
        trainer.leave_data()


def _fit(folder: RunDir, allocation: Allocation, trainer: Trainer) -> ExitCode:
    from jobs.checkpoint import StorageError
    from jobs.train import Diverged, Stopped

    fail = partial(_fail, folder, allocation)
    try:
        trainer.fit()
    except Stopped:
        return ExitCode.STOPPED
    except StorageError as error:
        return fail(error, ExitCode.STORAGE)
    except OSError as error:
        traceback.print_exc()  # of the model's own code, it may be
        return fail(error, ExitCode.STORAGE)
    except Diverged as error:
        return fail(error, ExitCode.CRASH, retry=False)
    except UserError as error:
        return fail(error, ExitCode.BAD_INPUT)
    trainer.engine.barrier()
    trainer.close()
    return ExitCode.DONE


def _build(folder: RunDir, experiment: Experiment, allocation: Allocation) -> Trainer:
    """A trainer at the step where the run goes on, its watchdog awake."""
    from jobs import virtual
    from jobs.engine import Engine, choose_device
    from jobs.train import Trainer, wants_determinism
    from jobs.watchdog import Peers, Watchdog

    device = choose_device(experiment.train.device, allocation)
    threads = virtual.THREADS if experiment.train.deterministic == "layout" and device.type == "cpu" else 0
    token = f"{folder.name} {allocation.generation}"
    engine = Engine(allocation, device, wants_determinism(experiment, device), token, threads)
    peers = Peers(engine.store, allocation) if engine.store else None
    watchdog = Watchdog(folder, allocation, experiment.train.hang_after, peers).start()
    with watchdog.phase("build", _BUILD_LIMIT_S):
        trainer = Trainer(folder, experiment, engine, _FLAG, watchdog)
        try:
            trainer.resume()
        except BaseException:
            trainer.leave_data()
            raise
    return trainer


def _fail(
    folder: RunDir, allocation: Allocation, error: Exception, code: ExitCode, retry: bool | None = None
) -> ExitCode:
    """Say why, to the user and to the batch script's tail; `retry` False: another attempt would be in vain."""
    word: dict[str, Any] = {"reason": str(error), "code": int(code)}
    if retry is not None:
        word["retry"] = retry
    with suppress(OSError):  # a full disk
        folder.event("failed", f"rank{allocation.rank}", allocation.generation, **word)
    with suppress(OSError):  # a terminal that is gone
        print(error, file=sys.stderr)
    return code


def main() -> None:
    faulthandler.enable()  # where in Python a crash of a library was
    try:
        code = run(sys.argv[1])
    except SystemExit as end:  # of a model or a library, and whatever it says: the run is not finished
        traceback.print_exc()
        print(f"the training code left by sys.exit({end.code})", file=sys.stderr)
        code = ExitCode.CRASH
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a terminal that is gone
            stream.flush()
    os._exit(code)  # no rank waits in an exit handler for one that has left


if __name__ == "__main__":
    main()
