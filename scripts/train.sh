#!/usr/bin/env bash
# Train: ./scripts/train.sh [RECIPE] [--section.key=value …] [--resume|--fresh] [--force]
#
# RECIPE is configs/debug.toml if absent. Sets up what is missing; starts torchrun when it sees several GPUs. Before the
# recipe may stand a command, such as verify or check.
# Exit codes: 0 done, 2 wrong recipe or usage, 3 stopped by a guard, 4 no usable checkpoint, 75 stopped early.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
source "$root/scripts/environment.sh"
ensure_environment

module=$(choose_module "$@")
if [[ $module == titanlite.train ]]; then
  recipe=
  for word in "$@"; do
    # A recipe stands first, or anywhere as a .toml: before it may be overrides and their values.
    if [[ $word != --* && ($word == "$1" || $word == *.toml) ]]; then recipe=$word; fi
  done
  if [[ -z $recipe ]]; then set -- "$root/configs/debug.toml" "$@"; fi
fi

if (($(count_gpus) > 1)); then exec "$root/scripts/torchrun.sh" "$@"; fi
exec "$python" -m "$module" "$@"
