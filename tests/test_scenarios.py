"""Runs the table of tests/scenarios.py, a few rows at a time; each row is a test of its own."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.playing import Playing, Row
from tests.scenarios import ROWS
from tests.slurm.cluster import obstacle, reap
from tests.stage import UNDISTURBED, played, undisturbed

AT_A_TIME = 3
SOAK = os.environ.get("HPC_SOAK") == "1"
PLAYED = [row for row in ROWS if SOAK or not row.soak]


@pytest.fixture(scope="session")
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Playing]"]]:
    """Every row of this session, started; a row's test waits for its own."""
    base = tmp_path_factory.mktemp("scenarios")
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    asked = [item for item in items if item.path == Path(__file__)]
    wanted = {item.callspec.id for item in asked if "stage" in item.fixturenames}
    reap()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        started = {name: pool.submit(undisturbed, name) for name in UNDISTURBED if name in wanted}
        for row in PLAYED:
            if row.name in wanted and (row.cluster is None or not obstacle()):
                started[row.name] = pool.submit(played, row, base / row.name)
        yield started
        pool.shutdown(cancel_futures=True)


def mark(row: Row) -> object:
    return pytest.param(row, id=row.name, marks=[pytest.mark.slurm] if row.cluster is not None else [])


@pytest.mark.parametrize("row", [mark(row) for row in PLAYED])
def test_scenario(row: Row, stage: dict[str, "Future[Playing]"]) -> None:
    print(stage[row.name].result().block())


@pytest.mark.parametrize("name", [name for name, row in UNDISTURBED.items() if SOAK or not row.soak])
def test_undisturbed(name: str, stage: dict[str, "Future[Playing]"]) -> None:
    print(stage[name].result().block())
