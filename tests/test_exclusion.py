"""Bad nodes: who leaves them out, for how long, and where a run ends because there are no others."""

from pathlib import Path

import pytest

from hpc import badnodes, requeue, slurm
from hpc.rundir import RunDir, read_json
from tests.fakeslurm import FakeSlurm
from tests.tails import changes, hold, in_job, make_row

DISABLED = "Requested operation is presently disabled for job 55"


def bad(run: RunDir, generation: int = 3, node: str = "node0", reason: str = "GPU 0 is lost", rank: int = 0) -> None:
    run.event("bad-node", f"rank{rank}", generation, node=node, reason=reason)


@pytest.mark.parametrize("code", [77, 137, 143])
def test_a_bad_node_is_left_out_by_the_job_and_remembered_for_others(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    badnodes.remember(run.runs, "fake", "another", {"node9": "no scratch space"})
    bad(run)
    bad(run, rank=1)
    assert requeue.finish(run, 3, code, False) == "end 77"
    assert changes(fake) == ["scontrol requeue 55", "scontrol update JobId=55 StartTime=now+5 ExcNodeList=node0,node9"]
    assert badnodes.current(run.runs) == {"node9": "no scratch space", "node0": "GPU 0 is lost"}
    state = read_json(run.state)
    assert (state["phase"], state["code"], state["step"]) == ("stopped", 77, 40)
    assert state["reason"] == "bad node node0: GPU 0 is lost; the job keeps off node0, node9; restart 1 of 3"


def test_the_bad_node_of_an_earlier_attempt_is_no_word_on_this_one(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run, generation=2)
    requeue.finish(run, 3, 143, False)
    assert changes(fake) == ["scontrol requeue 55", "scontrol update JobId=55 StartTime=now+5"]
    assert read_json(run.state)["reason"] == "ended by SIGTERM; restart 1 of 3"


def test_a_row_leaves_the_node_out_for_itself_alone(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = make_row(run)
    in_job(monkeypatch, fake, "54_1")
    bad(row)
    requeue.finish(row, 3, 77, False)
    assert changes(fake) == ["scontrol requeue 54_1", "scontrol update JobId=54_1 StartTime=now+5 ExcNodeList=node0"]
    assert badnodes.current(row.path.parent.parent) == {"node0": "GPU 0 is lost"}


def test_where_requeue_is_refused_the_new_job_leaves_the_node_out(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run)
    monkeypatch.setattr(slurm, "cluster_name", lambda: "fake")  # the fake scontrol fails in all it is asked
    fake.fails("scontrol", DISABLED)
    requeue.finish(run, 3, 77, False)
    assert changes(fake)[-1] == f"sbatch --parsable --exclude=node0 {run.script}"


def test_here_a_bad_machine_ends_the_run_and_is_not_remembered(run: RunDir) -> None:
    hold(run)
    bad(run, node="laptop")
    assert requeue.finish(run, 3, 77, False) == "end 77"
    reason = read_json(run.state)["reason"]
    assert reason == "bad node laptop: GPU 0 is lost; once that is mended, 'hpc resume exp-0000aaaa' goes on"
    assert not badnodes.file(run.runs).exists()


def test_a_cancelled_job_stays_so_and_its_bad_node_is_remembered(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run)
    fake.job("55", "COMPLETING")
    requeue.finish(run, 3, 143, True)
    assert changes(fake) == [] and badnodes.current(run.runs) == {"node0": "GPU 0 is lost"}


def test_a_run_meets_a_node_once_a_day(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, fake)
    run.event("requeue", "shell", 2, job="55", out=["node0"])
    run.event("checkpoint", "rank0", 2, step=40)
    hold(run, job="55")
    bad(run)
    requeue.finish(run, 3, 77, False)
    assert changes(fake) == []
    assert "the run was to keep off node0 and came there again; not started again" in capsys.readouterr().err


def test_bad_nodes_in_a_row_without_progress_end_the_run(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    for generation in (1, 2, 3):
        run.event("end", "shell", generation, cause="node")
        run.event("requeue", "shell", generation, job="55", out=[f"node{generation}"])
    hold(run, job="55", generation=4)
    bad(run, generation=4)
    requeue.finish(run, 4, 77, False)
    assert changes(fake) == []
    assert read_json(run.state)["reason"].startswith("4 bad nodes with nothing saved (launch.budgets.node is 3): bad n")
    run.event("checkpoint", "rank0", 3, step=40)
    requeue.finish(run, 4, 77, False)
    assert changes(fake)[0] == "scontrol requeue 55"


def hang(run: RunDir, generation: int, node: str = "node0") -> None:
    run.event("hang", "rank1", generation, rank=1, stuck=[{"rank": 0, "node": node, "why": "no sign of life"}])


@pytest.mark.parametrize(("before", "out"), [("node0", True), ("node1", False), (None, False)])
def test_the_second_hang_on_a_node_leaves_it_out(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, before: str | None, out: bool
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    if before:
        hang(run, 2, before)
    hang(run, 3)
    requeue.finish(run, 3, 143, False)
    asked = "scontrol update JobId=55 StartTime=now+5" + " ExcNodeList=node0" * out
    assert changes(fake) == ["scontrol requeue 55", asked]
    state = read_json(run.state)
    assert (state["code"], state["cause"]) == (76, "hang") and state["reason"].startswith("hung on node0")
    assert badnodes.current(run.runs) == ({"node0": "a run hung twice on it within a day"} if out else {})


def test_a_node_that_nothing_can_take_the_place_of_is_kept_after_two_hangs(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    hang(run, 2)
    hang(run, 3)
    fake.fails("sbatch", IMPOSSIBLE)
    fake.configure(nodes=[{}])
    requeue.finish(run, 3, 76, False)
    assert changes(fake)[-1] == "scontrol update JobId=55 StartTime=now+5" and badnodes.current(run.runs) == {}


GONE = "scratch space /scrach: No such file or directory"
NAMED = ("scratch space /s/node7/x: No such file or directory", "scratch space /s/node0/x: No such file or directory")


@pytest.mark.parametrize(
    ("before", "now", "wrong"),
    [
        (GONE, GONE, True),
        (*NAMED, True),
        (GONE, "scratch space /other: No such file or directory", False),
        (*["scratch space /scrach: Input/output error"] * 2, False),
        (*["scratch space /scrach has not answered for 20 s"] * 2, False),
        (*["GPU 0 is lost"] * 2, False),
    ],
)
def test_a_scratch_folder_that_no_node_has_is_no_nodes_fault(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, before: str, now: str, wrong: bool
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    run.event("requeue", "shell", 2, job="55", out=["node7"])
    badnodes.remember(run.runs, "fake", run.name, {"node7": before, "lost": "GPU 0 is lost"})
    bad(run, 2, "node7", before)
    bad(run, 3, "node0", now)
    assert requeue.finish(run, 3, 77, False) == ("end 2" if wrong else "end 77")
    state, known = read_json(run.state), set(badnodes.known(run.runs, "fake"))
    if wrong:
        words = f"bad input: {now}, on two nodes in a row: it is named wrongly; correct the instance's 'scratch'"
        assert state["code"] == 2 and state["reason"].startswith(words)
        assert known == {"lost"} and changes(fake) == []
    else:
        assert state["code"] == 77 and known == {"node7", "node0", "lost"}
        assert changes(fake)[0] == "scontrol requeue 55"


def test_one_node_that_lacks_the_folder_twice_is_its_own_fault(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run, 2, "node0", GONE)
    bad(run, 3, "node0", GONE)
    requeue.finish(run, 3, 77, False)
    assert read_json(run.state)["code"] == 77 and set(badnodes.known(run.runs, "fake")) == {"node0"}


IMPOSSIBLE = "allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    ("words", "nodes", "states", "again"),
    [
        (IMPOSSIBLE, 1, ["IDLE"], False),  # there is another, and it does not have what the job needs
        (IMPOSSIBLE, 1, ["DOWN*"], True),
        (IMPOSSIBLE, 1, ["IDLE+DRAIN"], True),
        (IMPOSSIBLE, 2, ["DOWN*"], False),
        (IMPOSSIBLE, 1, [], False),
        ("allocation failure: Job violates accounting/QOS policy", 1, [], True),
        ("Unable to contact slurm controller", 1, [], True),
    ],
)
def test_a_job_that_no_other_node_can_run_ends(
    run: RunDir,
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    nodes: int,
    states: list[str],
    again: bool,
) -> None:
    in_job(monkeypatch, fake, nodes=nodes)
    hold(run, job="55")
    bad(run)
    fake.fails("sbatch", words)
    others = [{"NodeName": f"node{number}", "State": state} for number, state in enumerate(states, 1)]
    fake.configure(nodes=[{}, *others, {"NodeName": "far", "Partitions": "other,more", "State": "DOWN"}])
    requeue.finish(run, 3, 77, False)
    assert bool(changes(fake)) is again
    (asked,) = [call for call in fake.calls() if "--test-only" in call]
    assert asked == f"sbatch --test-only --exclude=node0 --partition=gpu --nodes={nodes} {run.script}"
    if not again:
        state = read_json(run.state)
        assert state["phase"] == "ended" and "without node0 no nodes are left that could run it" in state["reason"]


def test_bad_nodes_that_cannot_be_written_down_are_left_out_all_the_same(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run)
    Path(run.runs / ".bad-nodes.lock").mkdir()
    requeue.finish(run, 3, 77, False)
    assert changes(fake)[-1] == "scontrol update JobId=55 StartTime=now+5 ExcNodeList=node0"
    assert "not remembered for other runs" in capsys.readouterr().err
