"""Commands on data and models: their options are read by the payload, in a child process."""

from __future__ import annotations

from collections.abc import Callable

import typer

from hpc.commands.common import app

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _passes_on(name: str, module: str, words: str) -> Callable[..., None]:
    """A command whose options are the child's own: `python -m MODULE` reads them and prints its help."""

    def command(context: typer.Context) -> None:
        from hpc import payload

        raise typer.Exit(payload.child(module, context.args))

    return app.command(name, help=words, context_settings=_PASSED_ON, rich_help_panel="Data and models")(command)


_passes_on("pack", "jobs.pack", "Pack scans into one HDF5 file, with split and checksums. [dim]hpc pack --help[/dim]")
_passes_on("inspect", "jobs.inspect", "Show what an HDF5 file holds; --verify its checksums, --png a montage.")
_passes_on("models", "jobs.models", "List the models, with parameters, shapes and FLOPs.")
