"""The list of bad nodes: a day long, one per cluster, written by many at once, and met on a real cluster."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from hpc import badnodes
from tests.fakeslurm import FakeSlurm


def entry(**values: object) -> dict[str, object]:
    return {"node": "node0", "cluster": "fake", "reason": "broken", "run": "exp", "until": time.time() + 60, **values}


def test_a_node_is_kept_for_a_day(tmp_path: Path, fake: FakeSlurm) -> None:
    badnodes.remember(tmp_path, "fake", "exp-1", {"node0": "GPU 0 is lost"})
    (told,) = json.loads(badnodes.file(tmp_path).read_text())["nodes"]
    assert {"node": "node0", "cluster": "fake", "reason": "GPU 0 is lost", "run": "exp-1"}.items() <= told.items()
    assert told["until"] - time.time() == pytest.approx(24 * 3600, abs=60)
    assert badnodes.current(tmp_path) == {"node0": "GPU 0 is lost"}


def test_what_has_expired_is_dropped_and_the_newest_reason_counts(tmp_path: Path, fake: FakeSlurm) -> None:
    old = [entry(node="old", until=time.time() - 1), entry(node="node1"), entry(node="node2")]
    badnodes.file(tmp_path).write_text(json.dumps({"nodes": old}))
    assert badnodes.current(tmp_path) == {"node1": "broken", "node2": "broken"}
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "still broken"})
    told = json.loads(badnodes.file(tmp_path).read_text())["nodes"]
    assert [(node["node"], node["reason"]) for node in told] == [("node2", "broken"), ("node1", "still broken")]


def test_clusters_that_share_the_folder_keep_their_own(tmp_path: Path, fake: FakeSlurm) -> None:
    badnodes.remember(tmp_path, "elsewhere", "exp", {"node0": "broken"})
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "broken"})
    assert badnodes.current(tmp_path) == {"node1": "broken"}
    assert badnodes.known(tmp_path, "elsewhere") == {"node0": "broken"}


def test_slurm_is_asked_only_where_there_are_bad_nodes(tmp_path: Path, fake: FakeSlurm) -> None:
    assert badnodes.current(tmp_path) == {} and not fake.calls()
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "broken"})
    fake.fails("scontrol", "slurm_load_ctl_conf error: Unable to contact slurm controller")
    assert badnodes.current(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": 3}', '{"nodes": [{"node": "node0"}]}', '{"nodes": ["node0"]}'])
def test_a_damaged_list_is_not_heeded_and_written_anew(
    tmp_path: Path, fake: FakeSlurm, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    badnodes.file(tmp_path).write_text(text)
    assert badnodes.current(tmp_path) == {}
    assert ".bad-nodes.json is not heeded" in capsys.readouterr().err
    badnodes.remember(tmp_path, "fake", "exp", {"node1": "broken"})
    assert badnodes.current(tmp_path) == {"node1": "broken"}


def _remember(runs: Path, number: int) -> None:
    for count in range(5):
        badnodes.remember(runs, "fake", "exp", {f"node{number}-{count}": "broken"})


def test_jobs_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_remember, args=(tmp_path, n)) for n in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(badnodes.known(tmp_path, "fake")) == 30
