"""Device, ranks and collectives of one task: the same training loop on one CPU, one GPU or many nodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc.allocation import Allocation
from jobs import rendezvous
from jobs.stepclock import StepClock

_MEET_S = 600
"""Until all ranks have come; nodes may start minutes apart."""


class BadNode(RuntimeError):
    """The node does not have what the job was given."""


def choose_device(wanted: str, allocation: Allocation) -> torch.device:
    """The device of this task: CUDA where the run asked for GPUs, or outside a run where there is one.

    Raises BadNode where a GPU is due and torch sees none.
    """
    if wanted == "cpu" or (wanted == "auto" and allocation.gpus == 0):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", allocation.local_rank % torch.cuda.device_count())
    if wanted == "cuda" or allocation.gpus:
        raise BadNode(
            f"{allocation.node}: the job has a GPU here, but torch {torch.__version__} sees none "
            f"(check nvidia-smi and the driver; train.device=cpu trains without)"
        )
    return torch.device("cpu")


def _usable(cpus: int) -> int:
    """As many threads as the task has cores: the sums of a kernel depend on their number."""
    usable = len(os.sched_getaffinity(0))
    return min(cpus, usable) if cpus else usable


class Engine:
    """One rank of a data-parallel job; with one task the collectives do nothing.

    Reductions of control values and of counts go through gloo on the CPU, gradients through NCCL where there is CUDA.
    """

    def __init__(
        self, allocation: Allocation, device: torch.device, deterministic: bool, token: str, threads: int = 0
    ) -> None:
        """`token` names the run and its attempt: ranks of another that come by accident are not let in.
        `threads`: of torch, 0 for its cores.

        Raises RendezvousError where the ranks do not find each other.
        """
        self.allocation = allocation
        self.rank = allocation.rank
        self.world_size = allocation.world_size
        self.device = device
        self.is_main = allocation.rank == 0
        self.clock = StepClock(device)
        self.deterministic = deterministic
        """Whether a resumed run is to be the undisturbed one, bit by bit."""
        self._control: Any = None  # the default group
        torch.set_num_threads(threads or _usable(allocation.cpus_per_task))
        self.store: Any = None
        """The TCPStore at which the ranks have met; None with one rank."""
        if deterministic and device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world_size > 1:
            self._connect(allocation, token)

    def _connect(self, allocation: Allocation, token: str) -> None:
        self.store = rendezvous.connect(allocation, token, _MEET_S)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world_size)
        if backend == "nccl":
            self._control = dist.new_group(backend="gloo")

    def max(self, values: Sequence[int]) -> list[int]:
        """Each value's maximum over the ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return [int(value) for value in tensor]

    def same(self, values: Sequence[int]) -> bool:
        """Whether all ranks have the same values."""
        both = self.max([*values, *(-value for value in values)])
        return both[: len(values)] == [-low for low in both[len(values) :]]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, as a CPU tensor of the same shape and type."""
        total = tensor.detach().to("cpu", copy=True)
        if self.world_size > 1:
            dist.all_reduce(total, group=self._control)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, (n, ...) each, rank by rank on rank 0 as a CPU tensor; on others their own."""
        mine = tensor.detach().to("cpu").contiguous()
        if self.world_size == 1:
            return mine
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[self.rank] = len(mine)
        dist.all_reduce(counts, group=self._control)
        padded = mine.new_zeros(int(counts.max()), *mine.shape[1:])
        padded[: len(mine)] = mine
        if not padded.numel():  # of no rank, or rows without columns
            return mine.new_zeros(int(counts.sum()), *mine.shape[1:]) if self.is_main else mine
        parts = [torch.empty_like(padded) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(padded, parts, group=self._control)
        if parts is None:
            return mine
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def broadcast(self, values: Sequence[float]) -> list[float]:
        """Rank 0's values on every rank, which must give as many."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.broadcast(tensor, 0, group=self._control)
        return [float(value) for value in tensor]

    def share_buffers(self, model: nn.Module) -> None:
        """Rank 0's running statistics on every rank, as DDP does it before each training step."""
        self.share(list(model.buffers()))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's numbers on every rank, a message for each kind of number; all of them on the device."""
        if self.world_size == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor.detach())
        for same in kinds.values():
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.broadcast(flat, 0)
            for tensor, piece in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()
