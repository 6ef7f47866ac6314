"""Bit-identical training on any number of ranks (`train.deterministic: layout`): virtual ranks, one order of sums.

A global batch has V = train.virtual_ranks parts, whoever works them off: its row p belongs to virtual rank p % V. Of W
ranks (W divides V) rank r holds those with v % W == r, and Loader gives it just their rows. Each part is a
forward and backward pass of its own, of the same shapes in every layout, hence the same kernels; what is summed over
parts is summed in one binary tree: v with v + V/2, then the halves of what is left, and so on. A step:

    for v, (x, y) in ranks.parts(batch.inputs, batch.targets):
        torch.manual_seed(...)                  # of (seed, step, v): the rank must not matter
        with norms.capture(v):
            outputs = model(x)                  # the bare model, no DDP
        (task.loss(outputs, y) / ranks.count).backward()    # the global mean, as all parts have as many rows
        gradients.add()                         # takes the .grad
        losses[v] = ...
    gradients.reduce()                          # .grad is that of the global batch, the same on all ranks
    loss = ranks.sum(losses)
    clip_grad_norm_(...); optimizer.step(); optimizer.zero_grad(set_to_none=True)
    norms.commit()                              # or norms.drop(), where the step is not to count

Evaluation goes through `parts` and `sum` as well: a short last batch leaves some virtual ranks with fewer rows or none.

Equal bits need equal kernels: the same versions of torch and its libraries, the same kind of CPU or GPU, THREADS on the
CPU, and on CUDA what `deterministic: run` asks for. The price is V smaller passes instead of W, and a reduction that
does not overlap with the backward pass (`make bench-layout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpc.errors import UserError

THREADS = 1
"""torch's threads in each rank on the CPU: the sums inside a kernel depend on their number."""

_CHUNK = 1 << 20
"""numbers of a flat gradient that are exchanged at once; the bits do not depend on it"""


class VirtualRanks:
    """Which parts of a batch this rank works off, and sums over all of them.

    Sums go through `group` (None: the default one), whose ranks are 0 to world_size - 1.
    """

    def __init__(self, count: int, rank: int = 0, world_size: int = 1, group: Any = None) -> None:
        if count < 1 or count & (count - 1) or count % world_size:
            raise ValueError(f"{count} virtual ranks must be a power of two that {world_size} ranks divide")
        self.count, self.rank, self.world_size, self.group = count, rank, world_size, group
        self.held = tuple(rank + world_size * j for j in _depth_first(count // world_size))
        """The virtual ranks of this rank in the order of `parts`, in which the tree needs the fewest partial sums."""

    def parts(self, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(virtual rank, its rows of each tensor) for those that this rank holds and that have rows.

        tensors: this rank's share of a batch, (B, ...) each, as Loader gives it. The rows are copies: a view's
        alignment and strides would depend on the layout, and with them a kernel's order of sums.
        """
        for v in self.held:
            rows = slice(v // self.world_size, None, self.count // self.world_size)
            mine = tuple(tensor[rows].clone(memory_format=torch.contiguous_format) for tensor in tensors)
            if len(mine[0]):
                yield v, mine

    def gather(self, values: Mapping[int, Tensor]) -> Tensor:
        """(V, ...) of all virtual ranks in their order, on every rank. values: one tensor for each of `held`."""
        mine = torch.stack([values[v] for v in sorted(self.held)])
        if self.world_size == 1:
            return mine
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine, group=self.group)
        return torch.stack(rows, 1).flatten(0, 1)

    def sum(self, values: Mapping[int, Tensor]) -> Tensor:
        """The sum over all virtual ranks, the same bits in every layout. values: as for `gather`."""
        return _tree_sum(self.gather(values))

    def broadcast(self, model: nn.Module) -> None:
        """Rank 0's weights and buffers on every rank, as DDP does it when it is made."""
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), group=self.group, group_src=0)


def _depth_first(count: int) -> list[int]:
    """0 to count - 1 so that both summands of each sum of the tree come as soon as they can: 0, 2, 1, 3."""
    if count == 1:
        return [0]
    return [j for first in _depth_first(count // 2) for j in (first, first + count // 2)]


def _tree_sum(rows: Tensor) -> Tensor:
    """(n, ...) -> (...), n a power of two: row i with row i + n/2, then the same with the sums. Overwrites `rows`."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half].add_(rows[half:])
    return rows[0]


class Gradients:
    """The sum of all virtual ranks' gradients of a model's trainable parameters.

    On top of the model's own gradients it holds max(1, log2(V / W)) partial sums. A parameter without a gradient in
    some virtual ranks counts as 0 there; without one in all of them, it has none in the end.
    """

    def __init__(self, ranks: VirtualRanks, model: nn.Module) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._sums = [_FlatSum(ranks, parameters) for parameters in kinds.values()]

    def add(self) -> None:
        """Take the .grad of the next of `ranks.held`; it is None afterwards."""
        for one in self._sums:
            one.add()

    def reduce(self) -> None:
        """Let .grad be the sum over all virtual ranks. It is valid until the next `add`, and must be None by then.

        Raises ValueError where not every virtual rank of this rank has been added: without rows it would have no
        gradient, and the others would weigh too little.
        """
        for one in self._sums:
            one.reduce()

    def drop(self) -> None:
        """Forget what was added since the last `reduce`."""
        for one in self._sums:
            one.drop()


class _Partial:
    """A partial sum: one flat buffer, and its parts in the shapes of the parameters."""

    def __init__(self, parameters: list[nn.Parameter], length: int) -> None:
        self.flat = parameters[0].new_zeros(length, requires_grad=False)
        sizes = [parameter.numel() for parameter in parameters]
        pieces = torch.split(self.flat[: sum(sizes)], sizes)
        self.views = [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]

    def put(self, gradients: list[Tensor | None], onto: bool) -> None:
        """Copy the gradients, or add them: None is 0, and a sum with 0 is computed too (-0 + 0 is 0)."""
        given = [(view, grad) for view, grad in zip(self.views, gradients, strict=True) if grad is not None]
        missing = [view for view, grad in zip(self.views, gradients, strict=True) if grad is None]
        if given:
            views, grads = (list(column) for column in zip(*given, strict=True))
            torch._foreach_add_(views, grads) if onto else torch._foreach_copy_(views, grads)
        for view in missing:
            view.add_(0) if onto else view.zero_()


class _FlatSum:
    """The gradients of one dtype. The end of the buffers says which parameters have a gradient in any rank."""

    def __init__(self, ranks: VirtualRanks, parameters: list[nn.Parameter]) -> None:
        self._ranks, self._parameters = ranks, parameters
        self._numbers = sum(parameter.numel() for parameter in parameters)
        self._length = -(-(self._numbers + len(parameters)) // ranks.count) * ranks.count
        self._spare: list[_Partial] = []
        self.drop()

    def drop(self) -> None:
        self._partial: list[_Partial] = []
        self._used = [False] * len(self._parameters)
        self._added = 0

    def add(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters]
        self._used = [used or grad is not None for used, grad in zip(self._used, gradients, strict=True)]
        second = self._added % 2 == 1
        if not second:
            self._partial.append(self._spare.pop() if self._spare else _Partial(self._parameters, self._length))
        self._partial[-1].put(gradients, onto=second)
        for parameter in self._parameters:
            parameter.grad = None
        self._added += 1
        size = 4  # a pair is one partial sum already
        while self._added % size == 0:
            right = self._partial.pop()
            self._partial[-1].flat.add_(right.flat)
            self._spare.append(right)
            size *= 2

    def reduce(self) -> None:
        if self._added != len(self._ranks.held):
            raise ValueError(f"{self._added} of {len(self._ranks.held)} virtual ranks gave a gradient")
        total, used = self._partial.pop(), self._used
        if self._ranks.world_size > 1:
            ends = total.flat[self._numbers : self._numbers + len(used)]
            ends.copy_(torch.tensor(used))
            self._exchange(total.flat)
            if not all(used):
                used = (ends > 0).tolist()
        for parameter, view, has in zip(self._parameters, total.views, used, strict=True):
            parameter.grad = view if has else None
        self._spare.append(total)
        self.drop()

    def _exchange(self, flat: Tensor) -> None:
        """The rest of the tree, over the ranks: each sums its share of every number, then all get all shares."""
        world, group = self._ranks.world_size, self._ranks.group
        received = torch.empty_like(flat[:_CHUNK])
        for chunk in torch.split(flat, _CHUNK):
            rows = received[: len(chunk)]
            dist.all_to_all_single(rows, chunk, group=group)
            share = _tree_sum(rows.view(world, -1))
            dist.all_gather(list(chunk.view(world, -1)), share, group=group)


class BatchNorms:
    """Running statistics of a model's BatchNorm layers, as if the virtual ranks had come one after another.

    In training, each virtual rank is normalised by its own statistics. Its layers update running statistics that begin
    at 0; the real ones are affine in what came before them, so all virtual ranks are put together afterwards, in their
    order and on every rank. What a backward pass computes once more (activation checkpointing) does not count.

    Raises UserError for SyncBatchNorm: its statistics are those of the layout.
    """

    def __init__(self, ranks: VirtualRanks, model: nn.Module) -> None:
        self._ranks, self._model = ranks, model
        self._norms: list[_BatchNorm] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise UserError(
                    f"{name} is a SyncBatchNorm: its statistics depend on the number of ranks, which "
                    f"train.deterministic=layout excludes; use BatchNorm, or train.deterministic=run"
                )
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                self._norms.append(module)
        self._real = [_statistics(norm) for norm in self._norms]
        self._scratch = [{key: torch.zeros_like(real) for key, real in one.items()} for one in self._real]
        self._rows: dict[int, Tensor] = {}
        sizes = torch.tensor([2 * norm.num_features for norm in self._norms], dtype=torch.int64)
        kept = [1.0 if norm.momentum is None else 1.0 - norm.momentum for norm in self._norms]
        device = self._real[0]["running_mean"].device if self._real else None
        self._owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
        self._keep = torch.tensor(kept, dtype=torch.float64, device=device)
        self._cumulative = torch.tensor([norm.momentum is None for norm in self._norms], device=device)

    @contextmanager
    def capture(self, virtual_rank: int) -> Iterator[None]:
        """Around the forward pass of a virtual rank, not its backward pass; until `commit` the layers hold scratch.

        Raises UserError where the pass changes another buffer of the model, which would then depend on the layout.
        """
        for norm, real, scratch in zip(self._norms, self._real, self._scratch, strict=True):
            torch._foreach_zero_(list(scratch.values()))
            norm._buffers.update(scratch if norm.training else real)  # a frozen layer reads the real ones
        before = self._others()
        yield
        changed = [name for name, state in self._others().items() if before.get(name) != state]
        if changed:
            raise UserError(
                f"buffer {changed[0]} changes in the forward pass, so it would depend on the number of ranks, which "
                f"train.deterministic=layout excludes; use train.deterministic=run"
            )
        if self._norms:
            self._rows[virtual_rank] = _flat(self._scratch)

    def commit(self) -> None:
        """Update the real statistics on every rank, after all virtual ranks of a step."""
        rows = self._rows
        self.drop()
        if not self._norms:
            return
        layers, owner = len(self._norms), self._owner
        state = _flat(self._real)
        running, batches = state[:-layers], state[-layers:]
        for row in self._ranks.gather(rows):
            statistics, calls = row[:-layers], row[-layers:]
            batches += calls
            share = calls / batches.clamp(min=1)
            old = torch.where(self._cumulative, 1 - share, self._keep**calls)
            new = torch.where(self._cumulative, share, 1.0)
            running.mul_(old[owner]).add_(new[owner] * statistics)
        _unflat(state, self._real)

    def drop(self) -> None:
        """Leave the real statistics as they were before the step."""
        self._rows = {}
        for norm, real in zip(self._norms, self._real, strict=True):
            norm._buffers.update(real)

    def _others(self) -> dict[str, tuple[int, int]]:
        """What changes when a buffer is replaced, or written to: those of the layers that are captured left out."""
        captured = {id(tensor) for scratch in self._scratch for tensor in scratch.values()}
        named = self._model.named_buffers()
        return {name: (id(tensor), tensor._version) for name, tensor in named if id(tensor) not in captured}


def _statistics(norm: _BatchNorm) -> dict[str, Tensor]:
    return {key: getattr(norm, key) for key in ("running_mean", "running_var", "num_batches_tracked")}


def _flat(statistics: list[dict[str, Tensor]]) -> Tensor:
    """(S + N,) float64 of N layers: mean and variance of each, then the numbers of batches."""
    numbers = [one[key] for one in statistics for key in ("running_mean", "running_var")]
    batches = torch.stack([one["num_batches_tracked"] for one in statistics])
    return torch.cat([torch.cat(numbers).double(), batches.double()])


def _unflat(flat: Tensor, statistics: list[dict[str, Tensor]]) -> None:
    targets = [one[key] for one in statistics for key in ("running_mean", "running_var")]
    targets += [one["num_batches_tracked"] for one in statistics]
    for target, piece in zip(targets, torch.split(flat, [target.numel() for target in targets]), strict=True):
        target.copy_(piece.view(target.shape))
