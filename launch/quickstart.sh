#!/usr/bin/env bash
# The main job on a laptop: demonstrations, event store, training, a robot acting on events, a report.
# Thirteen minutes on two free CPU cores, the installation included. Safe to run again: finished phases are kept.
#
#   bash launch/quickstart.sh                      everything into runs/quickstart
#   bash launch/quickstart.sh --fresh              start over
#   OUT=runs/mine SEED=1 bash launch/quickstart.sh
#
# PYTHON chooses the interpreter (3.11 or 3.12), VENV the environment's folder (default .venv).
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

timed() { # phase, command ...: runs it and keeps its seconds for the report
  local start=$SECONDS
  "${@:2}"
  echo "$((SECONDS - start))" >"$OUT/seconds.$1"
}

if [ ! -e "$OUT/store/store.json" ]; then
  timed data python -m wallwm_jax.build_events --source=ocbench:chamber,switch,block --episodes=72 --seed="$SEED" \
    --size=48 --views=front_pixels,ur5e/wrist --out="$OUT/store"
fi
if [ ! -e "$OUT/seconds.training" ]; then
  timed training python -m wallwm_jax.train --config=configs/ocbench_quickstart.py --config.data.store="$OUT/store" \
    --config.seed="$SEED" --workdir="$OUT/train" --resume
fi
python -m wallwm_jax.evaluate --workdir="$OUT/train" --store="$OUT/store" --level=action --out="$OUT/evaluation"
printf '{"data": %s, "training": %s}\n' "$(cat "$OUT/seconds.data")" "$(cat "$OUT/seconds.training")" >"$OUT/phases.json"
python -m wallwm_jax.evaluation.report --evaluation="$OUT/evaluation" --workdir="$OUT/train" --store="$OUT/store" \
  --phases="$OUT/phases.json" --out="$OUT/report"
echo "report: $OUT/report/report.html"
