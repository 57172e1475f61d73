#!/usr/bin/env bash
# Sets up .venv and runs the quick tests (about ten minutes on two cores). Safe to run again.
#
#   bash launch/test.sh                 every quick test
#   bash launch/test.sh tests/test_haar.py -k causal     anything pytest takes
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment's folder (default .venv).
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,7{s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
source launch/environment.sh
ensure_environment sim,dev
ensure_rendering
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # meshes are simulated on the CPU
exec python -m pytest -m "not parity and not tpu and not fault and not slow" "$@"
