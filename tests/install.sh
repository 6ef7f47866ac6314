#!/bin/sh
# Installs what the tests start (Debian, Ubuntu; as root): SLURM for tests/slurm/cluster.py, sshd and rsync for logs that
# come home, Chromium for the report's page. Where it cannot, it says so and succeeds.
# Programs only: no service of theirs is started now or enabled for the next boot.
PATH="$PATH:/usr/sbin:/sbin"

missing() { ! command -v "$1" >/dev/null; }
packages=""
if missing slurmctld || missing slurmd; then packages="slurm-wlm"; fi
if missing munged; then packages="$packages munge"; fi
if missing slurmdbd; then packages="$packages slurmdbd"; fi
# The server without its service: slurmdbd keeps its tables there.
if missing mariadbd || missing mariadb-install-db; then packages="$packages mariadb-server-core"; fi
if missing my_print_defaults; then packages="$packages mariadb-client-core"; fi # the server's tables are made by it
if missing sshd; then packages="$packages openssh-server"; fi
if missing rsync; then packages="$packages rsync"; fi
if missing chromium || missing chromedriver; then packages="$packages chromium chromium-driver"; fi
[ -n "$packages" ] || exit 0

refuse() {
    echo "NOT INSTALLED: ${packages# }, because $1; tests that need it will be skipped." \
        "Remedy, as root on Debian or Ubuntu: sh tests/install.sh" >&2
    exit 0
}
[ "$(id -u)" = 0 ] || refuse "this is not root"
if missing apt-get; then refuse "there is no apt-get"; fi

policy=/usr/sbin/policy-rc.d # Debian's packages start their services unless this script says no
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
fi
enabled=/etc/systemd/system/multi-user.target.wants # links, as systemctl makes them; it is not in every container
fresh=""
for unit in slurmctld slurmd slurmdbd munge ssh rsync; do
    [ -L "$enabled/$unit.service" ] || fresh="$fresh $unit"
done

log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -o DPkg::Lock::Timeout=120 "$@" >>"$log" 2>&1; }
# shellcheck disable=SC2086  # lists of names
if apt update && apt install -y --no-install-recommends $packages; then
    rm -f "$log"
    for unit in $fresh; do rm -f "$enabled/$unit.service"; done
else
    tail -n 20 "$log" >&2
    refuse "apt-get failed (whole log: $log)"
fi
exit 0
