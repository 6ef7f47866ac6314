"""`hpc recipes`: the experiments that come with the code."""

from __future__ import annotations

from dataclasses import asdict

from hpc.commands.common import AsJson, app, print_json, width


@app.command(rich_help_panel="Run")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes: names for plan, train, submit and sweep, and for 'base:'; each has a form --tiny."""
    from hpc import recipes, tables

    found = recipes.listed()
    if as_json:
        print_json([{**asdict(one), "file": str(one.file)} for one in found])
        return
    rows = [{"recipe": one.name, "task": one.task, "base": one.base or "", "what": one.summary} for one in found]
    tables.print_rows(rows, width(), ("base", "task"))
