#!/usr/bin/env bash
# What tpu_queued.sh does on each TPU VM, over ssh. The run itself does not depend on the connection.
#
#   worker.sh install           Python and the package, into ~/wallwm_jax.venv
#   worker.sh start COMMAND...  stops the run that is here, if any, and starts COMMAND in the background
#   worker.sh follow LINES      shows the last LINES of the log (+1: all of it), and goes on until the run has ended
#   worker.sh state             prints none, running, lost (the machine was started anew), or ended CODE
#   worker.sh end SECONDS       waits so long for the run to end, then stops it; prints "HOST ended CODE"
#   worker.sh stop              asks the run to save and end, and kills it after half a minute
set -euo pipefail
PROJECT=$(cd "$(dirname "$0")/.." && pwd)
RUN=$HOME/wallwm_jax.run # log; pid; code, once the run has ended
export VENV=$HOME/wallwm_jax.venv
mkdir -p "$RUN"

pid() { cat "$RUN/pid" 2>/dev/null || echo none; }

running() { grep -qsF "$RUN" "/proc/$(pid)/cmdline"; }

wait_for_end() { # seconds
  local deadline=$((SECONDS + $1))
  while running && ((SECONDS < deadline)); do sleep 0.5; done
}

find_python() { # sets PYTHON, unless it is, to 3.12, which the newest jax needs; the machines come with an older one
  local candidate
  [ -z "${PYTHON:-}" ] || return 0
  for candidate in python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  python3 -m pip install --quiet --user uv
  python3 -m uv --quiet python install 3.12
  PYTHON=$(python3 -m uv python find 3.12)
}

enter() { # the project's folder and environment
  cd "$PROJECT"
  find_python
  source launch/environment.sh
  ensure_environment tpu
}

install() {
  enter
  # With huge pages the TPU runtime starts and stops much faster.
  sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null || true
}

start() {
  stop
  enter
  rm -f "$RUN/code"
  : >"$RUN/log"
  # The inner shell outlives a SIGTERM, so that the exit code of a run that was taken away is known.
  # shellcheck disable=SC2016 # it expands these, not this shell
  PYTHONUNBUFFERED=1 setsid nohup bash -c '
    trap : TERM
    code=0
    "${@:2}" >>"$1/log" 2>&1 || code=$?
    echo "$code" >"$1/code.new"
    mv "$1/code.new" "$1/code"' run "$RUN" "$@" >/dev/null 2>&1 </dev/null &
  echo $! >"$RUN/pid"
}

follow() {
  [ -e "$RUN/log" ] || { echo "nothing has run on $(hostname)"; return; }
  tail -n "$1" -s 0.3 --pid="$(pid)" -F "$RUN/log" 2>/dev/null | sed -u "s/^/[$(hostname)] /"
}

state() {
  if running; then
    echo running
  elif [ -e "$RUN/code" ]; then
    echo "ended $(cat "$RUN/code")"
  elif [ -e "$RUN/pid" ]; then
    echo lost
  else
    echo none
  fi
}

end() {
  wait_for_end "$1"
  stop
  case $(state) in
  "ended 0" | "ended 143") ;;
  *) tail -n 20 "$RUN/log" | sed "s/^/[$(hostname)] /" >&2 ;;
  esac
  echo "$(hostname) $(state)"
}

stop() {
  running || return 0
  pkill -TERM -P "$(pid)" || true # the command itself: its own processes are its own business
  wait_for_end 30
  kill -KILL -- "-$(pid)" 2>/dev/null || true
}

"$@"
