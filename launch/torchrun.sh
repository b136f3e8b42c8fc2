#!/usr/bin/env bash
# Trains with torchrun. Arguments go to launch/pretrain.py; paths count from the folder you are in.
#
#   launch/torchrun.sh --config launch/configs/tiny-cpu.yaml              one host, RANKS processes on it
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh ...      on the first of two hosts
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh ...      on the second, at the same time
#
# RANKS         processes on this host: default one per GPU, or 2 without a GPU
# MAX_RESTARTS  how often torchrun starts ranks that failed again, on one host: by default 3 times in all
# NNODES        hosts in the run, by default 1
# NODE_RANK     number of this host, 0 to NNODES - 1
# MASTER_ADDR   address of host 0
# MASTER_PORT   a port that is free on host 0, by default 29500
# PET_*         torchrun's own, as Kubeflow sets them: they replace all of these
#
# SIGTERM, SIGINT and SIGUSR1 stop the run: it is saved, and the exit code is 75, on every host.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
[[ -d "$root/.venv/bin" ]] && PATH="$root/.venv/bin:$PATH"
[[ $# == 0 || " $* " == *" --help "* ]] && exec python "$root/launch/pretrain.py" "$@" # without the launcher's imports
# shellcheck source=launch/relay.sh
source "$root/launch/relay.sh"

gpus=$({ command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus; } | wc -l) || gpus=0
options=(--nproc_per_node "${PET_NPROC_PER_NODE:-${RANKS:-$((gpus > 0 ? gpus : 2))}}")
if [[ -n "${PET_NNODES:-}" ]]; then
  : # torchrun reads the hosts from PET_*
elif [[ ! "${NNODES:-1}" =~ ^[0-9]+$ ]]; then # bash would evaluate it
  echo "error: NNODES is no number; set it to the number of hosts" >&2
  exit 2
elif ((10#${NNODES:-1} > 1)); then
  : "${NODE_RANK:?set NODE_RANK to the number of this host, 0 to NNODES - 1}"
  : "${MASTER_ADDR:?set MASTER_ADDR to the address of host 0}"
  options+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
  port=${MASTER_PORT:-29500}
  if [[ "$NODE_RANK" == 0 ]] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "error: another program listens on port $port of this host; choose another on every host: MASTER_PORT=N" >&2
    exit 1
  fi
  options+=(--master_addr "$MASTER_ADDR" --master_port "$port")
else
  # Several hosts start again as a whole (launch/supervise.py on each, or the scheduler): each torchrun counts its own
  # restarts. The store that torch 2.13 shares with the ranks keeps the addresses of dead ones (pytorch#135712).
  options+=(--standalone --local-addr localhost --max-restarts "${MAX_RESTARTS:-3}")
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# For signals that reach torchrun itself, which SIGUSR1 would kill.
options+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "$save_seconds")
relay 1 python -m torch.distributed.run "${options[@]}" "$root/launch/pretrain.py" "$@"
