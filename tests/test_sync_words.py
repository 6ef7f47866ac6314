"""What hpc sync is told and tells: mistakes, places, names, what the far end answers, how a file ends."""

from __future__ import annotations

import ast
import random
import sys
from pathlib import Path

import pytest

from hpc import cli
from hpc.errors import UserError
from hpc.logs import agent
from hpc.logs.ends import LocalEnd, Place, place_of
from hpc.logs.records import Ending
from hpc.rundir import RunDir
from tests.syncing import attempt


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sync"], "hpc sync SRC DEST"),
        (["sync", "--", "a", "-oProxyCommand=x:y"], "is no host:path"),
        (["sync", "a:", "b"], "write a:runs"),
        (["sync", "a:x", "b:y"], "both elsewhere"),
        (["sync", "no-such-folder", "b"], "no such folder of runs"),
        (["sync", "hpc", "hpc/in"], "one is in the other"),
        (["sync", "hpc", "b", "--with", "cod"], "did you mean 'code'"),
        (["sync", "hpc", "b", "--watch", "--from-cron"], "exclude each other"),
        (["sync", "hpc", "b", "--every", "soon", "--watch"], "--every: 'soon' is not a duration"),
        (["sync", "hpc", "b", "--json"], "--json goes with --status"),
        (["sync", "hpc", "file"], "file: a file is in the way; name a folder"),
        (["sync", "hpc", "file/in"], "in: a file is in the way; name a folder"),
        (["sync", "mlflow:http://127.0.0.1:5000", "b"], "a tracker can only be DEST"),
        (["sync", "hpc", "wandb:x"], "no such sink; valid: mlflow:; a host of this name is me@wandb:path"),
        (["sync", "hpc", "WandB:x"], "no such sink; valid: mlflow:"),
        (["sync", "hpc", "s3://bucket/runs"], "s3://...: no place for runs"),
        (["prune", "--older-than", "soon"], "--older-than: 'soon'"),
        (["prune", "--older-than", "1d", "--runs", "hpc", "--only", "log"], "valid: logs, checkpoints"),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hpc").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hpc", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    told_there = capsys.readouterr().err
    assert left.value.code == 2, told_there
    assert told in told_there and len(told_there.splitlines()) == 1


def test_places() -> None:
    assert place_of("me@host:a b/c:d") == Place("me@host", "a b/c:d")
    assert place_of("[::1]:runs") == Place("[::1]", "runs")
    assert place_of("./a:b") == Place("", str(Path("a:b").resolve()))
    assert place_of("/x/../y").path == "/y"
    assert place_of("C:\\Users\\ana") == Place("C", "\\Users\\ana")
    assert place_of("me@wandb:/runs") == Place("me@wandb", "/runs")
    assert place_of("./wandb:x").host == ""
    for wrong in ("", " ", "-x:y", "h:"):
        with pytest.raises(UserError):
            place_of(wrong)


def test_the_agent_stays_in_its_folder_and_in_its_python(tmp_path: Path) -> None:
    end = LocalEnd(Place("", str(tmp_path)))
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for path in ("../x", "/etc/passwd", "a/../../x", "", "a\0b", "out/passwd", "./x", "a//b"):
        with pytest.raises(UserError, match="folder"):
            end.read(path, 0, 10)
    with pytest.raises(OSError, match="link"):
        end.read("link", 0, 10)
    with pytest.raises(UserError, match="unknown request"):
        end.call("shell")
    source = Path(agent.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {name for name in imported if name.startswith("hpc")} and "__future__" not in source


def test_endings_are_told_alike(tmp_path: Path) -> None:
    """blocks.py and records.py see the same in any cut or damaged bytes."""
    from hpc.logs.blocks import whole_records
    from hpc.logs.records import RecordReader

    rng, content, path = random.Random(1), attempt(0, 6, 1), tmp_path / "f"
    for _ in range(300):
        data = bytearray(content[: rng.randrange(len(content))])
        if data and rng.random() < 0.5:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        reader = RecordReader(path)
        list(reader)
        block = whole_records(bytes(data))
        assert (block.valid, block.records) == (reader.valid, reader.records)
        assert block.ending is reader.ending or {block.ending, reader.ending} <= {Ending.FLIPPED, Ending.ZEROS}


def test_run_dir_names_are_asked_of_rundir() -> None:
    from hpc.logs.sync import carried_names, more_names

    run = RunDir("x")
    assert run.tensorboard.name in carried_names() and run.code.name in more_names()
