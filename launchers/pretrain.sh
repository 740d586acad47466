#!/usr/bin/env bash
""":"
# Valid bash and valid Python: bash runs the lines down to its exec, Python takes them for a docstring.
#
#   deepspeed launchers/pretrain.sh --config launchers/recipes/NAME.yaml [--section.key=value ...]
#   bash launchers/pretrain.sh ...                      the same: starts the deepspeed launcher itself
#   deepspeed --no_python launchers/pretrain.sh ...     and torchrun --nproc_per_node N launchers/pretrain.sh ...
#
# By bash alone: TED_DS_RANKS is the number of ranks on this machine (default: deepspeed's own, one a GPU),
# MASTER_PORT the port they meet at. deepspeed is taken from PATH, else from this clone's .venv.
set -euo pipefail
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
root="$(dirname "$(dirname "$script")")"
command -v deepspeed > /dev/null || PATH="$root/.venv/bin:$PATH"
if ! launcher="$(command -v deepspeed)"; then
  echo "deepspeed is neither on PATH nor in $root/.venv: run 'make -C $root venv'" >&2
  exit 1
fi
if [ -n "${RANK:-}" ]; then
  exec "$(dirname "$launcher")/python3" -u "$script" "$@"
fi
exec "$launcher" ${TED_DS_RANKS:+--num_gpus "$TED_DS_RANKS"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$script" "$@"
":"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # a clone needs no installation; DeepSpeed compiles an op at the first start and looks for ninja on PATH
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    from ted_ds.cli.pretrain import main

    sys.exit(main(sys.argv[1:]))
