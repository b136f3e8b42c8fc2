#!/usr/bin/env bash
# Trains with DeepSpeed's launcher. Arguments go to launch/pretrain.py; paths count from the folder you are in.
#
#   launch/deepspeed.sh --config launch/configs/tiny-cpu.yaml             one host, RANKS processes on it
#   HOSTFILE=hostfile launch/deepspeed.sh --config ...                    the hosts of a hostfile, over ssh
#
# RANKS        processes on this host: default one per GPU, or 2 without a GPU (a hostfile has its own)
# HOSTFILE     lines `host slots=N` (hostfile.example; Open MPI's and MPICH's spelling too); needs pdsh, ssh
#              without a password, and the same checkout at the same path on every host, without a space in it
# MASTER_ADDR  address of the first host, by default what `hostname -I` prints first there
# MASTER_PORT  a port that is free on the first host, by default 29500
#
# SIGTERM, SIGINT and SIGUSR1 stop the run: it is saved, and the exit code is 75.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
[[ -d "$root/.venv/bin" ]] && PATH="$root/.venv/bin:$PATH"
[[ $# == 0 || " $* " == *" --help "* ]] && exec python "$root/launch/pretrain.py" "$@" # without the launcher's imports
# shellcheck source=launch/relay.sh
source "$root/launch/relay.sh"

options=(--log_level error --master_port "${MASTER_PORT:-29500}")
if [[ -z "${HOSTFILE:-}" ]]; then
  gpus=$({ command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus; } | wc -l) || gpus=0
  options+=(--hostfile /dev/null --num_gpus "${RANKS:-$((gpus > 0 ? gpus : 2))}")
  relay 2 python -m deepspeed.launcher.runner "${options[@]}" "$root/launch/pretrain.py" "$@"
fi

# DeepSpeed would hand anything in the hostfile, the exported variables and the arguments to a shell.
hosts=$(mktemp)
trap 'rm -f -- "$hosts"' EXIT
python "$root/launch/check_hostfile.py" "$HOSTFILE" "$@" >"$hosts"
options+=(--hostfile "$hosts" --launcher_args=-b) # -b: an interrupt ends pdsh at once
[[ -n "${MASTER_ADDR:-}" ]] && options+=(--master_addr "$MASTER_ADDR")

# The hosts' launchers are not told --log_level: what they log below an error is left out here.
errors_alone() {
  trap '' HUP INT TERM USR1
  exec sed -uE '/\[(DEBUG|INFO|WARNING)\] \[[a-z_]+\.py:/d'
}
relay 0 python -m deepspeed.launcher.runner "${options[@]}" "$root/launch/pretrain.py" "$@" > >(errors_alone)
