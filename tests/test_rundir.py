"""The run folder: files that are whole or not there, lines that outlive a kill, names that find their run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hpc import rundir
from hpc.errors import UserError
from hpc.rundir import RunDir, all_runs, append_line, find_run, next_run, read_json, read_lines, write_json, write_text


def make(runs: Path, name: str) -> RunDir:
    run = RunDir(runs / name)
    write_text(run.experiment, "name: x\n")
    return run


def test_a_reader_sees_the_old_file_or_the_new_one_never_half(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    texts = {str(number) * 200_000 for number in range(2)}
    write_text(path, "0" * 200_000)
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_text(path, str(number % 2) * 200_000)
    done.set()
    reader.join()
    assert seen <= texts
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import os, signal, sys
from pathlib import Path
from hpc import rundir
step, path = sys.argv[1], Path(sys.argv[2])
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if step == "before the fsync":
    os.fsync = kill
elif step == "before the rename":
    Path.rename = kill
else:
    rundir.fsync_folder = kill
rundir.write_json(path, {"step": 2})
"""


@pytest.mark.parametrize(
    ("moment", "step"), [("before the fsync", 1), ("before the rename", 1), ("after the rename", 2)]
)
def test_a_kill_at_any_moment_leaves_a_whole_file(moment: str, step: int, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    killed = subprocess.run([sys.executable, "-c", WRITER, moment, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_json(path) == {"step": step}
    write_json(path, {"step": 3})
    assert read_json(path) == {"step": 3}


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 2})
    assert read_json(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": 1', "damaged"), (b"", "damaged"), (b"\x00\xff\xfe", "damaged"), (b"[1]", "holds list, not an object")],
)
def test_a_damaged_json_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"state.json: {words}"):
        read_json(path)
    assert read_json(tmp_path / "none.json") == {}


def test_a_torn_last_line_is_left_out_and_never_joined_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1, "word": "line\nbreak\u2028"})
    with path.open("a") as file:
        file.write('{"step": 2, "val')
    assert [line["step"] for line in read_lines(path)] == [1]
    append_line(path, {"step": 3})
    append_line(path, {"step": 4})
    assert [line["step"] for line in read_lines(path)] == [1, 3, 4]
    assert read_lines(path)[0]["word"] == "line\nbreak\u2028"


@pytest.mark.parametrize("torn", [b"\x00" * 512, b"\xff\xfe{", b'{"step"', b"\n\n"])
def test_what_a_crash_left_in_a_line_file_is_no_error(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + torn)
    append_line(path, {"step": 2})
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_each_line_is_written_at_once(tmp_path: Path) -> None:
    """A writer that is killed at any time leaves whole lines, or one torn one at the end."""
    path = tmp_path / "metrics.jsonl"
    code = textwrap.dedent(
        """
        import sys, itertools
        from pathlib import Path
        from hpc.rundir import append_line
        for number in itertools.count():
            append_line(Path(sys.argv[1]), {"number": number, "fill": "x" * 5000})
        """
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not path.exists() or path.stat().st_size < 100_000:
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    numbers = [line["number"] for line in read_lines(path)]
    assert numbers == list(range(len(numbers))) and len(numbers) >= 19


def test_events_of_all_writers_are_read_by_time_with_their_generation(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "x-1")
    run.path.mkdir()
    assert run.last_generation() == 0 and run.read_events() == []
    run.event("submit", "login", job="7")
    time.sleep(0.002)
    run.event("start", "shell", 12, node="n")
    time.sleep(0.002)
    run.event("signal", "rank0", 12, cause="SIGTERM")
    assert [event["event"] for event in run.read_events()] == ["submit", "start", "signal"]
    assert sorted(path.name for path in run.events.iterdir()) == [
        "000-login.jsonl",
        "012-rank0.jsonl",
        "012-shell.jsonl",
    ]
    assert run.last_generation() == 12


def test_the_id_is_a_function_of_the_experiment_and_of_equal_runs_before(tmp_path: Path) -> None:
    resolved = {"b": 1, "a": {"c": 2}}
    first = next_run(tmp_path, "exp", resolved)
    assert first.name == next_run(tmp_path, "exp", {"a": {"c": 2}, "b": 1}).name, "the order of keys is no difference"
    assert first.name.startswith("exp-") and len(first.name) == len("exp-") + 8
    names = []
    for _ in range(3):
        run = next_run(tmp_path, "exp", resolved)
        run.path.mkdir()
        names.append(run.name)
    assert names[0] == first.name and len(set(names)) == 3
    assert next_run(tmp_path, "exp", {**resolved, "b": 2}).name not in names


def test_runs_are_found_by_path_name_beginning_or_id(tmp_path: Path) -> None:
    first, second = make(tmp_path, "resnet-0000aaaa"), make(tmp_path, "resnet-0000bbbb")
    for name in (str(first.path), "resnet-0000aaaa", "resnet-0000a", "0000aaaa"):
        assert find_run(tmp_path, name).path == first.path
    with pytest.raises(UserError, match="'resnet' names 2 runs: resnet-0000aaaa, resnet-0000bbbb"):
        find_run(tmp_path, "resnet")
    with pytest.raises(UserError, match=r"no run 'resnet-0000cccc' in .*did you mean"):
        find_run(tmp_path, "resnet-0000cccc")
    with pytest.raises(UserError, match="holds no runs yet; start one with 'hpc submit"):
        find_run(tmp_path / "none", "resnet")
    assert find_run(tmp_path, second.name).path == second.path


def test_a_run_that_is_not_whole_yet_is_not_listed(tmp_path: Path) -> None:
    run = make(tmp_path, "resnet-0000aaaa")
    make(tmp_path, ".resnet-0000bbbb.4711")
    (tmp_path / "notes").mkdir()
    assert [found.name for found in all_runs(tmp_path)] == [run.name]
    assert find_run(tmp_path, "resnet").name == run.name


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    for age, name in enumerate(["c-1", "a-1", "b-1"]):
        os.utime(make(tmp_path, name).experiment, (1000 + age, 1000 + age))
    assert [run.name for run in all_runs(tmp_path)] == ["c-1", "a-1", "b-1"]


def test_the_runs_folder_is_the_option_then_the_variable_then_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_RUNS", raising=False)
    assert rundir.runs_folder(None) == tmp_path / "runs"
    monkeypatch.setenv("HPC_RUNS", "elsewhere")
    assert rundir.runs_folder(None) == tmp_path / "elsewhere"
    assert rundir.runs_folder(Path("given")) == tmp_path / "given"


def test_the_newest_checkpoint_is_of_the_last_generation_and_step(tmp_path: Path) -> None:
    run = make(tmp_path, "x-1")
    assert run.newest_checkpoint() is None
    for name in ("g002-s00000030", "g001-s00000900", "g002-s00000200", ".g003-s00000300.4711", "g003-s1.old"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.newest_checkpoint() == "g002-s00000200"
    (run.checkpoints / "g1000-s00000001").mkdir()
    assert run.newest_checkpoint() == "g1000-s00000001"


def test_a_stray_file_among_the_events_is_no_generation(tmp_path: Path) -> None:
    run = make(tmp_path, "x-1")
    run.event("start", "shell", 2)
    (run.events / "copy-of-002.jsonl").touch()
    (run.events / "1000-shell.jsonl").touch()
    assert run.last_generation() == 1000


def test_a_later_attempt_takes_back_the_steps_from_its_first_line_on(tmp_path: Path) -> None:
    run = make(tmp_path, "x-1")
    for generation, step, value in ((1, 10, 1), (1, 20, 2), (1, 30, 3), (2, 20, 4), (2, 20, 5)):
        line = {"generation": generation, "step": step, "split": "validation", "metrics": {"loss": value}}
        append_line(run.metrics, line)
    assert [(line["step"], line["metrics"]["loss"]) for line in run.read_metrics()] == [(10, 1), (20, 5)]
    assert json.loads(run.metrics.read_text().splitlines()[1])["metrics"]["loss"] == 2, "nothing is rewritten"


def test_metrics_after_a_rollback_and_of_an_attempt_that_was_fenced(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for generation, step in ((1, 4), (2, 8), (2, 12), (2, 16), (2, 12), (1, 8), (1, 20)):
        append_line(run.metrics, {"generation": generation, "step": step, "split": "validation"})
        append_line(run.metrics, {"generation": generation, "step": step, "split": "test"})
    told = [(line["generation"], line["step"], line["split"]) for line in run.read_metrics()]
    assert told == [(g, step, split) for g, step in ((1, 4), (2, 8), (2, 12)) for split in ("test", "validation")]
