#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a machine with one GPU and no network:
#
#   ./scripts/gpu_check.sh [OUT_FOLDER]        (default: benchmarks/results)
#
# Uses the machine's own python3 (or $PYTHON) as it is: torch, triton, pydantic, torchdata, safetensors, xxhash, pytest.
# What is missing can be given as a folder of wheels in $WHEELS. Each part has its own time-out, so that one that fails
# does not hide the rest. Writes one JSON with the date and the card, and prints it as a table.
# On a machine without a GPU, `--small` runs the same parts on the CPU at a small size, to see that they work.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
python=${PYTHON:-python3}
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
"$python" benchmarks/gpu_check.py "$@"
