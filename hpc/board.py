"""TensorBoard on chosen runs, on 127.0.0.1 only: it has no login, and every user of a machine can reach its ports.

TensorBoard sees a folder of links, one for each run, so that a run's name is its folder's and not a path into it; both
of its loaders follow links (--logdir_spec would turn its fast one off). Links of new runs are added while it serves.
"""

from __future__ import annotations

import getpass
import importlib.util
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hpc.errors import UserError
from hpc.parent import end_with_parent
from hpc.preempt import ExitCode
from hpc.rundir import RunDir

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
_REFRESH = 5.0
"""Seconds between two looks for new runs; TensorBoard looks into its folder as often."""
_GRACE = 10.0
"""Seconds from TERM to KILL."""
# TensorBoard's own limits are 10 pictures and 1000 values of a tag; 0 would show none in either loader.
_LIMITS = "images=1000,scalars=100000,tensors=1000"


def serve(runs: Callable[[], Sequence[RunDir]], folder: Path, port: int, host: str, open_to_others: bool) -> int:
    """Serves the runs that `runs` names, asked again and again, until Ctrl-C or TERM; returns the exit code.

    `folder` is the runs folder: names are relative to it. Raises UserError where TensorBoard or runs are missing, for
    a port that is taken, and for an address others can reach unless `open_to_others`.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed here: pip install tensorboard")
    if not runs():
        raise UserError(f"{folder}: no runs yet; start one with 'hpc submit EXPERIMENT.yaml'")
    _check_address(host, open_to_others)
    port = _free(host, port)
    print(address(host, port), flush=True)
    print(_warning(host), file=sys.stderr, flush=True)
    with _told_to_stop() as told, tempfile.TemporaryDirectory(prefix="hpc-board-") as links:
        _link(runs(), folder, Path(links))
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", links, "--host", host, "--port", str(port)]
        command += ["--samples_per_plugin", _LIMITS, "--reload_multifile", "true", "--reload_interval", str(_REFRESH)]
        # In a session of its own: Ctrl-C reaches this process alone, which ends the server and takes the links away.
        server = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
        try:
            while not told.wait(_REFRESH) and server.poll() is None:
                _link(runs(), folder, Path(links))
        finally:
            _end(server)
    if told.is_set():
        return ExitCode.DONE
    print(f"TensorBoard has ended with exit code {server.returncode}", file=sys.stderr)
    return ExitCode.CRASH


def address(host: str, port: int) -> str:
    """Where to look, and the line that brings it to one's own machine."""
    here = LOOPBACK if host == EVERYWHERE else f"[{host}]" if ":" in host else host
    machine = socket.gethostname()
    return f"http://{here}:{port}\nfrom elsewhere:  ssh -L {port}:{here}:{port} {getpass.getuser()}@{machine}"


def _warning(host: str) -> str:
    who = "every user of this machine" if is_loopback(host) else f"everyone who can reach {host}"
    advice = "; with 'hpc sync' the logs come to your own machine, and 'hpc board' there is yours alone"
    return f"TensorBoard has no login: {who} can read these runs while it serves{advice}"


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(host: str, open_to_others: bool) -> None:
    if not is_loopback(host) and not open_to_others:
        raise UserError(
            f"{host}: TensorBoard has no login, so others could read these runs; leave {LOOPBACK} and use the 'ssh -L' "
            "line that is printed, or add --open-to-others if everyone on that network may read them"
        )


def _free(host: str, port: int) -> int:
    """The port, or any free one for 0. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{host}:{port}: {why}; --port 0 takes a free port") from None
        return int(probe.getsockname()[1])


def _link(runs: Sequence[RunDir], folder: Path, links: Path) -> None:
    """A link to each run's event files, named as the run is inside its folder: sweep/row for the row of a sweep."""
    for run in runs:
        path = run.path.resolve()
        inside = path.is_relative_to(folder)
        link = links / (path.relative_to(folder) if inside else path.name)
        if run.tensorboard.is_dir() and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(run.tensorboard.resolve(), target_is_directory=True)


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by Ctrl-C and TERM, which do nothing else meanwhile."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(server: subprocess.Popen[bytes]) -> None:
    """TERM, then KILL to all of its session: its data server is a process of its own."""
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(_GRACE)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
