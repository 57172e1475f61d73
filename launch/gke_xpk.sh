#!/usr/bin/env bash
# Trains on TPU slices of a Kubernetes cluster (GKE) through xpk: makes the cluster and the image, runs a command on
# every host and shows the log. After a preemption the cluster itself starts the command again, without a launcher.
#
#   bash launch/gke_xpk.sh up --name=wan14b --cluster=pod --topology=v5p:8x8x8 --slices=2 \
#       --capacity=reserved:RESERVATION --project=P --zone=us-east5-a -- \
#       python -m wallwm_jax.train --config=configs/wan14b.py:video --config.data.store=/mnt/bucket/store \
#       --workdir=gs://bucket/wan14b --distributed --config.mesh.slice=2 "--config.model.latent_shape=(12, 12)"
#
# Actions
#   create    make the cluster with these slices, or change the one that is there to them
#   install   build the image of the commit --ref in Cloud Build and keep it in the registry
#   run       submit the command (with --resume) as workload NAME, and follow it to its end
#   logs      show the log of the first host, and follow it while the run goes on
#   delete    stop the run; --with-cluster also deletes the cluster
#   up        create (only if there is no such cluster), install, run; the cluster stays, and a line says so
#
# Flags
#   --name=NAME           of the run, an xpk workload (needed)
#   --cluster=NAME        of the cluster (needed)
#   --topology=v5p:4x4x8  a slice: v5e, v5p, v6e or tpu7x, and its extents, as for preflight (for create, run, up)
#   --slices=1            how many; set config.mesh.slice to the same
#   --capacity=on-demand  or spot, or reserved:RESERVATION
#   --project= --zone=    where; default CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE
#   --image=              default gcr.io/PROJECT/wallwm_jax; the commit becomes the tag
#   --ref=HEAD            commit, tag or branch that the image holds; changes that are not committed stay out
#   --max-restarts=50     of the whole run; exit code 2, bad input, is never tried again
#   --poll=30             seconds between two looks at the run
#   --with-cluster        `delete` deletes the cluster too
#   --create-flag=FLAG    passed on to xpk cluster create, such as --enable-gcsfuse-csi-driver (again for more)
#   --run-flag=FLAG       passed on to xpk workload create, such as --storage=bucket or --priority=high (again for more)
#   --dry-run             print every command instead of running it
#
# Every host must reach the store: attach its bucket once with xpk storage attach. The workdir may be gs://BUCKET/...,
# with no mount. Compiler flags come from launch/xla_flags.sh; others in their place go in front of the command:
# -- env LIBTPU_INIT_ARGS=... python -m ...
set -euo pipefail
declare -A FLAG=([name]="" [cluster]="" [topology]="" [slices]=1 [capacity]=on-demand [image]="" [ref]=HEAD
  [project]=${CLOUDSDK_CORE_PROJECT:-} [zone]=${CLOUDSDK_COMPUTE_ZONE:-}
  [max-restarts]=50 [poll]=30 [with-cluster]=false)
source "$(dirname "$0")/lib.sh"
parse "$@"
need project "your Google Cloud project, or set CLOUDSDK_CORE_PROJECT"
need zone "a zone with this kind of TPU, or set CLOUDSDK_COMPUTE_ZONE"
need cluster "the cluster's name: small letters, digits and dashes" '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'
need slices "a number above 0" '^[1-9][0-9]*$'
need capacity "on-demand, spot or reserved:RESERVATION" '^(on-demand|spot|reserved:.+)$'
need poll "seconds" '^[0-9]+$'
if [[ $ACTION =~ ^(create|run|up)$ ]]; then read_topology; fi
[[ " ${COMMAND[*]} " != *" --overwrite"* ]] ||
  die "--overwrite would delete the run at every restart, since a cluster starts the same command again; leave it out"
need_program gcloud "get it from https://cloud.google.com/sdk/docs/install, then gcloud auth login"
need_program xpk "get it with pip install xpk"
need_program kubectl "get it with gcloud components install kubectl"
NAME=${FLAG[name]}
WHERE=(--cluster="${FLAG[cluster]}" --project="${FLAG[project]}" --zone="${FLAG[zone]}")
FIRST_HOST=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0
FIRST_HOST+=,batch.kubernetes.io/job-completion-index=0

create() {
  local capacity="--${FLAG[capacity]}"
  case ${FLAG[capacity]} in reserved:*) capacity="--reservation=${FLAG[capacity]#*:}" ;; esac
  call xpk cluster create "${WHERE[@]}" --tpu-type="$PREFIX-$EXTENTS" --num-slices="${FLAG[slices]}" "$capacity" \
    "${CREATE_FLAGS[@]}"
}

image() {
  [ -n "$COMMIT" ] || find_commit
  IMAGE=${FLAG[image]:-gcr.io/${FLAG[project]}/wallwm_jax}:${COMMIT:0:12}
}

install() {
  local archive=$ROOT/runs/launch/$NAME/wallwm_jax.tar.gz
  image
  send "$archive" "$COMMIT" --add-file="$ROOT/launch/Dockerfile" # Cloud Build looks for it at the top
  call gcloud builds submit "$archive" --tag="$IMAGE" --project="${FLAG[project]}" --timeout=3600
}

run() {
  image
  use_resume
  # exec, so that the SIGTERM of a preemption reaches the command. All exit codes but 2 are worth another start.
  call xpk workload create --workload="$NAME" "${WHERE[@]}" --tpu-type="$PREFIX-$EXTENTS" \
    --num-slices="${FLAG[slices]}" --docker-image="$IMAGE" --max-restarts="${FLAG[max-restarts]}" \
    --restart-on-exit-codes=1,3-126 "${RUN_FLAGS[@]}" \
    --command="exec $(quoted env LIBTPU_INIT_ARGS="$(xla_flags "$GENERATION" "${FLAG[slices]}")" "${COMMAND[@]}")"
  follow
}

follow() { # shows the first host's log until the run is done; 0 if it was completed
  local since="" conditions="" unanswered=0 true_ones='jsonpath={.status.conditions[?(@.status=="True")].type}'
  while :; do
    call kubectl logs --follow --prefix --tail=-1 ${since:+--since-time="$since"} --selector="$FIRST_HOST" || true
    since=$(date -u +%FT%TZ)
    conditions=$(call kubectl get jobset "$NAME" --output="$true_ones") || unanswered=$((unanswered + 1))
    case "$DRY_RUN $conditions" in
    *Completed* | yes*) return 0 ;;
    *Failed*)
      say "$NAME failed for good; its log says why"
      return 1
      ;;
    esac
    ((unanswered < 20)) || return 1
    sleep "${FLAG[poll]}"
  done
}

connect() { call xpk workload list "${WHERE[@]}" --filter-by-job="$NAME"; } # points kubectl at the cluster, too

logs() {
  connect
  follow
}

delete() {
  call xpk workload delete --workload="$NAME" "${WHERE[@]}"
  if [ "${FLAG[with-cluster]}" = true ]; then call xpk cluster delete "${WHERE[@]}" --force; fi
}

up() {
  local there
  image
  there=$(call gcloud container clusters list --project="${FLAG[project]}" --filter="name=${FLAG[cluster]}" \
    "--format=value(name)")
  [ -n "$there" ] || create
  install
  trap 'say "cluster ${FLAG[cluster]} still stands and is paid for; delete --with-cluster gives it back"' EXIT
  run
}

"$ACTION"
