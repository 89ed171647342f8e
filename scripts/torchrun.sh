#!/usr/bin/env bash
# One machine's part of a run: torchrun with the settings of elastic.env. train.sh, slurm.sh and kubernetes/ end here.
# By hand, on each of several machines:
#
#   PET_NNODES=2:4 PET_RDZV_ENDPOINT=first-machine:29400 ./scripts/torchrun.sh RECIPE [--section.key=value …]
#
# With a command before the recipe (verify, check, …) it starts that in place of the trainer. Any option of torchrun can
# be given as its PET_ variable. SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a save and a stop, and at the second time for
# the end. Exit codes: see train.sh.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
source "$root/scripts/environment.sh"
ensure_environment

module=$(choose_module "$@")
# Of what does not train, a second try would end as the first did.
if [[ $module == titanlite && $1 != train ]]; then export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-0}; fi
export PET_NNODES=${PET_NNODES:-1}
if [[ ${PET_NNODES##*:} == 1 ]]; then
  # Nothing joins a run of one machine, so it needs none of the rendezvous that reads a pickle from whoever reaches its
  # port, and gloo need not listen for other machines: docs/security.md.
  export PET_RDZV_BACKEND=${PET_RDZV_BACKEND:-static} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
  if [[ ${PET_RDZV_ENDPOINT:-} != *:[1-9]* ]]; then PET_RDZV_ENDPOINT=localhost:$(find_port); fi
  export PET_RDZV_ENDPOINT PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-localhost}
elif [[ -z ${PET_RDZV_ENDPOINT:-} ]]; then
  echo "PET_NNODES is $PET_NNODES: set PET_RDZV_ENDPOINT=HOST:PORT too, one of the machines, where all meet." >&2
  exit 2
fi
while IFS= read -r line; do # what the user has set stays
  if [[ $line == [A-Z]*=* && ! -v ${line%%=*} ]]; then declare -x "$line"; fi
done <"$root/scripts/elastic.env"
gpus=$(count_gpus)
export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-$((gpus > 1 ? gpus : 1))}

# torchrun says no more than whether all of its processes ended with 0: each adds its own exit code to this file.
TITANLITE_EXIT_CODE_FILE=$(mktemp)
export TITANLITE_EXIT_CODE_FILE
trap 'rm -f "$TITANLITE_EXIT_CODE_FILE"' EXIT

# Every signal becomes SIGTERM to torchrun, which passes it on and starts nothing again. To signal the processes
# themselves would not do: one that does not train yet dies of it, and torchrun would start them all again.
stopping=0
stop() {
  stopping=1
  kill -TERM "${agent:-}" 2>/dev/null || true
}
trap stop TERM INT HUP USR1
set -m # a process group of its own: Ctrl-C reaches torchrun through this script alone
"$python" -m titanlite.agent -m "$module" "$@" &
agent=$!
if ((stopping)); then stop; fi
code=0
wait_for "$agent" || code=$?

# The first that failed is the cause; those after it were ended by torchrun, or waited for it in vain. A planned end is
# the same on all, and is one only if torchrun ended well or was told to stop. 75 of torchrun itself (titanlite.agent):
# the place where machines meet has gone, and so processes have failed (1).
if told=$(grep -m1 -vxE "0|75$( ((code != 75)) || echo '|1')" "$TITANLITE_EXIT_CODE_FILE"); then
  code=$told
elif [[ -s $TITANLITE_EXIT_CODE_FILE ]] && ((code == 0 || stopping)); then
  code=$(tail -n1 "$TITANLITE_EXIT_CODE_FILE")
fi
if [[ -f ${TITANLITE_RESULT_FILE:-} ]]; then echo "$code" >"$TITANLITE_RESULT_FILE"; fi # see slurm.sh
exit "$code"
