"""srun's stand-in where there is no SLURM: `python -m hpc.localstep --tasks N --time S --notice S -- COMMAND...`.

Starts N ranks on this machine, passes USR2, TERM and INT on to them, sends USR2 `--notice` seconds before the time
limit and KILL at it, and ends all when one fails (srun's --kill-on-bad-exit). KILL follows TERM and INT after 30 s, a
second INT (Ctrl-C again) at once. Leaves with the first code that is not 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from hpc.parent import end_with_parent
from hpc.preempt import NOTICE, READY, STOP_SIGNALS, ignore_stops

GRACE_S = 30.0
_REPEAT_S = 1.0
"""A rank that was still starting has not heard the first signal; SLURM repeats its TERM, too."""
_POLL_S = 0.05
_TWICE_S = 1.0
"""An INT so long after the first is a second one, no copy: a terminal and its shell may both send the same Ctrl-C."""


def _prepare_rank() -> None:
    ignore_stops()
    end_with_parent()


class Step:
    """N ranks, started together and ended together."""

    def __init__(self, command: list[str], tasks: int, limit_s: float) -> None:
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._pending: list[int] = []
        self._told, self._told_at = 0, 0.0
        self._kill_at = self._end = time.monotonic() + limit_s
        self._interrupted = float("inf")
        end = {"HPC_END_TIME": f"{time.time() + limit_s:.0f}"} if limit_s < float("inf") else {}
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)
        for rank in range(tasks):
            place = {"HPC_RANK": str(rank), "HPC_WORLD_SIZE": str(tasks), "HPC_LOCAL_RANK": str(rank)}
            environ = {**os.environ, **end, **place}
            # A session of its own: Ctrl-C in a terminal reaches the ranks once, through this process.
            rank_process = subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=_prepare_rank)
            self._ranks.append(rank_process)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(number)

    def _pass_on(self, now: float) -> None:
        """What was heard, to the ranks; who asks for the end gets it, whether they answer or not."""
        while self._pending:
            number = self._pending.pop(0)
            self.tell(number)
            if number != NOTICE:
                self._kill_at = min(self._kill_at, now + GRACE_S)
            if number == signal.SIGINT:
                self._interrupted = min(self._interrupted, now)
                if now >= self._interrupted + _TWICE_S:
                    self._kill_at = now

    def tell(self, number: int) -> None:
        """Send a stop signal to every rank that is still there, and again each second."""
        self._told, self._told_at = number, time.monotonic()
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _kill(self) -> None:
        """KILL the ranks and all that they started."""
        for rank in self._ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)

    def wait(self, notice_s: float) -> int:
        """Wait for all ranks; the first exit code that is not 0, as a shell counts (128 + signal)."""
        noticed, failed = False, 0
        while None in [rank.poll() for rank in self._ranks]:  # each of them is asked: a live first one hides no failure
            now = time.monotonic()
            self._pass_on(now)
            if self._told and now >= self._told_at + _REPEAT_S:
                self.tell(self._told)
            if not noticed and now >= self._end - notice_s:
                noticed = True
                self.tell(NOTICE)
            codes = [rank.returncode for rank in self._ranks if rank.returncode]
            if codes and not failed:
                failed, self._kill_at = codes[0], min(self._kill_at, now + GRACE_S)
                self.tell(signal.SIGTERM)
            if now >= self._kill_at:
                if now >= self._end and not failed:
                    print("the time limit has passed: the ranks are killed", file=sys.stderr, flush=True)
                self._kill()
            time.sleep(_POLL_S)
        code = failed or next((rank.returncode for rank in self._ranks if rank.returncode), 0)
        return code if code >= 0 else 128 - code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc.localstep", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--time", type=float, default=float("inf"), help="seconds until KILL")
    parser.add_argument("--notice", type=float, default=0.0, help="seconds of notice by USR2")
    parser.add_argument("--shell", type=int, help="pid of the batch shell, told when this step hears signals")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    end_with_parent()
    step = Step(command, options.tasks, options.time)
    if options.shell:
        os.kill(options.shell, READY)
    return step.wait(options.notice)


if __name__ == "__main__":
    sys.exit(main())
