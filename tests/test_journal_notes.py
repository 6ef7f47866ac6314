"""Hand-written notes survive each new report byte for byte, whatever is in them; a broken marker is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from hpc.journal import notes
from hpc.journal.report import RunData, write_report

SOAK = 20 if os.environ.get("HPC_SOAK") else 1
RUNS = [RunData("a-1"), RunData("ü/b 2")]
LINES = st.one_of(
    st.sampled_from(["", "  ", "# Why", "<!-- notes", "    <!-- /notes -->", "> <!-- /notes -->", "x <!-- /notes -->"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n`~"), max_size=12),
)
FENCED = st.sampled_from(["```", "````md", "~~~", "  ```"]).flatmap(
    lambda fence: st.sampled_from(["<!-- /notes -->", "<!-- notes: x -->", "``", "plain", notes.HEADER]).map(
        lambda line: f"{fence}\n{line}\n{fence.rstrip('md')}"
    )
)
TEXTS = st.lists(st.one_of(LINES, FENCED), max_size=6).flatmap(
    lambda lines: st.sampled_from(["\n", "\r\n"]).map(lambda end: "\n".join(lines).replace("\n", end) + end)
)


def written(path: Path, texts: dict[str, str]) -> None:
    content = path.read_bytes().decode()
    for run, text in texts.items():
        content = content.replace(notes.block(run, ""), notes.block(run, text))
    path.write_bytes(content.encode())


def found(path: Path, run: str) -> str:
    """What stands between the markers of a run, as bytes would have it; the parser has no say in it."""
    head = notes.block(run, "").split("\n")[0]
    content = path.read_bytes().decode()
    return content[content.index(head) + len(head) + 1 :]


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=SOAK * 30, deadline=None)
def test_notes_survive_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, head: str, one: str, two: str) -> None:
    folder = tmp_path_factory.mktemp("notes")
    path, _ = write_report(RUNS, folder)
    texts = {notes.INTRODUCTION: head, "a-1": one, "ü/b 2": two}
    told = {run: text for run, text in texts.items() if text.strip("\r\n")}
    written(path, told)
    before = path.read_bytes()
    write_report(RUNS, folder)
    assert path.read_bytes() == before
    for runs in (RUNS[:1], RUNS[1:], RUNS):  # left out, and back again
        write_report(runs, folder)
        for run, text in told.items():
            kept = run in ("", *(one.run for one in runs)) or text.strip()
            assert not kept or found(path, run).startswith(text + "<!-- /notes -->")
    assert path.read_bytes() == before or any(not text.strip() for text in told.values())


def test_the_introduction_stands_before_the_runs(tmp_path: Path) -> None:
    path = write_report(RUNS, tmp_path)[0]
    written(path, {notes.INTRODUCTION: "What this project is about: «éà»\n"})
    write_report(RUNS[:1], tmp_path)
    text = path.read_text()
    assert text.index("«éà»") < text.index("## a-1") and notes.read(path)[notes.INTRODUCTION].startswith("What this")


def test_a_file_of_a_windows_editor(tmp_path: Path) -> None:
    path, _ = write_report(RUNS, tmp_path)
    written(path, {"a-1": "first  \n\nsecond\n"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for _ in range(2):
        write_report(RUNS, tmp_path)
        assert notes.read(path) == {"": "", "a-1": "first  \r\n\r\nsecond\r\n", "ü/b 2": ""}


def test_two_blocks_of_one_run_are_joined(tmp_path: Path) -> None:
    path, _ = write_report(RUNS, tmp_path)
    twice = notes.block("a-1", "one\n") + "\n" + notes.block("a-1", "two\n")
    path.write_text(path.read_text().replace(notes.block("a-1", ""), twice))
    assert notes.read(path)["a-1"] == "one\n\ntwo\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\ncode that is not closed\n", r"the notes of a-1 have no .* or close their ``` above it"),
        ("<!-- notes: other -->\n", r"line \d+: <!-- notes: other --> stands without its other half"),
        ("<!-- /notes -->\n", r"line \d+: <!-- /notes --> stands without its other half"),
    ],
)
def test_what_could_lose_text_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path, page = write_report(RUNS, tmp_path)
    written(path, {"a-1": text})
    before = path.read_bytes(), page.read_bytes()
    with pytest.raises(UserError, match=message):
        write_report(RUNS, tmp_path)
    assert (path.read_bytes(), page.read_bytes()) == before


def test_what_is_written_outside_of_the_markers_is_told_and_kept_aside(tmp_path: Path) -> None:
    told: list[str] = []
    path, _ = write_report(RUNS, tmp_path, tell=told.append)
    written(path, {"a-1": "why\n"})
    write_report([RunData("a-1", {"name": "other"}), *RUNS[1:]], tmp_path, tell=told.append)
    assert told == [] and not path.with_name("EXPERIMENTS.md.bak").exists(), "the report's own changes are no edits"
    edited = path.read_text().replace("# Experiments", "My remark\n\n# Experiments")
    path.write_text(edited)
    write_report(RUNS, tmp_path, tell=told.append)
    assert len(told) == 1 and "outside of the notes markers" in told[0] and "EXPERIMENTS.md.bak" in told[0]
    assert path.with_name("EXPERIMENTS.md.bak").read_text() == edited and "My remark" not in path.read_text()
    write_report(RUNS, tmp_path, tell=told.append)
    assert len(told) == 1
