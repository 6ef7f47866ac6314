"""`hpc watch`, `ls` and `logs`: time left across resumes, curves read once, frames that fit, logs of any size."""

import io
import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpc import foreground, listing, progress, runlogs, tables, watch
from hpc.commands import watch as commands
from hpc.commands.common import table
from hpc.errors import UserError
from hpc.ledger import Status
from hpc.progress import Pace, Series, bar, sparkline
from hpc.records import Reader, Records
from hpc.rundir import RunDir, append_line, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir, submission_of
from tests.fakeslurm import FakeSlurm, without_slurm

HPC = [sys.executable, "-c", "from hpc.cli import main; main()"]


def started(run: RunDir, job: str = "55", **state: Any) -> None:
    """A submitted run whose attempt trains since ten minutes."""
    now = time.time()
    write_json(run.submit, {"cluster": "slurm", "job": job, "time": now - 900})
    common = {"generation": 1, "job": job, "host": "node1", "node": "node1", "pid": 1, "phase": "training", "epoch": 4}
    steps = {"step": 300, "steps": 1000, "monitor": "balanced_accuracy", "best": {}}
    write_json(run.state, {**common, **steps, "started": now - 600, "time": now, **state})


def evaluated(run: RunDir, step: int, loss: float, generation: int = 1) -> None:
    metrics = {"balanced_accuracy": 1 - loss, "loss": loss}
    line = {"generation": generation, "epoch": step // 10, "step": step, "split": "validation", "metrics": metrics}
    append_line(run.metrics, {**line, "train": {"loss": loss}, "samples_per_second": {"train": 223.25}})


# Progress.


def test_metrics_are_read_once_and_a_later_attempt_takes_back_its_steps(run: RunDir) -> None:
    series = Series(run)
    series.update()
    assert series.loss() == [] and series.samples_per_second() is None
    for step in (10, 20, 30):
        evaluated(run, step, step / 100)
    series.update()
    with run.metrics.open("a") as file:
        file.write('{"generation": 2, "epoch": 2, "step": 2')  # torn: its writer is at it
    series.update()
    assert series.loss() == [0.1, 0.2, 0.3]
    with run.metrics.open("a") as file:
        file.write('0, "metrics": {"balanced_accuracy": 0.5}, "train": {"loss": 0.25}}\n')
    series.update()
    assert series.loss() == [0.1, 0.25] and series.metric("balanced_accuracy") == [0.9, 0.5]
    assert series.samples_per_second() == 223.25
    run.metrics.write_text("")
    evaluated(run, 10, 0.7)
    series.update()
    assert series.loss() == [0.7]


def test_of_a_long_history_the_end_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_MOST_BYTES", 1000)
    for step in range(40):
        evaluated(run, step, step / 100)
    series = Series(run)
    series.update()
    assert 2 <= len(series.loss()) < 10 and series.loss()[-1] == 0.39


def look(run: RunDir) -> Records:
    (found,) = Reader().read([run])
    assert isinstance(found, Records)
    return found


def test_time_left_counts_the_steps_of_this_attempt_alone(run: RunDir) -> None:
    """1000 steps, resumed at 250 ten minutes ago, 300 done: 12 s a step, whatever was done before."""
    for generation, step in ((1, 100), (1, 250), (2, 280)):
        run.event("checkpoint", "rank0", generation, step=step, name="x", seconds=1)
    now = time.time()
    started(run, generation=2, started=now - 600, time=now)
    pace = Pace(run)
    pace.update(look(run))
    left = pace.left_s(1000, now)
    assert left == pytest.approx(700 * 12) and pace.left_s(1000, now + 60) == pytest.approx(700 * 12 - 60)
    write_text(run.tensorboard / f"events.out.tfevents.{int(now) - 100}.node1.7.0.g002", "")
    pace.update(look(run))
    left = pace.left_s(1000, now)
    assert left == pytest.approx(700 * 2, rel=0.05), "the 500 s before it began to train do not count"
    started(run, generation=2, step=340, started=now - 600, time=now + 40)  # a step a second, seen by ourselves
    pace.update(look(run))
    assert pace.left_s(1000, now + 40) == pytest.approx(660)
    started(run, generation=3, step=340, started=now + 100, time=now + 101)
    pace.update(look(run))
    assert pace.left_s(1000, now + 101) == pytest.approx(11), "280 to 340 in its first second"


def test_there_is_no_time_left_before_the_first_step(run: RunDir) -> None:
    started(run, step=0, steps=0)
    pace = Pace(run)
    assert pace.left_s(1000, 0) is None
    pace.update(look(run))
    assert pace.left_s(1000, time.time()) is None and pace.rate() is None


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 9, ""),
        ([1.0, 1.0], 9, "▄▄"),
        ([0.0, 7.0], 9, "▁█"),
        ([3.0, float("nan"), 2.0, float("inf"), 1.0], 9, "█▅▁"),
        ([float(n) for n in range(80)], 8, "▁▂▃▄▅▆▇█"),
        ([1.0], 0, ""),
    ],
)
def test_sparklines(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line
    assert sparkline(values, width, plain=True).isascii()


@pytest.mark.parametrize(("share", "drawn"), [(0.0, "...."), (0.5, "##.."), (1.0, "####"), (7.0, "####")])
def test_bars(share: float, drawn: str) -> None:
    assert bar(share, 4, plain=True) == drawn


# Frames.


@pytest.fixture
def scene(tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that trains, one that waits, one that failed, and a sweep of which rows wait."""
    without_slurm(monkeypatch)
    runs = tmp_path / "runs"
    for name in ("tiny-0000aaaa", "a-name-of-some-length-for-a-run-0000bbbb", "tiny-0000cccc"):
        write_text(RunDir(runs / name).experiment, "name: tiny\n")
    training, waiting, failed = (
        RunDir(path) for path in (runs / "tiny-0000aaaa", *runs.glob("a-*"), runs / "tiny-0000cccc")
    )
    started(training)
    for step in range(10, 300, 10):
        evaluated(training, step, 1 - step / 1000)
    fake.job("55", "RUNNING", node="node1", comment=training.name)
    write_json(waiting.submit, {"cluster": "slurm", "job": "56", "time": 1.0})
    more = "gpu|1|N/A|2030-01-01T12:00:00|N/A|8:00:00|1|(null)"
    fake.job("56", "PENDING", "Priority", comment=waiting.name, more=more)
    started(failed, "57", phase="ended", code=1, reason="failed with exit code 1", time=time.time() - 60)
    sweep = SweepDir(runs / "grid-sweep-0123abcd")
    names = [f"grid-{number:08x}" for number in range(4)]
    for number, name in enumerate(names):
        write_text(RunDir(sweep.path / name).experiment, "name: grid\n")
        write_text(RunDir(sweep.path / name).delta, f"train.seed: {number}\ntrain.optimizer.lr: 0.001\n")
        fake.job(f"70_{number}", "PENDING", "JobArrayTaskLimit", comment="grid-sweep-0123abcd/0")
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, 4, 1)], axes={"train.seed": list("0123")})
    sweep.record("slurm", {0: ("70", [0, 1, 2, 3])})
    return runs


def frame(watcher: watch.Watcher, width: int, height: int | None = None, plain: bool = False) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(watch.Frame(watcher, width, height, plain).render())
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 160])
def test_a_frame_fits_its_terminal_and_shows_everything(scene: Path, width: int) -> None:
    watcher = watch.Watcher(scene)
    watcher.update()
    lines = frame(watcher, width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for part in ("tiny-0000aaaa", "30 %", "300/1000 steps", "23 min left", "223.2/s", "training on node1"):
        assert part in text, part
    assert "▁" in text and "█" in text and "balanced 0.29" in text
    assert re.search(r"0000bbbb +pending +from 2030-01-01 12:00: jobs", text)
    assert re.search(r"grid-sweep-0123abcd \(4 rows\) +pending +the sweep runs as many", text)
    assert re.search(r"tiny-0000cccc +failed +60 s ago +failed with exit", text)
    assert lines[-1].startswith("1 running, 5 pending, 1 failed")
    assert "".join(frame(watcher, width, plain=True)).isascii()


def test_a_frame_of_many_runs_fits_the_height(scene: Path, fake: FakeSlurm) -> None:
    for number in range(30):
        run = RunDir(scene / f"more-{number:08x}")
        write_text(run.experiment, "name: more\n")
        started(run, str(100 + number))
        fake.job(str(100 + number), "RUNNING", comment=run.name)
    watcher = watch.Watcher(scene)
    watcher.update()
    lines = frame(watcher, 80, 24)
    assert len(lines) <= 24 and any("more running" in line for line in lines)
    assert lines[-1].startswith("31 running, 5 pending")
    assert 0 < len(watcher._series) < 12, "metrics are read for what is shown"


def test_a_refresh_asks_squeue_seldom_and_reads_only_what_changed(
    scene: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch.Watcher(scene)
    watcher.update()
    reads: list[Path] = []
    real = foreground.read_json
    monkeypatch.setattr("hpc.records.read_json", lambda path: reads.append(path) or real(path))
    for _ in range(5):
        watcher.update()
    assert len([call for call in fake.calls() if call.startswith("squeue")]) == 1 and reads == []
    started(RunDir(scene / "tiny-0000aaaa"), step=310)
    watcher.update()
    assert {path.name for path in reads} == {"state.json", "submit.json"}
    assert watcher.running()[0].status.step == 310


def test_chosen_runs_are_shown_whatever_their_age_until_they_have_ended(scene: Path) -> None:
    failed = RunDir(scene / "tiny-0000cccc")
    watcher = watch.Watcher(scene, [failed])
    watcher.update()
    assert watcher.over and "1 failed" in frame(watcher, 80)[-1]


def test_without_a_terminal_one_frame_is_printed(scene: Path) -> None:
    done = subprocess.run(
        [*HPC, "watch", "--runs", str(scene)], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0 and done.stderr == "" and "\033" not in done.stdout and "30 %" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_terminal_it_is_left_without_a_trace(scene: Path, number: signal.Signals) -> None:
    """The alternate screen is entered and left, the cursor hidden and shown again."""
    master, slave = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [*HPC, "watch", "--runs", str(scene)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environ)
    os.close(slave)
    seen = b""
    while b"30 %" not in seen and select.select([master], [], [], 20)[0]:
        seen += os.read(master, 65536)
    process.send_signal(number)
    while select.select([master], [], [], 5)[0]:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert process.wait(10) == 0
    assert seen.count(b"\033[?1049h") == 1 and seen.endswith(b"\033[?25h\033[?1049l") and b"Traceback" not in seen


# Lists.


def test_the_list_has_one_line_for_a_sweep_and_its_rows_tell_what_differs(
    scene: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*names: str, width: int = 160, everything: bool = False) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        commands.list_runs(list(names), everything, scene)
        return capsys.readouterr().out.splitlines()

    for width in (80, 160):
        lines = listed(width=width)
        assert sum("grid" in line for line in lines) == 1 and all(len(line) <= width for line in lines)
        assert lines[-1].startswith("grid-sweep-0123abcd  4 rows: 4 pending")
    rows = listed("0123abcd")
    assert re.match(r"00000002 +2 +pending +seed=2 +0 +0 +slurm 70_2 .*JobArrayTaskLimit$", rows[3])
    assert rows[-1] == "4 rows: 4 pending" and "lr" not in "".join(rows)
    assert sum("grid-0000000" in line for line in listed(everything=True)) == 4
    commands.show("0123abcd", scene)
    assert capsys.readouterr().out.splitlines()[1] == "train.seed = 0, 1, 2, 3"
    commands.list_runs([], False, scene, as_json=True)
    told = json.loads(capsys.readouterr().out)
    row = next(one for one in told if one["run"] == "grid-00000002")
    assert len(told) == 7 and row["sweep"] == "grid-sweep-0123abcd"
    assert row["delta"] == {"train.seed": 2, "train.optimizer.lr": 0.001}


def status(best: float | None, direction: str = "max", state: str = "finished") -> Status:
    return Status("r", state, "", "s", "slurm", "1", "", 1, 1, 1, 1, "loss", best, direction, 1.0)


def test_the_best_row_knows_which_way_is_better() -> None:
    assert listing.best_row([status(0.5), status(None), status(0.7), status(0.7)]) == 2
    assert listing.best_row([status(0.5, "min"), status(0.3, "min")]) == 1
    assert listing.best_row([status(None)]) is None and listing.best_row([]) is None
    assert listing.best_in_words([status(0.5), status(0.7)]) == "loss 0.7000 (row 1)"


@pytest.mark.parametrize("width", [8, 20, 40, 80, 200])
def test_a_table_fits_any_width(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"run": "a-long-name-of-a-run-0123abcd", "state": "running", "best": "äöü 0.5", "": "some detail of length"}
    tables.print_rows([row, {**row, "best": ""}], width, ("best", "state", ""))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(len(line) <= max(width, 9) for line in lines)
    assert width < 20 or lines[1].split()[0].endswith("0123abcd")


def test_a_table_of_metrics_keeps_its_first_column_and_cuts_its_last_title(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ["epoch", "step", "split", "accuracy", "an_average_over_classes"]
    for width, titles in ((30, ["epoch", "step", "an_average_ove..."]), (80, columns)):
        monkeypatch.setenv("COLUMNS", str(width))
        table(columns, [["1", "40", "train", "0.5000"], ["1", "40", "validation", "0.5000", "0.2500"]])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == titles and lines[2].endswith("0.2500") and max(map(len, lines)) <= width


def test_a_list_for_a_closed_output_ends_well(scene: Path) -> None:
    command = f"{shlex.join([*HPC, 'ls', '--runs', str(scene)])} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Logs.


def test_logs_of_a_row_hold_what_its_task_wrote_before_it_knew_its_row(scene: Path) -> None:
    sweep = SweepDir(scene / "grid-sweep-0123abcd")
    row = sweep.rows()[1]
    for folder in (sweep.logs, row.logs):
        folder.mkdir()
    (sweep.logs / "70_1_log.out").write_text("module: not found\n")
    (sweep.logs / "70_11_log.out").write_text("another's\n")
    row.output("70_1", "0", "err").write_text("a\n")
    row.output("70_1", "1", "out").write_text("b\n")
    row.output("9_1", "0", "out").write_text("of an earlier job\n")
    os.mkfifo(row.logs / "70_1_7_log.out")
    (row.logs / "70_1_8_log.out").mkdir()
    assert [(log.path.name, log.rank) for log in runlogs.files(row)] == [
        ("9_1_0_log.out", 0),
        ("70_1_log.out", None),
        ("70_1_0_log.err", 0),
        ("70_1_1_log.out", 1),
    ]
    assert [log.path.name for log in runlogs.files(row, rank=1)] == ["70_1_1_log.out"]
    with pytest.raises(UserError, match="has no output of rank 9; there are ranks 0, 1"):
        runlogs.files(row, rank=9)


@pytest.mark.parametrize(
    ("lines", "wanted"), [(0, ""), (1, "line 9999\n"), (3, "line 9997\nline 9998\nline 9999\n"), (10**6, None)]
)
def test_the_tail_of_a_log(run: RunDir, lines: int, wanted: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    run.logs.mkdir()
    text = "".join(f"line {number}\n" for number in range(10000))
    run.output("55", "0").write_text(text)
    foreground.print_logs(run, tail=lines)
    out = capsys.readouterr().out
    assert out == (f"==> 55_0_log.out <==\n{text if wanted is None else wanted}" if lines else "")


def test_a_large_log_is_not_read_into_memory(run: RunDir) -> None:
    run.logs.mkdir()
    with run.output("55", "0").open("wb") as file:
        file.truncate(128 << 20)
    code = "import sys; from hpc import foreground, rundir; foreground.print_logs(rundir.RunDir(sys.argv[1]))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (80 << 20, 80 << 20))

    command = [sys.executable, "-c", code, str(run.path)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=limit)
    assert done.returncode == 0, done.stderr[-300:]
    assert runlogs.last_lines(run.output("55", "0"), 1000) == []


def test_logs_are_followed_across_a_requeue_until_the_run_ends(
    run: RunDir, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreground, "_ASK_S", 0.3)
    monkeypatch.setattr(foreground, "_POLL_S", 0.02)
    run.logs.mkdir()
    out = run.output("55", "0")
    started(run)
    fake.job("55", "RUNNING")
    out.write_bytes(b"one \xc3")  # half of a letter
    follower = threading.Thread(target=foreground.print_logs, args=(run, True))
    follower.start()
    printed = ""

    def wait_for(text: str) -> None:
        nonlocal printed
        limit = time.monotonic() + 20
        while text not in printed and time.monotonic() < limit:
            printed += capsys.readouterr().out
            time.sleep(0.01)
        assert text in printed

    wait_for("one ")
    started(run, phase="stopped", reason="preempted")
    fake.job("55", "PENDING", "BeginTime")
    with out.open("ab") as file:
        file.write(b"\xa4\ntwo\n")
    wait_for("ä\ntwo\n")
    assert follower.is_alive()
    fake.job("55", "RUNNING")
    started(run, generation=2)
    run.output("55", "1", "err").write_text("three\n")
    wait_for("==> 55_1_log.err <==\nthree\n")
    write_json(run.result, {"best": {}})
    follower.join(20)
    assert not follower.is_alive() and printed.count("==> 55_0_log.out <==") == 1


def test_a_run_without_output_says_so(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    foreground.print_logs(run)
    assert capsys.readouterr().err == "exp-0000aaaa: no output yet (not submitted)\n"
    write_json(run.submit, {"cluster": "slurm", "job": "55", "time": 1.0})
    foreground.print_logs(run)
    assert capsys.readouterr().err == "exp-0000aaaa: no output yet (job 55)\n"


def test_ctrl_c_reaches_the_script_of_a_train_that_was_started_in_the_background(tmp_path: Path) -> None:
    """`hpc train ... &` in a script: the shell starts it with INT ignored."""
    run = RunDir(tmp_path / "exp-0000aaaa")
    run.logs.mkdir(parents=True)
    write_text(run.script, "trap 'echo interrupted; exit 75' INT\necho ready\nwhile :; do sleep 0.05; done\n")
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from hpc import foreground, rundir"
    code += "; sys.exit(foreground.train(rundir.RunDir(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=10)[0] == "interrupted\n" and process.returncode == 75
        finally:
            script = int(submission_of(run)["job"])
            with suppress(ProcessLookupError):
                os.kill(script, signal.SIGKILL)
