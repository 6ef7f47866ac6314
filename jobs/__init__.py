"""What runs inside an allocation, and whatever needs torch; the only room that knows hpc, datasets and models3d.

`datasets` is also the name of Hugging Face's distribution, so this package checks at import that it got ours.
"""

import atexit
import importlib.util
import os
import select
import signal
import sys
from pathlib import Path
from types import TracebackType

_root = Path(__file__).resolve().parent.parent
_spec = importlib.util.find_spec("datasets")
_found = Path(_spec.origin).resolve() if _spec is not None and _spec.origin else None
if _found is None or _found.parent.parent != _root:
    raise ImportError(
        f"jobs was imported from {_root}, but datasets from {_found}. Put {_root} first on PYTHONPATH "
        f"('hpc env' prints the line), or uninstall the other package called datasets."
    )


def _ends_in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError) and _nobody_reads():
        os._exit(128 + signal.SIGPIPE)
    else:
        sys.__excepthook__(kind, error, trace)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that its reader has left, as with `| head`; then the rest goes nowhere."""
    poll = select.poll()
    poll.register(1, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return left


if sys.argv[:1] == ["-m"]:  # so it stands while `python -m jobs.X` looks for X: what X imports takes a second or more
    sys.excepthook = _ends_in_a_line
    atexit.register(_nobody_reads)
