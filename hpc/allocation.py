"""Node side of an allocation: ranks, job, restart count, master address. The one file that spells SLURM's variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_REACH = frozenset(["SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"])
_OF_A_RUN = tuple(
    f"HPC_{name}"
    for name in (
        *("STEP", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ARRAY", "GENERATION", "MASTER", "RESTART", "CPUS", "GPUS"),
        *("END_TIME", "NOTICE"),
    )
)


@dataclass(frozen=True)
class Allocation:
    """One task's place in its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = ""
    job_id: str = ""
    cpus_per_task: int = 0
    """0 when nobody said."""
    gpus: int | None = None
    """GPUs that the run asked for on each node; None outside a run."""
    generation: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    end_time: float | None = None
    """When the time limit ends the job (seconds since 1970), as known at the start; None: no limit, or unknown."""
    notice_s: int | None = None
    """From the first signal of a preemption to SIGKILL; None where jobs are not preempted, or nobody said."""

    @staticmethod
    def current(environ: Mapping[str, str] = os.environ) -> Allocation:
        """From hpc.localstep's variables, else srun's (a batch shell or salloc alone is no step), else one task."""
        if "HPC_RANK" in environ:
            rank, world, local = (int(environ[f"HPC_{key}"]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        elif "SLURM_STEP_ID" in environ:
            rank, world, local = (int(environ[f"SLURM_{key}"]) for key in ("PROCID", "NTASKS", "LOCALID"))
        else:
            rank, world, local = 0, 1, 0
        return Allocation(
            rank=rank,
            world_size=world,
            local_rank=local,
            node=node_name(environ),
            job_id=job_id(environ) or "",
            cpus_per_task=int(environ.get("HPC_CPUS_PER_TASK", "0")),
            gpus=int(environ["HPC_GPUS"]) if "HPC_GPUS" in environ else None,
            generation=int(environ.get("HPC_GENERATION", "1")),
            master_addr=environ.get("HPC_MASTER_ADDR", "127.0.0.1"),
            master_port=int(environ.get("HPC_MASTER_PORT", "0")),
            end_time=float(environ["HPC_END_TIME"]) if environ.get("HPC_END_TIME") else None,
            notice_s=int(environ["HPC_NOTICE_S"]) if environ.get("HPC_NOTICE_S") else None,
        )


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """What scontrol calls this job; of an array task `ARRAY_TASK`: its raw id may name the whole array."""
    if environ.get("HPC_STEP") == "local":
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return environ.get("SLURM_JOB_ID")


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """How often SLURM (unset on the first run) or the local tail has restarted this job."""
    return int(environ.get("SLURM_RESTART_COUNT") or environ.get("HPC_RESTART_COUNT") or 0)


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def nodes(environ: Mapping[str, str] = os.environ) -> str:
    """All nodes of this job as SLURM lists them (node[0-1]); empty outside one."""
    return environ.get("SLURM_JOB_NODELIST", "")


def scratch_folders(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Where this node may have a disk of its own, the best first: the instance's, the job's, the machine's."""
    named = (environ.get(key, "") for key in ("HPC_SCRATCH", "SLURM_TMPDIR", "TMPDIR"))
    return [place for place in (*named, "/tmp") if place]


def instance_scratch(environ: Mapping[str, str] = os.environ) -> str | None:
    """The instance's own scratch, where it has one: it is there for the next job, as the job's own is not."""
    return environ.get("HPC_SCRATCH") or None


def cluster_name(environ: Mapping[str, str] = os.environ) -> str:
    """SLURM's name of the cluster of this job; empty outside one."""
    return environ.get("SLURM_CLUSTER_NAME", "")


def master(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Address and free port for the rendezvous, called in the batch shell, which runs on rank 0's node."""
    several = int(environ.get("SLURM_JOB_NUM_NODES", "1")) > 1 and job_id(environ) is not None
    with socket.socket() as probe:
        probe.bind(("", 0))
        return (socket.gethostname() if several else "127.0.0.1"), int(probe.getsockname()[1])


def without_job(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment less the outer job's own variables: a job submitted from a job must not inherit its array id.

    What says how the controller is reached stays (without SLURM_CONF sbatch may not find it, submitit#1814), and of a
    run around this process nothing does: HPC_STEP=local would go through sbatch into the new job.
    """
    return {key: value for key, value in environ.items() if key in _REACH or not key.startswith(("SLURM_", *_OF_A_RUN))}
