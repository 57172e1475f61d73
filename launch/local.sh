#!/usr/bin/env bash
# Runs a command as several processes on this machine, as a pod would: CPU devices, collectives over gloo. The same
# interface as tpu_queued.sh and gke_xpk.sh; for tests, for trying things out, and for machines with many cores.
#
#   bash launch/local.sh up --name=try --processes=2 --devices=4 -- \
#       python -m wallwm_jax.train --config=configs/ocbench_quickstart.py --config.data.store=runs/store \
#       --workdir=runs/try --resume --distributed
#
# Actions
#   create    make the folder of the run, runs/local/NAME, where its log goes
#   install   make .venv (see launch/environment.sh), unless this machine's python has what is needed
#   run       run the command once in every process; each line names its process
#   logs      show the log, and follow it while the run goes on
#   delete    stop the run if it goes on, and remove its folder; the workdir stays
#   up        create, install, run; after a failure run again with --resume (and without --overwrite)
#
# Flags
#   --name=NAME          of the run (needed)
#   --processes=2        how many processes
#   --devices=1          virtual devices of each
#   --max-restarts=5     failures in a row that `up` puts up with; exit code 2, bad input, is never tried again
#   --healthy-after=600  a run that lasted this many seconds starts that count anew
#   --backoff=1          seconds before the first restart, twice as many before each further one
#   --grace=30           seconds that a process has to save and end, when another failed or after Ctrl-C
#   --dry-run            print every command instead of running it
#
# When a process fails, the others are stopped, and its exit code is that of the run.
set -euo pipefail
declare -A FLAG=([name]="" [processes]=2 [devices]=1 [max-restarts]=5 [healthy-after]=600 [backoff]=1 [grace]=30)
source "$(dirname "$0")/lib.sh"
parse "$@"
for number in processes devices; do need "$number" "a number above 0" '^[1-9][0-9]*$'; done
for number in healthy-after backoff grace; do need "$number" "seconds" '^[0-9]+$'; done
cd "$ROOT"
source launch/environment.sh
if [ -x "$VENV/bin/python" ]; then PATH="$(cd "$VENV" && pwd)/bin:$PATH"; fi
FOLDER=runs/local/${FLAG[name]}
PROCESSES=() # of this attempt; each leads a session, to be stopped with all it has started, and dies with the launcher

create() { call mkdir -p "$FOLDER"; }

install() {
  local look='import importlib.util as u, sys; sys.exit(not (u.find_spec("jax") and u.find_spec("orbax")))'
  python -c "$look" 2>/dev/null || call ensure_environment sim
}

run() { # one attempt; its exit code is that of the first process that failed
  local port index ended code=0 launcher going
  if launcher=$(running); then
    die "${FLAG[name]} runs already, as process $launcher; follow it with logs, end it with delete"
  fi
  create
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  PROCESSES=()
  for ((index = 0; index < FLAG[processes]; index++)); do
    local process=(env JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
      XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${FLAG[devices]}"
      JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="${FLAG[processes]}" JAX_PROCESS_ID="$index"
      PYTHONUNBUFFERED=1 "${COMMAND[@]}")
    if [ -n "$DRY_RUN" ]; then
      call "${process[@]}"
    else
      # Ctrl-C is for the launcher alone: what the processes still say while they save is kept.
      setsid setpriv --pdeathsig KILL "${process[@]}" </dev/null \
        > >(trap '' INT TERM && sed -u "s/^/[$index] /" | tee -a "$FOLDER/log") 2>&1 &
      PROCESSES+=($!)
    fi
  done
  [ -z "$DRY_RUN" ] || return 0
  BEGAN=$SECONDS
  echo $$ >"$FOLDER/pid"
  trap 'stop; exit $TAKEN_AWAY' INT TERM
  going=("${PROCESSES[@]}")
  while [ ${#going[@]} -gt 0 ] && [ "$code" = 0 ]; do
    wait -n -p ended "${going[@]}" 2>/dev/null || code=$?
    for index in "${!going[@]}"; do [ "${going[index]}" != "$ended" ] || unset "going[index]"; done
  done
  [ "$code" = 0 ] || say "process $(position "$ended") of ${FLAG[name]} ended with exit code $code; stopping the others"
  stop
  return "$code"
}

position() { # process id: its index
  local index
  for index in "${!PROCESSES[@]}"; do [ "${PROCESSES[index]}" != "$1" ] || echo "$index"; done
}

stop() { # asks every process to save and end, and kills what has not done so after --grace seconds
  local deadline=$((SECONDS + FLAG[grace])) process
  kill -TERM "${PROCESSES[@]}" 2>/dev/null || true
  while kill -0 "${PROCESSES[@]}" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
  for process in "${PROCESSES[@]}"; do kill -KILL -- "-$process" 2>/dev/null || true; done
  wait "${PROCESSES[@]}" 2>/dev/null || true
}

running() { # prints the process id of the launcher that has this run, if there is one
  local launcher
  launcher=$(cat "$FOLDER/pid" 2>/dev/null) && [ "$launcher" != $$ ] &&
    tr '\0' ' ' 2>/dev/null <"/proc/$launcher/cmdline" | grep -q "local.sh .*--name=${FLAG[name]} " && echo "$launcher"
}

logs() {
  local launcher
  [ -e "$FOLDER/log" ] || die "$FOLDER/log does not exist; start the run first, or give the --name of another"
  if launcher=$(running); then
    call tail -n +1 --pid="$launcher" -F "$FOLDER/log"
  else
    call cat "$FOLDER/log"
  fi
}

delete() {
  local launcher
  if launcher=$(running); then
    call kill -TERM "$launcher"
    while [ -z "$DRY_RUN" ] && kill -0 "$launcher" 2>/dev/null; do sleep 0.2; done
  fi
  call rm -rf "$FOLDER"
}

up() {
  create
  install
  keep_running run
}

"$ACTION"
