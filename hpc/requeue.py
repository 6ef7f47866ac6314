"""End of an attempt, in the batch shell: `python -m hpc.requeue RUN GENERATION CODE TOLD` sees to what follows.

What has ended it says hpc/ending.py, what follows from that hpc/verdict.py; here it is recorded, and SLURM is asked for
another attempt. A shell that was told (TERM) leaves it to SLURM, which has requeued the job already (preemption without
grace) or cancelled it: a cancelled job must never come back. Prints `again SECONDS` for a local restart, else `end
CODE`, the exit code for the script.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from hpc import allocation, ending, exclusion, health, slurm, verdict
from hpc.errors import UserError
from hpc.preempt import ExitCode, ignore_stops
from hpc.rundir import RunDir, locked, read_json, write_json
from hpc.sweepdir import alone
from hpc.verdict import Ending, Verdict

_AGAIN_S = 5.0
_PATIENCE_S = 100.0
"""While a silent controller is asked again; the notice of a time limit is 120 s."""
_SOONEST_S = 5
"""SLURM (22.05) makes a requeued job wait for 121 s, unless its StartTime has been set since and is still to come when
its last process has left: the shell needs well below a second for that, an epilog of the site's a few."""
_CANCELLED = ("CANCELLED", "COMPLETING")


def finish(run: RunDir, generation: int, code: int, told: bool) -> str:
    """Record the end of the attempt, requeue where that is right, and say what the batch script does next."""
    _set_aside_damaged(run)
    state = {**read_json(run.state), "generation": generation}  # an older shell may have written its own back
    if run.last_generation() > generation:
        left = ExitCode.DONE if run.result.exists() else code or ExitCode.CRASH
        return f"end {left:d}"  # a later attempt holds the run; its records are not ours to touch
    job, events = allocation.job_id(), run.read_events()
    told = told and not (job and _goes_on(job))
    own = [event for event in events if event["generation"] == generation]
    ended = ending.at_the_limit(run, generation, events, ending.of(run, generation, own, code, told))
    ended, out = _judge_nodes(run, generation, events, ended)
    row = verdict.row_before(events, generation)
    decided = verdict.judge(run.name, ended, row, ending.budgets_of(run))
    stopped = read_json(run.stop).get("generation") == generation
    code = ending.exit_code(ended.kind, own, code, stopped)
    _record(run, state, ended, decided, code, told)
    if decided.again and job is None:
        return f"again {decided.wait_s}"
    if decided.again and job:
        refusal = _requeue(run, generation, job, out, decided.wait_s)
        with suppress(OSError):  # a full disk takes the record, not the decision
            if refusal:
                _record_refusal(run, generation, f"{ended.words}; not started again: {refusal}")
            else:
                run.event("requeue", "shell", generation, job=job, **({"out": out} if out else {}))
    return f"end {code}"


def _set_aside_damaged(run: RunDir) -> None:
    """What cannot be read decides nothing, and keeps no run from going on."""
    for path in (run.state, run.stop):
        try:
            read_json(path)
        except UserError as error:
            print(error, file=sys.stderr)
            path.rename(path.with_name(f"{path.name}.damaged"))


def _goes_on(job: str) -> bool:
    """Whether the shell's TERM was not SLURM's: somebody's `scancel -b --signal`, or `sbatch --signal=B:TERM@N`."""
    try:
        info = slurm.queue([job]).get(job)
    except (slurm.SlurmError, OSError):
        return False
    return info is not None and info.state == "RUNNING"


def _judge_nodes(run: RunDir, generation: int, events: ending.Events, ended: Ending) -> tuple[Ending, list[str]]:
    """How the attempt ended, in the light of its nodes, and those that it is to keep off."""
    job, bad = allocation.job_id(), exclusion.bad_nodes(events, generation)
    met = exclusion.bad_nodes(events, generation - 1) | bad
    if bad and health.scratch_everywhere(met):
        if job:
            exclusion.let_in(run, met)
        if ended.kind != verdict.NODE:
            return ended, []
        remedy = "correct the instance's 'scratch' and submit anew"
        words = f"bad input: {'; '.join(bad.values())}, on two nodes in a row: it is named wrongly; {remedy}"
        return Ending(verdict.BAD_INPUT, words), []
    out = exclusion.leave_out(run, bad) if bad and job else []
    if ended.kind == verdict.NODE and bad:
        fault = exclusion.obstacle(run, events, bad, out)
        return replace(
            ended, words=ended.words if fault else f"{ended.words}; the job keeps off {', '.join(out)}", obstacle=fault
        ), out
    again = exclusion.hung_again(events, generation) if ended.kind == verdict.HANG and job else {}
    if job and again and exclusion.has_room(run, job, sorted(again)):
        out = exclusion.leave_out(run, again)
        return replace(
            ended, words=f"{ended.words}, for the second time there: the job keeps off {', '.join(out)}"
        ), out
    return ended, out


def _record(run: RunDir, state: Mapping[str, Any], ended: Ending, decided: Verdict, code: int, told: bool) -> None:
    stopped = read_json(run.stop).get("generation") == state["generation"]
    final = not decided.again and (ended.kind == verdict.NO_STEP or not stopped)
    phase = "ended" if final else "stopped"
    said = {"code": code, "cause": ended.kind, "reason": decided.reason}
    try:
        with locked(run.lease):
            if run.last_generation() <= state["generation"]:  # SLURM may have begun another while it was asked
                write_json(run.state, {**state, "phase": phase, **said, "time": round(time.time(), 3)})
        run.event("end", "shell", state["generation"], **said, told=told, again=decided.again)
    except OSError as error:  # a full disk takes the record, not the decision
        print(f"{run.name}: the end of this attempt is not recorded ({error})", file=sys.stderr)
    follows = "starting again" if decided.again else "not started again"
    print(f"{run.name}: {decided.reason}; {follows}", file=sys.stderr)


def _record_refusal(run: RunDir, generation: int, reason: str) -> None:
    """What was recorded as a restart is none."""
    with locked(run.lease):
        state = read_json(run.state)
        if run.last_generation() <= generation and state.get("generation") == generation:
            write_json(run.state, {**state, "reason": reason, "time": round(time.time(), 3)})
    run.event("refused", "shell", generation, reason=reason)


def _requeue(run: RunDir, generation: int, job: str, out: list[str], wait_s: int) -> str:
    """The same job again; where the cluster refuses (JobRequeue=0), the same script once, under the same token.

    Returns why not, empty where it comes back. SLURM sends TERM as soon as it agrees, and takes a change of the job
    only after that.
    """
    ignore_stops()
    out = [*out, *exclusion.excluded_by_user(job)] if out else []
    try:
        _ask_until_heard(job)
    except slurm.RequeueDisabled as refusal:
        print(f"{run.name}: {refusal}; submitted anew instead", file=sys.stderr)
        return _submit_anew(run, generation, job, out, wait_s)
    except slurm.SlurmError as refusal:
        print(f"{run.name}: {refusal}", file=sys.stderr)
        return str(refusal)
    changes = {"ExcNodeList": ",".join(out)} if out else {}
    try:
        slurm.update(job, StartTime=f"now+{max(wait_s, _SOONEST_S)}", **changes)
    except slurm.SlurmError as refusal:
        print(f"{run.name}: {refusal}: it comes back when SLURM lets it", file=sys.stderr)
    return ""


def _ask_until_heard(job: str) -> None:
    """A controller that is silent for a moment costs no run: SLURM ends this script before it is asked in vain."""
    end, asked = time.monotonic() + _PATIENCE_S, False
    while True:
        try:
            if not _refuse_another(job, asked):
                asked = True
                slurm.requeue(job)
            return
        except slurm.SilentError as silence:
            if time.monotonic() > end:
                raise
            print(f"{silence}; asked again in {_AGAIN_S:g} s", file=sys.stderr)
        time.sleep(_AGAIN_S)


def _refuse_another(job: str, asked: bool) -> bool:
    """Of a node that SLURM has lost the shell may live on: its job has been requeued, and may run elsewhere by now.

    True where it waits after all because we have asked before (what timed out is carried out later). Raises SlurmError.
    """
    info, ours = slurm.queue([job]).get(job), allocation.nodes()
    if info and asked and info.state in ("PENDING", *_CANCELLED):
        return True
    if info and info.state in _CANCELLED:
        raise slurm.SlurmError(f"job {job} was cancelled meanwhile, or SLURM ends it")
    if info and (info.state == "PENDING" or (info.state == "RUNNING" and ours and info.node not in ("", ours))):
        raise slurm.SlurmError(f"SLURM has requeued job {job} already, which is {info.state} {info.node}".rstrip())
    return False


def _submit_anew(run: RunDir, generation: int, job: str, out: list[str], wait_s: int) -> str:
    later = [f"--begin=now+{wait_s}"] if wait_s else []
    exclude = [f"--exclude={','.join(out)}"] if out else []
    try:
        new = _sbatch(run, job, [*later, *exclude])
        where = {"cluster": "slurm", "slurm_cluster": slurm.cluster_name()}
        write_json(run.submit, {**where, "job": new, "time": round(time.time(), 3)})
        run.event("submit", "shell", generation, job=new, after=job)
        return ""
    except (slurm.SlurmError, UserError, OSError) as error:
        print(f"{run.name}: not submitted again ({error}); 'hpc resume {run.name}' goes on from there", file=sys.stderr)
        return str(error)


def _sbatch(run: RunDir, job: str, options: list[str]) -> str:
    """A row of a sweep as its own task alone. One that waits under the same token already is not submitted twice.

    Raises SlurmError where the job was cancelled meanwhile: it must not come back.
    """
    single, queue = alone(run), slurm.queue()
    if (info := queue.get(job)) and info.state in _CANCELLED:
        raise slurm.SlurmError(f"job {job} was cancelled meanwhile")
    waiting = [i.job for i in queue.values() if i.comment == single.token and i.state == "PENDING"]
    return waiting[0] if waiting else single.job(slurm.submit(single.script, *single.options, *options))


def main() -> int:
    run, generation, code, told = sys.argv[1:5]
    print(finish(RunDir(run), int(generation), int(code), told == "1"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
