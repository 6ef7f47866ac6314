"""Commands on this machine and its cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import AsJson, app, print_json, say, width
from hpc.errors import UserError
from hpc.preempt import ExitCode

if TYPE_CHECKING:
    from hpc.instances import Instance


@app.command("instances", rich_help_panel="Machine")
def list_instances(
    discover: Annotated[
        bool, typer.Option("--discover", help="Read them off the cluster that answers here, and print their files.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Put these files into your own folder of instances.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there already.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the instances a request can be made for."""
    if (write and not discover) or (force and not write):
        raise UserError("--force belongs to --write, and that to --discover: hpc instances --discover --write")
    if discover:
        _discover(write, force, as_json)
    else:
        _list(as_json)


def _discover(write: bool, force: bool, as_json: bool) -> None:
    from hpc import discover

    found = discover.read()
    written = discover.write(found, force) if write else []
    if as_json:
        print_json([{"name": one.name, **one.values} for one in found])
    elif written:
        say("\n".join(str(path) for path in written))
    else:
        say("\n".join(f"# {one.name}.yaml\n{one.text}" for one in found).rstrip())


def _list(as_json: bool) -> None:
    from hpc import instances, tables

    found, faults = [], []
    for name, path in sorted(instances.names().items()):
        try:
            found.append((instances.find(name), path))
        except UserError as error:
            faults.append(str(error))
    if as_json:
        print_json([{**instance.model_dump(mode="json"), "file": str(path)} for instance, path in found])
    else:
        tables.print_rows([_line(one) for one, _ in found], width(), ("nodes", "time", "description", "GB", "cores"))
    if faults:
        print("\n".join(faults), file=sys.stderr)
        raise typer.Exit(ExitCode.CRASH)


def _line(one: Instance) -> dict[str, str]:
    from hpc.units import short_time

    memory = f" {one.gpu_mem_gb:g} GB" if one.gpu_mem_gb else ""
    return {
        "instance": one.name,
        "cores": str(one.cpus),
        "GB": f"{one.mem_gb:g}",
        "GPUs": f"{one.gpus} x {one.gpu_type or 'GPU'}{memory}" if one.gpus else "0",
        "nodes": str(one.nodes),
        "time": short_time(one.time_limit),
        "description": one.description,
    }


@app.command("template", rich_help_panel="Machine")
def show_template(
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Lint a template of your own.", show_default=False)
    ] = None,
    instance: Annotated[
        str | None, typer.Option("--instance", help="The instance it is filled for (laptop).", show_default=False)
    ] = None,
) -> None:
    """Print the batch template, to start your own from: hpc template > mine.sbatch.j2"""
    from hpc import filling, instances, template

    if check is None:
        if instance:
            raise UserError(
                "--instance has no effect without --check FILE; 'hpc plan EXPERIMENT' shows a filled script"
            )
        say((filling.FOLDER / filling.JOB).read_text().rstrip())
        return
    own = instances.find(instance or "laptop").model_copy(update={"template": check})
    if faults := template.check(own):
        raise UserError("\n".join(faults))
    say(f"{check}: good for single runs and arrays; 'template: {check.resolve()}' in an instance's file makes it count")


@app.command(rich_help_panel="Machine")
def env() -> None:
    """Print the line that lets a notebook or script import models3d and datasets."""
    import shlex

    from hpc import payload

    root = shlex.quote(str(payload.root()))
    say(f"export HPC_ROOT={root} PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}")
