"""The node check against what nvidia-smi says on healthy, sick and strange nodes, and against real scratch folders."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc import health, nvidia
from hpc.attempt import process_alive
from hpc.errors import UserError

UUIDS = [f"GPU-{number}7f1c6d0-5b4a-11ee-9d5c-00000000000{number}" for number in range(4)]
TOOL = """#!/usr/bin/env bash
cd "$(dirname "$0")"
echo "$*" >> calls
say() { cat "$1" 2>/dev/null; exit "$(cat code 2>/dev/null || echo 0)"; }
case "$1" in
  --query-gpu=*ecc*) say errors ;;
  --query-gpu=*) say place ;;
  --query-remapped-rows=*) say rows ;;
  -L) say list ;;
esac
"""


class FakeSmi:
    """An nvidia-smi that says what it was told to; a node of healthy A100s until then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "nvidia-smi").write_text(TOOL)
        (folder / "nvidia-smi").chmod(0o755)
        self.node(4)

    def node(self, gpus: int) -> None:
        names = [f"{number}, {UUIDS[number]}" for number in range(gpus)]
        self.says("place", *(f"{name}, 4, 40960" for name in names))
        self.says("errors", *(f"{name}, 0, [N/A]" for name in names))
        self.says("rows", *(f"{UUIDS[number]}, No, No" for number in range(gpus)))

    def says(self, what: str, *lines: str, code: int = 0) -> None:
        (self.folder / what).write_text("".join(f"{line}\n" for line in lines))
        (self.folder / "code").write_text(str(code))


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSmi:
    smi = FakeSmi(tmp_path / "smi")
    monkeypatch.setenv("PATH", f"{smi.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(health, "PATIENCE_S", 0.2)
    monkeypatch.setattr(health, "_RETRY_S", 0.05)
    return smi


def faults(gpus: int, visible: str | None = None, exclusive: bool = True) -> list[str]:
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return health.check(gpus, exclusive, given).faults


@pytest.mark.parametrize(
    ("gpus", "visible"),
    [(4, None), (4, "0,1,2,3"), (2, "2,3"), (1, UUIDS[3]), (1, UUIDS[3][:12]), (4, "1"), (0, "")],
)
def test_a_healthy_node(smi: FakeSmi, gpus: int, visible: str | None) -> None:
    assert faults(gpus, visible) == []


def test_a_node_without_the_tool_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    report = health.check(1, True, {})
    assert (report.faults, report.unchecked) == ([], ["no nvidia-smi here: GPUs are not checked"])
    assert health.check(0, True, {}).unchecked == []


GONE = "Unable to determine the device handle for GPU1: 0000:41:00.0: Unknown Error"


@pytest.mark.parametrize(
    ("lines", "code", "gpus", "visible", "told"),
    [
        (["No devices were found"], 6, 1, "0", "nvidia-smi shows 0 of 1 GPUs (No devices were found)"),
        (
            ["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the driver"],
            9,
            1,
            None,
            "nvidia-smi shows 0 of 1 GPUs (NVIDIA-SMI has failed because",
        ),
        (["Failed to initialize NVML: Driver/library version mismatch"], 18, 2, "0,1", "shows 0 of 2 GPUs (Failed to"),
        ([GONE, f"0, {UUIDS[0]}, 4, 40960"], 15, 2, "0,1", f"shows 1 of 2 GPUs ({GONE})"),
        ([f"0, {UUIDS[0]}, 4, 40960"], 0, 2, None, "nvidia-smi shows 1 of 2 GPUs"),
        ([f"0, {UUIDS[0]}, ERR!, 40960"], 0, 1, "0", "GPU 0: memory.used reads ERR!"),
        ([f"0, {UUIDS[0]}, [GPU is lost], [GPU is lost]"], 0, 1, "0", "GPU 0: memory.used reads [GPU is lost]"),
        ([f"0, {UUIDS[0]}, [Unknown Error], 40960"], 0, 1, None, "GPU 0: memory.used reads [Unknown Error]"),
        ([f"0, {UUIDS[0]}, 30720, 40960"], 0, 1, "0", "GPU 0: 30.0 of 40 GB are in use before the job begins"),
    ],
)
def test_a_sick_node(smi: FakeSmi, lines: list[str], code: int, gpus: int, visible: str | None, told: str) -> None:
    smi.says("place", *lines, code=code)
    found = faults(gpus, visible)
    assert told in found[0], found


@pytest.mark.parametrize("visible", ["0", UUIDS[0], "0,2"])
def test_what_ails_a_neighbours_gpu_is_no_fault_of_ours(smi: FakeSmi, visible: str) -> None:
    ours = [f"{number}, {UUIDS[number]}" for number in (0, 2)]
    theirs = f"3, {UUIDS[3]}"
    smi.says("place", GONE, *(f"{name}, 4, 40960" for name in ours), f"{theirs}, 39000, 40960", code=15)
    smi.says("errors", *(f"{name}, 0, No" for name in ours), f"{theirs}, 12, Yes")
    smi.says("rows", f"{UUIDS[3]}, Yes, Yes")
    assert faults(2, visible) == []


@pytest.mark.parametrize(
    ("errors", "rows", "told"),
    [
        ("0, [N/A]", "No, No", []),
        ("[N/A], [N/A]", "[N/A], [N/A]", []),
        ("[Not Supported], [Not Supported]", "", []),
        ("3, [N/A]", "No, No", ["GPU 0: 3 uncorrected memory errors (ECC) since its driver was loaded"]),
        ("0, Yes", "", ["GPU 0: memory pages wait to be retired, it needs a reset"]),
        ("0, No", "Yes, No", ["GPU 0: memory rows wait to be remapped, it needs a reset"]),
        ("0, No", "0, 1", ["GPU 0: its bad memory rows could not be remapped"]),
        (
            "[GPU requires reset], No",
            "No, No",
            ["GPU 0: ecc.errors.uncorrected.volatile.total reads [GPU requires reset]"],
        ),
    ],
)
def test_memory_errors(smi: FakeSmi, errors: str, rows: str, told: list[str]) -> None:
    smi.says("errors", f"0, {UUIDS[0]}, {errors}")
    smi.says("rows", *([f"{UUIDS[0]}, {rows}"] if rows else ["Option --query-remapped-rows is not recognized"]))
    assert faults(1, "0") == told


def test_counters_that_a_card_does_not_have_are_no_fault(smi: FakeSmi) -> None:
    smi.says("errors", 'Field "retired_pages.pending" is not a valid field to query.', code=2)
    assert faults(1, "0") == []


def test_memory_that_is_freed_in_time_and_what_a_desktop_uses_are_no_fault(smi: FakeSmi) -> None:
    smi.says("place", f"0, {UUIDS[0]}, 30720, 40960")
    assert faults(1, "0", exclusive=False) == []
    tool = smi.folder / "nvidia-smi"
    tool.write_text(TOOL.replace("*) say place ;;", "*) cat place; sed -i s/30720/400/ place ;;"))
    assert faults(1, "0") == []
    assert len([call for call in (smi.folder / "calls").read_text().splitlines() if "memory.used" in call]) == 3


SLICE = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"


def test_slices_of_a_gpu_are_looked_for_by_name(smi: FakeSmi) -> None:
    smi.says("place", f"0, {UUIDS[0]}, 39000, 40960")
    smi.says("list", f"GPU 0: NVIDIA A100 (UUID: {UUIDS[0]})", f"  MIG 1g.5gb     Device  0: (UUID: {SLICE})")
    assert faults(1, SLICE) == []
    lost = f"MIG-{UUIDS[0]}/7/0"
    assert faults(2, f"{SLICE},{lost}") == [f"nvidia-smi does not list {lost}"]


@pytest.mark.parametrize("visible", ["", "NoDevFiles", "-1"])
def test_a_job_whose_gpus_are_hidden(smi: FakeSmi, visible: str) -> None:
    assert faults(1, visible) == ["the job has a GPU here, but CUDA_VISIBLE_DEVICES names none"]


def test_a_hanging_tool_is_a_bad_node_and_is_not_waited_for(smi: FakeSmi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "TIMEOUT_S", 0.3)
    (smi.folder / "nvidia-smi").write_text(
        "#!/usr/bin/env bash\ntrap '' TERM\nsleep 300 & echo $! > $0.pid; wait; touch $0.done\n"
    )
    assert faults(1, "0") == ["nvidia-smi does not answer within 0.3 s"]
    assert not (smi.folder / "nvidia-smi.done").exists(), "the tool itself takes five minutes"
    child, end = int((smi.folder / "nvidia-smi.pid").read_text()), time.monotonic() + 60
    while process_alive(child):
        assert time.monotonic() < end, "what the tool started lives on"
        time.sleep(0.01)
    with pytest.raises(nvidia.Silent):
        nvidia.ask("-L", timeout_s=-1)


# Scratch space.


def scratch(path: str, needed: str | None = None, **more: str) -> list[str]:
    limit = {} if needed is None else {"HPC_SCRATCH_GB": needed}
    return health.check(0, True, {"HPC_SCRATCH": path, **limit, **more}).faults


def test_scratch_space(tmp_path: Path) -> None:
    assert scratch(str(tmp_path)) == []
    assert scratch("$BASE/${LAST}", "0.000001", BASE=str(tmp_path.parent), LAST=tmp_path.name) == []
    (fault,) = scratch(str(tmp_path), "1e6")
    assert fault.startswith(f"scratch space {tmp_path}: ") and fault.endswith(" of the 1e+06 GB needed are free")
    missing = tmp_path / "none"
    assert scratch(str(missing)) == [f"scratch space {missing}: No such file or directory"]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_scratch_space_that_cannot_be_written() -> None:
    (fault,) = scratch("/proc/self")
    assert fault.startswith("scratch space /proc/self: ")


@pytest.mark.parametrize("path", ["$NOWHERE", "", "here"])
def test_scratch_that_is_named_wrongly_is_no_nodes_fault(path: str) -> None:
    with pytest.raises(UserError, match="not a path: a variable of it is not set here"):
        scratch(path)


def test_scratch_space_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(health, "_look_at", lambda *_: [str(time.sleep(2))])
    assert scratch(str(tmp_path)) == [f"scratch space {tmp_path} has not answered for 0.2 s"]


def test_the_check_is_made_without_torch() -> None:
    code = "import sys, hpc.health, hpc.sampler, hpc.usage; print(set(sys.modules) & {'torch', 'pydantic', 'yaml'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
