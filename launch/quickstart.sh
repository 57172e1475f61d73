#!/usr/bin/env bash
# The main job on a laptop: demonstrations, event store, training, a robot acting on events, a report.
# About fifteen minutes on two CPU cores, the installation apart. Safe to run again: finished phases are kept.
#
#   bash launch/quickstart.sh                      everything into runs/quickstart
#   bash launch/quickstart.sh --fresh              start over
#   OUT=runs/mine SEED=1 bash launch/quickstart.sh
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment's folder (default .venv).
set -euo pipefail
case "${1:-}" in
-h | --help) sed -n '2,9{s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
--fresh | "") ;;
*) echo "error: unknown argument '$1'; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
source launch/environment.sh
ensure_environment sim
ensure_rendering
OUT=${OUT:-runs/quickstart}
SEED=${SEED:-0}
if [ "${1:-}" = "--fresh" ]; then rm -rf "$OUT"; fi
mkdir -p "$OUT"

if [ ! -e "$OUT/store/store.json" ]; then
  python -m wallwm_jax.build_events --source=ocbench:chamber,block,switch --episodes=72 --out="$OUT/store" --seed="$SEED"
fi
python -m wallwm_jax.train --config=configs/ocbench_quickstart.py --config.data.store="$OUT/store" --config.seed="$SEED" \
  --workdir="$OUT/train" --resume
python -m wallwm_jax.evaluate --workdir="$OUT/train" --store="$OUT/store" --out="$OUT/evaluation"
echo "report: $OUT/evaluation/report.html"
