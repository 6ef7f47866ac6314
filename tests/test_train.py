"""Training stopped, killed and resumed everywhere must end as if nothing had happened; bad input is told in a line."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.experiment import load
from hpc.logs import series
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json
from jobs import checkpoint
from jobs.setup import check, prepare
from jobs.train import main as check_main
from tests import tiny_run
from tests.tiny_run import (
    BOUNDARIES,
    CONTEXT,
    EPOCHS,
    SPLITS,
    STEPS,
    STEPS_PER_EPOCH,
    Outcome,
    assert_same,
    free_port,
    in_child,
    outcome,
    play,
    play_rank,
    run_ranks,
)

WORKERS = 3  # a resumed attempt spends half of its time waiting for the clock's next second
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(WORKERS, mp_context=CONTEXT) as executor:
        yield executor


STOPS = [(boundary,) for boundary in range(1, BOUNDARIES + 1)] + [(6, 2, 5)]


@pytest.fixture(scope="module")
def played(pool: ProcessPoolExecutor, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Futures of the undisturbed run () and of all the stopped ones."""
    folder = tmp_path_factory.mktemp("runs")
    rows: list[tuple[int, ...]] = [(), *STOPS]
    return {row: pool.submit(play, folder / "-".join(map(str, ("run", *row))), data, row) for row in rows}


@pytest.fixture(scope="module")
def golden(played: dict[Any, "Future[Outcome]"]) -> Outcome:
    return played[()].result()


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Run folders of all rows, and the futures of their playing."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {name: tiny_run.make_run(folder / f"run{number}", data) for number, name in enumerate(KILLS)}
    with ThreadPoolExecutor(WORKERS) as threads:
        yield {name: (run, threads.submit(play_kills, name, run)) for name, run in runs.items()}


@pytest.fixture(scope="module", autouse=True)
def early_start(played: dict[Any, Any], killed: dict[str, Any]) -> None:
    """The long rows run beside the other tests, which come first in this file."""


# The check of an experiment against its data and model (hpc plan's child).


def test_the_check_says_what_fits(data: Path, tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    lines = check(load(run.experiment)[0])
    count = sum(p.numel() for p in prepare(load(run.experiment)[0]).build_model("resnet3d_tiny").parameters())
    assert "27 samples of 1 x 8 x 8 x 8 int16, 17 train, 6 validation, 4 test, 3 classes" in lines[0]
    assert lines[1] == f"model: resnet3d_tiny, {count:,} parameters"


FAULTS = {
    "model.num_classes=4": ["num_classes is 4", "3 classes", "early, late, none"],
    "data.batch_size=18": ["batch_size is 18", "17 samples"],
    "train.loss.class_weights=[1, 2]": ["2 weights", "3 classes"],
    "model.name=resnet3d_tinny": ["resnet3d_tinny", "resnet3d_tiny"],
    "model.widht=8": ["widht", "width"],
    "model.width=-1": ["width", "-1"],
    "data.augment={flipp: [0]}": ["flipp", "flip"],
    "data.augment={flip: [3]}": ["flip", "3"],
    "data.file=/no/such/file.h5": ["/no/such/file.h5", "hpc pack"],
    "model.name=file:wide.py:Wide": ["scores of shape (5,)", "not (3,)"],
}


@pytest.mark.parametrize("override", FAULTS)
def test_the_check_tells_each_fault_in_one_line(
    override: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wide.py").write_text(FLAT.replace("Flat(", "Wide(").replace("8, num_classes", "8, 5"))
    monkeypatch.chdir(tmp_path)
    run = tiny_run.make_run(tmp_path / "run", data, override)
    for given, source in ((str(run.path), ""), (str(run.experiment), ""), ("-", run.experiment.read_text())):
        monkeypatch.setattr(sys, "argv", ["train", "--check", given])
        monkeypatch.setattr(sys, "stdin", io.StringIO(source))
        assert check_main() == ExitCode.BAD_INPUT
        told = capsys.readouterr()
        assert told.out == "" and len(told.err.splitlines()) == 1, told.err
        assert all(part in told.err for part in FAULTS[override]), told.err


def test_data_without_validation_are_refused(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path, {"train": 8}))
    with pytest.raises(UserError, match=r"no validation samples: .*--split"):
        check(load(run.experiment)[0])


def test_one_shard_of_several_is_no_data_file(tmp_path: Path) -> None:
    whole = tiny_run.make_data(tmp_path)
    for number in (1, 2):  # named as shards, and each whole
        shutil.copy(whole, tmp_path / f"part-0000{number}-of-00002.h5")
    run = tiny_run.make_run(tmp_path / "run", tmp_path / "part-00002-of-00002.h5")
    with pytest.raises(UserError, match=rf"is one of 2 shards; write 'data.file: {tmp_path}/part-\*.h5' for all"):
        check(load(run.experiment)[0])
    alone = tmp_path / "part-00001-of-00001.h5"
    shutil.copy(whole, alone)
    assert check(load(tiny_run.make_run(tmp_path / "alone", alone).experiment)[0])


def start_from(folder: Path, data: Path) -> None:
    """Weights of one run, one added to each, are where another begins; that they fit is seen in the check."""
    first = tiny_run.make_trainer(tiny_run.make_run(folder / "first", data))
    raised = {name: value + 1 for name, value in first.model.state_dict().items()}
    torch.save(raised, folder / "raised.pt")
    run = tiny_run.make_run(folder / "second", data, f"model.weights={folder / 'raised.pt'}")
    assert "weights: raised.pt: " in check(load(run.experiment)[0])[2]
    second = tiny_run.make_trainer(run)
    second.resume()
    assert all(torch.equal(value, raised[name]) for name, value in second.model.state_dict().items())


def test_a_run_starts_from_weights_of_elsewhere(data: Path, tmp_path: Path) -> None:
    assert in_child(start_from, tmp_path, data) == 0


# The payload's exit codes, each with one line for the user.


def run_payload(folder: Path, environ: dict[str, str], largest_file: int | None = None) -> None:
    from jobs import run as payload  # not in pytest's own process: it installs its signal handlers at once

    with (folder / "stderr.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update({"HPC_CPUS_PER_TASK": "1", **environ})
    sys.argv = ["jobs.run", str(folder)]
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    payload.main()


def last_line(run: RunDir) -> str:
    text = (run.path / "stderr.txt").read_text()
    return text.splitlines()[-1] if text else ""


def test_a_node_that_lost_its_gpu_is_a_bad_node(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    run = tiny_run.make_run(tmp_path / "run", data, "train.device=auto")
    assert in_child(run_payload, run.path, {"HPC_GPUS": "1"}) == ExitCode.BAD_NODE
    assert "sees none" in last_line(run)


def test_other_data_under_the_same_name_are_refused_on_resume(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    run = tiny_run.make_run(tmp_path / "run", data)
    assert in_child(attempt, run.path, 1, 5, signal.SIGTERM, False) == ExitCode.STOPPED
    tiny_run.make_data(tmp_path, train3=1)
    assert in_child(run_payload, run.path, {"HPC_GENERATION": "2"}) == ExitCode.BAD_INPUT
    assert str(data) in last_line(run) and "g001-s00000004" in last_line(run) and "hpc submit" in last_line(run)
    assert tiny_run.newest(run).step == 4
    tiny_run.make_data(tmp_path)  # put back, it goes on
    assert in_child(run_payload, run.path, {"HPC_GENERATION": "3"}) == ExitCode.DONE


def test_a_loss_that_is_not_finite_names_its_step_and_is_never_saved(data: Path, tmp_path: Path) -> None:
    given = ["train.optimizer={name: sgd, lr: 1e30}", "train.scheduler={name: constant}", "train.epochs=9"]
    run = tiny_run.make_run(tmp_path / "run", data, *given)
    assert in_child(run_payload, run.path, {}) == ExitCode.CRASH
    assert "after 2 rollbacks that passed over steps 2-" in last_line(run) and "train.optimizer.lr" in last_line(run)
    assert [checkpoint.verify(path).step for path in checkpoint.newest_first(run.checkpoints)] == [1]
    assert all(value.isfinite().all() for value in tiny_run.newest(run).model().values())


def test_only_damaged_checkpoints_are_a_storage_fault(data: Path, tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    assert in_child(attempt, run.path, 1, 3, signal.SIGTERM, False) == ExitCode.STOPPED
    next(checkpoint.newest_first(run.checkpoints)).joinpath("manifest.json").unlink()
    for generation in "23":
        assert in_child(run_payload, run.path, {"HPC_GENERATION": generation}) == ExitCode.STORAGE
        assert "no good checkpoint" in last_line(run)
    assert not run.metrics.exists(), "it started afresh"


def test_checkpoints_that_are_gone_are_never_a_fresh_start(data: Path, tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    assert in_child(attempt, run.path, 1, 5, signal.SIGTERM, False) == ExitCode.STOPPED
    shutil.rmtree(run.checkpoints)
    assert in_child(run_payload, run.path, {"HPC_GENERATION": "2"}) == ExitCode.STORAGE
    assert "has saved step 4" in last_line(run) and "hpc submit" in last_line(run)
    [told] = [event for event in run.read_events() if event["event"] == "failed"]
    assert told["retry"] is False and not run.metrics.exists()


LEAVES = """
import sys
from torch import nn

class Leaves(nn.Linear):
    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes)

    def forward(self, x):
        sys.exit(0)

class Remembers(nn.Linear):
    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes)

    def get_extra_state(self):
        return {"seen": 1}

class Lazy(nn.LazyLinear):
    def __init__(self, in_channels, num_classes):
        super().__init__(num_classes)
"""


def test_a_model_that_leaves_the_process_is_a_crash(data: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(LEAVES)
    run = tiny_run.make_run(tmp_path / "run", data, f"model.name=file:{tmp_path}/net.py:Leaves")
    assert in_child(run_payload, run.path, {}) == ExitCode.CRASH
    assert "sys.exit(0)" in last_line(run)


@pytest.mark.parametrize(("name", "word"), [("Remembers", "_extra_state"), ("Lazy", "all sizes")])
def test_state_that_no_checkpoint_could_bring_back_is_refused(name: str, word: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(LEAVES)
    run = tiny_run.make_run(tmp_path / "run", data, f"model.name=file:{tmp_path}/net.py:{name}")
    with pytest.raises(UserError, match=word):
        check(load(run.experiment)[0])


def test_a_disk_too_full_for_a_checkpoint_is_a_storage_fault(data: Path, tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    assert in_child(run_payload, run.path, {}, 4_000) == ExitCode.STORAGE
    assert "ulimit -f" in last_line(run)
    assert not run.ledger.exists() and not list(run.checkpoints.glob("*"))


def test_a_disk_too_full_for_events_trains_on(data: Path, tmp_path: Path, golden: Outcome) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    assert in_child(run_payload, run.path, {}, 40_000) == ExitCode.DONE
    assert_same(outcome(run), golden)
    matrices = series.images(run.tensorboard).get("confusion_matrix/validation", [])
    files = series.event_files(run.tensorboard)
    assert len(matrices) < tiny_run.EPOCHS or len(files) > 1, "the events fitted: the test proves nothing"
    assert "Traceback" not in (run.path / "stderr.txt").read_text()


def test_a_lease_lost_to_a_later_attempt_ends_this_one(data: Path, tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    run.state.write_text(json.dumps({"generation": 5}))
    run.event("start", "shell", 5)
    assert in_child(run_payload, run.path, {"HPC_GENERATION": "4"}) == ExitCode.BAD_INPUT
    assert "held by generation 5" in last_line(run)
    assert read_json(run.state) == {"generation": 5}


def test_a_signal_while_torch_is_loading_stops_cleanly(data: Path, tmp_path: Path, golden: Outcome) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    environ = {**os.environ, "HPC_CPUS_PER_TASK": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs.run", str(run.path)]
    with subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 30
        while not hears(child.pid, signal.SIGTERM) and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGTERM)
        assert "torch" not in Path(f"/proc/{child.pid}/maps").read_text(), "too late: torch was there already"
        assert child.wait(60) == ExitCode.STOPPED
    assert read_json(run.stop) == {"generation": 1, "step": 0, "cause": "SIGTERM"}
    assert in_child(attempt, run.path, 2, None, signal.SIGTERM, False) == ExitCode.DONE
    assert_same(outcome(run), golden)


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


# Accumulation.

FLAT = """
from torch import nn

class Flat(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(512 * in_channels, 8), nn.Tanh(), nn.Linear(8, num_classes))
"""


def follow(folder: Path, data: Path, parts: int, model: str) -> tuple[list[list[int]], Outcome]:
    """Sample numbers of every step, and the outcome, of a network that sees each sample alone."""
    run = tiny_run.make_run(folder, data, f"train.accumulate={parts}", f"model.name={model}")
    trainer, seen = tiny_run.make_trainer(run), []
    step = trainer._train_step

    def listen(batch: Any) -> None:
        seen.append(batch.samples.tolist())
        step(batch)

    trainer._train_step = listen  # type: ignore[method-assign]
    trainer.resume()
    trainer.fit()
    return seen, outcome(run)


def test_accumulated_parts_are_the_same_samples_and_the_same_step(
    pool: ProcessPoolExecutor, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "flat.py").write_text(FLAT)
    model = f"file:{tmp_path / 'flat.py'}:Flat"
    jobs = [pool.submit(follow, tmp_path / f"run{parts}", data, parts, model) for parts in (1, 2, 4)]
    (seen, whole), *others = [job.result() for job in jobs]
    assert len(seen) == STEPS and all(len(set(epoch)) == 16 for epoch in np.reshape(seen, (EPOCHS, 16)))
    for samples, result in others:
        assert samples == seen
        for name, content in whole["weights"].items():
            mine, theirs = (np.frombuffer(raw, np.float32) for raw in (result["weights"][name], content))
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# Ranks.


# world size, the boundaries of two stops, the steps they must be at: one in mid-epoch, one in a validation.
WORLDS = [(2, (4, 3), [3, 4]), (3, (4, 3), [2, 3])]


@pytest.mark.parametrize(("world", "boundaries", "steps"), WORLDS, ids=["2 ranks", "3 ranks"])
def test_ranks_stop_together_and_resume_bit_identical(
    world: int, boundaries: tuple[int, int], steps: list[int], data: Path, tmp_path: Path
) -> None:
    batch = f"data.batch_size={2 * world}"
    given = (batch, "train.accumulate=2", "train.epochs=2")
    runs = [tiny_run.make_run(tmp_path / name, data, *given) for name in ("whole", "stopped")]
    stopped = [(runs[1], generation, boundary) for generation, boundary in enumerate((*boundaries, None), start=1)]
    plan = [
        (run.path, generation, boundary, free_port()) for run, generation, boundary in [(runs[0], 1, None), *stopped]
    ]
    assert run_ranks(play_rank, [(rank, world, plan) for rank in range(world)]) == [0] * world
    assert [line["step"] for line in runs[1].read_events() if line["event"] == "signal"] == steps
    whole = outcome(runs[0])
    assert np.sum(whole["best"]["matrix"]) == SPLITS["validation"], "every rank's share counts, once"
    assert_same(outcome(runs[1]), whole)


def refuse_shares(folder: Path, rank: int, port: int) -> None:
    place = Allocation(rank, 2, rank, cpus_per_task=1, master_port=port)
    try:
        tiny_run.make_trainer(RunDir(folder), allocation=place)
    except Exception as error:
        os._exit(40 if "multiple of 8" in str(error) and "\n" not in str(error) else 41)
    os._exit(0)


def test_a_batch_that_does_not_divide_by_ranks_and_parts_is_refused(data: Path, tmp_path: Path) -> None:
    run, port = tiny_run.make_run(tmp_path / "run", data, "train.accumulate=4"), free_port()
    assert run_ranks(refuse_shares, [(run.path, rank, port) for rank in (0, 1)]) == [40, 40]


# Stopped and resumed.


def test_the_undisturbed_run_is_what_the_numbers_say(golden: Outcome) -> None:
    assert golden["step"] == STEPS == EPOCHS * STEPS_PER_EPOCH
    assert [line["step"] for line in golden["metrics"]] == [4, 8, 12]
    assert len({line["metrics"]["loss"] for line in golden["metrics"]}) == 3, "nothing is learnt: tests prove nothing"


@pytest.mark.parametrize("stops", STOPS, ids=lambda stops: "-".join(map(str, stops)))
def test_stopped_anywhere_and_resumed_is_bit_identical(
    stops: tuple[int, ...], played: dict[Any, "Future[Outcome]"], golden: Outcome
) -> None:
    assert_same(played[stops].result(), golden)


def attempt(folder: Path, generation: int, boundary: int | None, number: int, save_always: bool) -> None:
    answer = tiny_run.train(RunDir(folder), generation, boundary, number, save_always=save_always)
    os._exit(ExitCode.STOPPED if answer == "stopped" else ExitCode.DONE)


# (boundary, signal) of each attempt but the last; whether it saves at every step; step of the last good checkpoint.
KILLS = {
    "before the first save": ([(4, signal.SIGKILL)], False, None),
    "long after a save": ([(10, signal.SIGKILL)], False, 4),
    "at once after a save": ([(10, signal.SIGKILL)], True, 6),
    "stopped in a validation, killed when it is done": ([(12, signal.SIGTERM), (4, signal.SIGKILL)], False, 8),
    "twice with another signal": ([(3, signal.SIGUSR2), (4, signal.SIGKILL)], False, 2),
}


def play_kills(name: str, run: RunDir) -> None:
    """The attempts of a row, and one more to the end, each in a process of its own."""
    attempts, save_always, saved = KILLS[name]
    for generation, (boundary, number) in enumerate(attempts, start=1):
        code = in_child(attempt, run.path, generation, boundary, number, save_always)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else ExitCode.STOPPED)
    assert [tiny_run.newest(run).step] == [saved] if saved else not run.checkpoints.exists()
    assert in_child(attempt, run.path, len(attempts) + 1, None, signal.SIGTERM, save_always) == ExitCode.DONE


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_is_bit_identical_and_shown_once(name: str, killed: dict[str, Any], golden: Outcome) -> None:
    run, playing = killed[name]
    playing.result()
    assert_same(outcome(run), golden)
    assert tiny_run.shown_steps(run, "step/loss") == list(range(1, STEPS + 1))
    assert tiny_run.shown_steps(run, "validation/accuracy") == [4, 8, 12]


def test_the_newest_one_damaged_costs_steps_and_no_more(data: Path, tmp_path: Path, golden: Outcome) -> None:
    run = tiny_run.make_run(tmp_path / "run", data)
    assert in_child(attempt, run.path, 1, 10, signal.SIGTERM, False) == ExitCode.STOPPED
    weights = run.checkpoints / "g001-s00000007" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert in_child(attempt, run.path, 2, None, signal.SIGTERM, False) == ExitCode.DONE
    assert_same(outcome(run), golden)
    assert [path.name for path in run.quarantine.iterdir()] == ["g001-s00000007"]
