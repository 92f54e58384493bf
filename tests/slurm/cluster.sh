#!/usr/bin/env bash
# A real Slurm cluster inside one machine: a controller, which is also the login node, and compute
# nodes n1, n2, ...
#
#   cluster.sh up                   start it, or find it running; returns when all nodes are idle
#   cluster.sh run CMD...           on the login node, in this folder, with this environment
#   cluster.sh as USER CMD...       the same as another user
#   cluster.sh on N CMD...          on compute node N
#   cluster.sh power-cut N | boot N the node is gone at once; starts again
#   cluster.sh unplug N | plug N    its network cable
#   cluster.sh slurmd-dies N        its slurmd alone, by kill -9
#   cluster.sh controller-dies | controller-starts
#   cluster.sh timeout SECONDS      SlurmdTimeout: a silent node is DOWN after that
#   cluster.sh status | down
#
# Each machine is a set of Linux namespaces with its own name, address, processes and /dev/shm, joined
# to the others by a bridge that exists in the login node's alone. Killing the first process of one is
# its power cut; of the login node's, the end of all. This machine itself gets no address, no mount.
#
# $CLUSTER_DIR/small is a disk of 32 MB that all of its machines share.
#
# Needs root and Debian's packages slurmctld slurmd slurm-client munge iproute2.
# CLUSTER_DIR (state), CLUSTER_NODES, CLUSTER_GPUS (of a node; device files with nothing behind them),
# CLUSTER_CPUS (of a node, as claimed), CLUSTER_OWNER (a pid: with it the cluster ends, too).
set -euo pipefail

dir=${CLUSTER_DIR:-/tmp/slurm-cluster}
nodes=${CLUSTER_NODES:-4} gpus=${CLUSTER_GPUS:-2} cpus=${CLUSTER_CPUS:-8}
net=10.77.13 small=32m
self=$(readlink -f "$0")
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf
machine=(unshare --net --uts --pid --mount --fork --kill-child --mount-proc)

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
running() { [[ -s $1 ]] && kill -0 "$(< "$1")" 2> /dev/null; }
first_process() {                # of the machine that process $1 has made, numbered as seen from here
  local try pid
  for try in {1..200}; do
    pid=$(cat "/proc/$1/task/$1/children" 2> /dev/null || true)
    [[ -z $pid ]] || { echo "${pid%% *}"; return; }
    sleep 0.02
  done
  die "a machine did not start"
}
adopt_orphans() { while :; do wait -n 2> /dev/null || sleep 0.2; done; }
enter() {                        # enter PID CMD...: on the machine whose first process is PID
  local pid=$1; shift
  nsenter -t "$pid" -n -u -p -m -- bash -c 'cd "$1" 2> /dev/null || cd /; shift; exec "$@"' _ "$PWD" "$@"
}
login() { running "$dir/login.pid" || die "is not up: $self up"; enter "$(< "$dir/login.pid")" "$@"; }

configure() {
  mkdir -p "$dir"/{log,state,spool,dev} && chmod 755 "$dir" "$dir"/*
  (umask 077; head -c 256 /dev/urandom > "$dir/munge.key")
  { echo "127.0.0.1 localhost"; echo "$net.1 login"
    for ((n = 1; n <= nodes; n++)); do echo "$net.$((n + 10)) n$n"; done; } > "$dir/hosts"
  for ((g = 0; g < gpus; g++)); do mknod -m 666 "$dir/dev/gpu$g" c 1 3; done
  local mib=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
  cat > "$dir/gres.conf" <<END
NodeName=n[1-$nodes] Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]
END
  # cred_expire is what a requeued job waits before it may run again. config_overrides: believe the
  # cores claimed below. MinJobAge: jobs that have ended stay visible.
  cat > "$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=login($net.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%h
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%h.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%h.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=15
MinJobAge=86400
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/completed.txt
GresTypes=gpu
NodeName=n[1-$nodes] CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$mib Gres=gpu:$gpus State=UNKNOWN
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=1-0 DefaultTime=10 State=UP
END
}

up() {
  local command began=$SECONDS idle=0
  [[ $(id -u) == 0 ]] || die "needs root"
  for command in slurmctld slurmd sbatch munged unshare nsenter ip; do
    command -v $command > /dev/null ||
      die "no $command: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
  done
  if ! running "$dir/login.pid"; then
    rm -rf "$dir"; mkdir -p "$dir"; configure
    setsid "${machine[@]}" "$self" _login >> "$dir/log/login.log" 2>&1 < /dev/null &
    first_process $! > "$dir/login.pid"
    if [[ -n ${CLUSTER_OWNER:-} ]]; then
      setsid "$self" _follow "$CLUSTER_OWNER" > /dev/null 2>&1 < /dev/null &
    fi
  fi
  while ((SECONDS - began < 60)) && running "$dir/login.pid"; do
    idle=$(login timeout 5 sinfo -h -N -o %T 2> /dev/null | grep -c '^idle$' || true)
    [[ $idle == "$nodes" ]] && { say "$nodes nodes idle after $((SECONDS - began)) s; SLURM_CONF=$SLURM_CONF"; return; }
    sleep 0.2
  done
  tail -n 20 "$dir"/log/*.log >&2
  die "only $idle of $nodes nodes are idle after $((SECONDS - began)) s"
}

down() {
  local try
  if running "$dir/login.pid"; then
    kill -9 "$(< "$dir/login.pid")"
    for try in {1..100}; do running "$dir/login.pid" || break; sleep 0.05; done
  fi
  rm -rf "$dir"
}

_follow() { while kill -0 "$1" 2> /dev/null; do sleep 1; done; down; }

_login() {                       # the first process of the login node
  hostname login
  mount --bind "$dir/hosts" /etc/hosts
  ip link set lo up
  mkdir "$dir/small" && mount -t tmpfs -o "size=$small" tmpfs "$dir/small"
  # A bridge without an address of its own takes that of its lowest port, and changes it as a node dies.
  ip link add br0 address 02:00:00:00:00:01 type bridge forward_delay 0
  ip addr add "$net.1/24" dev br0 && ip link set br0 up
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
  _controller
  for ((n = 1; n <= nodes; n++)); do _boot $n; done
  adopt_orphans
}

_controller() { setsid slurmctld -D < /dev/null >> "$dir/log/slurmctld.out" 2>&1 & }

_boot() {                        # on the login node
  local name=n$1 maker pid try
  if running "$dir/$name.pid"; then kill -9 "$(< "$dir/$name.pid")"; fi
  for try in {1..100}; do ip link show "$name" > /dev/null 2>&1 || break; sleep 0.05; done
  setsid "${machine[@]}" "$self" _node "$1" >> "$dir/log/$name.log" 2>&1 < /dev/null &
  maker=$!
  pid=$(first_process $maker)
  echo "$pid" > "$dir/$name.pid"  # as the login node numbers it
  ip link add "$name" type veth peer name eth0 netns "$pid"
  ip link set "$name" master br0 up
}

_node() {                        # the first process of a compute node; slurmd as such would reap nobody
  local try
  hostname "n$1"
  mkdir -p "$dir/spool/n$1"
  mount --bind "$dir/hosts" /etc/hosts
  mount -t tmpfs tmpfs /dev/shm
  ip link set lo up
  for try in {1..200}; do ip link show eth0 > /dev/null 2>&1 && break; sleep 0.02; done
  ip addr add "$net.$(($1 + 10))/24" dev eth0 && ip link set eth0 up
  setsid slurmd -D < /dev/null &
  adopt_orphans
}

verb=${1:-}; shift || true
case $verb in
  up | down | _login) $verb ;;
  _node | _boot | _follow) $verb "$1" ;;
  _enter) enter "$@" ;;
  _controller) _controller ;;
  run) login "$@" ;;
  as) user=$1; shift; login runuser -u "$user" -- "$@" ;;
  on) n=$1; shift; login "$self" _enter "$(< "$dir/n$n.pid")" "$@" ;;
  power-cut) login kill -9 "$(< "$dir/n$1.pid")" ;;
  boot) login "$self" _boot "$1" ;;
  unplug) login ip link set "n$1" down ;;
  plug) login ip link set "n$1" up ;;
  slurmd-dies) login "$self" _enter "$(< "$dir/n$1.pid")" pkill -9 -x slurmd ;;
  controller-dies) login pkill -9 -x slurmctld ;;
  controller-starts) login "$self" _controller ;;
  timeout) sed -i "s/^SlurmdTimeout=.*/SlurmdTimeout=$1/" "$SLURM_CONF"; login scontrol reconfigure ;;
  status) login sinfo -N -o '%N %T %G %E'; login squeue ;;
  *) sed -n '2,/^set /p' "$self" | grep '^#'; exit 2 ;;
esac
