"""The last resort of a watchdog: a small process that ends its rank once Python has been silent there for too long.

Where C code holds Python's lock for ever, no thread of the rank's Python runs. A deadline would also pass while a job
is suspended (`scontrol suspend`, PreemptMode=SUSPEND, SIGSTOP), and end it as it is continued; so this process counts
its own ticks, of which there are none while it is suspended too, and none of those in which the rank is stopped.
Run by its path, without site-packages: it needs a little of the standard library alone.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

_TICK_S = 1.0
_LEAVE_S = 10.0
"""For the stacks, which faulthandler writes at SIGABRT."""


class LastResort:
    """Ends this process unless `allow` is called again within the seconds that the last call allowed."""

    def __init__(self) -> None:
        command = [sys.executable, "-IS", __file__, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
        assert self._process.stdin
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def allow(self, seconds: float) -> None:
        with suppress(OSError, ValueError):  # it is stopped, gone, or closed meanwhile
            self._pipe.write(f"{seconds:.3f}\n".encode())

    def close(self) -> None:
        """At once, also where it is stopped, or a process that was forked here holds the other end of its pipe."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def _is_overdue(rank: int) -> bool:
    """Wait; False where the rank has ended, or has closed the pipe."""
    left = float("inf")
    while os.getppid() == rank:
        if select.select([0], [], [], _TICK_S)[0]:
            told = os.read(0, 1 << 16).split()
            if not told:
                return False
            left = float(told[-1])
        elif not _stopped(rank):
            left -= _TICK_S
            if left <= 0:
                return True
    return False


def _stopped(pid: int) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - pathlib is half of the start
        return stat.read().rpartition(")")[2].split()[0] in "Tt"
    return False


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # what a rank is to hear is not for us
    rank = int(sys.argv[1])
    if not _is_overdue(rank):
        return
    os.write(2, b"\nPython gives no sign of life here: C code holds its lock. Ended by SIGABRT; all threads:\n")
    with suppress(OSError):
        resource.prlimit(rank, resource.RLIMIT_CORE, (0, 0))  # no file as large as the memory
    os.kill(rank, signal.SIGABRT)
    time.sleep(_LEAVE_S)
    if os.getppid() == rank:
        os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    main()
