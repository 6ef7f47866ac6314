"""The test cluster by hand: `sudo .venv/bin/python -m tests.slurm --shell`; `--reap` ends what killed sessions left."""

import argparse
import signal
import sys

from tests.slurm.cluster import Cluster, ClusterError, reap


def shell(nodes: int, accounting: bool) -> None:
    """Keeps a cluster until Ctrl-C or the end of the input, and says how to reach it."""
    with Cluster(nodes=nodes, accounting=accounting) as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
        print(f"Up in {cluster.start_seconds:.1f} s; Ctrl-C or the end of the input stops it.", flush=True)
        sys.stdin.read()


def main() -> int:
    """The exit code: 1 when no cluster can be started, with the reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--shell", action="store_true", help="start a cluster and keep it until Ctrl-C")
    action.add_argument("--reap", action="store_true", help="stop what killed sessions left behind")
    parser.add_argument("--nodes", type=int, default=2, help="with --shell; default: 2")
    parser.add_argument("--accounting", action="store_true", help="with --shell: with slurmdbd, for sacct")
    asked = parser.parse_args()
    if asked.reap:
        print("\n".join(f"stopped and removed {folder}" for folder in reap()) or "nothing was left behind")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        shell(asked.nodes, asked.accounting)
    except KeyboardInterrupt:
        return 0
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
