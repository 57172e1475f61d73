# Sourced by the launch scripts: makes .venv once, installs the package with the named extras, finds a way to render.
# Usage after `cd` to the project's root:  source launch/environment.sh; ensure_environment sim,dev; ensure_rendering

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

ensure_environment() { # extras
  "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || {
    echo "error: Python 3.11 or 3.12 is needed (others lack packages of the simulator); set PYTHON=/path/to/it" >&2
    return 2
  }
  local wanted stamp="$VENV/.installed-${1//,/-}" version='import sys; print(sys.version_info[:2])'
  wanted=$(cat setup.py pyproject.toml | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "==> installing wallwm_jax[$1] into $VENV (once)"
    [ "$("$VENV/bin/python" -c "$version" 2>/dev/null)" = "$("$PYTHON" -c "$version")" ] ||
      "$PYTHON" -m venv --clear "$VENV" || return 2
    "$VENV/bin/python" -m pip install --quiet --upgrade pip 2>"$VENV/pip.log" &&
      "$VENV/bin/python" -m pip install --quiet -e ".[$1]" 2>>"$VENV/pip.log" || {
      tail -n 20 "$VENV/pip.log" >&2
      echo "error: the installation failed; the whole log is $VENV/pip.log" >&2
      return 2
    }
    echo "$wanted" >"$stamp"
  fi
  PATH="$(cd "$VENV" && pwd)/bin:$PATH"
  export PATH
  # Huge pages for large buffers: the CPU train step spends much of its time on page faults without them (glibc 2.35+).
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}

ensure_rendering() { # picks EGL, else OSMesa; names the command that installs one
  MUJOCO_GL=$(python -m wallwm_jax.sources.simulator.rendering) || return 2
  export MUJOCO_GL LP_NUM_THREADS=1
}
