"""Runs whose ranks do what a script says, attempt by attempt, and need no torch: for tests of what is around them.

    run = make(tmp_path, "checkpoint 5, crash", "stop", "hang node0", "done", cluster="local")

Each attempt's acts, in order: `checkpoint STEP`, `stop` (75 with stop.json), `crash`, `code N`, `signal SIGKILL`,
`hang NODE` (76 with its event), `vain REASON` (failed, retry=false), `sleep SECONDS`, `await SIGTERM`,
`environment` (kept in environment.json), `done`.
"""

import json
from pathlib import Path

from hpc import plan, trust
from hpc.rundir import RunDir

_RANK = '''
"""A scripted rank."""
import json, os, signal, sys, time
from contextlib import suppress
from pathlib import Path
from hpc.allocation import Allocation
from hpc.rundir import RunDir, write_json

run, here = RunDir(sys.argv[1]), Allocation.current()
acts = json.loads((run.code / "acts.json").read_text())
for act in acts[min(here.generation, len(acts)) - 1].split(", "):
    word, _, rest = act.partition(" ")
    if word == "checkpoint" and here.rank == 0:
        run.event("checkpoint", "rank0", here.generation, step=int(rest), name=f"s{rest}", seconds=0.1)
    elif word == "stop":
        write_json(run.stop, {"generation": here.generation, "step": 7, "cause": "SIGUSR2"})
        sys.exit(75)
    elif word == "crash":
        raise RuntimeError(f"crash of attempt {here.generation}")
    elif word == "code":
        sys.exit(int(rest))
    elif word == "signal":
        os.kill(os.getpid(), signal.Signals[rest])
    elif word == "hang":
        run.event("hang", f"rank{here.rank}", here.generation, stuck=[{"rank": 0, "node": rest, "why": "a test"}])
        sys.exit(76)
    elif word == "vain":
        run.event("failed", f"rank{here.rank}", here.generation, reason=rest, retry=False)
        sys.exit(1)
    elif word == "sleep":
        time.sleep(float(rest))
    elif word == "await":
        heard = []
        signal.signal(signal.Signals[rest], lambda number, frame: heard.append(number))
        print("waiting", os.getpid(), flush=True)
        while not heard:
            time.sleep(0.05)
        with suppress(OSError):  # no terminal any more
            print("heard", rest, flush=True)
    elif word == "environment":
        names = ("HPC_END_TIME", "HPC_NOTICE_S", "HPC_RESTART_COUNT")
        write_json(run.path / "environment.json", {name: os.environ.get(name) for name in names})
    elif word == "done":
        write_json(run.result, {"finished": True})
'''


def make(folder: Path, *acts: str, overrides: tuple[str, ...] = (), cluster: str = "slurm") -> RunDir:
    """A run as `hpc submit` makes it, in `folder`/runs; the last of the acts is that of all further attempts."""
    file = folder / "scripted.yaml"
    file.write_text(
        "name: scripted\nmodel: {name: resnet3d_tiny}\n"
        f"data: {{file: {folder / 'none.h5'}}}\n"
        f"launch: {{instance: cedia-a100-40gb, cluster: {cluster}, gpus: 0, cpus: 1, mem: 100MB, time: 10min}}\n"
    )
    run = plan.create_next(plan.make(file, list(overrides), folder / "runs"))
    with trust.private():
        (run.code / "jobs" / "run.py").write_text(_RANK)
        (run.code / "acts.json").write_text(json.dumps(list(acts)))
    return run


def causes(run: RunDir) -> list[str]:
    """What the attempts have ended by, so far."""
    return [str(event["cause"]) for event in run.read_events() if event["event"] == "end"]
