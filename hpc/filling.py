"""From template and values to text: Jinja2's sandbox, every value shell-quoted; a user's own template is linted."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any

import slurm_templates
from hpc import lint
from hpc.errors import UserError
from hpc.instances import Instance
from hpc.sections import on_node, one_line

FOLDER = Path(slurm_templates.__file__).parent
JOB = "job.sbatch.j2"
_FUNCTION = "function.sbatch.j2"
_NOT_EVERYWHERE = ("run", "array", "slurm_job", "stdout", "stderr", "parent")
"""Variables that not every form has."""

_LONGEST = 1_000_000
_HIGHEST_POWER = 64
_SLIPS = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
"""What a template's expressions may raise."""

Options = dict[str, str | int | None]


class Raw(str):
    """Text that goes into the script as it is."""


def fill(instance: Instance, context: dict[str, Any], options: Options, function: bool = False) -> str:
    """The script. Raises UserError for a value that no `#SBATCH` line can carry, or faults of an own template."""
    for key, value in options.items():
        try:
            one_line(str(value))
        except ValueError as error:
            raise UserError(f"#SBATCH --{key}: {error}") from None
        if key in ("output", "error") and "\\" in str(value):
            raise UserError(
                f"#SBATCH --{key}: {str(value)!r} has a backslash, after which SLURM fills in no job id, and the logs "
                f"are lost; choose another folder"
            )
    for section in ("prologue", "epilogue"):
        if words := lint.syntax("\n".join(getattr(instance, section))):
            raise UserError(f"instance {instance.name}: {section}: bash -n: {words}")
    context = {**context, "options": options}
    environment = _environment()
    shipped = environment.get_template(JOB)
    if instance.template:
        return _fill_own(instance, context, environment, shipped, function)
    try:
        return _text(environment, shipped, context, function)
    except ValueError as error:
        raise UserError(f"instance {instance.name}: {error}") from None


def _fill_own(instance: Instance, context: dict[str, Any], environment: Any, shipped: Any, function: bool) -> str:
    """A user's own template, linted: each fault a line of a UserError."""
    from jinja2 import TemplateError

    path = Path(str(instance.template))
    try:
        written = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the template of instance {instance.name} cannot be read ({error})") from None
    faults = lint.source(written, {*context, *_NOT_EVERYWHERE}, environment, shipped.blocks)
    text = ""
    if not faults:
        try:
            text = _text(environment, environment.from_string(written), context, function)
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            TypeError,
            ValueError,
        ) as error:
            form = "a function" if function else "an array" if context["array"] else "a single run"
            faults = [f"rendered for {form}: {str(error) or type(error).__name__}"]
    if not faults and not function:
        faults = lint.script(text, _form(instance, context), written)
    if faults:
        raise UserError("\n".join(f"{path}: {fault}" for fault in faults))
    return text


def _text(environment: Any, job: Any, context: dict[str, Any], function: bool) -> str:
    """`job`, or the function's text over its blocks."""
    if not function:
        return _rendered(job, context)
    text = _rendered(environment.get_template(_FUNCTION), {**context, "parent": job})
    if "SUBMITIT_EXECUTOR" not in text or "hpc.requeue" in text:
        raise ValueError("a function's job replaces the blocks run, attempt, srun and tail; keep these in the template")
    return text


def _rendered(template: Any, context: dict[str, Any]) -> str:
    """Raises ValueError where the text is too long, before all of it is there."""
    parts, length = [], 0
    for part in template.generate(context):
        parts.append(part)
        length += len(part)
        _bounded(length)
    return "".join(parts)


def _bounded(length: int) -> None:
    if length > _LONGEST:
        raise ValueError(f"a text of {length:,} characters or more; a script has {_LONGEST:,} at most")


def _form(instance: Instance, context: dict[str, Any]) -> lint.Form:
    """What lint holds the script to."""
    sections = {
        **{f"environment {key}": f"export {key}=" for key in instance.environment},
        **{f"modules {name}": f"module load {shlex.quote(name)}" for name in instance.modules},
    }
    if instance.venv:
        sections["venv"] = f"{on_node(instance.venv)}/bin/activate"
    if instance.scratch:
        sections["scratch"] = "HPC_SCRATCH="
    array, job = context["array"], context["slurm_job"]
    return lint.Form(
        options=context["options"],
        command=context["command"],
        logs=(context["output"](job), context["output"](job, stream="err")),
        srun_options=tuple(context["srun_options"]),
        rows=shlex.quote(str(array["rows_file"])) if array else None,
        sections=sections,
    )


@cache
def _environment() -> Any:
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # What super() and macros return is quoted already.
    environment.concat = lambda parts: Raw("".join(parts))  # type: ignore[method-assign]
    # A slip must not fill the memory: "-" * 10**9.
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table = {**environment.binop_table, "*": _times, "**": _power}
    environment.filters["raw"] = Raw
    environment.filters["sbatch"] = _sbatch
    environment.filters["on_node"] = lambda text: Raw(on_node(text))
    return environment


def _quoted(value: Any) -> Raw:
    if isinstance(value, Raw):
        return value
    text = str(value)
    _bounded(len(text))
    return Raw(shlex.quote(text))


def _times(left: Any, right: Any) -> Any:
    for many, count in ((left, right), (right, left)):
        if hasattr(many, "__len__") and isinstance(count, int):
            _bounded(len(many) * count)
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if exponent > _HIGHEST_POWER:
        raise ValueError(f"a power of {exponent}; {_HIGHEST_POWER} is the highest")
    return base**exponent


def _sbatch(value: str | int) -> Raw:
    """A value in an `#SBATCH` line, where a backslash escapes even in single quotes (seen on 22.05)."""
    return Raw(shlex.quote(str(value)).replace("\\", "\\\\"))
