"""TensorBoard on the runs folder, on 127.0.0.1 only: it has no login, and every user of a node can reach its ports."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from hpc.errors import UserError


def serve(runs: Path, port: int) -> NoReturn:
    """Become TensorBoard until Ctrl-C. Raises UserError where it or the runs are missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed here: pip install tensorboard")
    if not runs.is_dir():
        raise UserError(f"{runs}: no runs yet; start one with 'hpc submit EXPERIMENT.yaml'")
    if port == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    host = socket.gethostname()
    print(f"http://127.0.0.1:{port}  (from elsewhere: ssh -L {port}:127.0.0.1:{port} {host})", flush=True)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1"]
    # The default keeps 10 pictures of a tag: a confusion matrix per epoch needs more.
    command += ["--port", str(port), "--samples_per_plugin", "images=1000,scalars=100000"]
    os.execv(sys.executable, [*command, "--reload_multifile", "true"])
