#!/usr/bin/env bash
# The one test command: ./scripts/test.sh [--quick | --all] [pytest arguments …]
#
# Sets up what is missing, then lints, checks types and runs the tests; --all adds the long suites, --quick keeps the
# pure functions, a few layouts' parity and one kill (two minutes on two cores). Without pytest arguments the parity
# suite runs beside the others, with the tests of float8 and of kernels.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
source "$root/scripts/environment.sh"
ensure_environment test
cd "$root"

selection=(-m "not slow")
case ${1:-} in
  --all) selection=() && shift ;;
  --quick) selection=(-m "quick and not slow") && shift ;;
esac
"$python" -m ruff check .
"$python" -m ruff format --check .
if (($#)); then
  "$python" -m mypy
  exec "$python" -m pytest "${selection[@]}" "$@"
fi

# Two at a time: most tests keep one core busy. What the second process has to say comes when the others are done.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
beside=(tests/parity tests/precision tests/kernels)
{
  code=0
  "$python" -m mypy || code=$?
  "$python" -m pytest "${selection[@]}" "${beside[@]}" || code=$?
  exit "$code"
} >"$said" 2>&1 &
second=$! code=0
"$python" -m pytest "${selection[@]}" "${beside[@]/#/--ignore=}" || code=$?
wait "$second" || code=$?
cat "$said"
exit "$code"
