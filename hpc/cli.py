"""The command line, `hpc`: the order of the commands in its help, and what a user's mistake looks like."""

from __future__ import annotations

import io
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
from hpc.commands import data, run, sweep, pipeline, watch, results, machine, doctor  # noqa: F401  the order of the panels in the help


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
        return ExitCode.DONE

    return wrapped


def main() -> None:
    """The entry point: a user's mistake is one clear line and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_quiet(app)())


if __name__ == "__main__":
    main()
