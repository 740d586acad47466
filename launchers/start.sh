# Sourced by pretrain.sh and finetune.sh: starts the deepspeed launcher on them, or is one rank of it (RANK is set).
# A task of `srun -n N`, N > 1, is a rank too; ted_ds/job/slurm.py says the rest of what a rank has to know.
#
# TED_DS_RANKS is the number of ranks on this machine (default: deepspeed's own, one a GPU), MASTER_PORT the port
# they meet at. deepspeed is taken from PATH, else from this clone's .venv.
set -euo pipefail
script="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
root="$(dirname "$(dirname "$script")")"
command -v deepspeed > /dev/null || PATH="$root/.venv/bin:$PATH"
if ! launcher="$(command -v deepspeed)"; then
  echo "deepspeed is neither on PATH nor in $root/.venv: activate the environment that has it, or run make venv" >&2
  exit 1
fi
if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  export RANK="${RANK:-$SLURM_PROCID}"
fi
if [ -n "${RANK:-}" ]; then
  exec "$(dirname "$launcher")/python3" -u "$script" "$@"
fi
exec "$launcher" ${TED_DS_RANKS:+--num_gpus "$TED_DS_RANKS"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$script" "$@"
