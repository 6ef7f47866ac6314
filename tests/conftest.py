"""Fixtures that several test files share: the real SLURM cluster, started when the first test asks for it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.preempt import STOP_SIGNALS
from tests.fakeslurm import fake, run  # noqa: F401  fixtures, for every test file that has none of its own
from tests.slurm.cluster import Cluster, obstacle, reap

UNTESTED = "submission, preemption, requeue and cancellation on a real SLURM"

SLOW_FIRST = (
    *("faults", "scenarios", "recipes", "strategies", "strategies_speed", "drill", "badnodes", "autotune", "learner"),
    *("slurm_harness", "train_tasks", "launcher", "train", "acceleration", "resume_elsewhere", "memory", "bench"),
)
"""Files that take longest. The suite's workers take file after file in this order, then the others in theirs, so that
none of them is left with a long one in the end."""
TOGETHER = ("tests/test_faults.py", "tests/test_scenarios.py")
"""Done by one worker: they share undisturbed runs, and one of them at a time is enough for the machine."""

MEASURED = "measured"
"""Property of a test: a line that is shown at the end."""


def pytest_configure() -> None:
    """A shell without job control starts what runs in its background with Ctrl-C ignored, and so would all children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "+".join(TOGETHER) if file in TOGETHER else file

    return Files(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `slurm` are skipped where no such cluster can run, and fail there under HPC_REQUIRE_SLURM=1.

    The mark's arguments are `obstacle`'s: slurm(accounting=True).
    """
    if (marker := item.get_closest_marker("slurm")) and (reason := obstacle(**marker.kwargs)):
        if os.environ.get("HPC_REQUIRE_SLURM") == "1":
            pytest.fail(f"HPC_REQUIRE_SLURM=1, but no SLURM cluster can be started here ({reason})", pytrace=False)
        pytest.skip(f"no SLURM cluster can be started here ({reason})")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs, the source of a sync; not made yet."""
    return tmp_path / "runs"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where runs are brought to; not made yet."""
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A test whose code becomes deaf to stop signals does not make the processes of later tests so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def alive() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a run's."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """The two-node cluster of tests/slurm, shared by the session; only for tests marked `slurm`."""
    reap()
    with Cluster() as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured; one loud line when those on the cluster were skipped: what is untested, the remedy."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
    for line in [text for report in reports for name, text in report.user_properties if name == MEASURED]:
        terminalreporter.write_line(str(line))
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "slurm" in report.keywords]
    if not skipped:
        return
    reason = obstacle() or skipped[0].longrepr[2]
    names = ", ".join(report.nodeid.rpartition("::")[2] for report in skipped)
    line = f"NOT TESTED: {UNTESTED} ({len(skipped)} tests skipped: {names}), because: {reason}"
    terminalreporter.write_line(line, red=True, bold=True)
