"""A real sshd on 127.0.0.1 with throw-away keys, on a port of its own, stopped by its own pid.

    with Sshd(tmp_path) as server:
        subprocess.run([*server.ssh, server.host, "true"])

`server.env` makes `hpc sync` reach it as `box`: HPC_SSH names its config, XDG_RUNTIME_DIR its own sockets.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
MISSING = "" if Path(SSHD).exists() and shutil.which("rsync") else "openssh-server and rsync are not installed here"


class Sshd:
    """One server; its only user is the one who runs the tests."""

    host = "box"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sshd"
        self.sockets = Path(tempfile.mkdtemp(prefix="hpc-sync-"))  # the path of a socket must be short
        self.config = self.folder / "ssh_config"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def ssh(self) -> list[str]:
        return ["ssh", "-F", str(self.config)]

    @property
    def env(self) -> dict[str, str]:
        return {"HPC_SSH": f"ssh -F '{self.config}'", "XDG_RUNTIME_DIR": str(self.sockets)}

    def __enter__(self) -> Self:
        self.folder.mkdir()
        for name in ("host", "user"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(self.folder / name)]
            subprocess.run(key, check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        (self.folder / "authorized").chmod(0o600)
        self._write_configs()
        self.start()
        return self

    def _write_configs(self) -> None:
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f'HostKey "{self.folder / "host"}"',
            f'AuthorizedKeysFile "{self.folder / "authorized"}"',
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
            "SetEnv PATH=/usr/bin:/bin",  # no slow shims
            f"PermitRootLogin {'prohibit-password' if os.getuid() == 0 else 'no'}",
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        options = [
            f"Host {self.host}",
            "HostName 127.0.0.1",
            f"Port {self.port}",
            f'IdentityFile "{self.folder / "user"}"',
            "IdentitiesOnly yes",
            f'UserKnownHostsFile "{self.folder / "known"}"',
            "StrictHostKeyChecking accept-new",
            "LogLevel ERROR",
        ]
        self.config.write_text("\n    ".join(options) + "\n")

    def start(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # the folder for privilege separation, of Debian's service
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"sshd does not listen: {(self.folder / 'log').read_text()}")

    def stop(self) -> None:
        """End the shared connections and the server; what it serves loses its connection."""
        for path in (self.sockets / "hpc").glob("*"):
            command = [*self.ssh, "-o", f"ControlPath={path}", "-O", "exit", self.host]
            subprocess.run(command, capture_output=True, check=False)
        if self._process:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.sockets, ignore_errors=True)
