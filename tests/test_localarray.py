"""Sweeps without SLURM: how many rows at a time, which GPUs, and what a signal or an early end of the controller does.

The rows' script is a few lines of bash in place of the batch script, so that nothing is trained.
"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc import arrays, ledger, sweep
from hpc.attempt import process_start
from hpc.localarray import capacity
from hpc.rundir import RunDir, write_json
from hpc.sweepdir import SweepDir, spec
from tests.fakeslurm import without_slurm

BOX = "cpus: 4\nmem_gb: 8\ngpus: 2\ntime_limit: 1h\n"
EXPERIMENT = "name: exp\nmodel: {name: m}\ndata: {file: x.h5}\nlaunch: {instance: box, cluster: local, time: 10min}\n"
SMALL = ("launch.cpus=1", "launch.mem=1GB", "launch.gpus=0")
LIMIT_S = 60
ROW = f"""
row=$HPC_ARRAY_TASK_ID here=$(dirname "$0")
say() {{ echo "$1 $row" >> "$here/said"; }}
finish() {{
  run=$(sed -n "$((row + 1))p" "$here/rows.txt")
  echo '{{"finished": true}}' > "$here/$run/{RunDir("/").result.name}"
}}
for signal in TERM INT USR2; do trap "say $signal; exit 3" $signal; done
say start
"""
WAIT = 'while [ ! -e "$here/go" ]; do sleep 0.05; done\n'


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance of 4 cores, 8 GB and 2 GPUs."""
    without_slurm(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HPC_INSTANCES", str(tmp_path))
    (tmp_path / "box.yaml").write_text(BOX)
    (tmp_path / "exp.yaml").write_text(EXPERIMENT)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SweepDir]:
    def make(script: str, *axes: str, parallel: int | None = None) -> SweepDir:
        plan = sweep.make(tmp_path / "exp.yaml", ["train.seed=0:4", *axes], tmp_path / "runs", parallel=parallel)
        made = sweep.create(plan, lambda: None)
        made.script(0).write_text(ROW + script)
        return made

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The controller of a sweep's four rows, as submitit starts it."""
    started: list[subprocess.Popen[str]] = []

    def start(made: SweepDir, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hpc.localarray", str(made.path), "--rows", spec(range(4)), *options]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()  # its rows end with it
        process.communicate()


def said(made: SweepDir) -> list[str]:
    file = made.path / "said"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("request_", "parallel", "visible", "slots", "gpus"),
    [
        (SMALL, None, None, 4, []),
        (SMALL, 3, None, 3, []),
        (SMALL, 99, None, 4, []),
        (("launch.cpus=1", "launch.mem=3GB", "launch.gpus=0"), None, None, 2, []),
        (("launch.gpus=0",), None, None, 1, []),
        (("launch.cpus=1", "launch.mem=1GB", "launch.gpus=1"), None, None, 2, [["0"], ["1"]]),
        (("launch.cpus=1", "launch.mem=1GB", "launch.gpus=1"), 1, "5,7", 1, [["5"]]),
        (("launch.cpus=2", "launch.mem=1GB", "launch.gpus=2"), None, "GPU-a,GPU-b,GPU-c", 1, [["GPU-a", "GPU-b"]]),
    ],
)
def test_rows_at_a_time_by_cores_memory_gpus_and_cap(
    make: Callable[..., SweepDir],
    monkeypatch: pytest.MonkeyPatch,
    request_: tuple[str, ...],
    parallel: int | None,
    visible: str | None,
    slots: int,
    gpus: list[list[str]],
) -> None:
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert capacity(make("", *request_, parallel=parallel)) == (slots, gpus)


def test_every_row_runs_once_two_at_a_time_each_on_a_gpu_of_its_own(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    script = """
    mkdir "$here/gpu$CUDA_VISIBLE_DEVICES" || say "shared"
    echo "output of $row"; echo "warning of $row" >&2
    sleep 0.2; rmdir "$here/gpu$CUDA_VISIBLE_DEVICES"; say "$CUDA_VISIBLE_DEVICES"
    [ "$row" != 1 ] || exit 9
    finish
    """
    made = make(script, "launch.cpus=1", "launch.mem=1GB", "launch.gpus=1")
    assert start(made).wait(LIMIT_S) == 0
    lines = said(made)
    assert sorted(line for line in lines if line.startswith("start")) == [f"start {row}" for row in range(4)]
    assert {line.split()[0] for line in lines} == {"start", "5", "7"} and len(lines) == 8
    assert [run.result.exists() for run in made.rows()] == [True, False, True, True], "a failed row stops no other"
    for number, run in enumerate(made.rows()):
        job = str(os.getpid())
        assert run.output(job, "0").read_text() == f"output of {number}\n"
        assert run.output(job, "0", "err").read_text() == f"warning of {number}\n"


def test_an_array_of_forty_runs_here_from_its_submission_to_its_end(make: Callable[..., SweepDir]) -> None:
    made = make("finish\n", "train.keep=1:11", *SMALL)
    arrays.submit(made, "local")
    rows = made.rows()
    wait_for(lambda: all(row.result.exists() for row in rows), "forty results")
    assert sorted(said(made)) == sorted(f"start {row}" for row in range(40)), "each once"
    assert {status.state for status in ledger.statuses(rows)} == {"finished"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_the_rows_that_run_are_told_and_no_other_starts(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    made = make(WAIT, *SMALL, parallel=2)
    controller = start(made)
    wait_for(lambda: len(said(made)) == 2, "two rows")
    controller.send_signal(number)
    assert controller.wait(LIMIT_S) == 0
    name = number.name.removeprefix("SIG")
    assert sorted(said(made)) == sorted([f"{name} 0", f"{name} 1", "start 0", "start 1"])


def test_a_notice_goes_to_the_rows_that_run_and_the_others_follow(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]]
) -> None:
    made = make(WAIT, *SMALL, parallel=2)
    controller = start(made)
    wait_for(lambda: len(said(made)) == 2, "two rows")
    controller.send_signal(signal.SIGUSR2)
    wait_for(lambda: len([line for line in said(made) if line.startswith("start")]) == 4, "the other two")
    (made.path / "go").touch()
    assert controller.wait(LIMIT_S) == 0
    assert [line for line in sorted(said(made)) if "USR2" in line] == ["USR2 0", "USR2 1"]


def test_a_signal_waits_for_the_traps_of_a_row_that_has_just_started(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]]
) -> None:
    made = make(WAIT, *SMALL, parallel=1)
    script = made.script(0)
    script.write_text(f'touch "$(dirname "$0")/deaf"\nsleep 0.5\n{script.read_text()}')
    controller = start(made)
    wait_for((made.path / "deaf").exists, "the row's shell")
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(LIMIT_S) == 0
    assert said(made)[-1] == "TERM 0", "it would have died of it"


def test_rows_end_with_a_controller_that_is_killed(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]]
) -> None:
    made = make(WAIT, *SMALL, parallel=2)
    controller = start(made)
    wait_for(lambda: len(said(made)) == 2, "two rows")
    controller.kill()
    wait_for(lambda: len(said(made)) == 4, "two rows that are told")
    assert sorted(said(made)) == ["TERM 0", "TERM 1", "start 0", "start 1"]


def test_a_row_whose_folder_is_gone_stops_no_other(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]]
) -> None:
    made = make("finish\n", *SMALL)
    gone = made.rows()[1]
    gone.path.rename(made.path.parent / "moved")
    controller = start(made)
    _, words = controller.communicate(timeout=LIMIT_S)
    assert controller.returncode == 0 and f"row 1, {gone.name}, cannot be started: " in words
    assert [run.result.exists() for run in made.rows()] == [True, False, True, True]


def test_it_can_be_ended_while_it_waits_for_another_run(
    make: Callable[..., SweepDir], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Else `hpc cancel` of the sweep would take effect when the other run ends."""
    made, other = make("finish\n", *SMALL), RunDir(tmp_path / "runs" / "other-0000aaaa")
    other.path.mkdir()
    other.experiment.write_text(EXPERIMENT)
    me = {"pid": os.getpid(), "process_start": process_start(os.getpid()), "host": os.uname().nodename}
    write_json(other.state, {**me, "phase": "training", "time": time.time(), "started": time.time()})
    controller = start(made, "--after", str(other.path))
    wait_for(lambda: _hears(controller), "its handlers")
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(LIMIT_S) == 1 and not said(made)


def _hears(controller: subprocess.Popen[str]) -> bool:
    """Whether it has handlers of its own."""
    status = Path(f"/proc/{controller.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)


def submit_from_a_terminal(made: SweepDir) -> None:
    """The terminal is closed as soon as the sweep is submitted."""
    code = f"from hpc import arrays, sweepdir; arrays.submit(sweepdir.SweepDir({str(made.path)!r}), 'local')"
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", code])
    os.waitpid(pid, 0)
    os.close(terminal)


def test_it_outlives_the_terminal_and_is_cancelled_as_a_whole(make: Callable[..., SweepDir]) -> None:
    made = make(WAIT + "finish\n", *SMALL, parallel=2)
    submit_from_a_terminal(made)
    wait_for(lambda: len(said(made)) == 2, "two rows")
    assert [status.state for status in ledger.statuses(made.rows())] == ["pending"] * 4
    told = ledger.cancel_all([made])[0]
    pid = json.loads(made.submit.read_text())["submissions"][0]["chunks"][0]["job"]
    assert told == f"process {pid}"
    wait_for(lambda: len(said(made)) == 4, "two rows that are told")
    wait_for(lambda: not any(status.live for status in ledger.statuses(made.rows())), "the end")
    assert [status.state for status in ledger.statuses(made.rows())] == ["cancelled"] * 4
    (made.path / "go").touch()
    (job,) = arrays.submit(made, "local", [1, 3])
    wait_for(lambda: [run.result.exists() for run in made.rows()] == [False, True, False, True], "rows 1 and 3")
    wait_for(lambda: not process_start(int(job)) or os.waitpid(int(job), os.WNOHANG)[0], "the controller's end")
