"""What may happen in a row of tests/playing.py, besides commands: waits, signals, kills, and what an admin does."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import stepledger
from hpc.rundir import RunDir
from tests.playing import Playing, listed
from tests.slurm.cluster import Cluster, ClusterError


def happen(play: Playing, line: str) -> None:
    """Play one line. Raises AssertionError for a line that is no event, and where one does not come."""
    for pattern, event in _EVENTS.items():
        if match := re.fullmatch(pattern, line):
            play.log.append(f"# {line}")
            event(play, *match.groups())
            return
    raise AssertionError(f"{line!r} is no event; known: {', '.join(_EVENTS)}")


def _cluster(play: Playing) -> Cluster:
    assert play.cluster
    return play.cluster


# Where a run is.


def _result(play: Playing, run: Path) -> bool:
    """Whether a run is finished; one that has failed will never be."""
    state = play.read("state.json", run)
    told = state.get("reason") if state.get("phase") == "ended" else None  # by the batch script's tail
    assert not told or (run / "result.json").exists(), f"{run.name} failed: {told}\n{play.block()}"
    return (run / "result.json").exists()


def _queue(play: Playing, wanted: str, job: str | None = None) -> bool:
    command = ("squeue", "-h", "--states=all", "-j", job or play.job, "-o", "%T")
    answer = _cluster(play).run(*command, check=False).stdout.strip()
    return answer in wanted.split("|")


def _at_step(play: Playing, number: str, step: str) -> None:
    run = play.row_of(number)
    play.wait(lambda: play.step(run) >= int(step), f"row {number} at step {step}", run=run)


def _row_job(play: Playing, number: str) -> str:
    return str(play.read("state.json", play.row_of(number))["job"])


def _live(play: Playing) -> list[str]:
    return [line["run"] for line in listed(play) if line["state"] in ("running", "pending", "requeued")]


def _expect_attempts(play: Playing, count: str) -> None:
    time.sleep(2)
    found = len(list((play.run / "events").glob("*-shell.jsonl")))
    assert found == int(count), f"{found} attempts, not {count}\n{play.block()}"


# Ranks and their signals.


@dataclass(frozen=True)
class Rank:
    pid: int
    number: int
    generation: int
    port: int
    """Where rank 0 was to listen."""

    def send(self, name: str) -> None:
        os.kill(self.pid, signal.Signals[f"SIG{name}"])


def ranks(play: Playing) -> list[Rank]:
    """The processes of the runs' ranks on this machine, in the order of their numbers."""
    found = [_rank(path.parent, play.runs) for path in Path("/proc").glob("[0-9]*/cmdline")]
    return sorted((rank for rank in found if rank), key=lambda rank: rank.number)


def _rank(process: Path, runs: list[Path]) -> Rank | None:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")[1:5]
        pairs = (pair.partition(b"=") for pair in (process / "environ").read_bytes().split(b"\0"))
    except OSError:
        return None
    if words[:3] != [b"-u", b"-m", b"jobs.run"] or words[3] not in [str(run).encode() for run in runs]:
        return None
    environ = {key: value for key, _, value in pairs}
    number = environ.get(b"HPC_RANK", environ.get(b"SLURM_PROCID", b"0"))
    generation, port = (int(environ.get(name, b"0")) for name in (b"HPC_GENERATION", b"HPC_MASTER_PORT"))
    return Rank(int(process.name), int(number), generation, port)


def _signal(play: Playing, name: str) -> None:
    if play.cluster:
        play.cluster.run("scancel", f"--signal={name}", play.job)
    else:
        subprocess.run(["kill", f"-{name}", str(play.read("state.json")["pid"])], check=True)


def _signal_ranks(play: Playing, names: str) -> None:
    """Each rank gets them all, 10 ms apart."""
    for rank in ranks(play):
        for name in names.split():
            rank.send(name)
            time.sleep(0.01)


def _signal_rank(play: Playing, number: str, name: str) -> None:
    [rank] = [rank for rank in ranks(play) if rank.number == int(number)]
    rank.send(name)


def _freeze(play: Playing, step: str) -> None:
    """Stop the tasks' clock until SLURM signals them (CONT, then USR2): the run need not last as long as its limit.

    SLURM may send USR2 up to 60 s early, even before the first step.
    """

    def there() -> bool:
        attempted = list(play.run.glob("events/001-*"))
        return play.step() >= int(step) or bool(attempted and _queue(play, "PENDING"))

    play.wait(there, f"step {step}, or stopped before", run=play.run)
    for rank in ranks(play):
        rank.send("STOP")


def _signal_during(play: Playing, name: str, phase: str) -> None:
    """The signal reaches rank 0 of the next attempt while it is there, seen from outside: in /proc and the folder."""
    answered = play.events("signal")
    been = max((event["generation"] for event in answered), default=0)
    found: list[Rank] = []

    def there() -> bool:
        found[:] = found or [rank for rank in ranks(play) if rank.generation > been]
        if not found or not _PHASES[phase](play, found[0]):
            return False
        found[0].send(name)
        return True

    play.wait(there, f"{name} during {phase}", often=0.001, run=play.run)
    play.wait(lambda: len(play.events("signal")) > len(answered), "it is answered", run=play.run)


def _maps(rank: Rank, library: str) -> bool:
    try:
        return library in Path(f"/proc/{rank.pid}/maps").read_text()
    except OSError:
        return False


def _marked(phase: str) -> Callable[[Playing, Rank], bool]:
    """tests/faults/net.py says so, beside the copy of it that the run carries."""
    return lambda play, rank: (play.run / "code" / "own" / f"{rank.generation}-{phase}").exists()


_PHASES: dict[str, Callable[[Playing, Rank], bool]] = {
    "the import of torch": lambda play, rank: _maps(rank, "libtorch_cpu"),
    "the build": _marked("build"),
    "compilation": lambda play, rank: any((play.run / "compiled").rglob("*.cpp")),
    "the first step": _marked("step"),
    "validation": _marked("validation"),
    "a save": lambda play, rank: any((play.run / "checkpoints").glob(".g*")),
    "a figure": lambda play, rank: _maps(rank, "matplotlib"),
}


def _kill_all(play: Playing) -> None:
    """kill -9 of the batch shell, the step and the ranks: nobody is left to write anything."""
    found = ranks(play)
    steps = {int(Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[1]) for rank in found}
    for pid in (int(play.read("state.json")["pid"]), *steps, *(rank.pid for rank in found)):
        os.kill(pid, signal.SIGKILL)
    play.wait(lambda: not ranks(play), "no rank is left")


def _take_ports(play: Playing, count: str) -> None:
    """Others listen where the ranks are to meet, as soon as these exist; they still import torch."""
    from jobs.rendezvous import ports

    play.wait(lambda: ranks(play), "the first rank", often=0.01)
    for port in ports(ranks(play)[0].port)[: int(count)]:
        listener = socket.create_server(("127.0.0.1", port))
        listener.setblocking(False)
        play.taken.append(listener)


# Whose a run is.


def _refused(play: Playing, words: str) -> None:
    """A second start of the run here leaves with 2, and one line with these words."""
    started = time.monotonic()
    command = ["bash", str(play.run / "job.sbatch")]
    done = subprocess.run(command, cwd=play.folder, env=play.environment(), capture_output=True, text=True)
    play.when["refused"] = max(play.when.get("refused", 0.0), time.monotonic() - started)
    play.log += [f"$ {' '.join(command)}", done.stdout + done.stderr]
    told = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(told) == 1 and words in told[0], play.block()


def _lease_of(play: Playing, host: str, seconds: str) -> None:
    """As if the run were held from another host, whose last word is so old."""
    path = play.run / "state.json"
    path.write_text(json.dumps({**play.read("state.json"), "host": host}))
    os.utime(path, (time.time() - int(seconds),) * 2)


# What happens to the data.


def _spoil(play: Playing, steps: str) -> None:
    """Each of these steps gets a sample for its second rank whose values have no finite loss."""
    from datasets import open_volumes
    from datasets.partition import SPLITS
    from datasets.writer import VolumeWriter

    assert play.undisturbed
    done = stepledger.read(RunDir(play.undisturbed("two-tasks").run)).steps
    spoilt = {done[int(step)][1]["samples"][0][0] for step in steps.split()}
    path = play.folder / "scans.h5"
    before = open_volumes(path.rename(play.folder / "unspoilt.h5"))
    sizes = {"shape": before.shape, "num_samples": len(before), "class_names": before.class_names}
    with VolumeWriter(path, dtype=before.dtype, **sizes) as writer:
        for number in range(len(before)):
            volume, label = before.read(number)
            scale = 3e38 if number in spoilt else before.scale[number]  # a number in the file, none in the network
            split = SPLITS[before.split[number]]
            given = {"id": before.ids[number], "split": split, "offset": before.offset[number]}
            writer.add(volume, label, scale=scale, **given)


# What SLURM and its admin do.


def _preempt(play: Playing) -> None:
    play.displacer = _cluster(play).preempt(play.job)


def _node_free(play: Playing) -> None:
    play.wait(lambda: _queue(play, "RUNNING|COMPLETING|COMPLETED", play.displacer), "the node is free", often=0.02)
    play.when[f"free {play.read('state.json')['generation']}"] = time.time()


def _release(play: Playing, job: str | None = None) -> None:
    """SLURM holds a requeued job back for two minutes."""
    play.wait(lambda: _queue(play, "PENDING", job), "the job is pending again", 0.05, None if job else play.run)
    try:
        _cluster(play).release(job or play.job)
    except ClusterError:  # after a failure the tail has said when itself, and that is soon
        assert _queue(play, "RUNNING", job), play.block()


def _by_hand(play: Playing) -> None:
    play.by_hand = _cluster(play).submit(play.run / "job.sbatch", cwd=play.folder)
    play.log.append(f"$ sbatch runs/{play.run.name}/job.sbatch\nSubmitted batch job {play.by_hand}")


def _submit_meanwhile(play: Playing, command: str) -> None:
    """The controller stops as the command calls sbatch, and is there again before sbatch gives up (9 s)."""
    programs, cluster = play.folder / "programs", _cluster(play)
    waiting = f'touch "{programs}/now"\nwhile [ ! -e "{programs}/go" ]; do sleep 0.05; done\nexec /usr/bin/sbatch "$@"'
    before = _own_sbatch(play, waiting)
    submitting = subprocess.Popen(command, shell=True, cwd=play.folder, env=before, stdout=subprocess.PIPE, text=True)
    play.wait((programs / "now").exists, "sbatch is called")
    cluster.stop_controller()
    (programs / "go").touch()
    time.sleep(3)
    cluster.start_controller()
    play.log += [f"$ {command}", submitting.communicate(timeout=60)[0]]
    assert submitting.returncode == 0, play.block()


def _submit_to_the_deaf(play: Playing, command: str) -> None:
    """The controller hangs as the command calls sbatch, until sbatch has given up; what it was asked it does then."""
    programs, cluster = play.folder / "programs", _cluster(play)
    does = f'touch "{programs}/now"\nwhile [ ! -e "{programs}/go" ]; do sleep 0.05; done\n/usr/bin/sbatch "$@"\n'
    environ = _own_sbatch(play, does + f'code=$?\necho $code >"{programs}/gave-up"\nexit $code')
    submitting = subprocess.Popen(command, shell=True, cwd=play.folder, env=environ, stdout=subprocess.PIPE, text=True)
    play.wait((programs / "now").exists, "sbatch is called")
    cluster.pause_controller()
    (programs / "go").touch()
    play.wait((programs / "gave-up").exists, "sbatch has given up")
    assert (programs / "gave-up").read_text() != "0\n", f"sbatch was heard\n{play.block()}"
    cluster.resume_controller()
    play.log += [f"$ {command}", submitting.communicate(timeout=60)[0], f"exit code {submitting.returncode}"]


def _own_sbatch(play: Playing, does: str) -> dict[str, str]:
    """An environment whose sbatch does this; `--test-only` is asked of the real one."""
    programs = play.folder / "programs"
    programs.mkdir()
    test_only = 'case "$*" in *--test-only*) exec /usr/bin/sbatch "$@";; esac'
    (programs / "sbatch").write_text(f"#!/bin/sh\n{test_only}\n{does}\n")
    (programs / "sbatch").chmod(0o755)
    environ = play.environment()
    return {**environ, "PATH": f"{programs}{os.pathsep}{environ['PATH']}"}


def _killed_after_sbatch(play: Playing, command: str) -> None:
    """kill -9 of the command when SLURM has taken the job, before anything of it is written down."""
    before = _own_sbatch(play, f'/usr/bin/sbatch "$@" > "{play.folder}/programs/said"; kill -9 $PPID')
    done = subprocess.run(f"exec {command}", shell=True, cwd=play.folder, env=before, capture_output=True, text=True)
    play.log += [f"$ {command}", done.stdout + done.stderr]
    assert done.returncode == -signal.SIGKILL and not play.read("submit.json"), play.block()
    assert (play.folder / "programs" / "said").read_text().strip(), play.block()


def _slurmd_dies(play: Playing, node: str = "") -> None:
    """kill -9 of the slurmd of a node, the run's first one unless named; its slurmstepd, shell and ranks live on."""
    cluster = _cluster(play)
    node = node or play.read("state.json")["node"]
    cluster.daemons[node].kill()
    cluster.daemons[node].wait()
    play.when["lost"] = time.time()


_EVENTS: dict[str, Callable[..., Any]] = {
    r"wait for step (\d+)": lambda play, step: play.wait(
        lambda: play.step() >= int(step), f"step {step}", 0.02, play.run
    ),
    r"wait for attempt": lambda play: play.wait(lambda: play.read("state.json"), "the first attempt has begun"),
    r"wait for attempt (\d+)": lambda play, number: play.wait(
        lambda: play.read("state.json").get("generation", 0) >= int(number), f"attempt {number} has begun"
    ),
    r"wait for silence": lambda play: play.wait(lambda: not ranks(play), "no rank is left"),
    r"wait until none is under way": lambda play: play.wait(lambda: not _live(play), "none is under way"),
    r"wait for end": lambda play: play.wait(lambda: _result(play, play.run), "result.json is there"),
    r"wait for requeue": _release,
    r"wait for the node": _node_free,
    r"wait for the job to go": lambda play: play.wait(lambda: _queue(play, "CANCELLED|PREEMPTED|"), "the job is gone"),
    r"wait for row (\d+)": lambda play, number: play.wait(
        lambda: _result(play, play.row_of(number)), f"row {number} is finished"
    ),
    r"wait for all": lambda play: play.wait(
        lambda: all(_result(play, run) for run in play.runs), "all runs are finished"
    ),
    r"wait for the tail": lambda play: play.wait(
        lambda: play.read("state.json").get("phase") in ("stopped", "ended"), "the batch script's tail has decided"
    ),
    r"wait for the tail of attempt (\d+)": lambda play, number: play.wait(
        lambda: any(event["generation"] == int(number) for event in play.events("end")), "its batch script has decided"
    ),
    r"wait (\d+) s": lambda play, seconds: time.sleep(int(seconds)),
    r"row (\d+) at step (\d+)": _at_step,
    r"preempt row (\d+)": lambda play, number: _cluster(play).preempt(_row_job(play, number)),
    r"requeue row (\d+)": lambda play, number: _release(play, _row_job(play, number)),
    r"cancel row (\d+)": lambda play, number: play.command(f"hpc cancel {play.row_of(number).name}"),
    r"controller stops": lambda play: _cluster(play).stop_controller(),
    r"controller starts": lambda play: _cluster(play).start_controller(),
    r"controller is away during (hpc submit .*)": _submit_meanwhile,
    r"controller hangs during (hpc submit .*)": _submit_to_the_deaf,
    r"kill after sbatch: (hpc submit .*)": _killed_after_sbatch,
    r"the node's slurmd is killed": _slurmd_dies,
    r"the slurmd of (\w+) is killed": _slurmd_dies,
    r"preempt": _preempt,
    r"scancel": lambda play: _cluster(play).run("scancel", play.job),
    r"freeze at step (\d+)": _freeze,
    r"signal (\w+)": _signal,
    r"signal (\w+) during (.+)": _signal_during,
    r"signal the ranks ([\w ]+)": _signal_ranks,
    r"signal rank (\d+) (\w+)": _signal_rank,
    r"all of it is killed": _kill_all,
    r"others take (\d+) ports": _take_ports,
    r"a second start is refused: (.+)": _refused,
    r"the lease is (\w+)'s, (\d+) s old": _lease_of,
    r"wait for the words (.+)": lambda play, words: play.wait(lambda: words in play.outputs(), words),
    r"spoil steps ([\d ]+)": _spoil,
    r"sbatch by hand": _by_hand,
    r"partition (\w+) (\w+)": lambda play, name, state: _cluster(play).run(
        "scontrol", "update", f"PartitionName={name}", f"State={state}"
    ),
    r"more time": lambda play: _cluster(play).run("scontrol", "update", f"JobId={play.job}", "TimeLimit=30"),
    r"expect attempts (\d+)": _expect_attempts,
}
