"""The house rules of CONTRIBUTING.md, read off the code: who imports whom, who spells what, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"hpc", "jobs", "models3d", "datasets", "slurm_templates"}
ALLOWED = {
    "hpc": {"hpc", "slurm_templates"},
    "slurm_templates": set(),
    "models3d": {"models3d"},
    "datasets": {"datasets"},
    "jobs": OURS,
}
NEVER_IN_HPC = {"torch", "numpy", "h5py", "tensorboard", "matplotlib", "nibabel", "scipy"}
LONGEST_FILE, LONGEST_FUNCTION = 500, 40


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all imports in a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(*OURS), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    wrong = (imported(path) & OURS) - ALLOWED[room]
    assert not wrong, f"{path}: {room} imports {wrong}. jobs -> hpc, datasets, models3d; those import nothing of ours."
    if room == "hpc":
        heavy = imported(path) & NEVER_IN_HPC
        assert not heavy, f"{path}: hpc runs on the login node and never imports {heavy}, not even inside a function."


# The word, and the one file of the rooms that may spell it.
VOCABULARY = [
    (r"\bSLURM_[A-Z_]+", "hpc/allocation.py"),
    (r"[\"'](sbatch|squeue|scontrol|scancel|sinfo|sacct)[\"'],", "hpc/slurm.py"),
    (r"\bsignal\.SIGUSR2\b", "hpc/preempt.py"),
    (r"[\"'](state|stop|submit|result)\.json[\"']", "hpc/rundir.py"),
    (r"[\"'](metrics\.jsonl|job\.sbatch|experiment\.yaml)[\"']", "hpc/rundir.py"),
    (r"[\"']/?(checksums|source_shape)[\"']", "datasets/layout.py"),
    (r"[\"'](model\.safetensors|optimizer\.pt|manifest\.json)[\"']", "jobs/checkpoint.py"),
]
# The demo types what a user would; a checkpoint has a state.json of its own.
ALSO = {
    r"[\"'](sbatch|squeue|scontrol|scancel|sinfo|sacct)[\"'],": {"jobs/demo.py"},
    r"[\"'](state|stop|submit|result)\.json[\"']": {"jobs/checkpoint.py"},
}


@pytest.mark.parametrize(("pattern", "owner"), VOCABULARY, ids=[pattern for pattern, _ in VOCABULARY])
def test_each_word_has_one_owner(pattern: str, owner: str) -> None:
    assert re.search(pattern, (ROOT / owner).read_text()), f"{owner} no longer spells {pattern}: update this table"
    spelt = {
        str(path.relative_to(ROOT))
        for path in sources("hpc", "jobs", "models3d", "datasets")
        for line in path.read_text().splitlines()
        if re.search(pattern, line.split("  # ")[0])
    }
    others = spelt - {owner} - ALSO.get(pattern, set())
    assert not others, f"{pattern} belongs to {owner}, and is spelt in {sorted(others)}"


@pytest.mark.parametrize("path", sources(*OURS, "tests"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= LONGEST_FILE, f"{path} has {lines} lines: redesign it"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path}: the first line says what the file is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            docstring = ast.get_docstring(node)
            length -= len(docstring.splitlines()) if docstring else 0
            assert length <= LONGEST_FUNCTION, f"{path}: {node.name} has {length} lines: redesign it"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = ["torch", "numpy", "h5py", "matplotlib", "submitit", "jinja2", "pydantic", "yaml", "nibabel"]
    code = f"import sys, hpc.cli; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"


HPC_MODULES = ["hpc.experiment", "hpc.submission", "hpc.preflight", "hpc.ledger", "hpc.journal.report"]


@pytest.mark.parametrize("module", HPC_MODULES)
def test_no_module_of_hpc_loads_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'numpy', 'h5py') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"


def test_another_package_called_datasets_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "datasets"
    other.mkdir()
    (other / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import jobs"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert out.returncode == 1
    assert str(other) in out.stderr and "PYTHONPATH" in out.stderr


def test_no_test_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
