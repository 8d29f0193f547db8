#!/usr/bin/env bash
# One node's part of a job on many, without a scheduler. The same command on every node, HEAD being one of them:
#
#   bash examples/torchrun_node.sh NODES PROCESSES_PER_NODE HEAD[:PORT] CONFIG [key=value ...]
#
# PROCESSES_PER_NODE is the number of its GPUs, less those of servers beside its ranks. torchrun must be on the PATH: source
# .venv/bin/activate, or start this in the container.
#
# A node that is lost may be started again with this command, up to ETR_RESTARTS (3) times: the others wait for it, and all go on
# from the last checkpoint. SIGTERM on any node saves and ends the run on all, within ETR_STOP_GRACE_S seconds: those
# of a phase and a checkpoint (without it run.stop_grace_s decides, up to 60).
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
# torchrun announces the store of its first round only; a node that comes back would wait for it in vain. This is a store a round.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
if [ -n "${ETR_STOP_GRACE_S:-}" ]; then
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((ETR_STOP_GRACE_S + 30)) # torchrun kills its ranks so long after SIGTERM
    set -- "$@" "run.stop_grace_s=$ETR_STOP_GRACE_S"
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "${ETR_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id etr "$(dirname "$0")/run_etr.sh" "$@"
