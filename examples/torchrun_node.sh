#!/usr/bin/env bash
# Runs one node's part of a job on many nodes, without a scheduler. Start the same command on every node; HEAD is one of them:
#
#   bash examples/torchrun_node.sh NODES PROCESSES_PER_NODE HEAD[:PORT] CONFIG [key=value ...]
#
# PROCESSES_PER_NODE is the number of GPUs of a node, minus the GPUs of servers on the same node. torchrun must be on the PATH:
# source .venv/bin/activate first, or start this in the container.
#
# A lost node can be started again with this command, up to ETR_RESTARTS (3) times. The other nodes wait for it, and all
# continue from the last checkpoint. SIGTERM on any node saves the run and ends it on all nodes. ETR_STOP_GRACE_S is the time
# limit for this, in seconds; it must cover a phase and a checkpoint. If it is not set, run.stop_grace_s applies, up to 60.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
command -v torchrun >/dev/null || {
    echo "error: torchrun is not on the PATH; source .venv/bin/activate first, or start this in the container" >&2
    exit 2
}
nodes=$1
processes=$2
head=$3
shift 3
case $head in *:*) ;; *) head=$head:29500 ;; esac
# torchrun announces its store only in the first round, so a restarted node would wait for it forever. Use one store per round.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
if [ -n "${ETR_STOP_GRACE_S:-}" ]; then
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((ETR_STOP_GRACE_S + 30)) # seconds from SIGTERM until torchrun kills its ranks
    set -- "$@" "run.stop_grace_s=$ETR_STOP_GRACE_S"
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "${ETR_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id etr "$(dirname "$0")/run_etr.sh" "$@"
