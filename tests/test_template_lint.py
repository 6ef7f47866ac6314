"""Lint of a user's own template: each thing that would lose a run has its sentence; comments do not count."""

import re
from pathlib import Path
from typing import Any

import pytest

from hpc import filling, instances, lint, template
from hpc.errors import UserError
from hpc.instances import Instance
from hpc.settings import Launch

SHIPPED = (filling.FOLDER / filling.JOB).read_text()
CEDIA = instances.find("cedia-a100-40gb")
FULL = Instance.model_validate(
    {
        "name": "full",
        "cpus": 4,
        "mem_gb": 8,
        "time_limit": "1h",
        "modules": ["cuda/12.4"],
        "venv": "/opt/v",
        "environment": {"A": "b"},
        "scratch": "$TMPDIR",
        "scratch_gb": 20,
        "prologue": ["umask 077"],
        "epilogue": ["date"],
        "sbatch": {"exclusive": None},
    }
)


@pytest.fixture
def faults(tmp_path: Path) -> Any:
    """The faults of a text as an instance's own template, without the file's name."""

    def of(text: str, instance: Instance = CEDIA) -> list[str]:
        own = tmp_path / "own.sbatch.j2"
        own.write_text(text)
        found = template.check(instance.model_copy(update={"template": own}))
        assert all(line.startswith(f"{own}: ") for line in found)
        return [line.removeprefix(f"{own}: ") for line in found]

    return of


CONTAINERS = [{"engine": "pyxis", "image": "a.sqsh"}, {"engine": "apptainer", "image": "a.sif"}]


@pytest.mark.parametrize("container", [None, *CONTAINERS])
def test_a_copy_of_the_shipped_text_has_no_fault(container: Any, faults: Any) -> None:
    venv = {"venv": None} if container else {}
    instance = Instance.model_validate({**FULL.model_dump(), **venv, "container": container})
    assert faults(SHIPPED) == faults(SHIPPED, instance) == []


def test_a_template_that_extends_the_shipped_one_is_filled_with_its_block(faults: Any, tmp_path: Path) -> None:
    block = "{% block prologue %}\n{{ super() }}ulimit -n 4096 # {{ request.cpus }}\n{% endblock %}"
    text = f'{{% extends "job.sbatch.j2" %}}\n{block}\n'
    assert faults(text, FULL) == []
    own = FULL.model_copy(update={"template": tmp_path / "own.sbatch.j2"})
    for script in (
        template.render_function("f", own, Launch(), tmp_path, "true", None),
        template.render_function("f", own, Launch(), tmp_path, "true", "0-3%2"),
    ):
        assert "\nmodule load cuda/12.4" in script and "\nulimit -n 4096 # 4\n" in script


# What is changed in the shipped text, and what lint says to it.
CHANGES = [
    ("{{ command }} &", "true &", "no {{ command }}: nothing would run"),
    ("step {{ command }} &", "# step {{ command }} &\nfalse &", "no {{ command }}: nothing would run"),
    ("#!/usr/bin/env bash\n", "\n", "no interpreter in the first line"),
    ("{% for key, value in options.items() %}", "{% for key, value in () %}", "no #SBATCH --requeue: where"),
    ("options.items() %}", "options.items() if key != 'requeue' %}", "no #SBATCH --requeue: where JobRequeue=0"),
    ("options.items() %}", "options.items() if key != 'open-mode' %}", "no #SBATCH --open-mode: each attempt would"),
    ("options.items() %}", "options.items() if key != 'signal' %}", "no #SBATCH --signal: the ranks get no notice"),
    ("options.items() %}", "options.items() if key != 'comment' %}", "no #SBATCH --comment: a failed sbatch is"),
    ("options.items() %}", "options.items() if key != 'mem' %}", "no #SBATCH --mem: what the experiment and"),
    ("options.items() %}", "options.items() if key != 'array' %}", "no #SBATCH --array: one task would run instead"),
    ("# One text", "#SBATCH --signal=B:USR2@60\n# One text", "line 8: #SBATCH --signal=B:USR2@60: --signal with B"),
    ("# One text", "#SBATCH --signal=USR1@60\n# One text", "--signal=USR1@60: the ranks listen to USR2"),
    ("# One text", "#SBATCH --no-requeue\n# One text", "line 8: #SBATCH --no-requeue: --no-requeue: a preempted run"),
    ("# One text", "#SBATCH -t 4:00:00\n# One text", "line 8: #SBATCH -t 4:00:00: hpc asks for --time=4320:00 here"),
    ("# One text", "#SBATCH --exclusve\n# One text", "--exclusve is no option of sbatch; did you mean 'exclusive'"),
    ("exit \"$code\"", "#SBATCH --exclusive\nexit \"$code\"", "#SBATCH --exclusive: stands after the first command"),
    (" --cpus-per-task={{ request.cpus_per_task }} \\", " \\", "srun without --cpus-per-task="),
    (" --kill-on-bad-exit=1", "", "srun without --kill-on-bad-exit=1: the others wait"),
    (" --open-mode=append{%", "{%", "srun without --open-mode=append: each attempt"),
    (" --export=ALL", "", "srun without --export=ALL: it takes sbatch's --export=NONE for its own"),
    ("{{ output(slurm_job) }}", "x.log", "srun without the run's logs"),
    ("  exec srun ", "  exec mpirun ", "no srun: SLURM sends the notice"),
    ("-m hpc.attempt", "-m true", "no hpc.attempt: two jobs could hold"),
    ("-m hpc.localstep", "-m true", "no hpc.localstep: a local run has no srun"),
    ("-m hpc.requeue", "-m true", "no hpc.requeue: a stopped or preempted run"),
    ('"$code" "$told")', '"$code")', "hpc.requeue decides by all four"),
    ("code=${next#end }", "true", "no hpc.requeue's answer: where ranks leave with 0"),
    ("trap 'tell TERM' TERM", "", "no trap for TERM: a cancelled job"),
    ('  wait "$child"\n  code', "  code", None),
    ('exit "$code"', "exit 0", "no exit with the step's code: SLURM would call"),
    ("told=0 noticed", "set -euo pipefail\ntold=0 noticed", "line 13: set -euo pipefail: set -e ends the script"),
    ("#!/usr/bin/env bash", "#!/bin/bash -e", "line 1: #!/bin/bash -e: set -e ends the script"),
    ("told=0 noticed", "set -e\nset +e\ntold=0 noticed", None),
    ("told=0 noticed", "# set -e\necho 'a # b' # scontrol requeue\ntold=0 noticed", None),
    ('exit "$code"', '[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"\nexit "$code"', ": a cancelled job"),
    ('exit "$code"', 'if [ $code == "75" ]; then date; fi\nexit "$code"', "srun's code is 143 where"),
    ("while :; do", "while :;", "bash -n: "),
    ("told=0 noticed", "cat <<X\ntold=0 noticed", "bash -n: "),
    ("{{ request.time_s }}", "{{ request.tim_s }}", "rendered for a single run: "),
    ("{{ request.time_s }}", "{{ requst.time_s }}", "'requst' is no variable of a template; did you mean 'request'"),
    ("{% endfor %}", "", "line 7: Encountered unknown tag 'endblock'"),
    ("{{ notice_s }}", "{{ notice_s | seconds }}", "No filter named 'seconds'"),
    ("{{ notice_s }}", "{{ ''.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ notice_s }}", "{{ 1 / 0 }}", "division by zero"),
    ("{{ notice_s }}", "{{ 'x' * 10**12 }}", "rendered for a single run: a text of 1,000,000,000,000 characters or"),
    ("{{ notice_s }}", "{{ 10**12 * 'x' }}", "rendered for a single run: a text of 1,000,000,000,000 characters or"),
    ("{{ notice_s }}", "{{ 9**99999999 }}", "rendered for a single run: a power of 99999999; 64 is the highest"),
    ("{{ notice_s }}", "{{ '' | center(1000001) }}", "rendered for a single run: a text of 1,000,001 characters or"),
    ("{{ notice_s }}", "{% for _ in range(99999) %}{{ request }}{% endfor %}", "1,000,000 at most"),
    ("{{ notice_s }}", "{{ 2 * notice_s // 2 ** 1 }}", None),
    ("{{ array.rows_file }}", "other.txt", "no {{ array.rows_file }}: an array's tasks would not find"),
    ("run={{ run }}", "run={{ run }}\n{% endif %}{% if true %}echo {{ run }}", "'run' is undefined"),
    ("export PYTHONPATH={{ code }} PYTHON", "export PYTHON", "no PYTHONPATH: the run would not use its own copy"),
    ("module load {{ name }}", "true", "the instance's modules cuda/12.4 would have"),
    ("/bin/activate", "", "no '/opt/v/bin/activate': the instance's venv would have no effect"),
    ("export HPC_SCRATCH={{", "export SCRATCH={{", "no 'HPC_SCRATCH=': the instance's scratch would have no effect"),
    ("export {{ key | raw }}={{ value }}", "", "no 'export A=': the instance's environment A would have no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "sentence"), CHANGES, ids=lambda text: re.sub(r"\W+", "-", str(text))[:40])
def test_each_change_has_its_sentence(old: str, new: str, sentence: str | None, faults: Any) -> None:
    assert old in SHIPPED
    found = faults(SHIPPED.replace(old, new), FULL.model_copy(update={"time_limit": 3 * 86400, "prologue": []}))
    if sentence is None:
        assert found == []
    else:
        assert any(sentence in fault for fault in found), found
        assert all("\n" not in fault for fault in found)


def test_a_short_text_of_ones_own_is_told_all_that_it_lacks_at_once(faults: Any) -> None:
    text = '#!/bin/bash\n#SBATCH -J {{ options["job-name"] }}\n# srun --cpus-per-task=1\nset -e\nsrun {{ command }}\n'
    found = faults(text)
    assert "line 5: srun {{ command }}: srun without --kill-on-bad-exit=1" in " ".join(found)
    assert "line 4: set -e: set -e ends the script" in " ".join(found)
    assert len(found) == len(set(found)) > 15
    assert not any("job-name" in fault for fault in found), "-J is --job-name"


@pytest.mark.parametrize("text", ["{% extends 'jb.sbatch.j2' %}", "{% include 'x' %}", "{{", "\x00", ""])
def test_what_is_no_template_is_refused_in_words(text: str, faults: Any) -> None:
    found = faults(text)
    assert found and all(fault.strip() and "\n" not in fault for fault in found)


def test_a_template_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    missing = CEDIA.model_copy(update={"template": tmp_path / "gone.j2"})
    assert template.check(missing) == [
        f"{tmp_path}/gone.j2: the template of instance cedia-a100-40gb cannot be read "
        f"([Errno 2] No such file or directory: '{tmp_path}/gone.j2')"
    ]


def test_a_function_needs_the_blocks_that_it_replaces(tmp_path: Path) -> None:
    own = tmp_path / "own.sbatch.j2"
    own.write_text(SHIPPED.replace("{% block tail %}", "{% block end %}"))
    with pytest.raises(
        UserError, match=r"own.sbatch.j2: rendered for a function: .* blocks run, attempt, srun and tail"
    ):
        template.render_function("f", CEDIA.model_copy(update={"template": own}), Launch(), tmp_path, "true", None)


def test_what_is_too_long_for_a_script_is_refused_without_an_own_template_too(tmp_path: Path) -> None:
    instance = CEDIA.model_copy(update={"environment": {"A": "x" * 1_000_001}})
    with pytest.raises(UserError, match=r"^instance cedia-a100-40gb: a text of 1,000,001 characters or more; a script"):
        template.render_function("f", instance, Launch(), tmp_path, "true", None)


def test_a_bash_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "_PATIENCE_S", 0.0)
    assert lint.syntax("true") == "no answer within 0 s"


@pytest.mark.parametrize("section", ["prologue", "epilogue"])
@pytest.mark.parametrize(
    ("lines", "words"),
    [(["if true; then"], "unexpected end of file"), ([")"], "unexpected token"), (["cat <<X", "a"], "here-document")],
)
def test_a_section_that_would_swallow_what_follows_is_refused(
    section: str, lines: list[str], words: str, tmp_path: Path
) -> None:
    instance = CEDIA.model_copy(update={section: lines})
    with pytest.raises(UserError, match=rf"^instance cedia-a100-40gb: {section}: bash -n: .*{words}"):
        template.render_function("f", instance, Launch(), tmp_path, "true", None)
