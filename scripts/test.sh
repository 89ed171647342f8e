#!/usr/bin/env bash
# The one test command: ./scripts/test.sh [--all] [pytest arguments …]
#
# Sets up what is missing, then lints, checks types and runs the tests; --all adds the long suites. Without pytest
# arguments the parity suite runs beside the others.
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
if (($#)); then exec "$python" -m pytest "${selection[@]}" "$@"; fi

# Two at a time: most tests keep one core busy. What the parity suite has to say comes when the others are done.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
"$python" -m pytest "${selection[@]}" tests/parity >"$said" 2>&1 &
parity=$! code=0
"$python" -m pytest "${selection[@]}" --ignore=tests/parity || code=$?
wait "$parity" || code=$?
cat "$said"
exit "$code"
