#!/usr/bin/env bash
# Train: ./scripts/train.sh [RECIPE] [--section.key=value …] [--resume|--fresh] [--force]
#
# RECIPE is configs/debug.toml if absent. Sets up what is missing; starts torchrun when it sees several GPUs.
# Exit codes: 0 done, 2 wrong recipe or usage, 3 stopped by a guard, 4 no usable checkpoint, 75 stopped early.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
source "$root/scripts/environment.sh"
ensure_environment

recipe=
for word in "$@"; do
  # A recipe stands first, or anywhere as a .toml: before it may be overrides and their values.
  if [[ $word != --* && ($word == "$1" || $word == *.toml) ]]; then recipe=$word; fi
done
if [[ -z $recipe ]]; then set -- "$root/configs/debug.toml" "$@"; fi

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l); fi
if ((gpus <= 1)); then exec "$python" -m titanlite.train "$@"; fi

# torchrun reports only whether all of its workers ended with 0: each adds its exit code to this file as it ends.
TITANLITE_EXIT_CODE_FILE=$(mktemp)
export TITANLITE_EXIT_CODE_FILE
trap 'rm -f "$TITANLITE_EXIT_CODE_FILE"' EXIT
set -m # a job of its own: a signal to this script is passed on once, and then waited for
"$python" -m torch.distributed.run --standalone --nproc-per-node="$gpus" -m titanlite.train "$@" &
launcher=$!
trap 'trap "" TERM INT HUP; kill -TERM "$launcher" 2>/dev/null' TERM INT HUP
code=0
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done
# The first that failed is the cause; those after it were ended by torchrun, or waited for it in vain.
if [[ -s $TITANLITE_EXIT_CODE_FILE ]]; then code=$(grep -m1 -vx 0 "$TITANLITE_EXIT_CODE_FILE") || code=0; fi
exit "$code"
