#!/usr/bin/env bash
# Trains on Cloud TPU slices that are asked for as queued resources: creates them, installs this project, runs a command
# on every worker, shows the log, and after a preemption asks again and goes on from the last checkpoint.
#
#   bash launch/tpu_queued.sh up --name=wan5b --topology=v5p:4x4x8 --capacity=spot --project=P --zone=us-east5-a -- \
#       python -m wallwm_jax.train --config=configs/wan5b.py:video --config.data.store=/mnt/bucket/store \
#       --workdir=gs://bucket/wan5b --resume --distributed "--config.model.latent_shape=(12, 12)"
#
# Actions
#   create    ask for the slices, unless they are there, and wait until they are active
#   install   send the commit --ref to every worker and install it there (once per change of the packages)
#   run       start the command on every worker and follow it to its end; it goes on when this terminal goes away
#   logs      show the log of a worker, and follow it while the run goes on
#   delete    stop the run and give the slices back
#   up        create, install, run; when the slices are taken away or the run fails, the same again with --resume (and
#             without --overwrite). After Ctrl-C the run goes on, and `up` again finds it. The slices are given back
#             when the run is done; when it failed for good they stay, to be looked at, and a line says so
#
# Flags
#   --name=NAME           of the queued resource (needed)
#   --topology=v5p:4x4x8  a slice: v5e, v5p or v6e, and its extents, as for preflight (for create, run, up)
#   --slices=1            how many; set config.mesh.slice to the same
#   --capacity=on-demand  or spot, or reserved
#   --project= --zone=    where; default CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE
#   --ref=HEAD            commit, tag or branch that is sent; changes that are not committed stay here
#   --max-restarts=10     failures in a row that `up` puts up with; exit code 2, bad input, is never tried again
#   --healthy-after=1800  a run that lasted this many seconds starts that count anew
#   --backoff=30          seconds before the first restart, twice as many before each further one
#   --poll=30             seconds between two looks at the queue
#   --node=0 --worker=0   whose log `logs` shows: slice and worker, or all
#   --keep                `up` leaves the slices when the run is done
#   --create-flag=FLAG    passed on to gcloud ... create, such as --service-account=A or --internal-ips (again for more)
#   --run-flag=FLAG       passed on to gcloud ... ssh and scp, such as --tunnel-through-iap (again for more)
#   --dry-run             print every command instead of running it
#
# Every worker must reach store and workdir. The store lies on a shared file system or in a mounted bucket (gcsfuse); the
# workdir may be gs://BUCKET/..., with no mount, where the machines' service account may write. ssh to several workers
# needs your key in the agent: ssh-add ~/.ssh/google_compute_engine. Compiler flags come from launch/xla_flags.sh; others
# in their place go in front of the command: -- env LIBTPU_INIT_ARGS=... python -m ...
set -euo pipefail
declare -A FLAG=([name]="" [topology]="" [slices]=1 [capacity]=on-demand [ref]=HEAD [node]=0 [worker]=0 [keep]=false
  [project]=${CLOUDSDK_CORE_PROJECT:-} [zone]=${CLOUDSDK_COMPUTE_ZONE:-}
  [max-restarts]=10 [healthy-after]=1800 [backoff]=30 [poll]=30)
source "$(dirname "$0")/lib.sh"
parse "$@"
need project "your Google Cloud project, or set CLOUDSDK_CORE_PROJECT"
need zone "a zone with this kind of TPU, or set CLOUDSDK_COMPUTE_ZONE"
need slices "a number above 0" '^[1-9][0-9]*$'
need capacity "on-demand, spot or reserved" '^(on-demand|spot|reserved)$'
for number in healthy-after backoff poll; do need "$number" "seconds" '^[0-9]+$'; done
if [[ $ACTION =~ ^(create|run|up)$ ]]; then
  read_topology
  [ "$RUNTIME" != - ] || die "$GENERATION slices exist only on Kubernetes; launch with gke_xpk.sh"
  require_default_shape
fi
need_program gcloud "get it from https://cloud.google.com/sdk/docs/install, then gcloud auth login"
NAME=${FLAG[name]}
WHERE=(--project="${FLAG[project]}" --zone="${FLAG[zone]}")
FOLDER=$ROOT/runs/launch/$NAME # what is sent, and the service's last complaint
WORKER="bash wallwm_jax/launch/worker.sh"
STATE=""   # of the queued resource
STARTED="" # this launcher has started the command, or found it going on

queue() { call gcloud compute tpus queued-resources "$@"; }

on() { # slice, worker, line for the shell there
  queue ssh "$NAME" "${WHERE[@]}" --node="$1" --worker="$2" "${RUN_FLAGS[@]}" --command="$3"
}

look() { # sets STATE as the service names it; MISSING when there is no such resource, UNKNOWN when nobody answers
  local describe=(describe "$NAME" "${WHERE[@]}" "--format=value(state.state)")
  if [ -n "$DRY_RUN" ]; then
    queue "${describe[@]}"
    STATE=$([ -z "$STATE" ] && echo MISSING || echo ACTIVE)
  else
    mkdir -p "$FOLDER"
    STATE=$(queue "${describe[@]}" 2>"$FOLDER/errors") || {
      STATE=UNKNOWN
      if grep -q NOT_FOUND "$FOLDER/errors"; then STATE=MISSING; fi
    }
  fi
}

create() {
  local before="" asked="" unanswered=0
  while :; do
    look
    [ "$STATE" = "$before" ] || say "$NAME is $STATE"
    before=$STATE
    case $STATE in
    ACTIVE) return ;;
    MISSING)
      # What is refused at once is a mistake; later on it may be the network.
      ask || { [ -n "$STARTED" ] && return 1 || return $BAD_INPUT; }
      asked=yes before=""
      ;;
    SUSPENDED | FAILED) # the slices are gone, and a resource in this state never gets new ones
      if [ -n "$asked" ]; then return 1; fi
      give_back || return 1
      ;;
    UNKNOWN)
      unanswered=$((unanswered + 1))
      if ((unanswered == 20)) || [ -z "$STARTED$asked" ]; then
        tail -n 3 "$FOLDER/errors" >&2
        [ -n "$STARTED$asked" ] && return 1 || return $BAD_INPUT
      fi
      sleep "${FLAG[poll]}"
      ;;
    *) sleep "${FLAG[poll]}" ;;
    esac
  done
}

ask() {
  local nodes=(--node-id="$NAME") capacity=()
  if [ "${FLAG[slices]}" -gt 1 ]; then nodes=(--node-count="${FLAG[slices]}"); fi
  if [ "${FLAG[capacity]}" != on-demand ]; then capacity=("--${FLAG[capacity]}"); fi
  queue create "$NAME" "${WHERE[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${nodes[@]}" \
    "${capacity[@]}" "${CREATE_FLAGS[@]}" --quiet
}

give_back() { queue delete "$NAME" "${WHERE[@]}" --force --quiet; }

install() {
  local unpack="rm -rf wallwm_jax && mkdir wallwm_jax && tar -xzf wallwm_jax.tar.gz -C wallwm_jax"
  [ -n "$COMMIT" ] || find_commit
  send "$FOLDER/wallwm_jax.tar.gz" "$COMMIT"
  queue scp "$FOLDER/wallwm_jax.tar.gz" "$NAME:" "${WHERE[@]}" --node=all --worker=all "${RUN_FLAGS[@]}" &&
    on all all "if [ -e wallwm_jax ]; then $WORKER stop; fi; $unpack && $WORKER install"
}

run() { start && watch; }

start() {
  local flags
  flags=$(quoted env LIBTPU_INIT_ARGS="$(xla_flags "$GENERATION" "${FLAG[slices]}")")
  on all all "$flags $WORKER start $(quoted "${COMMAND[@]}")" || return 1
  STARTED=yes BEGAN=$SECONDS
}

watch() { # until the run has ended everywhere; its exit code
  local lines=+1 unanswered=0 answer
  while :; do
    on 0 0 "$WORKER follow $lines" || sleep "${FLAG[poll]}"
    lines=20
    answer=$(on 0 0 "$WORKER state" 2>/dev/null) || answer=""
    [ -z "$DRY_RUN" ] || answer="ended 0"
    case $answer in
    ended*) break ;;
    running) ;; # only the connection was lost
    lost | none)
      say "the run is not on its first worker any more"
      return 1
      ;;
    *)
      look
      case $STATE in
      ACTIVE | UNKNOWN)
        unanswered=$((unanswered + 1))
        ((unanswered < 20)) || return 1
        ;;
      *)
        say "the slices were taken away: $NAME is $STATE"
        return $TAKEN_AWAY
        ;;
      esac
      sleep "${FLAG[poll]}"
      ;;
    esac
  done
  answer=$(on all all "$WORKER end 120") || true
  [ -n "$DRY_RUN" ] || exit_code "$answer"
}

exit_code() { # lines "HOST ended CODE" (or "HOST lost"): of all workers together
  local host ended code all=()
  if [ -z "$1" ]; then
    say "no worker answers any more"
    return 1
  fi
  while read -r host ended code; do
    if [ "$ended" != ended ]; then code=1; fi
    all+=("$code")
    [ "$code" = 0 ] || say "$host ended with exit code $code"
  done <<<"$1"
  for code in $BAD_INPUT $TAKEN_AWAY; do
    if [[ " ${all[*]} " == *" $code "* ]]; then return "$code"; fi
  done
  for code in "${all[@]}"; do
    if [ "$code" != 0 ]; then return 1; fi
  done
}

logs() { on "${FLAG[node]}" "${FLAG[worker]}" "$WORKER follow +1"; }

delete() {
  look
  if [ "$STATE" = MISSING ] && [ -z "$DRY_RUN" ]; then say "there is no $NAME"; else give_back; fi
}

attempt() {
  create || return
  if [ -z "$STARTED$DRY_RUN" ] && [ "$(on 0 0 "$WORKER state" 2>/dev/null)" = running ]; then
    say "$NAME runs a command already; following that one (the action run would start yours instead)"
    STARTED=yes BEGAN=$SECONDS
    watch
  else
    install && run
  fi
}

up() {
  local code=0
  trap 'say "a run that has started goes on: see logs, or up again, or end it with delete"; exit 130' INT TERM
  find_commit # before anything is paid for, and the same one after every preemption
  keep_running attempt || code=$?
  if [ "$code" = 0 ] && [ "${FLAG[keep]}" = false ]; then
    give_back
  elif [ "$STATE" != MISSING ]; then
    say "$NAME still stands and is paid for; give it back with: bash launch/tpu_queued.sh delete" \
      "$(quoted --name="$NAME" "${WHERE[@]}")"
  fi
  return "$code"
}

"$ACTION"
