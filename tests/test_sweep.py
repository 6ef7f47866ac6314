"""Sweeps before they are submitted: axes, combinations, chunks under one cap, rows that are finished, the folder."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc import sweep, yamlfile
from hpc.errors import UserError
from hpc.experiment import load
from hpc.rundir import RunDir, all_runs, find_run, next_run, write_json
from hpc.sweep import combine, cut, parse_axis
from hpc.sweepdir import SweepDir, alone, find_sweep, numbers, spec, submission_of

LOCAL = "launch: {instance: laptop, cluster: local, cpus: 1, mem: 1GB, time: 10min}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "exp.yaml"
    path.write_text(f"name: exp\nmodel: {{name: m}}\ndata: {{file: x.h5}}\n{LOCAL}")
    return path


def made(file: Path, *axes: str, runs: str = "runs", **options: object) -> SweepDir:
    plan = sweep.make(file, axes, file.parent / runs, **options)  # type: ignore[arg-type]
    return sweep.create(plan, lambda: None)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.seed=0:5", ["0", "1", "2", "3", "4"]),
        ("train.seed=0:10:4", ["0", "4", "8"]),
        ("train.seed=3:0:-1", ["3", "2", "1"]),
        ("train.seed=0:2,7", ["0", "1", "7"]),
        ("train.optimizer.lr=1e-3,3e-4", ["1e-3", "3e-4"]),
        ("model.hidden=[8,8],[16,16]", ["[8,8]", "[16,16]"]),
        ("data.augment={flip: [0,1], noise: 0.1},{}", ["{flip: [0,1], noise: 0.1}", "{}"]),
        ("model.name='a,b',c", ["'a,b'", "c"]),
        ("train.clip_norm=null,1.0", ["null", "1.0"]),
        ("launch.time=1:30:00", ["1:30:00"]),
        ("train.checkpoint_every=10:00:00,5min", ["10:00:00", "5min"]),
    ],
)
def test_an_axis_is_a_list_a_range_or_both(text: str, values: list[str]) -> None:
    assert parse_axis(text) == (text.split("=", maxsplit=1)[0], values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.seed", "is no axis; write train.seed=0:5"),
        ("--train.seed=1", "is no axis"),
        ("train.seed=", "has an empty value"),
        ("train.seed=1,,2", "has an empty value"),
        ("train.seed=5:5", "5:5 holds no number"),
        ("train.seed=0:5:0", "0:5:0 holds no number"),
        ("train.seed=0:1000000", "has 1000000 values; a sweep has at most 100000 rows"),
    ],
)
def test_an_axis_that_cannot_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_axis(text)


def test_grid_takes_all_combinations_and_zip_pairs() -> None:
    axes = {"a": ["1", "2"], "b": ["x", "y"], "c": ["k"]}
    assert combine(axes, zipped=False) == [
        ("a=1", "b=x", "c=k"),
        ("a=1", "b=y", "c=k"),
        ("a=2", "b=x", "c=k"),
        ("a=2", "b=y", "c=k"),
    ]
    assert combine(axes, zipped=True) == [("a=1", "b=x", "c=k"), ("a=2", "b=y", "c=k")]
    with pytest.raises(UserError, match="--zip pairs axes of one length, and these differ: a 2, b 3"):
        combine({"a": ["1", "2"], "b": ["x", "y", "z"]}, zipped=True)
    with pytest.raises(UserError, match="1000000 combinations"):
        combine({key: [str(n) for n in range(1000)] for key in "ab"}, zipped=False)


@given(
    st.integers(1, 5000),
    st.integers(1, 1001),
    st.one_of(st.none(), st.integers(1, 2000)),
)
def test_chunks_hold_every_row_once_and_keep_the_shared_cap(count: int, limit: int, parallel: int | None) -> None:
    chunks = cut(count, limit, parallel)
    assert [row for chunk in chunks for row in range(chunk.first, chunk.first + chunk.count)] == list(range(count))
    assert all(1 <= chunk.count <= limit for chunk in chunks)
    assert max(chunk.count for chunk in chunks) - min(chunk.count for chunk in chunks) <= 1
    if parallel is None:
        assert all(chunk.parallel is None and chunk.after is None for chunk in chunks)
        return
    # A chunk follows at most one other and is followed by at most one, so at any time one of each lane runs.
    lanes = [chunk for chunk in chunks if chunk.after is None]
    followed = [chunk.after for chunk in chunks if chunk.after is not None]
    assert len(followed) == len(set(followed)) and all(chunk.parallel for chunk in chunks)
    share = {chunk.number: chunk.parallel or 0 for chunk in chunks}
    assert all(share[chunk.number] <= share[chunk.after] for chunk in chunks if chunk.after is not None)
    assert (
        sum(share[chunk.number] for chunk in lanes) == parallel if parallel >= len(chunks) else len(lanes) == parallel
    )


@given(st.sets(st.integers(0, 3000), min_size=1))
def test_a_list_of_rows_is_written_and_read(rows: set[int]) -> None:
    assert numbers(spec(rows)) == sorted(rows)


def test_numbers_are_written_as_sbatch_takes_them() -> None:
    assert spec([7, 0, 1, 2, 9, 10]) == "0-2,7,9-10"
    with pytest.raises(UserError, match="is no list of rows"):
        numbers("1-2;3")


def test_a_sweep_is_a_folder_of_runs_that_share_a_snapshot(file: Path) -> None:
    folder = made(file, "train.seed=0:3", "train.optimizer.lr=1e-3,1e-2")
    rows = folder.rows()
    assert len(rows) == 6 and folder.path.name.startswith("exp-sweep-")
    seeds = []
    for row in rows:
        experiment, _ = load(row.experiment)
        seeds.append((experiment.train.seed, experiment.train.optimizer.lr))
        assert row.code.resolve() == folder.code and (row.code / "jobs" / "run.py").is_file()
        assert row.in_sweep and row.runs == folder.path.parent
        assert not row.script.exists(), "a row is a task of the sweep's script"
    assert seeds == [(s, lr) for s in range(3) for lr in (1e-3, 1e-2)]
    assert yamlfile.read(rows[3].delta) == {"train.optimizer.lr": 0.01, "train.seed": 1}
    assert [path.name for path in folder.path.parent.iterdir()] == [folder.name], "nothing beside it"
    assert [run.name for run in all_runs(folder.path.parent)] == [row.name for row in rows]
    assert find_run(folder.path.parent, rows[2].name).path == rows[2].path
    found = find_sweep(folder.path.parent, folder.name[-8:])
    assert found is not None and found.path == folder.path
    script = folder.script(0).read_text()
    assert "#SBATCH --array=0-5\n" in script and f"--comment={folder.name}/0\n" in script


def test_a_row_that_is_finished_is_left_out_and_other_equals_get_their_own_name(file: Path) -> None:
    first = made(file, "train.seed=0:3")
    write_json(first.rows()[1].result, {"finished": True})
    plan = sweep.make(file, ["train.seed=0:3"], first.path.parent)
    assert plan.left_out == {first.rows()[1].name: "finished"}
    assert [row.overrides for row in plan.rows] == [("train.seed=0",), ("train.seed=2",)]
    assert not {row.name for row in plan.rows} & {run.name for run in first.rows()}
    second = sweep.create(plan, lambda: None)
    assert second.name != first.name
    for run in (*first.rows(), *second.rows()):
        write_json(run.result, {"finished": True})
    with pytest.raises(UserError, match="equal runs of all rows"):
        sweep.make(file, ["train.seed=0:3"], first.path.parent)


def test_a_single_run_never_takes_the_name_of_a_row(file: Path) -> None:
    folder = made(file, "train.seed=4")
    resolved = load(folder.rows()[0].experiment)[0].as_dict()
    assert next_run(folder.path.parent, "exp", resolved).name != folder.rows()[0].name


def test_a_finished_single_run_counts_as_the_row(file: Path) -> None:
    experiment, _ = load(file, ["train.seed=1"])
    run = next_run(file.parent / "runs", "exp", experiment.as_dict())
    run.path.mkdir(parents=True)
    run.experiment.write_text(yamlfile.dump(experiment.as_dict()))
    write_json(run.result, {"finished": True})
    plan = sweep.make(file, ["train.seed=0:2"], file.parent / "runs")
    assert plan.left_out == {run.name: "finished"} and len(plan.rows) == 1


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["launch.mem=1GB,2GB"], "launch.mem=2GB: the rows of a sweep share one name and one request"),
        (["name=a,b"], "name=b: the rows of a sweep share one name"),
        (["train.seed=1", "train.seed=2"], "an axis stands twice"),
        (["train.sede=0:2"], "train.sede: no such key; did you mean 'seed'"),
        (["train.seed=0:2", "data.batch_size=3,x"], "data.batch_size"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_and_nothing_is_made(file: Path, axes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(file, *axes)
    assert not (file.parent / "runs").exists()


def test_a_refusal_by_the_check_leaves_nothing(file: Path) -> None:
    def refuse() -> None:
        raise UserError("no such data file")

    plan = sweep.make(file, ["train.seed=0:3"], file.parent / "runs")
    with pytest.raises(UserError, match="no such data file"):
        sweep.create(plan, refuse)
    assert not (file.parent / "runs").exists()


def test_models_of_ones_own_come_along_once_per_folder(file: Path) -> None:
    nets = []
    for name in ("one", "two"):
        folder = file.parent / name
        folder.mkdir()
        (folder / "net.py").write_text(f"WHERE = {name!r}\n")
        nets.append(f"file:{folder}/net.py:Net")
    folder = made(file, f"model.name={nets[0]},{nets[1]}", "train.seed=0:2")
    found = {load(row.experiment)[0].model.name for row in folder.rows()}
    assert found == {f"file:{folder.code}/own/net.py:Net", f"file:{folder.code}/own1/net.py:Net"}
    assert "'two'" in (folder.code / "own1" / "net.py").read_text()


def test_the_submission_of_a_row_is_the_sweeps_or_its_own_if_newer(file: Path) -> None:
    folder = made(file, "train.seed=0:4")
    rows = folder.rows()
    assert submission_of(rows[1]) == {}
    folder.record("slurm", {0: ("70", [0, 1, 2, 3])})
    folder.record("slurm", {0: ("71", [1, 3])})
    assert [submission_of(row)["job"] for row in rows] == ["70_0", "71_1", "70_2", "71_3"]
    write_json(rows[2].submit, {"cluster": "slurm", "job": "72_2", "time": 4e9})
    assert submission_of(rows[2])["job"] == "72_2" and submission_of(rows[0])["job"] == "70_0"
    folder.mark_cancelled()
    assert all("cancelled" in submission_of(row) for row in (rows[0], rows[3])), "rows of an earlier one may run still"


def test_a_row_alone_is_one_task_of_its_chunk(file: Path) -> None:
    folder = made(file, "train.seed=0:5")
    chunks = cut(5, 2, None)
    folder.write_chunks(chunks)
    single = alone(folder.rows()[3])
    assert (single.script, single.index) == (folder.script(1), 1)
    assert single.options == ["--array=1", f"--comment={folder.name}/1/1"] and single.job("88") == "88_1"
    run = RunDir(folder.path.parent / "other-1")
    assert alone(run).options == [] and alone(run).job("88") == "88" and alone(run).script == run.script
