"""TensorBoard on the runs folder, on 127.0.0.1 only: it has no login, and every user of a node can reach its ports."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

from hpc.errors import UserError


def serve(runs: Path, port: int) -> int:
    """Run TensorBoard until Ctrl-C. Raises UserError where it or the runs are missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed here: pip install tensorboard")
    if not runs.is_dir():
        raise UserError(f"{runs}: no runs yet; start one with 'hpc submit EXPERIMENT.yaml'")
    if port == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    print(
        f"http://127.0.0.1:{port}  (from elsewhere: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()})", flush=True
    )
    # The default keeps 10 pictures of a tag: a confusion matrix per epoch needs more.
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(runs),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--samples_per_plugin", "images=1000,scalars=100000", "--reload_multifile", "true"]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0
