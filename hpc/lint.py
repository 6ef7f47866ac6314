"""Lint of a user's own template: what would lose a run, said with its line, the reason, and what to write instead.

`source` looks at the Jinja text, `script` at what it renders to, where comments do not count.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpc.errors import nearest
from hpc.preempt import ExitCode
from hpc.sections import EXTRA, OWNED, SHORT


@dataclass(frozen=True)
class Form:
    """What a rendered script is held to."""

    options: Mapping[str, str | int | None]
    command: str
    logs: tuple[str, str]
    """The ranks' stdout and stderr, as srun is given them, from the run's folder on."""
    srun_options: tuple[str, ...]
    rows: str | None
    """The file of an array's rows."""
    sections: Mapping[str, str]
    """Field of the instance to text that shows that it is heard."""


@dataclass(frozen=True)
class Line:
    """A command with its continuation lines, without comments."""

    number: int
    text: str


Finding = tuple[str | None, str]
"""The line that it is about, None for what is missing, and the sentence."""

_ALIKE = 10
_PATIENCE_S = 20.0
_WHY = {
    "requeue": "where JobRequeue=0 a preempted run would not come back",
    "open-mode": "each attempt would erase the log of the one before",
    "signal": "the ranks get no notice of the time limit, and lose the work since the last checkpoint",
    "comment": "a failed sbatch is looked up by it, and without it a run may be submitted twice",
    "array": "one task would run instead of all rows",
    "output": "'hpc logs' and 'hpc why' read it there",
    "error": "'hpc logs' and 'hpc why' read it there",
}
_PARTS = {
    r"-m hpc\.attempt\b": ("hpc.attempt", "two jobs could hold one run folder", "the attempt block"),
    r"-m hpc\.localstep\b": ("hpc.localstep", "a local run has no srun", "the step block"),
    r"\btrap\s+(?!['\"]{2})[^\n]*\bTERM\b": (
        "trap for TERM",
        "a cancelled job is not told from a stopped one",
        "the signals block",
    ),
    r"\bwait\b": ("wait", "bash hears TERM only while it waits for a step in the background", "the wait block"),
    r"-m hpc\.requeue\b": ("hpc.requeue", "a stopped or preempted run would not come back", "the tail block"),
    r"#end\b": (
        "hpc.requeue's answer",
        "where ranks leave with 0 and without a result, SLURM would start what follows the run",
        "the tail block",
    ),
    r"\bexit \"?\$\{?\w": ("exit with the step's code", "SLURM would call a failed run COMPLETED", 'exit "$code"'),
    r"\bHPC_GPUS=": ("HPC_GPUS", "the ranks would not know what they were given", "the environment block"),
    r"\bPYTHONPATH=": ("PYTHONPATH", "the run would not use its own copy of the code", "the environment block"),
}
"""Pattern to (what is missing, why it matters, what to write)."""
_SRUN = {
    r"--cpus-per-task\b|-c\s?\d": (
        "--cpus-per-task={{ request.cpus_per_task }}",
        "SLURM 22.05 and 23.02 do not pass sbatch's on, and all threads of a rank share a core",
    ),
    r"--kill-on-bad-exit\b|-K\b": ("--kill-on-bad-exit=1", "the others wait for a dead rank until the time limit"),
    r"--open-mode=append\b": ("--open-mode=append", "each attempt would erase the log of the one before"),
    r"--export[= ]ALL\b": (
        "--export=ALL",
        "it takes sbatch's --export=NONE for its own, and the ranks would have no variable, not even PATH",
    ),
}
"""Pattern to (what srun is to be given, why it matters)."""


def source(text: str, names: Collection[str], environment: Any, blocks: Collection[str]) -> list[str]:
    """Faults of the Jinja text: syntax, unknown variables, blocks that replace none of `blocks`."""
    from jinja2 import TemplateSyntaxError, meta, nodes

    try:
        tree = environment.parse(text)
        unknown = meta.find_undeclared_variables(tree) - set(names)
    except TemplateSyntaxError as error:
        return [f"line {error.lineno}: {error.message}"]
    found = []
    for name in tree.find_all(nodes.Name):
        if name.name in unknown:
            unknown.remove(name.name)
            found.append((name.lineno, f"{name.name!r} is no variable of a template; {nearest(name.name, names)}"))
    if tree.find(nodes.Extends):
        for block in tree.find_all(nodes.Block):
            if block.name not in blocks:
                found.append((block.lineno, f"block {block.name!r} replaces nothing; {nearest(block.name, blocks)}"))
    return [f"line {number}: {sentence}" for number, sentence in sorted(found)]


def script(text: str, form: Form, written: str) -> list[str]:
    """Faults of a rendered script; `written` is the template, in whose lines they are told where they stand there."""
    if words := syntax(text):
        return [f"bash -n: {words}"]
    lines = list(commands(text))
    findings = [*_options(text, lines, form), *_parts(lines, form), *_steps(lines, form), *_dangers(text, lines, form)]
    return list(dict.fromkeys(_place(place, sentence, form, written) for place, sentence in findings))


def syntax(text: str) -> str:
    """bash's words on a script or a part of one that does not stand by itself; empty where it does."""
    if not text.strip():
        return ""
    try:
        done = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PATIENCE_S:g} s"
    fault = re.match(r"bash: (?:line (\d+): )?(.*)", done.stderr)
    if fault is None:
        return ""
    lines = [*text.splitlines(), ""]
    return f"{lines[int(fault[1]) - 1]}: {fault[2]}".removeprefix(": ") if fault[1] else fault[2]


def commands(text: str) -> Iterator[Line]:
    """Commands of a script, one by one, with continuation lines joined and comments taken off."""
    start, held, quote = 0, "", ""
    for number, line in enumerate(text.splitlines(), 1):
        start = start or number
        kept, quote = _without_comment(line, quote)
        held += kept
        if quote:
            held += "\n"
        elif held.endswith("\\"):
            held = held[:-1]
        else:
            if held.strip():
                yield Line(start, held.strip())
            start, held = 0, ""
    if held.strip():
        yield Line(start, held.strip())


def _without_comment(line: str, quote: str) -> tuple[str, str]:
    """The line up to its comment, and the quote that is open at its end."""
    position = 0
    while position < len(line):
        letter = line[position]
        if letter == "\\" and quote != "'":
            position += 1
        elif letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        elif not quote and letter == "#" and (position == 0 or line[position - 1] in " \t;"):
            return line[:position], quote
        position += 1
    return line, quote


def _options(text: str, lines: list[Line], form: Form) -> Iterator[Finding]:
    first = lines[0].number if lines else 0
    given: dict[str, tuple[str | None, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#SBATCH"):
            continue
        if number > first:
            yield line, "stands after the first command, where sbatch no longer reads; move it up"
        for key, value in _read_options(line):
            given[key] = value, line
            if key not in EXTRA and key not in OWNED:
                yield line, f"--{key} is no option of sbatch; {nearest(key, [*EXTRA, *OWNED])}"
    if "no-requeue" in given:
        yield given["no-requeue"][1], "--no-requeue: a preempted run would not come back; write --requeue"
    missing: dict[str, list[str]] = {}
    for key, wanted in form.options.items():
        text_of = f"--{key}" if wanted is None else f"--{key}={wanted}"
        why = _WHY.get(key, "what the experiment and the instance say would not be heard")
        if key not in given:
            missing.setdefault(why, []).append(f"--{key}")
        elif key == "signal":
            yield from _signal(*given[key])
        elif given[key][0] != (None if wanted is None else str(wanted)):
            yield given[key][1], f"hpc asks for {text_of} here: {why}; write the options block"
    for why, keys in missing.items():
        yield None, f"no #SBATCH {', '.join(keys)}: {why}; write the options block"


def _signal(value: str | None, line: str) -> Iterator[Finding]:
    flags, _, rest = str(value).rpartition(":")
    if "B" in flags:
        yield line, "--signal with B: tells the batch shell alone, and the ranks never hear; leave B: out"
    if not re.match(r"(SIG)?USR2@\d", rest):
        yield line, f"--signal={value}: the ranks listen to USR2; write USR2@{{{{ notice_s }}}}"


def _read_options(line: str) -> Iterator[tuple[str, str | None]]:
    """(long name, value) of each option in an #SBATCH line; `--key value`, `-k value` and `-kvalue` are read, too."""
    try:
        words = shlex.split(line.removeprefix("#SBATCH").replace("\\\\", "\\"), comments=True)
    except ValueError:
        words = line.split()[1:]
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
        else:
            key, equals, value = SHORT.get(word[1:2], word), word[2:], word[2:]
        if not equals and words and not words[0].startswith("-"):
            equals, value = "=", words.pop(0)
        yield key, value if equals else None


def _parts(lines: list[Line], form: Form) -> Iterator[Finding]:
    code = "\n".join(line.text for line in lines)
    if form.command not in code:
        yield None, "no {{ command }}: nothing would run; write step {{ command }} &"
    for pattern, (name, why, remedy) in _PARTS.items():
        if not re.search(pattern, code):
            yield None, f"no {name}: {why}; write {remedy}"
    if form.rows is not None and (form.rows not in code or "HPC_ARRAY_TASK_ID" not in code):
        yield None, "no {{ array.rows_file }}: an array's tasks would not find their runs; write the run block"
    around = code.replace(form.command, "")
    for field, shown in form.sections.items():
        if shown not in around:
            yield None, f"no {shown!r}: the instance's {field} would have no effect; write its block"
    for line in lines:
        if (call := re.search(r"-m hpc\.requeue\b([^)]*)", line.text)) and len(call[1].split()) < 4:
            yield line.text, 'hpc.requeue decides by all four: write "$run" "$HPC_GENERATION" "$code" "$told"'


def _steps(lines: list[Line], form: Form) -> Iterator[Finding]:
    steps = [line.text for line in lines if re.search(r"(^|[;&|]|\bexec|\bthen|\belse|\{)\s*srun\s", line.text)]
    if not steps:
        yield None, "no srun: SLURM sends the notice of the time limit to steps alone; write the step block"
    for step in steps:
        for pattern, (option, why) in _SRUN.items():
            if not re.search(pattern, step):
                yield step, f"srun without {option}: {why}; add it"
        if any(log not in step for log in form.logs):
            yield step, "srun without the run's logs: 'hpc logs' and 'hpc why' read them there; write the srun block"
        if any(option not in step for option in form.srun_options):
            yield step, "srun without the instance's container: the ranks would run outside; write the srun block"


def _dangers(text: str, lines: list[Line], form: Form) -> Iterator[Finding]:
    if not text.startswith("#!"):
        yield None, "no interpreter in the first line: sbatch refuses it; write #!/usr/bin/env bash"
    errexit = text.splitlines()[0] if re.match(r"#!\S+(\s+\S+)?\s+-\w*e", text) else ""
    for line in lines:
        if re.search(r"\bscontrol\s+requeue\b", line.text):
            yield (
                line.text,
                (
                    "a cancelled job would come back, and an array's raw id requeues all its tasks; "
                    "leave it to hpc.requeue, which asks scontrol itself"
                ),
            )
        if re.search(rf"(==?|-eq)\s*\"?{int(ExitCode.STOPPED)}\b", line.text):
            yield (
                line.text,
                (
                    "srun's code is 143 where ranks leave 0.2 s apart, so it decides nothing; "
                    "leave it to hpc.requeue, which reads what the ranks left"
                ),
            )
        if setting := re.findall(r"\bset\s+([-+])(?:\w*e\w*|o\s+errexit)", line.text):
            errexit = line.text if setting[-1] == "-" else ""
        if errexit and (form.command in line.text or re.search(r"-m hpc\.(attempt|requeue)|\bwait\b", line.text)):
            yield errexit, "set -e ends the script at srun's code, before the tail; write 'set +e' above the step"
            errexit = ""


def _place(line: str | None, sentence: str, form: Form, written: str) -> str:
    """`line N: TEXT: sentence`, N that of the template's line which begins most like it; of a missing one: sentence."""
    if line is None:
        return sentence
    shown = line.splitlines()[0].replace(form.command, "{{ command }}")
    alike = [_common(shown, given.strip()) for given in written.splitlines()] or [0]
    most = max(alike)
    place = f"line {alike.index(most) + 1}: " if most >= min(_ALIKE, len(shown)) else ""
    return f"{place}{shown}: {sentence}"


def _common(one: str, other: str) -> int:
    """Letters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
