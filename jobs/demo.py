"""`make demo`: the main job on real brain scans, through the user's own commands, printed as they run.

Packs patches of three T1 templates into HDF5, submits a 3D ResNet and a 3D transformer (SLURM where sbatch answers,
else here), stops the first in mid-epoch with the real signal, lets it resume, and evaluates both.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from hpc.experiment import load
from hpc.rundir import RunDir, read_json
from jobs.precision import emulates_bf16
from jobs.realdata.making import make
from jobs.realdata.wheels import Unavailable

_DEMO = Path("demo")
_RUNS, _SET = _DEMO / "runs", "t1-patches"
_DATA = _DEMO / f"{_SET}.h5"
_STOP_AFTER = 1.4  # epochs


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def hpc(*arguments: str, capture: bool = False) -> str:
    """Run one of the user's commands, printed as it would be typed."""
    command = [str(Path(sys.executable).with_name("hpc")), *arguments]
    print(f"$ {shlex.join(['hpc', *arguments])}", flush=True)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE if capture else None, check=False)
    if done.returncode:
        sys.exit(f"hpc {arguments[0]} left with {done.returncode}")
    return done.stdout or ""


def pack() -> None:
    try:
        make(_SET, _DEMO)
    except (Unavailable, OSError) as error:
        sys.exit(str(error))
    hpc("inspect", str(_DATA), "--verify", "--png", str(_DEMO / "patches.png"))


def _precision() -> list[str]:
    """As the recipe says, but fp32 where it would take a CPU hours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ["train.precision=fp32"] if emulates_bf16(device) else []


def submit(recipe: str) -> RunDir:
    answer = hpc("submit", recipe, f"data.file={_DATA}", *_precision(), "--json", "--runs", str(_RUNS), capture=True)
    print(answer, end="", flush=True)
    return RunDir(json.loads(answer)["path"])


def stop_in_mid_epoch(run: RunDir) -> None:
    """Send the signal of a SLURM time limit once the run is in the middle of an epoch."""
    epochs = load(run.experiment)[0].train.epochs
    now: dict[str, Any] = {}
    while now.get("step", 0) < _STOP_AFTER * now.get("steps", 1 << 30) / epochs:
        time.sleep(0.2)
        now = read_json(run.state)
        if now.get("phase") == "ended":
            return
    job = now.get("job")
    command = ["scancel", "--signal=USR2", str(job)] if job else ["kill", "-USR2", str(now["pid"])]
    say(f"step {now['step']}: stopping it with the signal that SLURM sends ahead of a time limit")
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)
    if job:
        _shorten_the_wait(str(job))


def _shorten_the_wait(job: str) -> None:
    """SLURM holds a requeued job back for two minutes; the demo does not wait. (A start in the same second fails.)"""
    for _ in range(300):
        time.sleep(0.2)
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T %r"], text=True, capture_output=True, check=False)
        if asked.stdout.startswith("PENDING"):
            command = ["scontrol", "update", f"JobId={job}", "StartTime=now+2"]
            print(f"$ {shlex.join(command)}", flush=True)
            subprocess.run(command, check=True)
            return


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)
    started = time.monotonic()
    shutil.rmtree(_DEMO, ignore_errors=True)
    say("1. Real scans: patches of 24 mm of three T1 brain templates, from six groups of regions; the third validates")
    pack()
    say("2. What will run: the experiment as resolved, the batch script, the checks")
    hpc("plan", "t1-resnet3d", f"data.file={_DATA}", "--runs", str(_RUNS))
    say("3. The 3D ResNet, stopped in mid-epoch and resumed")
    resnet = submit("t1-resnet3d")
    stopper = threading.Thread(target=stop_in_mid_epoch, args=(resnet,))
    stopper.start()
    hpc("logs", resnet.name, "-f", "--runs", str(_RUNS))
    stopper.join()
    say("4. The 3D transformer")
    transformer = submit("t1-transformer3d")
    hpc("logs", transformer.name, "-f", "--runs", str(_RUNS))
    say("5. Results")
    hpc("ls", "--runs", str(_RUNS))
    for run in (resnet, transformer):
        hpc("evaluate", run.name, "--runs", str(_RUNS))
    hpc("report", resnet.name, transformer.name, "--runs", str(_RUNS), "-o", str(_DEMO / "report"))
    _check((resnet, transformer))
    say(f"Done in {time.monotonic() - started:.0f} s. Figures:")
    for path in sorted([_DEMO / "patches.png", *_RUNS.glob("*/figures/*.png"), _DEMO / "report" / "index.html"]):
        print(f"  {path}")
    print("\nTensorBoard, with a confusion matrix for every epoch:")
    print(f"  {Path(sys.executable).parent}/hpc board --runs {_RUNS}")


def _check(runs: tuple[RunDir, RunDir]) -> None:
    """The demo fails where it did not show what it says: a resumed run, and accuracy far above the majority class."""
    for run in runs:
        result = read_json(run.result)
        accuracy, majority = result["best"]["metrics"]["accuracy"], result["majority"]
        attempts = result["attempts"]
        print(f"{run.name}: accuracy {accuracy:.3f}, majority class {majority:.3f}, {attempts} attempts")
        if accuracy < 3 * majority:
            sys.exit(f"{run.name}: accuracy {accuracy:.3f} is not far above the majority class {majority:.3f}")
    if read_json(runs[0].result)["attempts"] < 2:
        sys.exit("the ResNet was to be stopped and resumed, but made one attempt only")


if __name__ == "__main__":
    main()
