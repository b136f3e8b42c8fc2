# shellcheck shell=bash
# For deepspeed.sh and torchrun.sh: runs a launcher, hands stops on to its ranks, and ends with the exit code of the run.
#
#   relay DEPTH COMMAND...     the ranks are the children of the COMMAND (DEPTH 1), or the children of those (2)
#
# A launcher that gets a signal gives its ranks no time to save, or another exit code. So it has a process group of its
# own (set -m), which Ctrl-C does not reach, and the ranks alone are told. DEPTH 0: they are on other hosts, and the
# launcher is told. What is left of the group when the launcher has ended is ended too: a runner that is killed would
# leave pdsh behind, and with it every host at work.
#
# Ranks know their start by the file INGOT_START. A stop and each rank that fails add their exit code to it, which
# launchers change: see llm/cluster/failure.py.
save_seconds=40

processes_at() { # DEPTH PID...
  local depth=$1
  shift
  if ((depth == 0)); then
    echo "$@"
  elif (($#)); then
    # shellcheck disable=SC2046 # one word per process
    processes_at $((depth - 1)) $(for pid; do cat "/proc/$pid/task/"*/children; done 2>/dev/null)
  fi
}

stop() { # DEPTH SIGNAL
  local ranks signal=$2
  echo 75 >>"$INGOT_START" # before the ranks are told: one that ends of it is not started again
  ranks=$(processes_at "$1" "$launcher") || ranks=
  if (($1 == 0)) || [[ -z "$ranks" ]]; then # no rank has begun
    signal=TERM ranks=$launcher
  fi
  # shellcheck disable=SC2086 # one word per process
  kill -s "$signal" $ranks 2>/dev/null || true
}

recorded() { grep -qsF -- "${INGOT_START##*/}" runs/*/stopped.json; } # the ranks write it into the record of a stop

relay() {
  local code=0 launcher depth=$1 INGOT_START
  shift
  INGOT_START=$(mktemp "${TMPDIR:-/tmp}/ingot-$HOSTNAME.XXXXXXXXXX")
  export INGOT_START
  set -mx
  "$@" </dev/null &
  { set +mx; } 2>/dev/null
  launcher=$!
  trap 'stop "$depth" TERM' TERM HUP
  trap 'stop "$depth" INT' INT
  trap 'stop "$depth" USR1' USR1
  wait "$launcher" || code=$?
  while ((code > 128)) && kill -0 "$launcher" 2>/dev/null; do # a signal came: it is handed on, wait on
    code=0
    wait "$launcher" || code=$?
  done
  kill -INT -- "-$launcher" 2>/dev/null || true
  for ((i = 0; depth && i < 10 * save_seconds; i++)); do
    # The ranks of a torchrun that was killed are not of its group; they save, and end within 30 s.
    kill -0 -- "-$launcher" 2>/dev/null || { ((depth == 1 && code > 128)) && ! recorded; } || break
    sleep 0.1
  done
  if grep -qx 2 "$INGOT_START"; then
    code=2 # also where torchrun has ended with 0: ranks that it started again left at once
  elif ((code)) && grep -qx 69 "$INGOT_START"; then
    code=69
  elif ((code)) && [[ "$(tail -n 1 "$INGOT_START")" == 75 ]]; then
    code=75
  fi
  rm -f -- "$INGOT_START"
  recorded && code=75
  exit "$code"
}
