"""Commands on this machine and its cluster."""

from __future__ import annotations

from hpc.commands.common import AsJson, app, print_json, say, table


@app.command("instances", rich_help_panel="Machine")
def list_instances(as_json: AsJson = False) -> None:
    """List the instances a request can be made for."""
    from hpc import instances
    from hpc.units import short_time

    found = [(instances.find(name), path) for name, path in sorted(instances.names().items())]
    if as_json:
        print_json([{**instance.model_dump(), "file": str(path)} for instance, path in found])
        return
    columns = ["instance", "cores", "GB", "GPUs", "nodes", "time", "description"]
    rows = []
    for i, _ in found:
        gpus = f"{i.gpus} x {i.gpu_type} {i.gpu_mem_gb:g} GB" if i.gpus and i.gpu_mem_gb else str(i.gpus)
        rows.append([i.name, str(i.cpus), f"{i.mem_gb:g}", gpus, str(i.nodes), short_time(i.time_limit), i.description])
    table(columns, rows)


@app.command(rich_help_panel="Machine")
def env() -> None:
    """Print the line that lets a notebook or script import models3d and datasets."""
    import shlex

    from hpc import payload

    root = shlex.quote(str(payload.root()))
    say(f"export HPC_ROOT={root} PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}")
