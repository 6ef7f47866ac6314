"""Signals: srun's stand-in passes them on and ends its ranks, and the flag that they raise."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.attempt import process_alive
from hpc.preempt import StopFlag

# A rank that says READY, then its first stop signal, and leaves with the code given.
RANK = r"""
import os, signal, sys, time
start, code = float(sys.argv[1]), int(sys.argv[2])
time.sleep(start)
def hear(number, _):
    os.write(1, f"heard {os.environ['HPC_RANK']} {signal.Signals(number).name}\n".encode())
    os._exit(code)
for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, hear)
os.write(1, f"ready {os.environ['HPC_RANK']}\n".encode())
time.sleep(60)
"""


def step(*command: str, tasks: int = 1, **options: float) -> subprocess.Popen[str]:
    given = [f"--{key}={value}" for key, value in options.items()]
    whole = [sys.executable, "-m", "hpc.localstep", f"--tasks={tasks}", *given, "--", *command]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rank(start: float = 0, code: int = 75) -> list[str]:
    return [sys.executable, "-c", RANK, str(start), str(code)]


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    said, _ = process.communicate(timeout=20)
    return process.returncode, sorted(said.splitlines())


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def test_every_rank_knows_its_place() -> None:
    code, said = end(step("bash", "-c", 'echo "$HPC_RANK of $HPC_WORLD_SIZE, $HPC_LOCAL_RANK"', tasks=3))
    assert (code, said) == (0, ["0 of 3, 0", "1 of 3, 1", "2 of 3, 2"])


def test_arguments_reach_the_command_as_they_are() -> None:
    odd = ["a b", "--tasks", "$HOME", "*", "--", ""]
    assert end(step("printf", "<%s>\n", *odd)) == (0, sorted(f"<{word}>" for word in odd))


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 75", 75), ("exit 2", 2), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)],
)
def test_the_exit_code_is_that_of_a_shell(script: str, code: int) -> None:
    assert end(step("bash", "-c", script))[0] == code


def test_one_bad_exit_ends_all_ranks_and_is_the_code() -> None:
    text = f'[ "$HPC_RANK" != 1 ] || {{ sleep 0.5; exit 7; }}; exec {sys.executable} -c "$0" 0 75'
    code, said = end(step("bash", "-c", text, RANK, tasks=3))
    assert code == 7, said
    assert said == ["heard 0 SIGTERM", "heard 2 SIGTERM", "ready 0", "ready 2"]


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM", "SIGINT"])
def test_stop_signals_are_passed_on_to_every_rank(name: str) -> None:
    process = step(*rank(), tasks=2)
    assert sorted(lines(process, 2)) == ["ready 0", "ready 1"]
    process.send_signal(signal.Signals[name])
    assert end(process) == (75, [f"heard 0 {name}", f"heard 1 {name}"])


def test_a_rank_that_is_still_starting_is_not_killed_and_hears_the_signal_later() -> None:
    process = step("bash", "-c", 'echo here; exec "$@"', "bash", *rank(start=0.5))
    assert lines(process, 1) == ["here"]
    process.send_signal(signal.SIGUSR2)
    assert end(process) == (75, ["heard 0 SIGUSR2", "ready 0"])


def test_notice_of_the_time_limit_comes_ahead_of_it() -> None:
    process = step(*rank(), tasks=2, time=30, notice=29)
    assert end(process) == (75, ["heard 0 SIGUSR2", "heard 1 SIGUSR2", "ready 0", "ready 1"])


def test_at_the_time_limit_ranks_and_what_they_started_are_killed(tmp_path: Path) -> None:
    deaf = f"trap '' TERM USR2; sleep 60 & echo $! > {tmp_path / 'pid'}; wait"
    process = step("bash", "-c", deaf, time=0.5, notice=0.3)
    assert end(process) == (137, ["the time limit has passed: the ranks are killed"])
    assert not process_alive(int((tmp_path / "pid").read_text()))


# Ranks that answer to nothing.

DEAF = ["bash", "-c", "trap '' TERM INT USR2; echo ready; while :; do sleep 0.1; done"]


def deaf(grace_s: float) -> subprocess.Popen[str]:
    """A step of two of them, under way."""
    text = f"from hpc import localstep; localstep.GRACE_S = {grace_s}; raise SystemExit(localstep.main())"
    command = [sys.executable, "-c", text, "--tasks=2", "--time=300", "--", *DEAF]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert lines(process, 2) == ["ready", "ready"]
    return process


def lives(process: subprocess.Popen[str], seconds: float) -> bool:
    time.sleep(seconds)
    return process.poll() is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_ranks_that_do_not_answer_are_killed_after_a_grace(name: str) -> None:
    process = deaf(grace_s=1.5)
    process.send_signal(signal.Signals[name])
    assert lives(process, 0.7), "they may be saving"
    assert end(process)[0] == 137


def test_a_second_ctrl_c_kills_at_once_and_no_copy_of_the_first_does() -> None:
    process = deaf(grace_s=120)
    for _ in range(3):  # the terminal's and the shell's
        process.send_signal(signal.SIGINT)
        assert lives(process, 0.1)
    process.send_signal(signal.SIGTERM)
    assert lives(process, 1.1), "TERM comes again and again, and the launcher repeats what it was told"
    process.send_signal(signal.SIGTERM)
    assert lives(process, 0.3)
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 137


def test_the_notice_of_the_time_limit_alone_sets_no_deadline() -> None:
    process = deaf(grace_s=0.2)
    process.send_signal(signal.SIGUSR2)
    assert lives(process, 1.0)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 137


# The flag. Each case is a process of its own: handlers and fork hooks stay for good.

HEADER = """
import os, signal, subprocess, sys
from hpc.preempt import StopFlag
flag = StopFlag().install()
def send(number): os.kill(os.getpid(), number)
"""


def flagged(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HEADER + text], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0, f"left with {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def test_no_signal_is_no_cause() -> None:
    assert flagged("print(flag.cause, flag.agree(lambda mine: mine))") == "None None"


@pytest.mark.parametrize("first", ["SIGUSR2", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("then", ["SIGUSR2", "SIGTERM", "SIGINT"])
def test_the_first_signal_names_the_cause(first: str, then: str) -> None:
    assert flagged(f"send(signal.{first}); send(signal.{then}); send(signal.{then}); print(flag.cause)") == first


def test_a_forked_child_ignores_the_stop_signals_and_raises_no_flag() -> None:
    text = """
child = os.fork()
if not child:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        send(number)
    os._exit(3 if flag.cause is None else 4)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flag.cause)
"""
    assert flagged(text) == "3 None"


def test_a_worker_process_outlives_the_signals_that_its_parent_hears() -> None:
    text = """
import multiprocessing
queue = multiprocessing.get_context("fork").SimpleQueue()
def work():
    send(signal.SIGTERM)
    queue.put("alive")
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
send(signal.SIGUSR2)
print(queue.get(), flag.cause)
worker.join()
"""
    assert flagged(text) == "alive SIGUSR2"


def test_usr1_is_left_alone() -> None:
    assert flagged("print(signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL)") == "True"


@pytest.mark.parametrize(
    ("seen", "cause"),
    [([0, 0], None), ([0, signal.SIGTERM], "SIGTERM"), ([signal.SIGTERM, signal.SIGUSR2], "SIGTERM")],
)
def test_ranks_agree_on_the_highest_signal_that_any_has_seen(seen: list[int], cause: str | None) -> None:
    flags = [StopFlag() for _ in seen]
    for flag, number in zip(flags, seen, strict=True):
        if number:
            flag._raise(number, None)
    mine = [flag._signal for flag in flags]
    assert [flag.agree(lambda _: max(mine)) for flag in flags] == [cause, cause]
    assert [flag.cause for flag in flags] == [cause, cause], "who had seen nothing stops, too"


def test_a_flag_of_another_process_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = StopFlag()
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    flag._raise(signal.SIGTERM, None)
    assert flag.cause is None


def test_waiting_ranks_cost_no_core() -> None:
    """The stand-in sleeps between its looks."""
    process = step("sleep", "1")
    time.sleep(0.7)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    assert ticks / os.sysconf("SC_CLK_TCK") < 0.4
    assert end(process)[0] == 0
