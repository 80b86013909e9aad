#!/usr/bin/env bash
# A Slurm of one node, this one, from Debian's packages (slurmctld slurmd slurm-client munge), all of it below one folder:
#   one_node_slurm.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
# Jobs look for their configuration in /etc/slurm, so a link stands there while it runs.
#   one_node_slurm.sh stop FOLDER
# Needs root. Exit code 77, with the reason, where it cannot be started.
set -euo pipefail
folder=$(mkdir -p "$2" && cd "$2" && pwd)
host=$(hostname -s)

cannot() { echo "no Slurm here: $1" >&2; exit 77; }

stop() {
    if [ "$(readlink /etc/slurm/slurm.conf)" = "$folder/slurm.conf" ]; then rm /etc/slurm/slurm.conf; fi
    for daemon in slurmd slurmctld munged; do
        if [ -f "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true; fi
    done
}

if [ "$1" = stop ]; then stop; exit; fi
if [ -e /etc/slurm/slurm.conf ]; then cannot "this machine has one of its own in /etc/slurm"; fi
[ "$(id -u)" = 0 ] || cannot "its daemons need root"
for program in munged slurmctld slurmd sbatch; do
    PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || cannot "$program is not installed (apt install slurmctld slurmd slurm-client munge)"
done
export PATH=$PATH:/usr/sbin
mkdir -p "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/munge.key" && chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" || cannot "munged does not start"
cat >"$folder/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=17817
SlurmdPort=17818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmctldParameters=enable_configless
JobRequeue=1
PropagatePrioProcess=1
RequeueExit=75
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$folder/slurm.conf
mkdir -p /etc/slurm
ln -s "$SLURM_CONF" /etc/slurm/slurm.conf
slurmctld -f "$SLURM_CONF" || cannot "slurmctld does not start: $(tail -n 1 "$folder/slurmctld.log")"
slurmd -f "$SLURM_CONF" || { stop; cannot "slurmd does not start: $(tail -n 1 "$folder/slurmd.log")"; }
for _ in $(seq 60); do
    if sinfo -h -o %t 2>/dev/null | grep -q idle; then echo "$SLURM_CONF"; exit; fi
    sleep 1
done
stop
cannot "its node does not come up: $(tail -n 1 "$folder/slurmd.log")"
