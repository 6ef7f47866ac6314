"""hpc bench on a tiny experiment, what hpc plan makes of the rates, and the keys that they are kept under."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc import instances
from hpc.errors import UserError
from hpc.experiment import Experiment, load
from hpc.instances import Instance
from jobs import bench, measured, waiting
from jobs.engine import Engine
from jobs.setup import Parts, prepare
from tests import tiny_run
from tests.fakeslurm import without_slurm
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
CEDIA = "launch.instance=cedia-a100-40gb"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return tiny_run.make_run(folder / "run", tiny_run.make_data(folder)).experiment


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_slurm(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def hpc(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == code, done.stderr
    return done


def test_the_rates_of_this_machine_are_measured_kept_and_compared_by_plan(file: Path, tmp_path: Path) -> None:
    found = json.loads(hpc("bench", "all", str(file), "--seconds", "0.6", "--steps", "5", "--json").stdout)
    step, seconds = found["step"], found["step"]["step_seconds"]
    assert (found["model"], found["device"], found["batch"], found["not_kept"]) == ("resnet3d_tiny", "cpu", 4, None)
    assert 1 <= step["steps"] <= 5 and seconds["forward"] > 0 < seconds["backward"] and seconds["data"] == 0
    assert sum(seconds.values()) - seconds["step"] == pytest.approx(seconds["step"])
    assert step["flops_per_second"] > 0 and "mfu" not in step
    assert step["memory"]["peak_rss"] > step["memory"]["predicted"] > 0
    cores = len(os.sched_getaffinity(0))
    assert [row["threads"] for row in found["loader"]] == sorted({0, 1, cores})
    for row in found["loader"]:  # 8 x 8 x 8 int16
        assert row["gb_per_second"] == pytest.approx(row["samples_per_second"] * 1024 / 1e9)
    assert found["verdict"]["words"].startswith("the loader gives ")
    told = hpc("plan", str(file), "launch.cluster=local").stderr
    planned = json.loads(hpc("plan", str(file), "launch.cluster=local", "--json").stdout)["memory"]
    assert step["memory"]["planned"] == planned["peak"], "one number from both"
    line = next(line for line in told.splitlines() if "the loader gives" in line)
    assert "with data.threads=1, the model takes" in line and "(measured 20" in line
    assert ("ok" if found["verdict"]["kept_busy"] else "take care") == line.split("  ")[0]


def test_what_is_measured_elsewhere_is_shown_and_not_kept(file: Path) -> None:
    done = hpc("bench", "step", str(file), CEDIA, "launch.gpus=1", "--seconds", "0.2", "train.device=auto")
    assert "not kept for hpc plan: cedia-a100-40gb has a GPU, this machine has none" in done.stdout
    assert "forward" in done.stdout and "GB predicted of the tensors" in done.stdout
    assert not measured.folder().exists()
    assert "no/such.h5" in hpc("bench", "loader", str(file), "data.file=/no/such.h5", code=2).stderr


def test_ctrl_c_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", pressed)
    monkeypatch.setattr(sys, "argv", ["bench", "step", "--seconds", "1", "--steps", "1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text()))
    assert bench.main() == 130
    assert capsys.readouterr().err == "stopped: nothing is kept for hpc plan\n"


def make(file: Path, *overrides: str) -> tuple[Experiment, Parts]:
    experiment = load(file, [CEDIA, "train.device=auto", "train.precision=bf16", *overrides])[0]
    return experiment, prepare(experiment)


def keep(experiment: Experiment, parts: Parts, loader: float | None = None, model: float | None = None) -> None:
    if loader:
        measured.keep(measured.loader_key(experiment, parts, experiment.data.threads), loader)
    if model:
        measured.keep(measured.model_key(experiment, parts), model)


def word(file: Path, *overrides: str) -> tuple[str, str]:
    found = waiting.compare(*make(file, *overrides))
    assert found
    return found.kind, found.text


def test_plan_says_which_one_will_wait(file: Path) -> None:
    keep(*make(file), loader=410, model=120)
    kind, text = word(file)
    assert kind == "passed" and "410 samples/s with data.threads=1, the model takes 120 (measured 20" in text
    assert text.endswith(": the GPU is kept busy")
    keep(*make(file), loader=90)
    kind, text = word(file)
    assert kind == "cautions" and "the GPU will wait for data, 25 % of the time; more data.threads" in text
    keep(*make(file), loader=125)
    assert word(file)[1].endswith("kept busy, with little to spare")
    assert "takes 120 samples/s, the loader is not measured: 'srun hpc" in word(file, "data.threads=3")[1]
    assert waiting.compare(*make(file, "launch.instance=laptop")) is None, "no GPU to wait, and nothing was measured"


def test_without_a_measurement_plan_bounds_the_need_and_names_the_command(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "per_sample", lambda *_: (1.56e12,))
    kind, text = word(file)
    assert kind == "unchecked" and "nothing is measured; the model takes 20 to 100 samples/s a GPU" in text
    assert "at 10 to 50 % of 312 TFLOP/s (assumed; 1.56 TFLOP a sample)" in text
    assert text.endswith("'srun hpc bench all EXPERIMENT' in an allocation of cedia-a100-40gb measures both")
    for rate, kind, words in (
        (101, "passed", "the GPU is kept busy"),
        (19, "cautions", "the GPU will wait for data; more data.threads"),
        (50, "unchecked", "which one will wait is open; 'srun hpc bench all EXPERIMENT'"),
    ):
        keep(*make(file), loader=rate)
        assert word(file)[0] == kind and words in word(file)[1]
    keep(*make(file, "data.threads=2"), model=70)
    assert "the model takes 70 samples/s, the loader is not measured" in word(file, "data.threads=2")[1]


def test_a_rate_is_found_only_for_what_it_was_measured_of(file: Path) -> None:
    one = make(file)
    keys = [measured.loader_key(*one, 1), measured.model_key(*one)]
    for key in keys:
        measured.keep(key, 5.0)
    for override, loader, model in (
        ("train.seed=3", True, True),
        ("train.precision=fp32", True, False),
        ("model.width=8", True, False),
        ("data.augment={noise: 0.1}", False, True),
        ("data.patch=[4, 4, 4]", False, False),
        ("data.batch_size=8", False, False),
        ("launch.instance=cedia-a100-40gb-nodes", False, False),
    ):
        other = make(file, override)
        found = [measured.find(measured.loader_key(*other, 1)), measured.find(measured.model_key(*other))]
        assert [bool(one) for one in found] == [loader, model], override
    for path in measured.folder().iterdir():
        path.write_text("{")
    assert measured.find(keys[0]) is None


def test_one_process_of_several_is_measured_with_its_share(file: Path) -> None:
    experiment = make(file, "train.deterministic=layout", "data.batch_size=8", "data.stage=node")[0]
    alone = bench.one_process(experiment, 2)
    assert (alone.data.batch_size, alone.data.stage, alone.train.virtual_ranks) == (4, "none", 2)
    assert (alone.train.strategy, alone.launch.nodes) == ("single", 1)
    with pytest.raises(UserError, match="does not divide by 3 tasks"):
        bench.one_process(experiment, 3)


def test_a_verdict_names_the_threads_that_help() -> None:
    rows = [{"threads": threads, "samples_per_second": 10.0 * threads} for threads in (0, 2, 8)]
    found: dict[str, Any] = {"loader": rows, "step": {"samples_per_second": 40.0}, "device": "NVIDIA A100"}
    said = bench._verdict(found, threads=2)
    assert not said["kept_busy"] and said["words"].endswith(
        "the GPU will wait for data, 50 % of the time; data.threads=8 gives 80"
    )
    assert bench._verdict(found, threads=8)["kept_busy"]
    found["step"]["samples_per_second"] = 400.0
    assert "with cores for them" in bench._verdict(found, threads=8)["words"]


def test_peaks_of_a_gpu_are_read_from_the_instance(tmp_path: Path) -> None:
    for name in ("cedia-a100-40gb", "cedia-a100-40gb-x8"):
        found = instances.find(name)
        assert found.gpu_tflops and found.gpu_bandwidth_gb_s == 1555
        peaks = {precision: found.gpu_tflops.of(precision) for precision in ("fp32", "tf32", "bf16", "fp16", "auto")}
        assert peaks == {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312, "auto": None}
    cpu = instances.find("cedia-cpu")
    assert cpu.gpu_tflops is None and cpu.gpu_bandwidth_gb_s is None
    file = tmp_path / "mine.yaml"
    file.write_text("cpus: 4\nmem_gb: 8\ntime_limit: 1h\ngpu_tflops: {bf61: 3}\n")
    with pytest.raises(UserError, match=r"gpu_tflops\.bf61.*bf16"):
        instances.read(file)


def test_rates_of_another_machine_say_nothing_of_the_instance(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make(file)[0]
    engine: Any = type("E", (), {"device": torch.device("cuda"), "allocation": type("A", (), {"job_id": ""})})
    assert bench._foreign(experiment, engine) == "this is no allocation of cedia-a100-40gb"
    engine.allocation.job_id = "7"
    assert bench._foreign(experiment, engine) is None
    engine.device = torch.device("cpu")
    assert bench._foreign(experiment, engine) == "cedia-a100-40gb has a GPU, this machine has none"
    assert isinstance(instances.find("laptop"), Instance) and Engine


@pytest.mark.slurm
def test_one_of_two_tasks_of_an_allocation_measures(file: Path, slurm_cluster: Cluster) -> None:
    """As the help says it: srun hpc bench."""
    words = ["bench", "step", file, "--seconds", "0.3", "--steps", "3", "--json"]
    done = slurm_cluster.run("srun", "--ntasks=2", sys.executable, "-m", "hpc.cli", *words, cwd=ROOT)
    found = json.loads(done.stdout)  # of one alone
    assert found["step"]["steps"] >= 1 and found["not_kept"] is None and "Traceback" not in done.stderr
