"""Instances: what a request becomes, the sentence at each limit, and whose file counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc import instances
from hpc.errors import UserError
from hpc.settings import Launch

CEDIA = instances.find("cedia-a100-40gb-nodes")
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
        ({"nodes": 5}, "launch.nodes: 5 asked, but cedia-a100-40gb-nodes has 4; ask for 4 or less"),
        (
            {"cpus": 13},
            "launch.cpus: 13 cores per node asked, but cedia-a100-40gb-nodes has 12; ask for 12 or less",
        ),
        (
            {"mem": "64.001GB"},
            "launch.mem: 64.001 GB per node asked, but cedia-a100-40gb-nodes has 64; ask for 64 or less",
        ),
        (
            {"gpus": 2, "cpus": 12},
            "launch.gpus: 2 per node asked, but cedia-a100-40gb-nodes has 1; ask for 1 or less",
        ),
        (
            {"time": 3 * 86400 + 1},
            "launch.time: 3-00:00:01 asked, but cedia-a100-40gb-nodes ends a job after 3-00:00:00; "
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


@pytest.mark.parametrize(("name", "gpus"), [("", 1), ("-nodes", 1), ("-x2", 2), ("-x4", 4), ("-x8", 8)])
def test_each_a100_comes_with_its_cores_and_memory(name: str, gpus: int) -> None:
    one, found = instances.find("cedia-a100-40gb"), instances.find(f"cedia-a100-40gb{name}")
    assert (found.cpus, found.mem_gb, found.gpus) == (12 * gpus, 64 * gpus, gpus)
    same = ("gpu_type", "gpu_mem_gb", "time_limit", "partition")
    assert all(getattr(found, key) == getattr(one, key) for key in same)
    assert found.request(Launch()).cpus_per_task == 12


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


def test_a_base_gives_what_the_file_leaves_out(own: Path) -> None:
    (own / "site.yaml").write_text("base: cedia-a100-40gb\npartition: gpu\n")
    (own / "more.yaml").write_text("base: site\nnodes: 9\n")
    found = instances.find("more")
    assert (found.name, found.nodes, found.partition, found.cpus, found.gpu_type) == ("more", 9, "gpu", 12, "a100")


def test_an_own_file_may_stand_on_the_shipped_one_of_its_name(own: Path) -> None:
    (own / "laptop.yaml").write_text("base: laptop\ntime_limit: 2h\n")
    assert instances.find("laptop").time_limit == 7200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: cedia-a100", r"'cedia-a100' is not known; did you mean 'cedia-a100-40gb'"),
        ("base: b", "'b' is not known"),
    ],
)
def test_an_unknown_base_and_a_circle_are_refused(text: str, words: str, own: Path) -> None:
    (own / "a.yaml").write_text(text)
    (own / "b.yaml").write_text("base: a")
    with pytest.raises(UserError, match=words):
        instances.find("b")


def test_a_base_may_say_its_own_name(own: Path) -> None:
    (own / "a.yaml").write_text("name: a\nbase: laptop\n")
    (own / "b.yaml").write_text("base: a\n")
    assert (instances.find("a").name, instances.find("b").name) == ("a", "b")


def listed(own: Path, *options: str, columns: int = 200) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HPC_INSTANCES": str(own), "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "hpc.cli", "instances", *options]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_a_faulty_file_hides_no_other(own: Path) -> None:
    (own / "good.yaml").write_text("base: laptop\ngpus: 2\ntemplate: mine.sbatch.j2\n")
    (own / "bad.yaml").write_text("cpus: 4\nmem_gb: 8\ntime_limit: soon\n")
    (own / "worse.yaml").write_text("[\n")
    shown = listed(own)
    names = [line.split()[0] for line in shown.stdout.splitlines()[1:]]
    assert {"good", "laptop"} <= set(names) and not {"bad", "worse"} & set(names)
    assert " 2 x GPU " in shown.stdout
    faults = shown.stderr.splitlines()
    assert faults[0].startswith(f"{own}/bad.yaml: time_limit: 'soon' is not a duration")
    assert faults[1].startswith(f"{own}/worse.yaml, line 2: ") and len(faults) == 2 and shown.returncode == 1
    told = listed(own, "--json")
    assert [one["name"] for one in json.loads(told.stdout)] == names
    assert (told.stderr, told.returncode) == (shown.stderr, 1)


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_a_narrow_terminal_shows_whole_names_in_one_line_each(columns: int, own: Path) -> None:
    (own / "b.yaml").write_text(f"base: laptop\ndescription: {'long ' * 50}\n")
    lines = listed(own, columns=columns).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(instances.names())
    assert all(len(line) <= columns for line in lines)
    assert any("1 x a100 40 GB" in line for line in lines)


def test_a_template_is_looked_for_beside_its_instance(own: Path) -> None:
    (own / "a.yaml").write_text("base: laptop\ntemplate: mine.sbatch.j2\n")
    (own / "b.yaml").write_text("base: a\ntemplate: /etc/mine.j2\n")
    assert instances.find("a").template == own / "mine.sbatch.j2"
    assert instances.find("b").template == Path("/etc/mine.j2")


SECTIONS = [
    ("sbatch: {mem: 4G}", "sbatch: mem is set by launch.mem, not here"),
    ("sbatch: {output: x}", "sbatch: output is set by hpc itself"),
    ("sbatch: {exclusiv: }", "sbatch: --exclusiv is no option of sbatch; did you mean 'exclusive'"),
    ("sbatch: {--exclusive: }", "sbatch: ----exclusive is no option of sbatch; did you mean 'exclusive'"),
    ("sbatch: {wrap: id}", "sbatch: --wrap is no option of sbatch"),
    ('sbatch: {licenses: "a\\nb"}', "sbatch.licenses: 'a\\nb' carries a line break or control character"),
    ("sbatch: {licenses: [a]}", "sbatch.licenses: ['a'] is no value of an option"),
    ("venv: relative/venv", "venv: 'relative/venv' must start with '/', '~' or a variable"),
    ('venv: "/a\\nb"', "carries a line break"),
    ('modules: ["-a"]', "modules.0: String should match pattern"),
    ("scratch_gb: 5", "scratch_gb has no effect without scratch"),
    ("container: {engine: docker, image: x}", "container.engine: Input should be 'apptainer' or 'pyxis'"),
    ("container: {engine: pyxis}", "container.image: Field required"),
    ("container: {engine: pyxis, image: x, mount: []}", "container.mount: Extra inputs are not permitted; did you"),
    ("container: {engine: pyxis, image: x}\nvenv: /v", "venv has no effect with a container"),
    ("environment: {run: /etc}", "environment: run is a variable of the batch script itself; choose another name"),
    ("environment: {HPC_STEP: local}", "environment: HPC_STEP is set by hpc itself; leave it out"),
    ("environment: {SLURM_NTASKS: 3}", "environment: SLURM_NTASKS is set by SLURM itself; leave it out"),
    ("environment: {PYTHONPATH: /x}", "environment: PYTHONPATH leads to the run's own copy of the code"),
    ("environment: {A: yes}", "environment.A: True is no text; put quotes around yes, no, on"),
    ("environment: {A: [1]}", "environment.A: Input should be a valid string"),
    ("setup: []", "setup: Extra inputs are not permitted"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), SECTIONS)
def test_a_section_that_cannot_be_heard_is_refused_by_name(text: str, words: str, own: Path) -> None:
    (own / "bad.yaml").write_text(f"base: laptop\n{text}\n")
    with pytest.raises(UserError) as caught:
        instances.find("bad")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_are_the_text_of_a_variable(own: Path) -> None:
    (own / "a.yaml").write_text("base: laptop\nenvironment: {OMP_NUM_THREADS: 4, RATE: 0.5, NAME: run}\n")
    assert instances.find("a").environment == {"OMP_NUM_THREADS": "4", "RATE": "0.5", "NAME": "run"}


def test_paths_of_a_site_may_begin_at_home_or_at_a_variable(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    (own / "a.yaml").write_text("base: laptop\nvenv: ~/venvs/x\nscratch: $TMPDIR/job\n")
    found = instances.find("a")
    assert (found.venv, found.scratch) == ("/home/ana/venvs/x", "$TMPDIR/job")


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
        ("base: laptop\nname: good\n", "bad.yaml: name: an instance is called as its file, 'bad', not 'good'"),
    ],
)
def test_a_bad_instance_file_is_refused_by_name(text: str, words: str, own: Path) -> None:
    (own / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        instances.find("bad")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cedia", "CEDIA-a100-40gb", "../laptop", "", "laptop.yaml"])
def test_an_unknown_instance_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"is not known; .*valid: cedia-a100-40gb, cedia-a100-40gb-nodes, .*, laptop"):
        instances.find(name)
