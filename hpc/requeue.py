"""End of an attempt, in the batch shell: `python -m hpc.requeue RUN GENERATION CODE TOLD` decides what follows.

stop.json and the event bad-node decide, not srun's code: under --kill-on-bad-exit a skew of 0.2 s between ranks makes
srun return 143 for a clean stop. A shell that was told (TERM) leaves it to SLURM, which has requeued the job already
(preemption without grace) or cancelled it: a cancelled job must never come back. Prints `again` for a local restart,
else `end`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from hpc import allocation, badnodes, health, slurm
from hpc.errors import UserError
from hpc.preempt import ExitCode, ignore_stops
from hpc.rundir import RunDir, read_json, write_json
from hpc.sweepdir import alone

_IMPOSSIBLE = re.compile("node configuration is not available", re.I)
_IN_A_ROW = 3
_AGAIN_S = 5.0
_PATIENCE_S = 100.0
"""While a silent controller is asked again; the notice of a time limit is 120 s."""
_CANCELLED = ("CANCELLED", "COMPLETING")
_AWAY = re.compile(r"DOWN|DRAIN|FAIL|MAINT|NOT_RESPONDING|UNKNOWN|REBOOT|POWER")
"""States of nodes that may come back."""


def decide(
    run: RunDir, generation: int, code: int, told: bool, bad: Mapping[str, str] | None = None, out: Iterable[str] = ()
) -> tuple[bool, str]:
    """Whether this attempt is to be followed by another that we ask for, and why.

    `bad`: nodes (to reasons) that this attempt found bad; `out`: all nodes that are to be left out from now on.
    """
    if run.result.exists():
        return False, "finished"
    stop = read_json(run.stop)
    stopped = stop.get("generation") == generation
    if told and allocation.job_id() is None:
        return False, f"cancelled or interrupted; 'hpc resume {run.name}' goes on"
    if told:
        return False, "the batch shell was told to end: SLURM requeued the job, or it was cancelled"
    if stopped:
        return True, f"stopped by {stop['cause']} at step {stop['step']}"
    if bad and code == ExitCode.BAD_INPUT:
        fault = "; ".join(bad.values())
        remedy = "correct the instance's 'scratch' and submit anew"
        return False, f"bad input: {fault}, on two nodes in a row: it is named wrongly; {remedy}"
    if bad:
        return _elsewhere(run, bad, sorted(out))
    if code == ExitCode.BAD_INPUT:
        return False, "bad input: it would fail again"
    return False, f"failed with exit code {code}"


def _elsewhere(run: RunDir, bad: Mapping[str, str], out: list[str]) -> tuple[bool, str]:
    """Whether a run that met bad nodes is to be tried on others."""
    reason = "; ".join(f"bad node {node}: {fault}" for node, fault in bad.items())
    job = allocation.job_id()
    if job is None:
        return False, f"{reason}; once that is mended, 'hpc resume {run.name}' goes on"
    met, in_a_row = _met(run)
    if again := sorted(bad.keys() & met):
        return False, f"{reason}; the run was to keep off {', '.join(again)} and came there again"
    if in_a_row >= _IN_A_ROW:
        return False, f"{reason}; {in_a_row + 1} attempts in a row ended so: is it the nodes, or the run itself?"
    if not _room(run, job, out):
        mended = f"once they are mended, take them out of {badnodes.file(run.runs)} and 'hpc resume {run.name}'"
        return False, f"{reason}; without {', '.join(out)} no nodes are left that could run it: {mended}"
    return True, f"{reason}; the job keeps off {', '.join(out)}"


def _met(run: RunDir) -> tuple[set[str], int]:
    """The nodes that requeues of this run have left out within a day, and how many of these since it last saved."""
    events, since = run.read_events(), time.time() - badnodes.KEPT_S
    left = [event for event in events if event["event"] == "requeue" and "out" in event and event["time"] > since]
    saved = max((event["time"] for event in events if event["event"] == "checkpoint"), default=0.0)
    return {node for event in left for node in event["out"]}, sum(event["time"] > saved for event in left)


def _room(run: RunDir, job: str, out: list[str]) -> bool:
    """Whether the job can ever start without these nodes. SLURM's verdict, which is no also while others are down."""
    try:
        single, info = alone(run), slurm.queue([job])[job]
        shape = [f"--partition={info.partition}", f"--nodes={info.nodes}"]
        fits, words = slurm.test_only(single.script, f"--exclude={','.join(out)}", *shape, *single.options)
        if fits or not _IMPOSSIBLE.search(words):
            return True
        there = [node for node in slurm.nodes() if info.partition in node.get("Partitions", "").split(",")]
    except (slurm.SlurmError, UserError, KeyError):
        return True  # nobody knows: rather wait in the queue than give up
    left = [node for node in there if node["NodeName"] not in out]
    return len(left) >= info.nodes and any(_AWAY.search(node["State"]) for node in left)


def finish(run: RunDir, generation: int, code: int, told: bool) -> str:
    """Record the end of the attempt, requeue where that is right, and say what the batch script does next."""
    state = read_json(run.state)
    if state.get("generation") != generation:
        return "end"  # a later attempt holds the run; its records are not ours to touch
    job = allocation.job_id()
    bad, before = _bad_nodes(run, generation), _bad_nodes(run, generation - 1)
    astray = bool(bad) and health.scratch_everywhere(before | bad)
    if bad:  # a rank that was killed for it may have been faster
        code = ExitCode.BAD_INPUT if astray else ExitCode.BAD_NODE
    if astray and job:
        _let_in(run, before | bad)
    out = _leave_out(run, bad) if bad and job and not astray else []
    again, reason = decide(run, generation, code, told, bad, out)
    stopped = read_json(run.stop).get("generation") == generation
    phase = "stopped" if stopped or again else "ended"
    ended = {**state, "phase": phase, "code": code, "reason": reason, "time": round(time.time(), 3)}
    try:
        write_json(run.state, ended)
        run.event("end", "shell", generation, code=code, told=told, again=again, reason=reason)
    except OSError as error:  # a full disk takes the record, not the decision
        print(f"{run.name}: the end of this attempt is not recorded ({error})", file=sys.stderr)
    print(f"{run.name}: {reason}; {'starting again' if again else 'not started again'}", file=sys.stderr)
    if not again:
        return "end"
    if job is None:
        return "again"
    if _requeue(run, generation, job, out):
        with suppress(OSError):  # as above
            run.event("requeue", "shell", generation, job=job, **({"out": out} if out else {}))
    return "end"


def _bad_nodes(run: RunDir, generation: int) -> dict[str, str]:
    """Nodes that ranks of this attempt have left as bad, and why."""
    events = [event for event in run.read_events() if event["generation"] == generation]
    return {event["node"]: event["reason"] for event in events if event["event"] == "bad-node"}


def _leave_out(run: RunDir, bad: Mapping[str, str]) -> list[str]:
    """Remember bad nodes for other runs, too; all nodes that are to be left out now."""
    cluster = slurm.cluster_name()
    try:
        badnodes.remember(run.runs, cluster, run.name, bad)
    except OSError as error:
        print(f"{run.name}: bad nodes are not remembered for other runs ({error})", file=sys.stderr)
    return sorted({*bad, *badnodes.known(run.runs, cluster)})


def _let_in(run: RunDir, met: Mapping[str, str]) -> None:
    """Take the nodes off the list that are there for the folder which these lack, too."""
    cluster = slurm.cluster_name()
    known = badnodes.known(run.runs, cluster)
    alike = {node: reason for node, reason in known.items() if health.scratch_everywhere({**met, node: reason})}
    try:
        badnodes.forget(run.runs, cluster, alike)
    except OSError as error:
        print(f"{run.name}: {', '.join(alike)} stay left out ({error})", file=sys.stderr)


def _excluded(job: str) -> list[str]:
    """What the user excluded: SLURM replaces the whole list."""
    try:
        info = slurm.queue([job]).get(job)
    except slurm.SlurmError:
        return []
    return [info.excluded] if info and info.excluded else []


def _requeue(run: RunDir, generation: int, job: str, out: list[str]) -> bool:
    """The same job again; where the cluster refuses (JobRequeue=0), the same script once, under the same token.

    SLURM sends TERM as soon as it agrees, and takes a change of the job's nodes only after that.
    """
    ignore_stops()
    out = [*out, *_excluded(job)] if out else []
    try:
        _ask_until_heard(job)
        if out:
            slurm.update(job, ExcNodeList=",".join(out))
        return True
    except slurm.RequeueDisabled as refusal:
        print(f"{run.name}: {refusal}; submitted anew instead", file=sys.stderr)
    except slurm.SlurmError as refusal:
        print(f"{run.name}: {refusal}", file=sys.stderr)
        return False
    try:
        new = _submit_anew(run, job, out)
        where = {"cluster": "slurm", "slurm_cluster": slurm.cluster_name()}
        write_json(run.submit, {**where, "job": new, "time": round(time.time(), 3)})
        run.event("submit", "shell", generation, job=new, after=job)
        return True
    except (slurm.SlurmError, UserError, OSError) as error:
        print(f"{run.name}: not submitted again ({error}); 'hpc resume {run.name}' goes on from there", file=sys.stderr)
        return False


def _ask_until_heard(job: str) -> None:
    """A controller that is silent for a moment costs no run: SLURM ends this script before it is asked in vain."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return slurm.requeue(job)
        except slurm.SilentError as silence:
            if time.monotonic() > end:
                raise
            print(f"{silence}; asked again in {_AGAIN_S:g} s", file=sys.stderr)
        time.sleep(_AGAIN_S)


def _submit_anew(run: RunDir, job: str, out: list[str]) -> str:
    """A row of a sweep as its own task alone. One that waits under the same token already is not submitted twice.

    Raises SlurmError where the job was cancelled meanwhile: it must not come back.
    """
    single, queue = alone(run), slurm.queue()
    if (info := queue.get(job)) and info.state in _CANCELLED:
        raise slurm.SlurmError(f"job {job} was cancelled meanwhile")
    waiting = [i.job for i in queue.values() if i.comment == single.token and i.state == "PENDING"]
    exclude = [f"--exclude={','.join(out)}"] if out else []
    return waiting[0] if waiting else single.job(slurm.submit(single.script, *single.options, *exclude))


def main() -> int:
    run, generation, code, told = sys.argv[1:5]
    print(finish(RunDir(run), int(generation), int(code), told == "1"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
