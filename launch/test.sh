#!/usr/bin/env bash
# Sets up .venv and runs the quick tests (about ten minutes on two cores). Safe to run again.
#
#   bash launch/test.sh                 every quick test
#   bash launch/test.sh tests/test_haar.py -k causal     anything pytest takes
#
# PYTHON chooses the interpreter (3.11 or 3.12), VENV the environment's folder (default .venv).
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,7{s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
source launch/environment.sh
ensure_environment sim,dev
ensure_rendering
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # meshes are simulated on the CPU
# Files are shared out to as many processes as there are cores, at most four: programs are compiled once per file.
workers=$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')
exec python -m pytest -n "$workers" --dist loadfile -m "not parity and not tpu and not fault and not extended and not slow" "$@"
