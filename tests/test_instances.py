"""Instances: what a request becomes, the sentence at each limit, and whose file counts."""

import os
from pathlib import Path
from typing import Any

import pytest

from hpc import instances
from hpc.errors import UserError
from hpc.experiment import Launch

CEDIA = instances.find("cedia-a100-40gb")
FITS = {"nodes": 4, "cpus": 12, "mem": "64GB", "gpus": 1, "time": "3d"}


def refusals(**launch: Any) -> list[str]:
    return CEDIA.check(CEDIA.request(Launch.model_validate(launch)))


def test_what_is_not_asked_for_is_what_the_instance_offers() -> None:
    request = CEDIA.request(Launch())
    assert (request.nodes, request.cpus, request.mem_gb, request.gpus) == (1, 12, 64, 1)
    assert (request.tasks_per_node, request.cpus_per_task, request.world_size) == (1, 12, 1)
    assert request.time_s == 3 * 86400
    assert CEDIA.check(request) == []


def test_cores_are_shared_out_to_the_tasks() -> None:
    request = CEDIA.request(Launch(nodes=2, gpus=0, tasks_per_node=5))
    assert (request.cpus, request.cpus_per_task, request.world_size) == (10, 2, 10)
    assert CEDIA.check(request) == []


def test_exactly_the_limit_fits() -> None:
    assert refusals(**FITS) == []


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"nodes": 5}, "launch.nodes: 5 asked, but cedia-a100-40gb has 4; ask for 4 or less"),
        (
            {"cpus": 13},
            "launch.cpus: 13 cores per node asked, but cedia-a100-40gb has 12; ask for 12 or less",
        ),
        (
            {"mem": "64.001GB"},
            "launch.mem: 64.001 GB per node asked, but cedia-a100-40gb has 64; ask for 64 or less",
        ),
        (
            {"gpus": 2, "cpus": 12},
            "launch.gpus: 2 per node asked, but cedia-a100-40gb has 1; ask for 1 or less",
        ),
        (
            {"time": 3 * 86400 + 1},
            "launch.time: 3-00:00:01 asked, but cedia-a100-40gb ends a job after 3-00:00:00; "
            "ask for 3-00:00:00 or less",
        ),
        (
            {"gpus": 0, "tasks_per_node": 5, "cpus": 12},
            "launch.cpus: 12 cores do not divide by 5 tasks per node; ask for 10",
        ),
        (
            {"tasks_per_node": 2},
            "launch.tasks_per_node: 2 asked, but each of 1 GPUs is one task; leave it out",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_just_over_a_limit_one_sentence_says_what_fits(over: dict[str, Any], sentence: str) -> None:
    assert refusals(**{**FITS, **over}) == [sentence]


def test_every_limit_is_told_at_once() -> None:
    keys = [sentence.split(":")[0] for sentence in refusals(nodes=9, cpus=99, mem="1TB", gpus=8, time="30d")]
    assert keys[:5] == ["launch.nodes", "launch.cpus", "launch.mem", "launch.gpus", "launch.time"]


def test_the_laptop_is_this_machine() -> None:
    laptop = instances.find("laptop")
    assert laptop.cpus == len(os.sched_getaffinity(0)) and laptop.gpus == 0
    assert laptop.mem_gb == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, abs=0.1)


def test_every_shipped_instance_can_be_read() -> None:
    for name in instances.names():
        assert instances.find(name).check(instances.find(name).request(Launch())) == []


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPC_INSTANCES", str(tmp_path))
    return tmp_path


def test_the_users_own_folder_comes_first(own: Path) -> None:
    (own / "cedia-a100-40gb.yaml").write_text("cpus: 3\nmem_gb: 8GB\ntime_limit: 1h\npartition: mine\n")
    (own / "site.yaml").write_text("cpus: 96\nmem_gb: 500\ngpus: 4\ntime_limit: 1d\n")
    found = instances.find("cedia-a100-40gb")
    assert (found.cpus, found.mem_gb, found.time_limit, found.partition) == (3, 8, 3600, "mine")
    assert instances.find("site").request(Launch()).cpus_per_task == 24
    assert instances.names()["laptop"].parent != own


def test_without_the_variable_the_config_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_INSTANCES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "hpc" / "instances"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("cpus: 2\nmem_gb: 4\ntime_limit: 1h\n")
    assert instances.find("site").cpus == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpus: 4\nmem_gb: 8\n", "bad.yaml: time_limit: Field required"),
        (
            "cpus: 4\nmem_gb: 8\ntime_limit: 1h\ngpu: 1\n",
            "bad.yaml: gpu: Extra inputs are not permitted; did you mean 'gpus'",
        ),
        ("cpus: none\nmem_gb: 8\ntime_limit: 1h\n", "bad.yaml: cpus: Input should be a valid integer"),
        ("cpus: 4\nmem_gb: 8\ntime_limit: soon\n", "bad.yaml: time_limit: 'soon' is not a duration"),
        ("cpus: 4\nmem_gb: 8\ntime_limit: 1h\nenvironment: {A B: x}\n", "bad.yaml: environment.A B"),
        ("cpus: 4\ncpus: 8\n", "bad.yaml, line 2: 'cpus' stands twice"),
        ("", "bad.yaml: is empty"),
    ],
)
def test_a_bad_instance_file_is_refused_by_name(text: str, words: str, own: Path) -> None:
    (own / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        instances.find("bad")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cedia", "CEDIA-a100-40gb", "../laptop", "", "laptop.yaml"])
def test_an_unknown_instance_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"is not known; .*valid: cedia-a100-40gb, laptop"):
        instances.find(name)
