"""Launcher: a user's own functions as jobs here and on SLURM, their results, refusals and preemption."""

import multiprocessing
import os
import pickle
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, UncompletedJobError

from hpc import template
from hpc.errors import UserError
from hpc.functions import step
from hpc.functions.job import QueueWatcher, SlurmFunctionJob, outcome
from hpc.launch import Launcher
from hpc.settings import Launch
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

SMALL = {"cpus_per_task": 1, "mem_gb": 0.2, "timeout_min": 5}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Not there yet; its name needs quotes."""
    return tmp_path / "it's 100% $(mine)"


@pytest.fixture
def here(logs: Path) -> Launcher:
    return Launcher(logs, cluster="local", **SMALL)


def wait(condition: Callable[[], Any], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


class Saver:
    """Saved so many times, it returns; before, it waits to be stopped. Has a child, as with a data loader's worker."""

    def __init__(self, marks: Path, starts: int) -> None:
        self.marks, self.starts, self.saved = marks, starts, 0

    def __call__(self) -> int:
        number = len(list(self.marks.parent.glob(f"{self.marks.name}*"))) + 1
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        worker.start()
        self.marks.with_name(f"{self.marks.name}{number}").touch()
        while number < self.starts:
            assert worker.is_alive(), "a preempted job's workers live as long as it does"
            time.sleep(0.05)
        return self.saved

    def checkpoint(self) -> DelayedSubmission:
        self.saved += 1
        with self.marks.with_name(f"saved-{self.marks.name}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return DelayedSubmission(self)


# Here.


def test_a_function_gives_its_result_its_output_and_its_exception(here: Launcher) -> None:
    def divide(a: int, b: int) -> float:
        print("dividing", a)
        return a / b

    good, bad = here.submit(divide, 7, b=2), here.submit(divide, 7, b=0)
    assert good.result() == 3.5 and good.stdout() == "dividing 7\n" and good.state == "FINISHED"
    with pytest.raises(FailedJobError, match="ZeroDivisionError: division by zero"):
        bad.result()
    assert "in divide" in str(bad.exception()) and good.exception() is None
    again = pickle.loads(pickle.dumps(good))
    assert again.result() == 3.5 and good.submission().args == (7,)


def test_an_array_keeps_its_order_and_its_cap(here: Launcher, tmp_path: Path) -> None:
    def square(number: int, folder: Path) -> int:
        mine = folder / f"running{number}"
        mine.touch()
        seen = len(list(folder.glob("running*")))
        time.sleep(0.05)
        mine.unlink()
        (folder / f"seen{number}").write_text(str(seen))
        return number**2

    here.update_parameters(array_parallelism=2)
    jobs = here.map_array(square, range(8), [tmp_path] * 8)
    assert [job.result() for job in jobs] == [number**2 for number in range(8)]
    most = min(2, len(os.sched_getaffinity(0)))
    assert max(int(path.read_text()) for path in tmp_path.glob("seen*")) <= most
    assert [job.job_id.partition("_")[2] for job in jobs] == [str(number) for number in range(8)]


def test_a_batch_is_an_array_and_ranks_have_results_each(here: Launcher) -> None:
    def rank() -> tuple[int, int]:
        environment = submitit.JobEnvironment()
        return environment.global_rank, environment.num_tasks

    here.update_parameters(tasks_per_node=2, cpus_per_task=1)
    with here.batch():
        jobs = [here.submit(rank) for _ in range(2)]
    assert [job.results() for job in jobs] == [[(0, 2), (1, 2)]] * 2
    assert jobs[0].job_id.endswith("_0") and jobs[1].job_id.endswith("_1")


def test_at_the_time_limit_a_function_that_saves_goes_on(here: Launcher, tmp_path: Path) -> None:
    here.update_parameters(time="8s")  # told after four
    here.max_num_timeout = 1
    saver = here.submit(Saver(tmp_path / "once", 2))
    here.max_num_timeout = 0
    spent = here.submit(Saver(tmp_path / "never", 2))
    here.update_parameters(time="1s")
    plain = here.submit(time.sleep, 60)
    assert saver.result() == 1
    with pytest.raises(FailedJobError, match=r"reached its time limit too often \(max_num_timeout\)"):
        spent.result()
    with pytest.raises(FailedJobError, match="ended with exit code 137 and left no result"):
        plain.result()


def test_a_local_job_is_cancelled_running_or_waiting(here: Launcher, tmp_path: Path) -> None:
    def sleep(mark: Path) -> None:
        mark.touch()
        time.sleep(60)

    here.update_parameters(array_parallelism=1)
    running, waiting, last = here.map_array(sleep, [tmp_path / name for name in "abc"])
    wait((tmp_path / "a").exists)
    assert running.state == "RUNNING" and waiting.state == "PENDING" and not last.done()
    for job in (waiting, running, last):
        job.cancel()
    for job, words in ((running, "cancelled"), (waiting, "cancelled before it started"), (last, "cancelled before")):
        with pytest.raises(FailedJobError, match=words):
            job.result()
    assert not (tmp_path / "b").exists()


def test_a_function_that_dies_is_told_and_so_is_a_dead_controller(here: Launcher, tmp_path: Path) -> None:
    def die() -> None:
        os._exit(3)

    def sleep(mark: Path) -> None:
        mark.touch()
        time.sleep(2)

    with pytest.raises(FailedJobError, match="ended with exit code 3 and left no result"):
        here.submit(die).result()
    here.update_parameters(array_parallelism=1)
    first, second = here.map_array(sleep, [tmp_path / "a", tmp_path / "b"])
    wait((tmp_path / "a").exists)
    second._process.kill()
    with pytest.raises(UncompletedJobError, match="has not produced any output"):
        second.result()
    wait(lambda: outcome(first.paths))  # what ran already goes on to its end


# Names and refusals.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"timeout_min": 90, "mem_gb": 8, "cpus_per_task": 3}, {"time_s": 5400, "mem_gb": 8, "cpus": 3}),
        ({"gpus_per_node": 0, "tasks_per_node": 4, "cpus_per_task": 2}, {"gpus": 0, "tasks_per_node": 4, "cpus": 8}),
        ({"gpus": 0, "slurm_ntasks_per_node": 2, "slurm_time": 30}, {"tasks_per_node": 2, "time_s": 1800}),
        ({"time": "2h", "mem": "500MB", "cpus": 4, "nodes": 1}, {"time_s": 7200, "mem_gb": 0.5, "cpus": 4, "nodes": 1}),
        ({"cpus_per_task": 3, "time": "1h", "timeout_min": 2}, {"cpus": 3, "time_s": 120}),
        ({"cpus_per_task": None, "mem_gb": None}, {"cpus": 12, "mem_gb": 64, "gpus": 1}),
    ],
)
def test_submititss_names_and_ours_are_one_request(logs: Path, given: dict[str, Any], expected: dict[str, Any]) -> None:
    launcher = Launcher(logs, "cedia-a100-40gb", "local")
    launcher.update_parameters(**given)
    request = launcher._request()
    assert {key: getattr(request, key) for key in expected} == expected


@pytest.mark.parametrize("count", [0, -1])
def test_the_script_of_no_task_is_refused(logs: Path, count: int) -> None:
    with pytest.raises(UserError, match=rf"^script\({count}\): a submission has one task or more; .*$"):
        Launcher(logs, cluster="local").script(count)


def test_the_script_is_our_template_for_jobs_and_arrays(logs: Path, fake: FakeSlurm) -> None:
    launcher = Launcher(logs, "cedia-a100-40gb", slurm_partition="gpu", account="it's", name="study", timeout_min=90)
    launch = Launch(partition="gpu", account="it's", time="90min")
    for count, array in ((1, None), (5, "0-4")):
        command = launcher._submitit_command_str
        ours = template.render_function("study", launcher.instance, launch, logs, command, array)
        assert launcher.script(count) == ours
    launcher.update_parameters(array_parallelism=3)
    assert "#SBATCH --array=0-4%3\n" in launcher.script(5)
    assert left(logs) == []
    jobs = [launcher.submit(print), *launcher.map_array(print, "abc")]
    given = [job.paths.submission_file.read_text().splitlines() for job in jobs[:2]]
    for lines, count in zip(given, (1, 3), strict=True):
        (token,) = (line for line in lines if "--comment=" in line)
        assert [line for line in lines if line != token] == launcher.script(count).splitlines()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"gpu_per_node": 1}, r"gpu_per_node: no such parameter; did you mean 'gpus_per_node'"),
        ({"slurm_acount": "x"}, r"slurm_acount: no such parameter; did you mean 'account'"),
        ({"cpus_per_task": 0}, r"cpus_per_task: 0 is no whole number above zero"),
        ({"array_parallelism": "many"}, r"array_parallelism: 'many' is no whole number above zero"),
        ({"time": 90}, r"time: 90 has no unit; write time='90min', or timeout_min=90"),
        ({"timeout_min": "1h"}, r"timeout_min: '1h' is no number of minutes above zero; or write time='8h'"),
        ({"mem_gb": "much"}, r"mem: 'much' is not a size"),
        ({"nodes": 1.5}, r"nodes: .*\(got 1.5\)"),
        ({"stderr_to_stdout": True}, r"stderr_to_stdout: no such parameter"),
        ({"name": 3}, r"name: 3 is no text"),
    ],
)
def test_an_unknown_name_or_value_is_one_line(here: Launcher, parameters: dict[str, Any], words: str) -> None:
    before = dict(here.parameters)
    with pytest.raises(UserError, match=words) as caught:
        here.update_parameters(qos="high", **parameters)
    assert "\n" not in str(caught.value) and here.parameters == before


@pytest.mark.parametrize(
    ("parameters", "function", "words"),
    [
        ({"cpus": 4000}, abs, r"^cpus: 4000 cores per node asked, but laptop has \d+; ask for \d+ or less"),
        ({"time": "30d"}, abs, r"^time: 30-00:00:00 asked, but laptop ends a job after 1-00:00:00"),
        ({}, (number for number in "ab").__next__, r"cannot be pickled: cannot pickle 'generator' object"),
        ({"name": "two\nlines"}, abs, r"two\\nlines"),
    ],
)
def test_what_is_refused_leaves_no_file(
    here: Launcher, logs: Path, parameters: dict[str, Any], function: Callable[..., Any], words: str
) -> None:
    here.update_parameters(**parameters)
    for submit in (lambda: here.submit(function), lambda: here.map_array(function, [1, 2])):
        with pytest.raises(UserError, match=words):
            submit()
    assert not logs.exists()


def test_too_large_pickles_unknown_places_and_placeholders_are_refused(logs: Path, tmp_path: Path) -> None:
    launcher = Launcher(logs, cluster="local", max_pickle_size_gb=1e-4)
    with pytest.raises(UserError, match=r"0.001 GB of pickled .*\(50 x 2e-05 GB\), and max_pickle_size_gb is 0.0001"):
        launcher.map_array(len, [bytes(20_000)] * 50)
    assert not logs.exists()
    with pytest.raises(UserError, match=r"'laptob' is not known; did you mean 'laptop'"):
        Launcher(logs, "laptob")
    with pytest.raises(UserError, match=r"cluster 'slrum' is not known; did you mean 'slurm'"):
        Launcher(logs, cluster="slrum")
    with pytest.raises(UserError, match=r"%j is not filled in"):
        Launcher(tmp_path / "%j")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/logs: cannot be made"):
        Launcher(tmp_path / "file" / "logs", cluster="local").submit(abs, 1)


# sbatch's answers.


def test_sbatchs_refusal_leaves_no_file(logs: Path, fake: FakeSlurm) -> None:
    launcher = Launcher(logs)
    fake.fails("sbatch", "sbatch: error: invalid partition specified: gqu")
    for expected in (UserError, FailedSubmissionError):
        with pytest.raises(expected, match=r"^sbatch: invalid partition specified: gqu$"):
            launcher.map_array(abs, [1, 2])
    assert not logs.exists() and fake.jobs() == {}


def test_a_failed_sbatch_that_did_submit_is_found_by_its_token(logs: Path, fake: FakeSlurm) -> None:
    launcher = Launcher(logs)
    fake.fails("sbatch", "Socket timed out on send/recv operation")
    assert launcher.submit(abs, -1).job_id == "101" and fake.jobs() == {"101": "PENDING"}
    fake.fails("squeue", "Unable to contact slurm controller")
    with pytest.raises(FailedSubmissionError, match=r"Socket timed .* may have submitted all the same .*the comment"):
        launcher.submit(abs, -1)
    assert sorted(left(logs)) == ["101_submission.sh", "101_submitted.pkl"]


def test_chunks_share_the_cap(logs: Path, fake: FakeSlurm) -> None:
    fake.configure({"MaxArraySize": "4"})
    for cap, expected in ((5, ["0-3%2", "0-2%2", "0-2%1"]), (1, ["0-3%1", "0-2%1", "0-2%1"])):
        before = len(fake.calls())
        jobs = Launcher(logs, array_parallelism=cap).map_array(abs, range(10))
        arrays = list(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
        texts = "".join((logs / f"{array}_submission.sh").read_text() for array in arrays)
        assert re.findall("#SBATCH --array=(.*)", texts) == expected
        assert fake.calls()[-1] == f"scontrol release {','.join(arrays)}"
        waits = re.findall("--dependency=([^ ]*)", " ".join(fake.calls()[before:]))
        assert waits == ([] if cap == 5 else [f"afterany:{array}" for array in arrays[:2]])


def test_an_old_result_under_the_same_id_is_not_this_jobs(logs: Path, fake: FakeSlurm) -> None:
    logs.mkdir()
    (logs / "101_0_result.pkl").write_bytes(pickle.dumps(("success", "old")))
    (logs / "10_0_result.pkl").write_bytes(b"another job's")
    job = Launcher(logs).submit(abs, -1)
    assert not job.done() and (logs / "10_0_result.pkl").exists()


def test_an_error_counts_only_when_the_job_has_ended(logs: Path, fake: FakeSlurm) -> None:
    job = Launcher(logs).submit(abs, -1)
    job.paths.result_pickle.write_bytes(pickle.dumps(("error", "told to end")))
    fake.job(job.job_id, "COMPLETING")
    assert not job.done(force_check=True)
    fake.job(job.job_id, "PENDING", "BeginTime")  # requeued: it comes again
    assert not job.done(force_check=True)
    job.paths.result_pickle.write_bytes(pickle.dumps(("success", 1)))
    assert job.done() and job.result() == 1
    job.paths.result_pickle.write_bytes(pickle.dumps(("error", "told to end")))
    fake.fails("squeue", "Unable to contact slurm controller")
    assert not job.done(force_check=True), "no answer ends no job"
    (fake.folder / "squeue.fails").unlink()
    fake.job(job.job_id, "FAILED")
    with pytest.raises(FailedJobError, match="told to end"):
        job.result()


def test_a_step_knows_whether_slurm_has_decided(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(step, "_LOOKS", 2)
    for shown, known in (("COMPLETING", "COMPLETING"), ("RUNNING", "RUNNING"), ("SIGNALING", "RUNNING")):
        fake.job("7", shown)
        assert step._state() == known
    fake.fails("squeue", "Unable to contact slurm controller")
    assert step._state() is None


def test_all_jobs_are_asked_for_in_one_call(logs: Path, fake: FakeSlurm) -> None:
    jobs = Launcher(logs).map_array(abs, range(9))
    for job in jobs:
        fake.job(job.job_id, "RUNNING")
    before = len(fake.calls())
    assert not any(job.done() for job in jobs)
    assert len(fake.calls()) == before + 1 and fake.calls()[-1].startswith("squeue")
    assert isinstance(SlurmFunctionJob.watcher, QueueWatcher)


# submitit's door.


def test_autoexecutor_takes_it_when_asked_and_only_then(logs: Path, fake: FakeSlurm) -> None:
    assert submitit.AutoExecutor(logs).cluster == "slurm"
    executor = submitit.AutoExecutor(logs, cluster="hpc", hpc_cluster="local", hpc_instance="cedia-a100-40gb")
    executor.update_parameters(timeout_min=5, mem_gb=1, cpus_per_task=1, gpus_per_node=0, hpc_partition="gpu")
    inner = executor._executor
    assert isinstance(inner, Launcher) and inner._request().time_s == 300 and inner.parameters["partition"] == "gpu"
    with pytest.raises(UserError, match=r"partitoin: no such parameter; did you mean 'partition'"):
        executor.update_parameters(hpc_partitoin="gpu")
    with pytest.warns(UserWarning, match="Use 'slurm_partition' instead"):
        submitit.AutoExecutor(logs, cluster="slurm").update_parameters(partition="gpu")
    assert executor.submit(abs, -3).result() == 3


# The real cluster.


@pytest.fixture
def cluster(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    reach(slurm_cluster, monkeypatch)
    return slurm_cluster


@pytest.fixture
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with Cluster(max_array_size=8) as cluster:
        reach(cluster, monkeypatch)
        yield cluster


def reach(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, cluster.environment()[key])


@pytest.mark.slurm
def test_functions_on_the_cluster(cluster: Cluster, logs: Path) -> None:
    launcher = Launcher(logs, cluster="slurm", **SMALL)

    def tenth(number: int) -> tuple[float, str | None]:
        return 10 / number, submitit.JobEnvironment().array_task_id

    jobs = launcher.map_array(tenth, [*range(1, 40), 0])
    assert [job.result() for job in jobs[:39]] == [(10 / (number + 1), str(number)) for number in range(39)]
    with pytest.raises(FailedJobError, match="ZeroDivisionError"):
        jobs[39].result()
    alone = launcher.submit(tenth, 5)
    assert alone.result() == (2.0, None)
    assert "#SBATCH --requeue\n" in alone.paths.submission_file.read_text()
    assert "#SBATCH --array=0-39\n" in jobs[0].paths.submission_file.read_text()


@pytest.mark.slurm
def test_an_array_above_the_clusters_limit_is_cut_and_runs_under_one_cap(
    small_arrays: Cluster, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(number: int, folder: Path) -> tuple[int, int]:
        mine = folder / f"running{number}"
        mine.touch()
        time.sleep(0.3)
        count = len(list(folder.glob("running*")))
        mine.unlink()
        return number, count

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")  # as inside a task of another array
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    jobs = Launcher(logs, array_parallelism=6, **SMALL).map_array(seen, range(20), [tmp_path] * 20)
    assert len({job.job_id.partition("_")[0] for job in jobs}) == 3
    results = [job.result() for job in jobs]
    assert [number for number, _ in results] == list(range(20))
    assert max(count for _, count in results) <= 6


@pytest.mark.slurm
def test_a_preempted_function_is_run_again_and_one_that_saves_goes_on(
    cluster: Cluster, logs: Path, tmp_path: Path
) -> None:
    launcher = Launcher(logs, **SMALL)

    def attempts(folder: Path) -> int:
        number = len(list(folder.glob("attempt*")))
        (folder / f"attempt{number}").touch()
        while number == 0:
            time.sleep(0.05)
        return number

    def with_a_program(mark: Path) -> int:
        if mark.exists():
            return 1
        subprocess.run(["bash", "-c", 'touch "$0"; exec sleep 60', str(mark)], check=True)
        return 0

    jobs = [launcher.submit(attempts, tmp_path), launcher.submit(Saver(tmp_path / "start", 2))]
    launcher.update_parameters(partition="grace")
    jobs += [launcher.submit(Saver(tmp_path / "grace", 2)), launcher.submit(with_a_program, tmp_path / "program")]
    wait(lambda: all((tmp_path / name).exists() for name in ("attempt0", "start1", "grace1", "program")))
    for node in {cluster.job_field(job.job_id, "NodeList") for job in jobs}:
        cluster.preempt(node)
    for job in jobs:
        cluster.release(job.job_id)
        assert not job.done(force_check=True)
    assert [job.result() for job in jobs] == [1, 1, 1, 1]
    assert [cluster.job_field(job.job_id, "Restarts") for job in jobs] == ["1", "1", "1", "1"]
    assert [len((tmp_path / f"saved-{name}").read_text().split()) for name in ("start", "grace")] == [1, 1]


@pytest.mark.slurm
def test_a_cancelled_job_ends_at_once_and_does_not_come_back(cluster: Cluster, logs: Path, tmp_path: Path) -> None:
    job = Launcher(logs, **SMALL).submit(Saver(tmp_path / "start", 2))
    wait((tmp_path / "start1").exists)
    job.cancel()
    with pytest.raises(UncompletedJobError, match=r"has not produced any output \(state: CANCELLED\)"):
        job.result()
    assert cluster.state(job.job_id) == "CANCELLED"


@pytest.mark.slurm
def test_what_the_cluster_refuses_leaves_no_file(cluster: Cluster, logs: Path) -> None:
    launcher = Launcher(logs, partition="gqu", **SMALL)
    with pytest.raises(FailedSubmissionError, match=r"(?i)invalid partition.*gqu"):
        launcher.map_array(abs, range(3))
    assert not logs.exists()
