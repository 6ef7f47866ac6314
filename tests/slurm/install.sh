#!/bin/sh
# Installs the SLURM that tests/slurm/cluster.py starts (Debian, Ubuntu; as root). Elsewhere it says so and succeeds.
PATH="$PATH:/usr/sbin:/sbin"

if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then
    exit 0
fi
remedy="the tests on a real SLURM will be skipped. Remedy, as root on Debian or Ubuntu: sh tests/slurm/install.sh"
if [ "$(id -u)" != 0 ]; then
    echo "NOT INSTALLED: SLURM, because this is not root; $remedy" >&2
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "NOT INSTALLED: SLURM, because there is no apt-get; $remedy" >&2
    exit 0
fi

log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if { apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; } >"$log" 2>&1; then
    rm -f "$log"
else
    tail -n 20 "$log" >&2
    echo "NOT INSTALLED: SLURM, because apt-get failed (whole log: $log); $remedy" >&2
fi
