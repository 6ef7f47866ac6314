"""The command-line options that evaluate and predict share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import torch

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.experiment import load
from hpc.rundir import RunDir
from jobs import checkpoint
from jobs.engine import BadNode, choose_device
from jobs.inference.fitting import check_window
from jobs.inference.members import Manner, Member, check_manner


class Parser(argparse.ArgumentParser):
    """One whose complaints are UserError: a line, and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; '{self.prog} --help' shows the usage")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", default="best", help="best (default), last, or a folder's name")
    add("--skip-unfinished", action="store_true", help="of several runs, leave out those that have not finished")
    add("--device", choices=("auto", "cpu", "cuda"), help="default: as the training")
    add("--flips", metavar="A,B", help="ask mirror images along these axes, too: 0,1,2 are x,y,z or rows,columns")
    add("--window", metavar="X,Y,Z", help="sliding windows of this size (default: of the training's)")
    add("--windows", action="store_true", help="classifiers: the mean over windows of the volume, not its centre")
    add("--overlap", type=float, metavar="SHARE", help="of neighbouring windows (default: 0.5)")
    add("--batch", type=int, metavar="N", help="windows, or samples, in one forward pass")


def manner_of(options: argparse.Namespace) -> Manner:
    """Raises UserError for what is no number."""
    if options.batch is not None and options.batch < 1:
        raise UserError(f"--batch {options.batch} must be 1 or more")
    return Manner(
        flips=whole_numbers("--flips", options.flips) or (),
        window=whole_numbers("--window", options.window),
        overlap=0.5 if options.overlap is None else options.overlap,
        batch=options.batch or 0,
        windows=options.windows,
    )


def runs_of(options: argparse.Namespace, folders: Sequence[str]) -> list[RunDir]:
    """The runs that are asked, without the unfinished ones if so wanted. Raises UserError where one cannot answer."""
    runs = [RunDir(folder) for folder in folders]
    unfinished = unfinished_among(runs)
    if options.skip_unfinished:
        if len(runs) < 2:
            raise UserError("--skip-unfinished has no effect on one run")
        if len(unfinished) == len(runs):
            raise UserError(f"none of these {len(runs)} runs has finished; see 'hpc ls'")
        return [run for run in runs if run not in unfinished]
    if len(runs) > 1 and (empty := [run for run in unfinished if not any(checkpoint.newest_first(run.checkpoints))]):
        raise UserError(
            f"{_named(empty)} of these {len(runs)} runs: no checkpoint yet; --skip-unfinished goes on without"
        )
    return runs


def unfinished_among(runs: Sequence[RunDir]) -> list[RunDir]:
    return [run for run in runs if run.experiment.is_file() and not run.result.exists()]


def tell_unfinished(runs: Sequence[RunDir]) -> list[str]:
    """A sentence where several are asked and some of them are still in training, or have stopped."""
    found = unfinished_among(runs) if len(runs) > 1 else []
    if not found:
        return []
    return [f"not finished, and asked as saved so far: {_named(found)} (--skip-unfinished leaves such runs out)"]


def _named(runs: Sequence[RunDir]) -> str:
    return ", ".join(f"{run.path.parent.name}/{run.name}" if run.in_sweep else run.name for run in runs)


def device_of(options: argparse.Namespace, run: RunDir) -> torch.device:
    """As --device says, else as the run was trained. Raises UserError where torch sees no such device."""
    wanted = options.device or load(run.experiment)[0].train.device
    try:
        return choose_device(wanted, Allocation.current())
    except BadNode as error:
        asked = f"--device {wanted}" if options.device else f"{run.name} has train.device {wanted}"
        seen = str(error).partition(" (")[0]
        raise UserError(f"{asked}, but {seen} (see nvidia-smi): add --device cpu") from None


def whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r} is not whole numbers with commas between, such as 0,1") from None


def check_options(members: list[Member], options: argparse.Namespace, manner: Manner) -> None:
    """Raises UserError for what makes no sense for these networks, or would have no effect."""
    check_manner(members, manner)
    check_window(members, manner)
    maps = members[0].facts.task == "segmentation"
    if options.overlap is not None and not (maps or manner.windows):
        raise UserError("--overlap has no effect on one window: it belongs to --windows, or to a segmentation")
