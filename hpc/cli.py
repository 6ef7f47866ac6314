"""The command line, `hpc`: each command is thin, and imports submitit and jinja2 only where it needs them."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc import __version__
from hpc.errors import UserError
from hpc.preempt import ExitCode

app = typer.Typer(
    help="SLURM batch jobs for 3D networks: checked before they queue, preempted without losing a step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Runs = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs (HPC_RUNS; default: runs).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: train.epochs=20 ...", show_default=False)]
ExperimentFile = Annotated[
    Path, typer.Argument(help="The experiment, a YAML file.", metavar="EXPERIMENT", show_default=False)
]
RunName = Annotated[str, typer.Argument(help="A run: its name, id, or path.", metavar="RUN", show_default=False)]
_NARROW, _NAME, _DETAIL, _GAP = 100, 32, 12, 2
"""Widths: of a terminal that shows less; of a name and of a detail where there is little room; between two columns."""
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _say(text: str = "") -> None:
    print(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=_width()).print(table)


def _width() -> int:
    """Columns of the terminal (COLUMNS first), or 200 where the output is none."""
    return shutil.get_terminal_size((200, 24)).columns


def _passes_on(name: str, module: str, words: str) -> Callable[..., None]:
    """A command whose options are the child's own: `python -m MODULE` reads them and prints its help."""

    def command(context: typer.Context) -> None:
        from hpc import payload

        raise typer.Exit(payload.child(module, context.args))

    return app.command(name, help=words, context_settings=_PASSED_ON, rich_help_panel="Data and models")(command)


_passes_on("pack", "jobs.pack", "Pack scans into one HDF5 file, with split and checksums. [dim]hpc pack --help[/dim]")
_passes_on("inspect", "jobs.inspect", "Show what an HDF5 file holds; --verify its checksums, --png a montage.")
_passes_on("models", "jobs.models", "List the models, with parameters, shapes and FLOPs.")


@app.command(rich_help_panel="Run")
def plan(file: ExperimentFile, overrides: Overrides = None, runs: Runs = None) -> None:
    """Print the resolved experiment and the exact batch script, then every refusal. Exit code 2 on a refusal."""
    from hpc import launch, plan, preflight, yamlfile
    from hpc.rundir import runs_folder

    planned = plan.make(file, overrides or [], runs_folder(runs))
    cluster = launch.choose_cluster(planned.experiment.launch.cluster)
    _say(f"# {planned.run.path} on {cluster}: the experiment as resolved\n")
    _say(yamlfile.dump(planned.experiment.as_dict()))
    _say("# the batch script, byte for byte\n")
    _say(planned.script)
    findings = preflight.check(planned.experiment, planned.instance, cluster, planned.script)
    _report(findings)
    raise typer.Exit(ExitCode.BAD_INPUT if findings.refusals else ExitCode.DONE)


def _report(findings: Any) -> None:
    from rich.console import Console

    out = Console(stderr=True, soft_wrap=True, highlight=False)
    for color, word, lines in (
        ("green", "ok", findings.passed),
        ("yellow", "not checked", findings.unchecked),
        ("red", "refused", findings.refusals),
    ):
        for line in lines:
            out.print(f"[{color}]{word}[/]  ", end="")
            out.print(line, markup=False)


def _prepare(file: Path, overrides: list[str] | None, runs: Path | None, cluster: str | None) -> tuple[Any, str]:
    """Plan, check, and make the run folder; refusals end the command with exit code 2 and nothing made."""
    from hpc import launch, plan, preflight
    from hpc.rundir import runs_folder

    planned = plan.make(file, overrides or [], runs_folder(runs))
    where = cluster or launch.choose_cluster(planned.experiment.launch.cluster)
    findings = preflight.check(planned.experiment, planned.instance, where, planned.script)
    if findings.refusals:
        raise UserError("\n".join(findings.refusals))
    _report(findings)
    return plan.create_next(planned), where


@app.command(rich_help_panel="Run")
def submit(file: ExperimentFile, overrides: Overrides = None, runs: Runs = None, as_json: AsJson = False) -> None:
    """Check, then submit one job: SLURM where sbatch answers, else submitit's local executor."""
    from hpc import launch

    run, cluster = _prepare(file, overrides, runs, None)
    job = launch.submit(run, cluster)
    if as_json:
        _print_json({"run": run.name, "path": str(run.path), "cluster": cluster, "job": job.job_id})
    else:
        _say(f"{run.name}  job {job.job_id} ({cluster})  {run.path}")
        _say(f"follow it: hpc logs {run.name} -f")


@app.command(rich_help_panel="Run")
def train(file: ExperimentFile, overrides: Overrides = None, runs: Runs = None) -> None:
    """Train here, in the foreground: the same batch script under bash. Ctrl-C stops it cleanly."""
    from hpc import foreground

    run, _ = _prepare(file, overrides, runs, "local")
    raise typer.Exit(foreground.train(run))


@app.command(rich_help_panel="Run")
def resume(name: RunName, runs: Runs = None) -> None:
    """Submit a stopped, failed or cancelled run again; it goes on from its newest good checkpoint."""
    from hpc import launch, ledger, plan
    from hpc.rundir import find_run, runs_folder

    run = find_run(runs_folder(runs), name)
    now = ledger.status(run)
    if now.state == "damaged":
        raise UserError(f"{run.name} is damaged: {now.detail}")
    if ledger.live(now.state) or now.state == "finished":
        raise UserError(f"{run.name} is {now.state}: nothing to resume")
    experiment, _ = plan.reopen(run)
    cluster = launch.choose_cluster(experiment.launch.cluster)
    newest = run.newest_checkpoint()
    job = launch.submit(run, cluster)
    whence = f"goes on from checkpoint {newest}" if newest else "from the start: it has no checkpoint yet"
    _say(f"{run.name}  job {job.job_id} ({cluster})  {whence}")


@app.command("ls", rich_help_panel="Watch")
def list_runs(runs: Runs = None, as_json: AsJson = False) -> None:
    """List all runs: state, job, epoch, step, best metric."""
    from hpc import ledger
    from hpc.rundir import all_runs, runs_folder

    folder = runs_folder(runs)
    found = ledger.statuses(list(all_runs(folder)))
    if as_json:
        _print_json([status.as_dict() for status in found])
    elif not found:
        _say(f"no runs in {folder}; start one with 'hpc submit EXPERIMENT.yaml'")
    else:
        _table(*_fitted([_row(status) for status in found], _width()))


def _row(status: Any) -> dict[str, str]:
    from hpc.units import short_time

    return {
        "run": status.run,
        "state": status.state,
        "epoch": str(status.epoch),
        "step": str(status.step),
        "best": status.metric,
        "attempts": str(status.attempts),
        "job": f"{status.cluster} {status.job}".strip(),
        "changed": f"{short_time(status.age_s)} ago",
        "": " ".join(status.detail.split()),
    }


def _fitted(rows: list[dict[str, str]], width: int) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of one line each: in a narrow terminal columns are left out, and long texts are cut."""
    sizes = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    shown = [title for title in sizes if width >= _NARROW or title not in ("attempts", "job", "changed")]
    if sum(sizes.values()) + _GAP * len(sizes) > width:
        sizes["run"] = min(sizes["run"], _NAME)
    for title in ("changed", "attempts", "job", "epoch", "best", "step", ""):
        detail = min(sizes[""], _DETAIL) if "" in shown else 0
        if sum(sizes[t] for t in shown if t) + detail + _GAP * (len(shown) - 1) > width and title in shown:
            shown.remove(title)
    room = {title: sizes[title] for title in shown}
    for title, shorten in (("", _cut), ("run", _cut_middle)):
        if title in room:
            taken = sum(room[t] for t in shown if t != title) + _GAP * (len(shown) - 1)
            room[title] = min(room[title], max(width - taken, 0))
            rows = [{**row, title: shorten(row[title], room[title])} for row in rows]
    return shown, [[row[title] for title in shown] for row in rows]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 3, 0)] + "..."


def _cut_middle(name: str, room: int) -> str:
    """A run's name with its id, by which it is found."""
    return name if len(name) <= room else f"{name[: max(room - 11, 0)]}..{name[-9:]}"


@app.command(rich_help_panel="Watch")
def show(name: RunName, runs: Runs = None, as_json: AsJson = False) -> None:
    """Show one run: state, metrics per epoch, events, files."""
    from hpc import ledger
    from hpc.rundir import find_run, read_json, runs_folder

    run = find_run(runs_folder(runs), name)
    status, metrics, events = ledger.status(run), run.read_metrics(), run.read_events()
    if as_json:
        state = read_json(run.state)
        _print_json({"status": status.as_dict(), "state": state, "metrics": metrics, "events": events})
        return
    _say(f"{run.path}\n{status.state}  {status.detail}".rstrip())
    columns = ["epoch", "step", "split", *(metrics[0]["metrics"] if metrics else [])]
    rows = [
        [str(m["epoch"]), str(m["step"]), m["split"], *(f"{value:.4f}" for value in m["metrics"].values())]
        for m in metrics
    ]
    _table(columns, rows)
    for event in events:
        fields = "  ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event"))
        _say(f"{_clock(event['time'])}  {event['event']:<10}  {fields}")


def _clock(when: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


@app.command(rich_help_panel="Watch")
def logs(
    name: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    runs: Runs = None,
) -> None:
    """Print what a run's tasks wrote to stdout and stderr."""
    from hpc import foreground
    from hpc.rundir import find_run, runs_folder

    foreground.print_logs(find_run(runs_folder(runs), name), follow)


@app.command(rich_help_panel="Run")
def cancel(name: RunName, runs: Runs = None) -> None:
    """End a run; it saves what it has, and is not requeued."""
    from hpc import ledger
    from hpc.rundir import find_run, runs_folder

    run = find_run(runs_folder(runs), name)
    _say(f"{run.name}: cancelled {ledger.cancel(run)}")


@app.command(rich_help_panel="Results", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(context: typer.Context, name: RunName, runs: Runs = None) -> None:
    """Evaluate a run's best checkpoint on a split (--split validation|test|train, --checkpoint NAME)."""
    from hpc import payload
    from hpc.rundir import find_run, runs_folder

    run = find_run(runs_folder(runs), name)
    raise typer.Exit(payload.child("jobs.evaluate", [str(run.path), *context.args]))


@app.command(rich_help_panel="Results")
def board(
    runs: Runs = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
) -> None:
    """Open TensorBoard on the runs, on 127.0.0.1, with every confusion matrix kept."""
    from hpc import board
    from hpc.rundir import runs_folder

    board.serve(runs_folder(runs), port)


@app.command(rich_help_panel="Results")
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs, the baseline first (all).", metavar="[RUN]...")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report.md and report.html.")] = Path("report"),
    runs: Runs = None,
) -> None:
    """Write the journal: Markdown, and one self-contained HTML page. Hand-written notes are kept."""
    from hpc.journal.report import write_report
    from hpc.rundir import all_runs, find_run, runs_folder

    folder = runs_folder(runs)
    found = [find_run(folder, name) for name in names] if names else list(all_runs(folder))
    for path in write_report([data for run in found if (data := _run_data(run))], out):
        _say(str(path))


def _run_data(run: Any) -> Any:
    """What the journal needs of a run; None, and a line on stderr, of one whose files are damaged."""
    from hpc import ledger, yamlfile
    from hpc.journal.report import RunData
    from hpc.rundir import read_json

    status = ledger.status(run)
    if status.state == "damaged":
        print(f"{run.name} is left out: {status.detail}", file=sys.stderr)
        return None
    figures = {path.stem: path for path in sorted(run.figures.glob("*.png"))}
    delta = yamlfile.read(run.delta) if run.delta.exists() else {}
    metrics, events = run.read_metrics(), run.read_events()
    return RunData(run.name, yamlfile.read(run.experiment), delta, read_json(run.result), metrics, events, figures)


@app.command(rich_help_panel="Results")
def fsck(name: RunName, runs: Runs = None, as_json: AsJson = False) -> None:
    """Check a run's event files record by record; exit code 1 when any is damaged."""
    from hpc.logs import fsck as files
    from hpc.rundir import find_run, runs_folder

    run = find_run(runs_folder(runs), name)
    findings = files.check(run.tensorboard)
    if not findings:
        raise UserError(f"{run.name} has no event files yet; see 'hpc show {run.name}'")
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        _table(list(files.TITLES), [list(row) for row in files.rows(findings)])
    raise typer.Exit(files.exit_code(findings))


@app.command("instances", rich_help_panel="Machine")
def list_instances(as_json: AsJson = False) -> None:
    """List the instances a request can be made for."""
    from hpc import instances
    from hpc.units import short_time

    found = [(instances.find(name), path) for name, path in sorted(instances.names().items())]
    if as_json:
        _print_json([{**instance.model_dump(), "file": str(path)} for instance, path in found])
        return
    columns = ["instance", "cores", "GB", "GPUs", "nodes", "time", "description"]
    rows = []
    for i, _ in found:
        gpus = f"{i.gpus} x {i.gpu_type} {i.gpu_mem_gb:g} GB" if i.gpus and i.gpu_mem_gb else str(i.gpus)
        rows.append([i.name, str(i.cpus), f"{i.mem_gb:g}", gpus, str(i.nodes), short_time(i.time_limit), i.description])
    _table(columns, rows)


@app.command(rich_help_panel="Machine")
def env() -> None:
    """Print the line that lets a notebook or script import models3d and datasets."""
    import shlex

    from hpc import payload

    root = shlex.quote(str(payload.root()))
    _say(f"export HPC_ROOT={root} PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}")


def _version(asked: bool) -> None:
    if asked:
        _say(f"hpc {__version__}")
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
