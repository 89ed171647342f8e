#!/usr/bin/env bash
# Train on Slurm, on one machine or many, and again after each time limit until the run is done. In the clone's folder:
#
#   sbatch --nodes=4 --gpus-per-node=8 --exclusive --time=24:00:00 scripts/slurm.sh RECIPE [--section.key=value …]
#
# Before the limit (--signal: 300 s) the run saves its state, and the job goes back into the queue. `MIN_NODES=2 sbatch
# --no-kill …` goes on without machines that fail, with no fewer than 2. More: docs/launching.md.
# Exit codes: see train.sh.
#SBATCH --job-name=titanlite
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-} # Slurm runs a copy of this file that lies elsewhere
if [[ ! -f $root/scripts/environment.sh ]]; then
  echo "Start this script by sbatch, in the folder of a clone of titanlite." >&2
  exit 2
fi
source "$root/scripts/environment.sh"
ensure_environment # before all machines look for it at once

# Here, on the job's first machine, all meet, and its part of the run tells how the run ended.
PET_RDZV_ENDPOINT=$(hostname):$((10000 + SLURM_JOB_ID % 20000))
export PET_RDZV_ENDPOINT PET_RDZV_ID=$SLURM_JOB_ID PET_NNODES=${MIN_NODES:+$MIN_NODES:}$SLURM_JOB_NUM_NODES
TITANLITE_RESULT_FILE=$(mktemp)
export TITANLITE_RESULT_FILE
trap 'rm -f "$TITANLITE_RESULT_FILE"' EXIT

limit=0
pass_on() {
  limit=1
  kill -USR1 "${step:-}" 2>/dev/null || true
}
trap pass_on USR1
trap : TERM # scancel and preemption tell the parts themselves
# Parts that end early, or with 75, must not take the others with them.
srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0 ${MIN_NODES:+--no-kill} \
  "$root/scripts/torchrun.sh" "$@" &
step=$!
if ((limit)); then pass_on; fi
code=0
wait_for "$step" || code=$?
# srun's code is the highest: a machine that was lost on the way may hide that the others ended as they should.
if grep -qxE '0|75' "$TITANLITE_RESULT_FILE"; then code=$(<"$TITANLITE_RESULT_FILE"); fi

if ((limit)) && ((code == 75)); then
  echo "Saved before the time limit; job $SLURM_JOB_ID goes back into the queue."
  scontrol requeue "$SLURM_JOB_ID" || echo "It could not: submit it again." >&2
elif ((limit)) && ((code != 0)); then
  # With nothing saved since the start, it might go round for ever.
  echo "Exit code $code before the time limit: not queued again. If the save took too long, see --signal." >&2
fi
exit "$code"
