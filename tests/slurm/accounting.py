"""The accounting database of a test cluster: slurmdbd over a MariaDB of its own, both in the cluster's folder.

MariaDB answers on a Unix socket in that private folder and nowhere else, so it needs no users and no passwords.
"""

import subprocess
from pathlib import Path

from tests.slurm.processes import ClusterError, search_path

PROGRAMS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db", "my_print_defaults")
# Small and careless with the disk: it lives for some seconds and a crash of the machine may eat it.
MARIADB = (
    "--no-defaults",
    "--user=root",
    "--skip-networking",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-lock-wait-timeout=900",
)


def socket(folder: Path) -> Path:
    """Where MariaDB listens."""
    return folder / "run" / "mariadb.socket"


def environment(folder: Path) -> dict[str, str]:
    """Variables that slurmdbd needs: its configuration knows no sockets, but its client library does."""
    return {"MYSQL_UNIX_PORT": str(socket(folder))}


def configure(folder: Path, port: int, munge_socket: Path | None) -> list[str]:
    """Lines for slurm.conf; writes slurmdbd.conf beside it, which clients that have SLURM_CONF never read."""
    lines = [
        "AuthType=auth/munge",
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={port}",
        "SlurmUser=root",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        "StorageLoc=slurm_acct_db",
        f"PidFile={folder}/run/slurmdbd.pid",
        f"LogFile={folder}/log/slurmdbd.log",
    ]
    if munge_socket:
        lines.append(f"AuthInfo=socket={munge_socket}")
    conf = folder / "slurmdbd.conf"
    conf.touch(mode=0o600)  # or slurmdbd refuses it
    conf.write_text("\n".join([*lines, ""]))
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={port}",
        *([f"AccountingStoragePass={munge_socket}"] if munge_socket else []),
        "AccountingStorageTRES=gres/gpu",
    ]


def make(folder: Path) -> None:
    """Makes an empty MariaDB.

    Raises:
        ClusterError: with the last words of mariadb-install-db.
    """
    command = ["mariadb-install-db", *MARIADB, f"--datadir={folder}/database", "--skip-test-db"]
    done = subprocess.run(command, env={"PATH": search_path()}, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"mariadb-install-db left with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def commands(folder: Path) -> dict[str, list[str]]:
    """The commands of the two daemons, in the order of their start; slurmdbd finds its file by SLURM_CONF."""
    place = (f"--datadir={folder}/database", f"--socket={socket(folder)}")
    return {"mariadbd": ["mariadbd", *MARIADB, *place, "--skip-grant-tables"], "slurmdbd": ["slurmdbd", "-D"]}
