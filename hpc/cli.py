"""The command line, `hpc`: the order of the commands in its help, and what a user's mistake looks like."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from hpc import __version__
from hpc.commands.common import app, say
from hpc.errors import UserError
from hpc.preempt import ExitCode

# isort: off
from hpc.commands import data, run, sweep, pipeline, recipes, watch, inference, results  # noqa: F401  the order of the panels in the help
from hpc.commands import logs, machine, doctor, drill, bench  # noqa: F401


def _version(asked: bool) -> None:
    if asked:
        say(f"hpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _in_a_line(error: Exception) -> str | None:
    """What the machine or SLURM refused; None for a fault of ours."""
    from hpc.slurm import SlurmError

    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return str(error) if isinstance(error, SlurmError) else None


def _quiet(call: Callable[[], Any]) -> Callable[[], int]:
    @wraps(call)
    def wrapped() -> int:
        try:
            call()
        except UserError as error:
            print(error, file=sys.stderr)
            return ExitCode.BAD_INPUT
        except KeyboardInterrupt:
            return 130
        except (OSError, RuntimeError) as error:
            if os.environ.get("HPC_DEBUG") == "1" or (words := _in_a_line(error)) is None:
                raise
            print(f"{words} (HPC_DEBUG=1 shows where)", file=sys.stderr)
            return ExitCode.CRASH
        return ExitCode.DONE

    return wrapped


def main() -> None:
    """The entry point: one clear line, exit code 2 for a user's mistake, 1 for what the machine refuses."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_quiet(app)())


if __name__ == "__main__":
    main()
