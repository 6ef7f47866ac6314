"""The payload of the batch script: `python -m jobs.run RUN`, one process per task; its exit code says how it ended."""

from __future__ import annotations

import logging
import os
import sys

from hpc.preempt import ExitCode, StopFlag

_FLAG = StopFlag().install()  # before torch is imported: a signal in the warm-up must be heard, too

from hpc.allocation import Allocation  # noqa: E402
from hpc.errors import UserError  # noqa: E402
from hpc.experiment import load  # noqa: E402
from hpc.rundir import RunDir  # noqa: E402


def run(path: str) -> ExitCode:
    """Train one run to its end or to a clean stop."""
    from jobs.checkpoint import Damaged
    from jobs.engine import BadNode, Engine, choose_device
    from jobs.train import Stopped, Trainer, wants_determinism

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
        device = choose_device(experiment.train.device, allocation)
        engine = Engine(allocation, device, wants_determinism(experiment, device))
        trainer = Trainer(folder, experiment, engine, _FLAG, allocation.generation)
        trainer.resume()
    except (UserError, ValueError) as error:
        return _fail(error, ExitCode.STORAGE if isinstance(error, Damaged) else ExitCode.BAD_INPUT)
    except BadNode as error:
        return _fail(error, ExitCode.BAD_NODE)
    try:
        trainer.fit()
    except Stopped:
        return ExitCode.STOPPED
    except OSError as error:
        return _fail(error, ExitCode.STORAGE)
    except FloatingPointError as error:
        return _fail(error, ExitCode.CRASH)
    except UserError as error:
        return _fail(error, ExitCode.BAD_INPUT)
    engine.barrier()
    engine.close()
    return ExitCode.DONE


def _fail(error: Exception, code: ExitCode) -> ExitCode:
    print(error, file=sys.stderr)
    return code


def main() -> None:
    code = run(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no rank waits in an exit handler for one that has left


if __name__ == "__main__":
    main()
