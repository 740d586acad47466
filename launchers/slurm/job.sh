# Sourced by the job scripts, which set `root` to the clone: runs a command as the ranks of a job, and goes on after an
# interruption.
#
#   ranks COMMAND ...     one task of srun is one rank; returns srun's exit code, the highest of the ranks'. On a part of
#                         the job's nodes if the array `part` says so: part=(--nodes=1 --ntasks=8)
#   go_on CODE            ends the job with CODE, or puts it back into the queue
#
# Every rank has a log of its own, runs/slurm/JOB/rank-N.log in the folder that the job was submitted from, JOB as in
# the name of the job script's own log. What a restart says is appended.

# the id of an array's last job is the whole array's name too
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-$SLURM_JOB_ID}"
part=()

# not left to the site's settings:
#   --kill-on-bad-exit=0   all ranks end with 75 after a warning, not in the same instant: the first one's end must not
#                          kill another. A rank whose neighbour is lost ends by itself (76, train.timeout_minutes).
#   --wait=3600            for what even that does not end, a task that hangs in a driver
#   --cpus-per-task        srun does not take it over from sbatch by itself
ranks() {
  local logs="runs/slurm/$job"
  mkdir -p "$logs"
  # scontrol knows every way to write a list of nodes
  MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
  export MASTER_ADDR
  command -v deepspeed > /dev/null || PATH="$root/.venv/bin:$PATH"
  local which="ranks: $SLURM_NTASKS, nodes: $SLURM_JOB_NODELIST${part:+, of them ${part[*]}}"
  echo "$(date '+%F %T') start ${SLURM_RESTART_COUNT:-0}, $which, logs: $logs"
  # RANK is set before Python runs, so that a mistake in a recipe is said once; `bash -c` is replaced by the command, so
  # that SLURM's signals reach it
  srun --mpi=none --kill-on-bad-exit=0 --wait=3600 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${part[@]}" \
    --open-mode=append --output="$logs/rank-%t.log" bash -c 'RANK="$SLURM_PROCID" exec "$@"' rank "$@"
}

# 75: a warning ended the run, its state is saved. 76: a rank was lost. Above 128: a rank died by a signal; srun gives
# that code, the highest, where the other ranks ended with 76. All else ends the job: 0, 1 (a bug, on all ranks), and 2, a
# mistake that a person has to mend, with which all ranks end. One rank's bug beside others' 76 is tried again too.
go_on() {
  local code="$1" restarts="${SLURM_RESTART_COUNT:-0}" limit="${TED_DS_RESTARTS:-20}"
  if [ "$code" -ne 75 ] && [ "$code" -ne 76 ] && [ "$code" -le 128 ]; then
    exit "$code"
  fi
  if [ "$restarts" -ge "$limit" ]; then
    echo "exit code $code after $restarts restarts, TED_DS_RESTARTS=$limit: submit it again to go on" >&2
    exit "$code"
  fi
  echo "exit code $code: back into the queue, restart $((restarts + 1)) of at most $limit"
  scontrol requeue "$job" || true
  exit "$code"
}
