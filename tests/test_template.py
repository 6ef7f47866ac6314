"""The batch script: what SLURM reads in it, its quoting run by a real bash, what it refuses; plan and submit agree."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc import plan, template
from hpc.errors import UserError
from hpc.experiment import load
from hpc.instances import Instance
from hpc.rundir import RunDir
from hpc.settings import Launch
from hpc.sweepdir import Chunk
from tests.batchtext import CEDIA, DEAF, PYTHON, STUB, experiment, options, played, render, rows_of
from tests.slurm.cluster import Cluster

GOLDEN = Path(__file__).parent / "golden" / "job.sbatch"
ODD = [
    "with space",
    "it's",
    'double "quote"',
    "100%j",
    "a#b # c",
    "$(touch canary)",
    "`touch canary`",
    "${HOME}$HOME",
    "semi;touch canary&",
    "back\\slash",
    "star*?[a]",
    "-rf",
    "ünïcode",
    "!history",
    "~",
]
TAIL = '[ "$2" != hpc.requeue ] || echo end 0\n'


def test_what_slurm_reads() -> None:
    read = options(GOLDEN.read_text())
    assert read["requeue"] == "" and read["open-mode"] == "append"
    assert read["signal"] == "USR2@120", "no B: the tasks are told, not the batch shell"
    assert read["gres"] == "gpu:a100:1" and read["mem"] == "60000M" and read["time"] == "480:00"
    assert read["comment"] == "golden-0123abcd", "the token by which a failed sbatch is looked up"
    assert read["output"] == "/scratch/ana/runs/golden-0123abcd/logs/%j_0_log.out"


def test_every_line_for_sbatch_stands_before_the_first_command() -> None:
    lines = GOLDEN.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    assert lines[0] == "#!/usr/bin/env bash"


def test_options_that_nobody_set_are_not_there() -> None:
    read = options(render(experiment(gpus=0, tasks_per_node=2), Path("/r/x-1")))
    assert not {"gres", "partition", "account", "qos", "reservation", "constraint", "mail-user", "mail-type"} & set(
        read
    )
    assert read["ntasks-per-node"] == "2" and read["cpus-per-task"] == "6"


@pytest.mark.parametrize(("time", "notice"), [("8h", 120), ("240s", 120), ("60s", 30), ("1s", 0)])
def test_the_notice_leaves_half_of_a_short_limit(time: str, notice: int) -> None:
    script = render(experiment(time=time), Path("/r/x-1"))
    assert options(script)["signal"] == f"USR2@{notice}" and f"--notice {notice} " in script


@pytest.mark.parametrize("odd", ODD)
def test_bash_takes_every_path_as_it_is(odd: str, tmp_path: Path) -> None:
    here = tmp_path / "cwd"
    python = tmp_path / odd / "python"
    run = tmp_path / odd.replace("\\", "") / "runs" / "x-1"
    for folder in (here, run, python.parent):
        folder.mkdir(parents=True, exist_ok=True)
    python.write_text(STUB)
    python.chmod(0o755)
    script = render(experiment(account=odd, constraint=odd), run, str(python))
    calls = played(script, here)
    assert calls[0] == ["-m", "hpc.attempt", str(run)]
    assert calls[1][:2] == ["-m", "hpc.localstep"]
    assert calls[1][calls[1].index("--") + 1 :] == [*DEAF, str(python), "-u", "-m", "jobs.run", str(run)]
    assert calls[2] == ["-m", "hpc.requeue", str(run), "7", "0", "0"]
    assert not list(tmp_path.rglob("canary"))
    read = options(script)
    assert read["account"] == odd and read["constraint"] == odd
    assert read["output"] == str(run).replace("%", "%%") + "/logs/%j_0_log.out"


@pytest.mark.parametrize("odd", ODD)
def test_srun_is_given_every_path_as_it_is(odd: str, tmp_path: Path) -> None:
    programs, run, here = tmp_path / "programs", tmp_path / odd.replace("\\", "") / "x-1", tmp_path / "cwd"
    for folder in (programs, run, here):
        folder.mkdir(parents=True)
    for name in ("python", "srun"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    calls = played(render(experiment(), run, str(programs / "python")), here, SLURM_JOB_ID="5", PATH=path)
    srun = calls[1]
    slurms = str(run).replace("%", "%%")
    assert f"--output={slurms}/logs/%j_%t_log.out" in srun and f"--error={slurms}/logs/%j_%t_log.err" in srun
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=12", "--open-mode=append"} <= set(srun)
    assert srun[-9:] == [*DEAF, str(programs / "python"), "-u", "-m", "jobs.run", str(run)]
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("odd", ODD)
def test_a_task_of_an_array_is_the_run_of_its_row(odd: str, tmp_path: Path) -> None:
    here, python = tmp_path / "cwd", tmp_path / odd / "python"
    sweep = rows_of(tmp_path / odd.replace("\\", "") / "sweep", 12)
    here.mkdir()
    python.parent.mkdir(exist_ok=True)
    python.write_text(STUB)
    python.chmod(0o755)
    script = template.render_array([experiment()], CEDIA, sweep, Chunk(1, 8, 4, 2), str(python))
    read = options(script)
    assert read["array"] == "0-3%2" and read["comment"] == "sweep/1" and "error" not in read
    assert read["output"] == str(sweep.path).replace("%", "%%") + "/logs/%A_%a_log.out"
    for task, row in (("0", "row-8"), ("03", "row-11")):
        calls = played(script, here, HPC_STEP="local", HPC_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_ID="1")
        run = str(sweep.path / row)
        assert calls[0] == ["-m", "hpc.attempt", run] and calls[1][-1] == run and calls[2][2] == run
        (here / "record").unlink()
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("task", ["4", "99", "", "-1", "1x", "a[$(touch canary)]"])
def test_a_task_without_a_row_is_bad_input_in_one_line(task: str, tmp_path: Path) -> None:
    script = template.render_array([experiment()], CEDIA, rows_of(tmp_path / "sweep", 12), Chunk(1, 8, 4), PYTHON)
    (tmp_path / "job.sbatch").write_text(script)
    environ = {**os.environ, "HPC_STEP": "local", "HPC_ARRAY_TASK_ID": task}
    done = subprocess.run(
        ["bash", "job.sbatch"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"array task '{task}': no row in {tmp_path}/sweep/rows.txt\n"
    assert not (tmp_path / "canary").exists()


@pytest.mark.slurm
def test_sbatch_itself_reads_every_value_as_it_is(slurm_cluster: Cluster, tmp_path: Path) -> None:
    launch = Launch(cpus=1, mem=0.1, gpus=0, time=60)
    values = [*ODD, "\\", "'\\'", '\\"', "a\\nb"]
    for odd in values:
        script = tmp_path / "job.sbatch"
        script.write_text(template.render_function(odd, CEDIA, launch, tmp_path, "true", None, comment=odd))
        slurm_cluster.submit("--hold", script)
    told = slurm_cluster.run("squeue", "--noheader", "--format=%i|%j|%k").stdout.splitlines()
    jobs = {line.split("|")[0]: line.split("|")[1:] for line in told}
    slurm_cluster.run("scancel", *jobs)
    assert sorted(jobs.values()) == sorted([odd, odd] for odd in values)


@pytest.mark.slurm
def test_each_node_has_its_own_scratch_folder(slurm_cluster: Cluster, tmp_path: Path) -> None:
    run, python = RunDir(tmp_path / "x-1"), tmp_path / "python"
    run.logs.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" != jobs.run ] && [ "$3" != jobs.run ] || echo "$HPC_SCRATCH"\n{TAIL}')
    python.chmod(0o755)
    given = experiment(cpus=1, mem="100MB", time="5min", gpus=0, nodes=2)
    script = tmp_path / "job.sbatch"
    script.write_text(render(given, run.path, str(python), CEDIA.model_copy(update={"scratch": "/s/$SLURMD_NODENAME"})))
    job = slurm_cluster.submit(script, cwd=tmp_path)
    slurm_cluster.wait_state(job, "COMPLETED")
    told = [run.output(job, task).read_text() for task in ("0", "1")]
    assert told == ["/s/node0\n", "/s/node1\n"]


@pytest.mark.slurm
def test_the_ranks_start_where_sbatch_exports_nothing(slurm_cluster: Cluster, tmp_path: Path) -> None:
    run, python = RunDir(tmp_path / "x-1"), tmp_path / "python"
    run.logs.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$3" != jobs.run ] || echo "$HPC_GPUS $ODD"\n{TAIL}')
    python.chmod(0o755)
    nothing = CEDIA.model_copy(update={"sbatch": {"export": "NONE"}, "environment": {"ODD": "1"}})
    given = experiment(cpus=1, mem="100MB", time="5min", gpus=0)
    script = tmp_path / "job.sbatch"
    script.write_text(render(given, run.path, str(python), nothing))
    function = tmp_path / "function.sbatch"
    launch = Launch(cpus=1, mem=0.1, gpus=0, time=60)
    command = "sh -c 'echo \"$HPC_GPUS $ODD\"'"
    function.write_text(template.render_function("f", nothing, launch, tmp_path, command, None))
    jobs = [slurm_cluster.submit(path, cwd=tmp_path) for path in (script, function)]
    for job in jobs:
        slurm_cluster.wait_state(job, "COMPLETED")
    written = [run.output(jobs[0], "0"), tmp_path / f"{jobs[1]}_0_log.out"]
    assert [path.read_text() for path in written] == ["0 1\n"] * 2


@pytest.mark.slurm
def test_each_task_of_an_array_writes_to_the_logs_of_its_row(slurm_cluster: Cluster, tmp_path: Path) -> None:
    sweep = rows_of(tmp_path / "50% of it's $(touch canary)", 5)
    sweep.logs.mkdir()
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\ncase "$2" in hpc.attempt) echo export HPC_GENERATION=7;; hpc.requeue) echo tail $3 >&2;;'
        ' *) echo "rank $*";; esac\n'
    )
    python.chmod(0o755)
    given = experiment(cpus=1, mem="100MB", time="5min", gpus=0)
    script = tmp_path / "job.sbatch"
    script.write_text(template.render_array([given], CEDIA, sweep, Chunk(0, 2, 3), str(python)))
    job = slurm_cluster.submit(script, cwd=tmp_path)
    rows = [sweep.path / f"row-{number}" for number in (2, 3, 4)]
    written = [RunDir(row).output(f"{job}_{task}", "0", "err") for task, row in enumerate(rows)]
    slurm_cluster.wait_for(lambda: all(path.exists() and "tail" in path.read_text() for path in written), 30, "rows")
    for err, row in zip(written, rows, strict=True):
        assert err.read_text() == f"tail {row}\n"
        assert err.with_suffix(".out").read_text() == f"rank -u -m jobs.run {row}\n"
    assert not list(tmp_path.rglob("canary"))
    assert [path.read_text() for path in sweep.logs.iterdir()] == [""] * 3


@pytest.mark.parametrize("key", ["account", "partition", "qos", "reservation", "constraint", "mail"])
@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\tb", "x\n#SBATCH --wrap=id", "\x1b[1m", "a\x7f"])
def test_control_characters_are_refused_by_the_name_of_their_option(key: str, bad: str) -> None:
    with pytest.raises(UserError, match=r"#SBATCH --[a-z-]+: .* carries a line break or control character"):
        render(experiment(**{key: bad}), Path("/r/x-1"))


def test_a_runs_folder_with_a_backslash_is_refused() -> None:
    with pytest.raises(UserError, match=r"--output: '.*' has a backslash, after which SLURM fills in no job id"):
        render(experiment(), Path("/r/back\\slash/x-1"))


def test_a_runs_folder_with_a_line_break_is_refused() -> None:
    with pytest.raises(UserError, match=r"--output: .* carries a line break"):
        render(experiment(), Path("/r\n#SBATCH --wrap=id/x-1"))


def test_the_instances_environment_and_prologue_reach_the_tasks(tmp_path: Path) -> None:
    instance = Instance(
        name="site",
        cpus=2,
        mem_gb=4,
        time_limit=3600,
        environment={"ODD": "a 'b' $(touch canary) `id`\nsecond", "HTTPS_PROXY": "http://p:3128"},
        prologue=["greeting=$(echo hello)", 'export GREETING="$greeting world"'],
    )
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s" "$ODD|$HTTPS_PROXY|$GREETING|$OMP_NUM_THREADS" > "$RECORD"\nexit 3\n'
    )
    python.chmod(0o755)
    script = render(experiment(instance="laptop", gpus=0, tasks_per_node=1), tmp_path / "x-1", str(python), instance)
    (tmp_path / "job.sbatch").write_text(script)
    environ = {**os.environ, "RECORD": str(tmp_path / "record")}
    done = subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=environ, check=False)
    assert done.returncode == 3, "an attempt that is refused ends the script with its code"
    told = (tmp_path / "record").read_text()
    assert told == "a 'b' $(touch canary) `id`\nsecond|http://p:3128|hello world|2"
    assert not (tmp_path / "canary").exists()


SITE = {
    "name": "site",
    "cpus": 2,
    "mem_gb": 4,
    "time_limit": 3600,
    "modules": ["cuda/12.4"],
    "venv": "$SITE/my venv",
    "scratch": "$SITE/scratch",
    "scratch_gb": 2.5,
    "prologue": ["set -euo pipefail", 'said="$LOADED $ACTIVE $HPC_SCRATCH $HPC_SCRATCH_GB"'],
    "epilogue": ['echo "$said, then $code" > "$SITE/said"', "set -e", "false", "exit 9"],
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's files: modules of which only cuda/12.4 is there, and a venv."""
    init, venv = tmp_path / "modules" / "init" / "bash", tmp_path / "my venv" / "bin"
    for folder in (init.parent, venv):
        folder.mkdir(parents=True)
    init.write_text('module() { [ "$2" = cuda/12.4 ] && LOADED=$2; }\n')
    (venv / "activate").write_text("ACTIVE=venv\n")
    (tmp_path / "python").write_text(STUB.replace("#!/bin/sh\n", '#!/bin/sh\n[ "$2" != hpc.localstep ] || exit 3\n'))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def at_the_site(site: Path, given: Instance) -> subprocess.CompletedProcess[str]:
    (site / "job.sbatch").write_text(render(experiment(), site / "x-1", str(site / "python"), given))
    environ = {"PATH": os.environ["PATH"], "MODULESHOME": str(site / "modules"), "SITE": str(site)}
    environ["RECORD"] = str(site / "record")
    return subprocess.run(["bash", "job.sbatch"], cwd=site, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["USR2", "TERM", "INT"])
def test_a_signal_while_the_tail_works_is_sent_to_nobody(tmp_path: Path, name: str) -> None:
    """The step is gone: its number may be another process's by now."""
    python = tmp_path / "python"
    answer = 'echo "end $5"'
    python.write_text(STUB.replace(answer, f"{{ kill -{name} $PPID; {answer}; }}"))
    python.chmod(0o755)
    calls = played(render(experiment(), tmp_path / "x-1", str(python)), tmp_path)  # says nothing on stderr
    assert [call[1] for call in calls] == ["hpc.attempt", "hpc.localstep", "hpc.requeue"]


def test_a_sites_sections_come_in_order_and_the_tail_runs_whatever_they_do(site: Path) -> None:
    done = at_the_site(site, Instance.model_validate(SITE))
    assert (done.returncode, done.stderr) == (3, ""), "the step's code, not the epilogue's"
    assert (site / "said").read_text() == f"cuda/12.4 venv {site}/scratch 2.5, then 3\n"
    assert (site / "record").read_text().split("\1")[-2].split("\0")[:5] == [
        "-m",
        "hpc.requeue",
        f"{site}/x-1",
        "7",
        "3",
    ]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"modules": ["cuda/12.4", "gcc/99"]}, 2, "modules: gcc/99 cannot be loaded here; see 'module avail'"),
        ({"venv": "/none"}, 2, "/none/bin/activate: No such file or directory"),
        ({"scratch": "$NOWHERE/x"}, None, "NOWHERE: is not set on this node"),
    ],
)
def test_a_section_that_fails_ends_the_job_with_one_line_before_the_attempt(
    change: dict[str, Any], code: int | None, words: str, site: Path
) -> None:
    done = at_the_site(site, Instance.model_validate({**SITE, **change}))
    assert done.returncode == code or (code is None and done.returncode)
    assert done.stderr.rstrip().endswith(words) and done.stderr.count("\n") == 1
    assert not (site / "record").exists()


@pytest.mark.parametrize(("lines", "code"), [(["exit 3"], 3), (["exit"], 0), (["set -eu", "false"], 1)])
def test_a_prologue_that_ends_the_script_says_so_and_keeps_its_code(lines: list[str], code: int, site: Path) -> None:
    done = at_the_site(site, Instance.model_validate({**SITE, "name": "it's $(touch canary)", "prologue": lines}))
    words = "the prologue of instance it's $(touch canary) ended the script before the attempt, with code"
    assert (done.returncode, done.stderr) == (code, f"{words} {code}\n")
    assert not (site / "record").exists() and not (site / "canary").exists()


def test_a_trap_of_the_prologue_is_the_users_own(site: Path) -> None:
    given = Instance.model_validate({**SITE, "prologue": ["trap 'echo cleared >&2' EXIT"]})
    done = at_the_site(site, given)
    assert (done.returncode, done.stderr) == (3, "cleared\n")


def test_a_pyxis_container_ends_a_local_run_with_one_line(site: Path) -> None:
    given = Instance.model_validate({**SITE, "venv": None, "container": {"engine": "pyxis", "image": "x"}})
    done = at_the_site(site, given)
    assert done.returncode == 2 and done.stderr == f"{given.local_obstacle}\n"
    assert not (site / "record").exists()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "exp.yaml"
    path.write_text("name: same\nmodel: {name: m}\ndata: {file: x.h5}\nlaunch: {instance: cedia-a100-40gb}\n")
    return path


def test_plan_and_submit_render_the_same_bytes_and_an_equal_run_gets_its_own_id(file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    planned, again = (plan.make(file, ["train.seed=1"], runs) for _ in range(2))
    assert planned.script == again.script and planned.run.path == again.run.path
    first = plan.create(planned)
    assert first.path == planned.run.path and first.script.read_text() == planned.script
    assert load(first.experiment)[0] == planned.experiment
    second = plan.create(plan.make(file, ["train.seed=1"], runs))
    assert second.path != first.path and second.experiment.read_text() == first.experiment.read_text()
    other = plan.make(file, ["train.seed=2"], runs)
    assert other.run.path not in (first.path, second.path)
    assert sorted(path.name for path in runs.iterdir()) == sorted([first.name, second.name])


def test_two_submissions_at_once_make_one_run_and_one_refusal(file: Path, tmp_path: Path) -> None:
    planned, late = (plan.make(file, [], tmp_path / "runs") for _ in range(2))
    run = plan.create(planned)
    with pytest.raises(UserError, match="made by another command just now"):
        plan.create(late)
    assert [path.name for path in run.path.parent.iterdir()] == [run.name]


def test_a_runs_folder_that_cannot_be_made_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"no folder for runs can be made .* --runs or HPC_RUNS"):
        plan.create(plan.make(file, [], file / "runs"))
