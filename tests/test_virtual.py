"""Virtual ranks: 1, 2 and 4 real processes train to the same bits, and a chain of them; another order does not."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpc.errors import UserError
from jobs import virtual
from jobs.virtual import THREADS, BatchNorms, Gradients, VirtualRanks
from models3d import create_model
from tests.tiny_run import CONTEXT

V, BATCH, STEPS = 4, 8, 6
EVALUATED = 13  # one full batch, then 5 rows: of four virtual ranks one has 2, of eight three have none
WORLDS = (1, 2, 4)
LIMIT_S = 120  # for processes that take 3 s on a machine of their own


class Net(nn.Module):
    """Conv, BatchNorm of both kinds, dropout; a frozen layer, an unused one, and one that some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.mix, self.average = nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6, momentum=None)
        self.frozen, self.unused, self.rare = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rare = bool(x[0, 0, 0, 0, 0] > 0.7)
        x = self.norm(self.conv(x)).relu()
        if self.training:
            x = checkpoint(lambda y: self.average(self.mix(y)).relu(), x, use_reentrant=False)
        else:
            x = self.average(self.mix(x)).relu()
        x = self.frozen(self.dropout(x.mean((2, 3, 4))))
        return self.head(x + self.rare(x) if rare else x)


@dataclass(frozen=True)
class Play:
    """A training."""

    count: int = V
    bf16: bool = False
    plain: bool = False
    """The control: gradients in the order of their coming, then all_reduce."""
    zoo: bool = False
    """The registered ResNet instead of Net."""


def global_batch(step: int, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(rows, 1, 7, 6, 5, generator=draw), torch.randint(0, 3, (rows,), generator=draw)


def parts_of(ranks: VirtualRanks, step: int, rows: int = BATCH) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """As Loader shares a batch out: every world_size-th row, beginning at the rank."""
    x, y = (tensor[ranks.rank :: ranks.world_size] for tensor in global_batch(step, rows))
    return ranks.parts(x, y)


class Training:
    """One rank's; `state` goes to the next layout and holds all that must not depend on it."""

    def __init__(self, play: Play, ranks: VirtualRanks, state: dict[str, Any] | None) -> None:
        self.play, self.ranks = play, ranks
        torch.manual_seed(5 + ranks.rank)  # `broadcast` must make them equal
        self.model = create_model("resnet3d_tiny", 1, 3, width=4, layers=1, dropout=0.2) if play.zoo else Net()
        ranks.broadcast(self.model)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.gradients, self.norms = Gradients(ranks, self.model), BatchNorms(ranks, self.model)
        self.step, self.losses = 0, []
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.losses = state["step"], state["losses"]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.play.bf16):
            outputs = self.model(x)
        return nn.functional.cross_entropy(outputs.float(), y)

    def train_step(self) -> None:
        self.model.train()
        losses = {}
        for v, (x, y) in parts_of(self.ranks, self.step):
            torch.manual_seed(1000 * self.step + v)
            with self.norms.capture(v):
                loss = self.forward(x, y)
            (loss / self.ranks.count).backward()
            losses[v] = loss.detach().double()
            if not self.play.plain:
                self.gradients.add()
        if self.play.plain:
            self.sum_as_they_come()
        else:
            self.gradients.reduce()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.norms.commit()
        self.losses.append(float(self.ranks.sum(losses)).hex())
        self.step += 1

    def sum_as_they_come(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if self.ranks.world_size > 1:
                    dist.all_reduce(parameter.grad)

    def evaluate(self) -> str:
        self.model.eval()
        sums = {v: torch.zeros((), dtype=torch.float64) for v in self.ranks.held}
        with torch.inference_mode():
            for step, rows in ((90, BATCH), (91, EVALUATED - BATCH)):
                for v, (x, y) in parts_of(self.ranks, step, rows):
                    sums[v] += self.forward(x, y).double() * len(y)
        return float(self.ranks.sum(sums)).hex()

    def state(self) -> dict[str, Any]:
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**kept, "step": self.step, "losses": self.losses, "validation": self.evaluate()}


def run_rank(rank: int, world: int, store: Path, rows: list[tuple[Play, int, Path | None, Path]]) -> None:
    """Trainings of one layout, one after another: (what, up to which step, begin from, write to)."""
    torch.set_num_threads(THREADS)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    virtual._CHUNK = 64  # several chunks in a small model
    for play, end, begin, result in rows:
        state = torch.load(begin, weights_only=True) if begin else None
        training = Training(play, VirtualRanks(play.count, rank, world), state)
        while training.step < end:
            training.train_step()
        torch.save(training.state(), result.with_suffix(f".{rank}"))
    if world > 1:
        dist.barrier()
    os._exit(0)


def start_ranks(folder: Path, world: int, rows: list[tuple[Play, int, Path | None, Path]]) -> list[Any]:
    store = folder / f"store-{world}-{rows[0][-1].name}"
    ranks = [CONTEXT.Process(target=run_rank, args=(rank, world, store, rows)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def join(ranks: list[Any]) -> None:
    for process in ranks:
        process.join(LIMIT_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * len(ranks)


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """All of it byte by byte."""
    moments = state["optimizer"]["state"]
    return {
        "losses": state["losses"],
        "validation": state["validation"],
        "model": {key: value.numpy().tobytes() for key, value in state["model"].items()},
        "optimizer": {(n, key): value.numpy().tobytes() for n, one in moments.items() for key, value in one.items()},
    }


EVERYWHERE = {
    "fp32": Play(),
    "bf16": Play(bf16=True),
    "eight parts": Play(count=8),
    "resnet": Play(zoo=True),
    "plain": Play(plain=True),
}
CHAIN = ((2, 2), (4, 4), (1, STEPS))
"""Ranks, and the step that they go on to."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], dict[str, Any]]:
    """The state of (name, world size, rank) at the end; "chain" with the last layout's world size."""
    folder = tmp_path_factory.mktemp("ranks")
    everywhere = []
    for world in WORLDS:
        plays = [(play, STEPS, None, folder / f"{name}-{world}") for name, play in EVERYWHERE.items()]
        everywhere += start_ranks(folder, world, plays)
    begin = None
    for number, (world, end) in enumerate(CHAIN):  # meanwhile
        last = number == len(CHAIN) - 1
        result = folder / (f"chain-{world}" if last else f"link{number}")
        join(start_ranks(folder, world, [(Play(), end, begin, result)]))
        begin = result.with_suffix(f".{world - 1}")
    join(everywhere)
    return lambda name, world, rank=0: torch.load(folder / f"{name}-{world}.{rank}", weights_only=True)


# Real ranks.


@pytest.mark.parametrize("name", [name for name, play in EVERYWHERE.items() if not play.plain])
def test_one_two_and_four_ranks_end_with_the_same_bits(name: str, played: Callable[..., dict[str, Any]]) -> None:
    golden = bits(played(name, 1))
    assert len(set(golden["losses"])) == STEPS, "nothing is learnt: the test proves nothing"
    for world in WORLDS[1:]:
        for rank in range(world):
            assert bits(played(name, world, rank)) == golden, f"rank {rank} of {world}"


def test_a_change_of_layout_in_mid_training_changes_no_bit(played: Callable[..., dict[str, Any]]) -> None:
    assert bits(played("chain", CHAIN[-1][0])) == bits(played("fp32", 1))


def test_the_order_in_which_gradients_come_would_show(played: Callable[..., dict[str, Any]]) -> None:
    states = [played("plain", world) for world in WORLDS]
    found = [bits(state)["model"] for state in states]
    assert found[0] != found[1] and found[0] != found[2] and found[1] != found[2]
    losses = [[float.fromhex(loss) for loss in state["losses"]] for state in (*states, played("fp32", 1))]
    for other in losses[1:]:  # and yet it is the same training, but for Adam on gradients of 0 instead of none
        assert other == pytest.approx(losses[0], rel=0.02)


def test_who_has_no_gradient_anywhere_stays_and_who_has_it_somewhere_moves(
    played: Callable[..., dict[str, Any]],
) -> None:
    torch.manual_seed(5)
    begin = Net().state_dict()
    rare = [[float(x[0, 0, 0, 0, 0]) > 0.7 for _, (x, _) in parts_of(VirtualRanks(V), n)] for n in range(STEPS)]
    assert any(any(step) and not all(step) for step in rare) and any(not any(step) for step in rare)
    for world in WORLDS:
        end = played("fp32", world)
        moved = {key for key, value in end["model"].items() if not torch.equal(value, begin[key])}
        still = {f"{layer}.{kind}" for layer in ("frozen", "unused") for kind in ("weight", "bias")}
        assert begin.keys() - moved == still
        trained = [name for name, p in Net().named_parameters() if not name.startswith("frozen")]
        counts = {trained[n]: int(one["step"]) for n, one in end["optimizer"]["state"].items()}
        assert counts["conv.weight"] == STEPS and "unused.weight" not in counts
        assert counts["rare.weight"] == sum(any(step) for step in rare), "Adam skips it where it has no gradient"


def test_running_statistics_are_those_of_one_batch_after_the_other(played: Callable[..., dict[str, Any]]) -> None:
    end = played("fp32", 2)["model"]
    assert int(end["norm.num_batches_tracked"]) == int(end["average.num_batches_tracked"]) == V * STEPS


# One rank.


def reference(model: Net, steps: int) -> None:
    """Plain training on the virtual ranks in their order: torch's own running statistics and gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        model.train()
        for v, (x, y) in sorted(parts_of(VirtualRanks(V), step)):
            torch.manual_seed(v)
            (nn.functional.cross_entropy(model(x), y) / V).backward()
        optimizer.step()
        optimizer.zero_grad()


def ours(model: Net, steps: int) -> None:
    ranks = VirtualRanks(V)
    gradients, norms = Gradients(ranks, model), BatchNorms(ranks, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        model.train()
        for v, (x, y) in parts_of(ranks, step):
            torch.manual_seed(v)
            with norms.capture(v):
                loss = nn.functional.cross_entropy(model(x), y)
            (loss / V).backward()
            gradients.add()
        gradients.reduce()
        optimizer.step()
        optimizer.zero_grad()
        norms.commit()


class Once(Net):
    """Net without recomputation, whose second run through a BatchNorm torch would count."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.average(self.mix(self.norm(x))).relu()  # a layer that is used twice counts twice
        return self.head(self.dropout(x.mean((2, 3, 4))))


def test_it_is_plain_training_on_the_parts() -> None:
    torch.manual_seed(0)
    mine, theirs = Once(), Once()
    theirs.load_state_dict(mine.state_dict())
    ours(mine, 3)
    reference(theirs, 3)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert int(mine.norm.num_batches_tracked) == 2 * V * 3


def test_recomputed_activations_count_once() -> None:
    class Kept(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x)).relu()
            x = self.average(self.mix(x)).relu()
            return self.head(self.dropout(x.mean((2, 3, 4))))

    class Recomputed(Kept):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    kept, recomputed = Kept(), Recomputed()
    recomputed.load_state_dict(kept.state_dict())
    ours(kept, 2)
    ours(recomputed, 2)
    for key, value in kept.state_dict().items():
        assert torch.equal(recomputed.state_dict()[key], value), key


def test_a_dropped_step_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, ranks = Net(), VirtualRanks(V)
    gradients, norms = Gradients(ranks, model), BatchNorms(ranks, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for v, (x, _) in parts_of(ranks, 0):
        with norms.capture(v):
            model(x * torch.nan).sum().backward()
        gradients.add()
        if v == ranks.held[2]:
            break
    gradients.drop()
    norms.drop()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for v, (x, _) in parts_of(ranks, 0):
        with norms.capture(v):
            model(x).sum().backward()
        gradients.add()
    gradients.reduce()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_frozen_statistics_are_read_and_stay() -> None:
    torch.manual_seed(0)
    model, ranks = Net(), VirtualRanks(V)
    model.norm.running_mean.fill_(0.3)
    norms = BatchNorms(ranks, model)
    model.train()
    model.norm.eval()
    x = global_batch(0)[0]
    wanted = model.norm(x.expand(-1, 4, -1, -1, -1))
    for v in ranks.held:
        with norms.capture(v):
            found = model.norm(x.expand(-1, 4, -1, -1, -1))
            model(x)
        assert torch.equal(found, wanted)
    norms.commit()
    assert float(model.norm.running_mean[0]) == pytest.approx(0.3) and int(model.norm.num_batches_tracked) == 0
    assert int(model.average.num_batches_tracked) == V


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 13, 16])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_each_row_goes_to_its_virtual_rank_once(rows: int, world: int) -> None:
    seen = {}
    for rank in range(world):
        ranks = VirtualRanks(8, rank, world)
        for v, (mine, twice) in ranks.parts(torch.arange(rows)[rank::world], torch.arange(rows)[rank::world] * 2):
            assert v % world == rank and v in ranks.held and torch.equal(twice, mine * 2)
            seen[v] = mine.tolist()
    assert seen == {v: list(range(rows))[v::8] for v in range(min(rows, 8))}


@pytest.mark.parametrize(("count", "partials"), [(1, 1), (2, 1), (4, 2), (8, 3), (16, 4)])
def test_no_more_gradients_are_held_than_the_tree_needs(
    count: int, partials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = virtual._Partial
    monkeypatch.setattr(virtual, "_Partial", lambda *given: made.append(given) or real(*given))
    layer = nn.Linear(3, 2)
    gradients = Gradients(VirtualRanks(count), layer)
    for _ in range(3):
        for v in VirtualRanks(count).held:
            (layer.weight.sum() * float(v)).backward()
            gradients.add()
        gradients.reduce()
        assert float(layer.weight.grad[0, 0]) == sum(range(count)) and layer.bias.grad is None
        layer.zero_grad()
    assert len(made) == partials


def test_none_counts_as_zero_also_by_its_sign() -> None:
    """On two ranks the sum is -0 + 0, which is 0: so it must be where one rank has both."""
    layer = nn.Linear(1, 1)
    gradients = Gradients(VirtualRanks(2), layer)
    (layer.weight * -0.0).sum().backward()
    gradients.add()
    layer.bias.sum().backward()
    gradients.add()
    gradients.reduce()
    assert not bool(layer.weight.grad.signbit()) and float(layer.bias.grad) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_are_copies_of_one_alignment(world: int) -> None:
    """A kernel's order of sums may depend on where its input lies and on its strides."""
    unaligned = torch.zeros(4 * 3 * 5 + 1)[1:].view(4, 3, 5)[0::world]
    for _, (rows,) in VirtualRanks(4, 0, world).parts(unaligned):
        assert rows.is_contiguous() and rows.data_ptr() % 64 == 0


def test_a_part_that_is_missing_is_told() -> None:
    layer = nn.Linear(3, 2)
    gradients = Gradients(VirtualRanks(2), layer)
    layer.weight.sum().backward()
    gradients.add()
    with pytest.raises(ValueError, match="1 of 2 virtual ranks gave a gradient"):
        gradients.reduce()


@pytest.mark.parametrize(("count", "world"), [(0, 1), (3, 1), (4, 3), (2, 4)])
def test_ranks_that_do_not_divide_are_told(count: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"{count} virtual ranks must be a power of two that {world} ranks divide"):
        VirtualRanks(count, 0, world)


def test_statistics_of_the_layout_are_refused() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.SyncBatchNorm(2))
    with pytest.raises(UserError, match=r"^1 is a SyncBatchNorm: .*deterministic=run$"):
        BatchNorms(VirtualRanks(2), model)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


@pytest.mark.parametrize("layer", [Counting(), nn.InstanceNorm3d(1, track_running_stats=True)], ids=["own", "instance"])
def test_another_buffer_that_a_forward_changes_is_refused(layer: nn.Module) -> None:
    norms = BatchNorms(VirtualRanks(2), nn.Sequential(layer, nn.InstanceNorm3d(1), nn.BatchNorm3d(1)))
    told = pytest.raises(UserError, match=r"^buffer 0\..* changes in the forward pass.*deterministic=run$")
    with told, norms.capture(0):
        norms._model(torch.ones(2, 1, 3, 3, 3))
