# Sourced by the job scripts. `begin STAGE` checks recipe and run folder and opens the logs; `launch COMMAND...` then runs a
# command as the job's tasks, one rank each, and ends the job.
#
# Before the time limit Slurm sends USR1 to this script, which passes it on; training then writes a checkpoint. How the
# ranks ended is read from what they wrote down, for srun's own exit status is not reliable after a signal.
source "${CLKD_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
mkdir -p "$TMPDIR"
# A requeued job that was told to take fewer nodes still hears its old number of tasks.
if [[ -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
  most=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
  if ((${SLURM_NTASKS:-1} > most)); then export SLURM_NTASKS="$most" SLURM_NPROCS="$most"; fi
fi
RECIPE="${1:?usage: sbatch slurm/STAGE.sbatch RECIPE.yaml [section.key=value ...]}"
shift
OVERRIDES=("$@")

begin() {
  local facts
  STAGE="$1"
  facts="$(inside python -m pipeline record begin "$RECIPE" --stage "$STAGE" "${OVERRIDES[@]}")"
  eval "$facts" # RUN_DIR, RUN_LOGS, MASTER_PORT, OPERATORS
  export RUN_LOGS MASTER_PORT OPERATORS
  MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  export MASTER_ADDR
}

launch() {
  srun --kill-on-bad-exit=1 --open-mode=append --output="$RUN_LOGS/rank-%t.log" ${CLKD_SRUN:-} \
    bash "$CLKD_HOME/slurm/rank.sh" "$@" &
  local step=$! state outcome me="$SLURM_JOB_ID"
  # The bare number of an array's last task means the whole array to scontrol.
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then me="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
  trap 'echo "$(date "+%F %T") USR1: the ranks write a checkpoint and stop"; kill -USR1 "$step"' USR1
  trap : TERM # Slurm's own requeue: the ranks have it too, and this script waits for them
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  trap - TERM

  state="$(scontrol -o show job "$me" | grep -o 'JobState=[A-Z_]*' || true)"
  outcome="$(inside python -m pipeline record end "$RECIPE" --stage "$STAGE" --state "${state#JobState=}" "${OVERRIDES[@]}")"
  if [[ $outcome == requeue ]] && scontrol requeue "$me"; then sleep 300; fi # Slurm ends this script
  [[ $outcome == done ]]
}
