#!/usr/bin/env bash
# The one test command: ./scripts/test.sh [--all] [pytest arguments …]
#
# Sets up what is missing, then lints, checks types and runs the tests; --all adds the long suites.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
source "$root/scripts/environment.sh"
ensure_environment test
cd "$root"

selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
  selection=()
  shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest "${selection[@]}" "$@"
