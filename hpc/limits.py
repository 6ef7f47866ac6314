"""How long a job has: when SLURM ends it, and how much notice a preemption gives. Asked in the job, in 2 s at most."""

from __future__ import annotations

import sys

from hpc import allocation, slurm
from hpc.allocation import Allocation
from hpc.cluster import Cluster

_PATIENCE_S = 2.0
"""For all questions together: a silent controller must not keep a job from its work."""


def end_time() -> float | None:
    """When the time limit ends this job (seconds since 1970), as it is now: admins change it. None: no limit.

    Where there is no SLURM, or it does not answer in time, what was known at the start of the attempt.
    """
    known, job = Allocation.current().end_time, allocation.job_id()
    if job is None:
        return known
    try:
        with slurm.within(_PATIENCE_S):
            info = slurm.queue([job]).get(job)
    except slurm.SlurmError:
        return known
    return info.end if info else known


def of_this_job() -> dict[str, str]:
    """HPC_END_TIME and HPC_NOTICE_S for the ranks, empty where there is none or nobody says."""
    end, notice = "", ""
    job = allocation.job_id()
    try:
        with slurm.within(_PATIENCE_S):
            if job and (info := slurm.queue([job]).get(job)):
                end = f"{info.end:.0f}" if info.end else ""
                notice_s = Cluster.look(info.node).notice_s(info.partition)
                notice = "" if notice_s is None else str(notice_s)
    except (slurm.SlurmError, KeyError) as error:
        print(f"end and notice of job {job} are not known: {error}", file=sys.stderr)
    return {"HPC_END_TIME": end, "HPC_NOTICE_S": notice}
