#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a machine with one GPU and no network, in under nine minutes:
#
#   ./scripts/gpu_check.sh [OUT_FOLDER]        (default: benchmarks/results)
#
# Uses the machine's own python3 (or $PYTHON) as it is: torch, triton, pydantic, torchdata, safetensors, xxhash, pytest,
# hypothesis. What is missing can be given as a folder of wheels in $WHEELS, compiled ones too; of several for one
# package, the one that fits this Python is taken. Each part has its own time-out, so that one that fails does not hide
# the rest, and what the deadline leaves out is said. Writes one JSON and one Markdown table with the date and the card.
# On a machine without a GPU, `--small` runs the same parts on the CPU at a small size, to see that they work.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
python=${PYTHON:-python3}
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # By name, so that pip chooses; without what they depend on, which is in the folder or on the machine.
  mapfile -t packages < <(find "$WHEELS" -maxdepth 1 -name '*.whl' -printf '%f\n' | cut -d- -f1 | sort -u)
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$WHEELS" --no-deps \
    --target "$site" "${packages[@]}"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec

needed = "torch triton numpy pydantic torchdata safetensors xxhash tensorboard rich pytest hypothesis"
print(*(name for name in needed.split() if find_spec(name) is None))
PYTHON
)
[[ -z $missing ]] || echo "not installed here, so some parts may fail: $missing (see \$WHEELS in this script)" >&2
"$python" benchmarks/gpu_check.py "$@"
