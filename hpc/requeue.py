"""End of an attempt, in the batch shell: `python -m hpc.requeue RUN GENERATION CODE TOLD` decides what follows.

stop.json decides, not srun's code: under --kill-on-bad-exit a skew of 0.2 s between ranks makes srun return 143 for a
clean stop. A shell that was told (TERM) leaves it to SLURM, which has requeued the job already (preemption without
grace) or cancelled it: a cancelled job must never come back. Prints `again` for a local restart, else `end`.
"""

from __future__ import annotations

import sys
import time

from hpc import allocation, slurm
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json, write_json


def decide(run: RunDir, generation: int, code: int, told: bool) -> tuple[bool, str]:
    """Whether this attempt is to be followed by another that we ask for, and why."""
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
    if code == ExitCode.BAD_INPUT:
        return False, "bad input: it would fail again"
    return False, f"failed with exit code {code}"


def finish(run: RunDir, generation: int, code: int, told: bool) -> str:
    """Record the end of the attempt, requeue where that is right, and say what the batch script does next."""
    again, reason = decide(run, generation, code, told)
    state = read_json(run.state)
    if state.get("generation") != generation:
        return "end"  # a later attempt holds the run; its records are not ours to touch
    stopped = read_json(run.stop).get("generation") == generation
    phase = "stopped" if stopped else "ended"
    ended = {**state, "phase": phase, "code": code, "reason": reason, "time": round(time.time(), 3)}
    try:
        write_json(run.state, ended)
        run.event("end", "shell", generation, code=code, told=told, again=again, reason=reason)
    except OSError as error:  # a full disk takes the record, not the decision
        print(f"{run.name}: the end of this attempt is not recorded ({error})", file=sys.stderr)
    print(f"{run.name}: {reason}; {'starting again' if again else 'not started again'}", file=sys.stderr)
    if not again:
        return "end"
    job = allocation.job_id()
    if job is None:
        return "again"
    run.event("requeue", "shell", generation, job=job)
    _requeue(run, generation, job)
    return "end"


def _requeue(run: RunDir, generation: int, job: str) -> None:
    """The same job again; where the cluster refuses (JobRequeue=0), the same script once, under the same token."""
    try:
        slurm.requeue(job)
        return
    except slurm.RequeueDisabled as refusal:
        print(f"{run.name}: {refusal}; submitted anew instead", file=sys.stderr)
    except slurm.SlurmError as refusal:
        print(f"{run.name}: {refusal}", file=sys.stderr)
        return
    try:
        waiting = [i.job for i in slurm.queue().values() if i.comment == run.name and i.state == "PENDING"]
        new = waiting[0] if waiting else slurm.submit(run.script)
        write_json(run.submit, {**read_json(run.submit), "job": new})
        run.event("submit", "shell", generation, job=new, after=job)
    except (slurm.SlurmError, OSError) as error:
        print(f"{run.name}: not submitted again ({error}); 'hpc resume {run.name}' goes on from there", file=sys.stderr)


def main() -> int:
    run, generation, code, told = sys.argv[1:5]
    print(finish(RunDir(run), int(generation), int(code), told == "1"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
