"""Preflight: each check once for any number of rows, the rows named, and what could not be looked at said."""

import copy
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc import instances, payload, preflight, yamlfile
from hpc.commands.common import report
from hpc.experiment import Experiment, validate
from hpc.preempt import ExitCode
from hpc.preflight import UNCHECKED, _payload_key
from hpc.rundir import RunDir, write_text
from tests import tiny_run
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
CEDIA = instances.find("cedia-a100-40gb")
SCRIPT = "#!/bin/bash\n#SBATCH --cpus-per-task=12 --mem=64000M --gres=gpu:a100:1 --time=60\n"


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_data(tmp_path_factory.mktemp("data"))


def experiment(data: Path | str = "scans.h5", **changed: Any) -> Experiment:
    """A changed value is named section__key."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "resnet3d_tiny"},
        "data": {"file": str(data), "batch_size": 4},
        "launch": {"instance": CEDIA.name, "time": "1h"},
    }
    for key, value in changed.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return validate(values, "test")


def rows(*changed: dict[str, Any]) -> list[Experiment]:
    return [experiment(**change) for change in changed]


def check(*experiments: Experiment, cluster: str = "slurm", payload: bool = False) -> preflight.Findings:
    return preflight.check_many(experiments, CEDIA, cluster, SCRIPT, Path("runs"), payload=payload)


@pytest.mark.parametrize(("time", "few"), [("10s", True), ("2min", True), ("3min", False)])
def test_a_time_limit_that_is_hardly_longer_than_a_start_is_allowed_with_a_warning(
    fake: FakeSlurm, time: str, few: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = check(experiment(), experiment(launch__time=time))
    assert not found.refusals and len(found.cautions) == few
    report(found)
    assert ("take care  row 1: launch.time: " in capsys.readouterr().err) == few


def test_what_tasks_and_devices_exclude_is_refused_and_one_task_in_shards_is_told() -> None:
    one = {"launch__cluster": "local", "launch__instance": "laptop"}
    two = {**one, "launch__tasks_per_node": 2, "launch__cpus": 2}
    faults = {
        "row 0: train.strategy: single runs one task, but 2 are asked for; use ddp": {"train__strategy": "single"},
        "row 1: train.sync_batchnorm: torch has it on CUDA alone; leave it out to train on the CPU": {
            "train__sync_batchnorm": True
        },
    }
    experiments = rows(*({**two, **change} for change in faults.values()), {**one, "train__strategy": "fsdp"})
    laptop = instances.find("laptop")
    found = preflight.check_many(experiments, laptop, "local", SCRIPT, Path("runs"), payload=False)
    assert found.refusals == list(faults)
    assert found.cautions == ["row 2: train.strategy: fsdp of one task is one whole process"]


def test_all_that_fits_is_told_and_the_budget_of_a_preemption_too(fake: FakeSlurm) -> None:
    found = check(experiment())
    assert found.refusals == found.warnings == found.unchecked == []
    assert found.passed[0].startswith("fits cedia-a100-40gb: 1 x (12 cores, 64 GB, 1 GPUs)")
    assert found.passed[1].startswith("partition gpu: 2 of its 2 nodes fit")
    assert found.passed[2].startswith("partition gpu: its jobs are not preempted")
    assert re.fullmatch(
        r"sbatch --test-only: accepted; it would start (at once|in about .*)", found.passed[3].strip(",")
    )


def earlier(runs: Path, name: str, model: str, *took: float) -> None:
    run = RunDir(runs / name)
    write_text(run.experiment, f"name: x\nmodel: {{name: {model}}}\n")
    for seconds in took:
        run.event("checkpoint", "rank0", 1, step=1, seconds=seconds)


@pytest.mark.parametrize(
    ("longest", "model", "told"), [(31.0, "resnet3d_tiny", True), (30.0, "resnet3d_tiny", False), (99.0, "vit", False)]
)
def test_a_notice_shorter_than_the_longest_save_of_this_model_is_told(
    fake: FakeSlurm, tmp_path: Path, longest: float, model: str, told: bool
) -> None:
    fake.configure(partitions=[{}, {"PartitionName": "high", "PriorityTier": "2", "Default": "NO"}])
    fake.configure(nodes=[{"Partitions": "gpu,high"}, {"NodeName": "node1", "Partitions": "gpu,high"}])
    earlier(tmp_path, "slow-0000aaaa", model, 3.0, longest, 2.0)
    earlier(tmp_path, "fast-0000aaaa", "resnet3d_tiny", 3.0)
    (tmp_path / "torn-0000aaaa").mkdir()
    (tmp_path / "torn-0000aaaa" / "experiment.yaml").write_text("model: [")
    found = preflight.check(experiment(), CEDIA, "slurm", SCRIPT, tmp_path, payload=False)
    words = [line for line in found.passed if "a save took" in line]
    assert len(words) == told and found.warnings == []
    if told:
        assert words[0].startswith(
            "partition gpu: a preempted job has 30 s, and a save took up to 31 s (slow-0000aaaa): what was done"
        )


def test_three_questions_to_scontrol_and_one_to_sbatch_for_any_number_of_rows(fake: FakeSlurm) -> None:
    fake.configure({"MaxArraySize": "100"})
    found = check(*rows(*({"train__seed": seed} for seed in range(200))))
    assert "200 rows are several arrays: one has 100 at most here (MaxArraySize)" in found.passed
    assert [call.split()[0] for call in fake.calls()] == ["scontrol"] * 3 + ["sbatch"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "Job 5 to start at 2001-01-01T00:00:00 using 12 processors on nodes n0 in partition gpu",
            "start at once, using",
        ),
        (
            "Job 5 to start at 2199-01-01T00:00:00 using 12 processors on nodes n0 in partition gpu",
            "at 2199-01-01 00:00",
        ),
        ("Job 5 to start at 2001-01-01T00:00:00", "accepted; it would start at once"),
        ("something else of a later version", "something else of a later version"),
    ],
)
def test_the_estimated_start_in_words(words: str, told: str) -> None:
    assert told in preflight._verdict(words)


def test_a_refusal_of_sbatch_is_one_and_while_nodes_are_away_it_is_none(fake: FakeSlurm) -> None:
    fake.fails("sbatch", "allocation failure: Requested node configuration is not available")
    words = "Requested node configuration is not available"
    assert check(experiment()).refusals == [f"sbatch --test-only: {words}"]
    fake.configure(nodes=[{"State": "IDLE+DRAIN"}])
    found = check(experiment())
    assert found.refusals == [] and found.warnings[1] == f"sbatch --test-only, now: {words}"


@pytest.mark.parametrize("harm", ["fails", "hangs"])
def test_a_controller_that_is_silent_is_unchecked_in_words_and_asked_once(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr("hpc.slurm._TIMEOUT_S", 0.3)
    if harm == "fails":
        fake.fails("scontrol", "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)")
    else:
        fake.hangs("scontrol")
    found = check(experiment())
    (words,) = found.unchecked
    assert words.startswith("partition, nodes, preemption and sbatch's verdict: scontrol")
    assert found.refusals == [] and len(fake.calls()) == 1


def test_a_local_run_asks_no_slurm(fake: FakeSlurm) -> None:
    assert check(experiment(), cluster="local").refusals == [] and fake.calls() == []
    many = instances.find("cedia-a100-40gb").model_copy(update={"nodes": 4})
    found = preflight.check(experiment(launch__nodes=2), many, "local", SCRIPT, Path("runs"), payload=False)
    assert found.refusals == ["launch.nodes: 2 asked, but a local run has 1"]


# Rows.


def test_what_is_wrong_with_some_rows_names_them(fake: FakeSlurm) -> None:
    good, long, odd = {}, {"launch__time": "30d"}, {"launch__tasks_per_node": 3, "launch__gpus": 0, "launch__cpus": 3}
    found = check(*rows(good, long, odd, odd, good, odd, long))
    assert found.refusals == [
        "rows 1, 6: launch.time: 30-00:00:00 asked, but cedia-a100-40gb ends a job after 3-00:00:00; "
        "ask for 3-00:00:00 or less",
        "rows 2-3, 5: data.batch_size 4 does not divide by 3 tasks; use a multiple of 3",
    ]
    assert check(*rows(long, long)).refusals[0].startswith("launch.time"), "of all rows none is named"
    several = check(*rows({"launch__tasks_per_node": 1}, {"launch__cpus": 6}), cluster="local").passed
    assert [line[:11] for line in several] == ["row 0: fits", "row 1: fits"]


def test_the_batch_and_its_shares_are_worded_once() -> None:
    two = experiment(train__accumulate=2)
    assert two.batch_fault(2) is None and two.batch_fault(1) is None
    told = two.batch_fault(3)
    assert told == "data.batch_size 4 does not divide by 3 tasks x train.accumulate 2; use a multiple of 6"
    assert experiment().batch_fault(3) == "data.batch_size 4 does not divide by 3 tasks; use a multiple of 3"


def test_the_payload_is_asked_once_for_all_rows_and_its_faults_name_them(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def spy(module: str, arguments: list[str], text: str) -> subprocess.CompletedProcess[str]:
        asked.append(text)
        return payload.ask(module, arguments, text)

    monkeypatch.setattr(preflight, "ask", spy)
    wrong, gone = {"model__widht": 8}, {"data__file": "/no/such.h5"}
    same = [{"train__seed": seed} for seed in range(3)]
    found = check(
        *[experiment(**{"data__file": str(data), **change}) for change in (*same, wrong, gone, wrong)],
        cluster="local",
        payload=True,
    )
    assert len(asked) == 1 and asked[0].count("\n---\n") == 2, "three that differ in what is looked at"
    assert found.refusals[0].startswith("rows 3, 5: ")
    assert "widht" in found.refusals[0] and "width" in found.refusals[0]
    assert found.refusals[1].startswith("row 4: /no/such.h5 does not exist; make one with 'hpc pack")
    assert len(found.refusals) == 2


def test_what_fits_is_told_once_for_several_experiments(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.check import report

    texts = [yamlfile.dump(experiment(data, model__width=width).as_dict()) for width in (4, 8)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("---\n".join(texts)))
    assert report("-") == ExitCode.DONE
    words = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["data", "model", "model", "memory", "not checked"]


def test_the_payloads_check_looks_at_nothing_that_the_rows_are_not_told_apart_by() -> None:
    """Rows equal in what `_payload_key` names are checked once: the check must not look at more."""
    files = (
        "check.py",
        "checked.py",
        "setup.py",
        "measured.py",
        "memory_plan.py",
        "waiting.py",
        "flops.py",
        "tasks/__init__.py",
        "tasks/options.py",
    )
    text = "".join((ROOT / "jobs" / file).read_text() for file in files)
    unchecked = {"name", *UNCHECKED["train"], *UNCHECKED["launch"]} - {"optimizer"}
    read = set(re.findall(r"(?:experiment|train|launch)\.(?:train\.|launch\.)?([a-z]\w*)", text))
    assert not read & unchecked and {"model", "loss", "accumulate", "nodes"} <= read


@pytest.mark.parametrize(
    ("section", "values", "apart"),
    [
        ("train", {"seed": 3}, False),
        ("train", {"optimizer": {"lr": 0.5}}, False),
        ("launch", {"time": "2h"}, False),
        ("train", {"optimizer": {"name": "timm:lion"}}, True),
        ("train", {"monitor": "f1_macro"}, True),
        ("train", {"stages": [{"epochs": 10, "freeze": "backbone"}]}, True),
        ("launch", {"nodes": 2}, True),
        ("data", {"batch_size": 16}, True),
    ],
)
def test_rows_are_checked_apart_where_the_check_may_answer_otherwise(
    section: str, values: dict[str, Any], apart: bool
) -> None:
    plain = experiment().as_dict()
    other = copy.deepcopy(plain)
    if "optimizer" in values:
        values = {"optimizer": plain["train"]["optimizer"] | values["optimizer"]}
    other[section] |= values
    one, two = (validate(given, "test") for given in (plain, other))
    assert (_payload_key(one) != _payload_key(two)) is apart


def test_a_missing_file_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    text = yamlfile.dump(experiment(tmp_path / "gone.h5").as_dict())
    code = "import sys; from jobs.check import report; print(report('-'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == [str(int(ExitCode.BAD_INPUT)), "False"] and "gone.h5 does not exist" in done.stderr


def test_a_payload_that_is_not_installed_or_crashes_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    monkeypatch.setenv("HPC_ROOT", str(tmp_path))
    for code, kind, words in (
        ("import nosuchmodule", "unchecked", "data file and model: No module named 'nosuchmodule' here"),
        ("def f(): raise TypeError('odd')\nf()", "refusals", "the payload's check failed: TypeError: odd; 'python -m"),
    ):
        (tmp_path / "jobs" / "check.py").write_text(code)
        (line,) = getattr(check(experiment(), cluster="local", payload=True), kind)
        assert line.startswith(words) and "\n" not in line


# On the real cluster.


@pytest.mark.slurm
def test_the_real_cluster_answers(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    found = check(experiment(launch__partition="grace"))
    assert found.refusals == [] and found.unchecked == []
    assert any("SIGTERM 13 s (GraceTime 8 + KillWait 5)" in line for line in found.passed)
    assert "accepted; it would start" in found.passed[-1]
    assert check(experiment(launch__partition="hgih")).refusals == [
        "partition 'hgih' is not on this cluster; did you mean 'high'? valid: gpu, grace, high"
    ]


@pytest.mark.slurm
def test_a_real_node_that_is_drained_delays_but_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster() as cluster:
        for key, value in cluster.environment().items():
            monkeypatch.setenv(key, value)
        for node in cluster.nodes:
            cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=fan")
        found = check(experiment())
        assert found.refusals == [] and "node0 is DRAIN (fan); node1 is DRAIN (fan)" in found.warnings[0]
