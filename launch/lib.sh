# Sourced by local.sh, tpu_queued.sh and gke_xpk.sh: what the three ways to launch a run share. A script
#   1. declares its flags and their defaults:  declare -A FLAG=([name]="" ...);  its header comment is its --help;
#   2. calls `parse "$@"`, which fills FLAG, ACTION, COMMAND, CREATE_FLAGS and RUN_FLAGS;
#   3. defines one function per action and calls `"$ACTION"`; whatever it does to the world goes through `call`.
# Exit codes: 0 done, 2 bad input (never started again), 143 taken away after a save, anything else a failure.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/launch/xla_flags.sh"
COMMAND=() CREATE_FLAGS=() RUN_FLAGS=() DRY_RUN="" COMMIT=""
BAD_INPUT=2 TAKEN_AWAY=143

say() { echo "==> $*" >&2; }
die() { # message: what, where, what to do
  echo "error: $*" >&2
  exit $BAD_INPUT
}

# --- flags ---------------------------------------------------------------------------------------------------------

parse() { # the arguments of the script
  FLAG[dry-run]=false
  case ${1:-} in
  -h | --help) usage; exit 0 ;;
  create | install | run | logs | delete | up) ACTION=$1 ;;
  *) die "the first argument is create, install, run, logs, delete or up, not '${1:-}'; see --help" ;;
  esac
  shift
  while [ $# -gt 0 ]; do
    local name=${1%%=*}
    name=${name#--}
    case $1 in
    -h | --help) usage; exit 0 ;;
    --) COMMAND=("${@:2}"); break ;;
    --dry-run | --keep | --with-cluster) is_flag "$name" "$1" && FLAG[$name]=true ;;
    --dry-run=* | --keep=* | --with-cluster=*) die "--$name takes no value; see --help" ;;
    --create-flag=*) is_flag zone "$1" && CREATE_FLAGS+=("${1#*=}") ;;
    --run-flag=*) is_flag zone "$1" && RUN_FLAGS+=("${1#*=}") ;;
    --*=*) is_flag "$name" "$1" && FLAG[$name]=${1#*=} ;;
    --*) is_flag "$name" "$1" && die "$1 needs a value: $1=..." ;;
    *) die "unknown argument '$1'; the command to run goes after --; see --help" ;;
    esac
    shift
  done
  if [ "${FLAG[dry-run]}" = true ]; then DRY_RUN=yes; fi
  need name "small letters, digits and dashes, at most 40, such as wan5b" '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'
  need max-restarts "a number" '^[0-9]+$'
  if [[ $ACTION == run || $ACTION == up ]]; then
    [ ${#COMMAND[@]} -gt 0 ] || die "nothing to run; put the command after --, as in -- python -m wallwm_jax.train ..."
    [[ "${COMMAND[*]}" != *$'\n'* ]] || die "the command holds a line break; give each argument in one line"
  fi
}

is_flag() { # name, argument: whether the script has this flag
  [[ $1 =~ ^[a-z-]+$ && -v FLAG[$1] ]] || die "unknown argument '$2'; the command to run goes after --; see --help"
}

need() { # flag, what it is, pattern it matches
  [ -n "${FLAG[$1]}" ] || die "--$1 is missing; give --$1=... ($2)"
  [[ ${FLAG[$1]} =~ ${3:-.} ]] || die "--$1='${FLAG[$1]}' is not possible; give $2"
}

need_program() { # program, how to get it
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null || die "$1 is not installed; $2"
}

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# --- commands ------------------------------------------------------------------------------------------------------

quoted() { # words: one line that a shell reads back as the same words
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

exec 3>&1 # what --dry-run prints is seen even where the output of a command is captured
call() { # command ...: runs it; under --dry-run prints it instead
  if [ -n "$DRY_RUN" ]; then quoted "$@" >&3; else "$@"; fi
}

# --- topologies ----------------------------------------------------------------------------------------------------

# Generation: what accelerator types are called, cores counted per chip, axes, most chips of a slice, TPU VM software.
declare -A GENERATIONS=(
  [v5e]="v5litepod 1 2 256 v2-alpha-tpuv5-lite"
  [v5p]="v5p 2 3 6144 v2-alpha-tpuv5"
  [v6e]="v6e 1 2 256 v2-alpha-tpuv6e"
  [tpu7x]="tpu7x 2 3 9216 -" # only on Kubernetes
)

read_topology() { # sets GENERATION, EXTENTS, CHIPS, PREFIX, RUNTIME and ACCELERATOR of --topology
  local cores axes most a b c topology=${FLAG[topology]}
  [[ $topology =~ ^(v5e|v5p|v6e|tpu7x):([1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?)$ ]] ||
    die "--topology='$topology' is not a slice; write generation and extents, such as v5p:4x4x8, v5e:16x16 or v6e:8x8"
  GENERATION=${BASH_REMATCH[1]} EXTENTS=${BASH_REMATCH[2]}
  read -r PREFIX cores axes most RUNTIME <<<"${GENERATIONS[$GENERATION]}"
  IFS=x read -r a b c <<<"$EXTENTS"
  [ "$axes" = $((${c:-0} ? 3 : 2)) ] || die "--topology='$topology': a $GENERATION slice has $axes extents"
  CHIPS=$((a * b * ${c:-1}))
  if [ "$axes" = 2 ]; then
    case $EXTENTS in
    1x1 | 2x2 | 2x4 | 4x4 | 4x8 | 8x8 | 8x16 | 16x16) ;;
    *) die "--topology='$topology' does not exist; $GENERATION has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16" ;;
    esac
  else
    case $EXTENTS in
    2x2x1 | 2x2x2 | 2x2x4 | 2x4x4) ;;
    *) ((a % 4 == 0 && b % 4 == 0 && c % 4 == 0 && a <= b && b <= c && CHIPS <= most)) ||
      die "--topology='$topology' does not exist; $GENERATION has 2x2x1, 2x2x2, 2x2x4, 2x4x4 and rising multiples of" \
        "four up to $most chips, such as 4x4x8" ;;
    esac
  fi
  ACCELERATOR=$PREFIX-$((CHIPS * cores))
}

require_default_shape() { # of several slices of as many chips, an accelerator type means the most compact one
  local a b chips best surface=0 cubes=$((CHIPS / 64))
  [[ $EXTENTS == *x*x* ]] && ((cubes > 0)) || return 0
  for ((a = 1; a * a * a <= cubes; a++)); do
    for ((b = a; a * b * b <= cubes; b++)); do
      ((cubes % (a * b) == 0)) || continue
      chips=$((cubes / (a * b)))
      if ((surface == 0 || a * b + (a + b) * chips < surface)); then
        surface=$((a * b + (a + b) * chips)) best=$((4 * a))x$((4 * b))x$((4 * chips))
      fi
    done
  done
  [ "$EXTENTS" = "$best" ] || die "--topology='${FLAG[topology]}': queued resources give $CHIPS chips as" \
    "$GENERATION:$best; ask for that one, or launch with gke_xpk.sh"
}

# --- the project ---------------------------------------------------------------------------------------------------

find_commit() { # sets COMMIT, what --ref names; says what of the working tree stays behind
  COMMIT=$(git -C "$ROOT" rev-parse --verify --quiet "${FLAG[ref]}^{commit}") ||
    die "--ref='${FLAG[ref]}' is not a commit of $ROOT; code is sent by git, so give a branch, tag or commit"
  if [ -n "$(git -C "$ROOT" status --porcelain)" ]; then
    say "uncommitted changes stay behind: ${COMMIT:0:12} is sent (git stash or commit to be sure)"
  fi
}

send() { # file, commit, ...: packs the commit into the file
  call mkdir -p "$(dirname "$1")"
  call git -C "$ROOT" archive --format=tar.gz --output="$1" "${@:3}" "$2"
}

# --- start again ---------------------------------------------------------------------------------------------------

use_resume() { # from now on COMMAND goes on with the run that is there
  local word kept=()
  for word in "${COMMAND[@]}"; do
    case $word in --resume | --resume=* | --overwrite | --overwrite=*) ;; *) kept+=("$word") ;; esac
  done
  COMMAND=("${kept[@]}" --resume)
}

keep_running() { # function that runs COMMAND once, and sets BEGAN when it starts: calls it until COMMAND is done
  local failures=0 code pause
  while :; do
    BEGAN="" code=0
    "$1" || code=$?
    case $code in 0 | "$BAD_INPUT") return "$code" ;; esac
    # Only failures in a row count: a run of weeks may be taken away more often than the limit.
    if [ -n "$BEGAN" ] && ((SECONDS - BEGAN >= ${FLAG[healthy-after]})); then failures=0; fi
    failures=$((failures + 1))
    if ((failures > ${FLAG[max-restarts]})); then
      say "exit code $code, and ${FLAG[max-restarts]} restarts in a row did not help; the last lines of the log say why"
      return "$code"
    fi
    pause=$((${FLAG[backoff]} * 2 ** (failures < 6 ? failures - 1 : 5)))
    say "exit code $code; restart $failures of ${FLAG[max-restarts]} in $pause s"
    sleep "$pause"
    if [ -n "$BEGAN" ]; then use_resume; fi
  done
}
