"""A run that does not train (step.yaml): packing or evaluation, by the payload's own command in a child process.

A stop signal ends the child, and the run is started again later: packing leaves no half file.
`python -m jobs.step` looks at the steps of a pipeline before they queue, from standard input.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time

from hpc import yamlfile
from hpc.errors import UserError
from hpc.preempt import ExitCode, StopFlag
from hpc.rundir import RunDir, read_json, write_json

_POLL_S = 0.2
_GRACE_S = 20.0
_BEAT_S = 5.0


def run(folder: RunDir, flag: StopFlag, generation: int) -> ExitCode:
    """Run the step to its end or to a stop; result.json when it is done."""
    step = yamlfile.read(folder.step)
    phase = step["module"].removeprefix("jobs.")
    _heartbeat(folder, phase, generation)
    command = [sys.executable, "-m", step["module"], *map(str, step["arguments"])]
    child = subprocess.Popen(command, cwd=step["folder"], preexec_fn=_hear)
    beaten = time.monotonic()
    while child.poll() is None and not flag.cause:
        time.sleep(_POLL_S)
        if time.monotonic() - beaten > _BEAT_S:
            beaten = time.monotonic()
            if not _heartbeat(folder, phase, generation):
                break
    time.sleep(_POLL_S if child.returncode else 0)  # what ended the child may reach us a moment later
    if flag.cause or child.poll() is None:
        _end(child)
    if folder.last_generation() > generation:
        raise UserError(f"{folder.name} is held by generation {folder.last_generation()}, not by this {generation}")
    if child.returncode == ExitCode.DONE:
        write_json(folder.result, {"finished": True, "run": folder.name, "step": step["module"]})
        return ExitCode.DONE
    if flag.cause:
        write_json(folder.stop, {"generation": generation, "step": 0, "cause": flag.cause})
        folder.event("signal", "rank0", generation, cause=flag.cause)
        logging.info("stopped by %s: it starts anew", flag.cause)
        return ExitCode.STOPPED
    return ExitCode.BAD_INPUT if child.returncode == ExitCode.BAD_INPUT else ExitCode.CRASH


def _heartbeat(folder: RunDir, phase: str, generation: int) -> bool:
    """What others see of a run that is alive; False where another attempt holds it by now."""
    held = read_json(folder.state)
    if held.get("generation") == generation:
        write_json(folder.state, {**held, "phase": phase, "time": round(time.time(), 3)})
    return folder.last_generation() <= generation


def _hear() -> None:
    """A child of this process is deaf to stop signals; this one has nothing to save and may be ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def check(pack: list[str] | None, data: str, split: str, fold: int | None = None) -> str:
    """What is to be packed, in words. Raises ValueError or UserError for arguments of `hpc pack` or a split that fail.

    `pack`: the arguments, None where `data` is there already.
    """
    from datasets import open_volumes
    from datasets.partition import SPLITS

    if split not in SPLITS:
        raise UserError(f"--split {split!r} is no split; use {', '.join(SPLITS)}")
    if pack is not None:
        return _check_pack(pack, split, SPLITS.index(split), fold)
    volumes = open_volumes(data)
    volumes = volumes if fold is None else volumes.fold(fold)
    if not len(volumes.indices(split)):
        full = [name for name in SPLITS if len(volumes.indices(name))]
        raise UserError(f"--split {split}: {data} has no such samples; it has {', '.join(full)}")
    return f"{data} is there: nothing is packed"


def _check_pack(arguments: list[str], split: str, number: int, fold: int | None) -> str:
    """Sources and table, before any volume is read; the split must get samples by its share or by the table."""
    from datasets import sources
    from datasets.packing.labelling import read_labelling
    from jobs.pack import parse

    options = parse(arguments)
    found = sources.find(options.sources, options.channels)
    given = {row.split for row in read_labelling(options, found).rows.values()}
    if (fold is None) != (options.folds is None) or (fold or 0) >= (options.folds or 1):
        raise UserError(
            f"data.fold is {fold}, and --pack makes {options.folds or 'no'} folds: give both, the first below"
        )
    if options.folds is not None and split == "validation":
        given |= {number}  # each fold is that of some run
    if not options.split[number] and number not in given:
        shares = "/".join(f"{100 * share:g}" for share in options.split)
        raise UserError(f"--split {split}: --pack makes no such samples (its own --split is {shares})")
    return f"{len(found)} volumes to pack"


def main() -> int:
    try:
        print(check(**yamlfile.parse(sys.stdin.read(), "stdin")))
    except (UserError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
