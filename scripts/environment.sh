# shellcheck shell=bash
# Sourced by the other scripts, which set $root: the environment, the machine, its processes.
#
# ensure_environment [EXTRA]   makes .venv and installs titanlite into it, when that is missing or stale; afterwards
#                              $python is the environment's, compiled, with pyproject.toml's extra of that name.
# count_gpus                   prints how many this machine has.
# find_port                    prints one that nothing listens on.
# choose_module "$@"           prints what Python module takes these words: the trainer, or titanlite if one of its
#                              commands stands first (letters and hyphens that name no file).
# wait_for PROCESS             waits through any signals for a process of the script's; returns its exit code.
#
# Stale means that pyproject.toml or the constraints changed since the last install; finding out that nothing did
# costs one checksum.

ensure_environment() {
  local extra=${1:-} want stamp
  python="$root/.venv/bin/python"
  want="$root $(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)"
  # An environment with an extra serves those who need none.
  for stamp in "$root/.venv/installed-$extra" ${extra:-"$root"/.venv/installed-*}; do
    if [[ -x $python && -f $stamp && $(<"$stamp") == "$want" ]]; then return; fi
  done
  echo "Setting up $root/.venv (once; a few minutes on a slow network) …" >&2
  if [[ -x $python ]]; then
    "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >&2 # environments that other tools made lack it
  else
    "$(find_python)" -m venv --clear "$root/.venv" || {
      echo "Could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
      exit 1
    }
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint "$root/scripts/constraints.txt" --editable "$root${extra:+[$extra]}" >&2
  # To bytecode, now and on all cores (pip uses one): where a run may write none (PYTHONDONTWRITEBYTECODE, an environment
  # that is read-only), each start would compile 2,500 modules again. What fails to compile is no module of a run.
  "$python" -m compileall -qq -j 0 "$root"/{titanlite,kernels} "$root"/.venv/lib/python3*/site-packages || true
  printf '%s' "$want" >"$root/.venv/installed-$extra"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.13 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "titanlite needs Python 3.10 or newer; set PYTHON to one." >&2
  exit 1
}

count_gpus() {
  if command -v nvidia-smi >/dev/null; then nvidia-smi --list-gpus 2>/dev/null | wc -l; else echo 0; fi
}

choose_module() {
  if [[ ${1:-} =~ ^[a-z][a-z-]*$ && ! -f $1 ]]; then echo titanlite; else echo titanlite.train; fi
}

find_port() { # below those that the system gives to outgoing connections; torchrun's static rendezvous takes no 0
  local port
  while port=$((10000 + RANDOM % 20000)) && (: <"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  echo "$port"
}

wait_for() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done # a trap ends a wait before the process has ended
  wait "$1"
}
